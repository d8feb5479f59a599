// Attention backward by warpgroups of sm_90a, deterministic: no races, every sum in a fixed order.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, the other way around: a block of threads keeps up to
// `128 M_TILES` queries of a head and walks over the keys by 64, as soon as others have what it needs.
//   walking groups, two, of 64 M_TILES queries each: s = q k^T, p = 2^(s scale log2 e + bias - lse), dp = do v^T,
//            ds = p * (dp - rowsum(do * o)), dq += ds k with ds as it comes out of the matrix unit; dq stays in registers
//   value group  dv = p^T do of 64 keys, with p from shared memory; requests do and o, and makes rowsum(do * o)
//   key group    dk = ds^T q, with ds from shared memory; requests queries, keys and values
// The copy engine brings and stores boxes of 64 rows. Blocks of threads stay for several heads: queries of the next arrive
// while this one is at work, and no group waits for another but where it needs its results.
//
// With at most `128 M_TILES` queries (256 tokens of an image) all gradients are final. With up to CLUSTER times as many, so they
// are by a cluster: each of its blocks has a share of the queries, and they walk over the same keys one behind the other. dk
// and dv of 64 keys go on from block to block, each of which begins with the sums of those before it. With more, a block of
// threads visits its share one after the other and adds to dk and dv in f32 in memory, where each address belongs to one
// thread; shares of several blocks are added by attention_reduce_rows.
//
// attention_backward_wgmma(Arguments, Maps): reads all but the gradients; writes query_gradient, key_gradient, value_gradient
// (with several visits by way of `partial`, `[keys and values, parts, B, H, M, D]`) and, where not null, bias_partial.
//   grid   as many blocks as run at once, whole clusters of them, at most parts heads batch; of clusters, parts is CLUSTER
//   block  512 threads
//   shared 512 D QUERY_STAGES + 1152 D + 32768 + 1024 QUERY_STAGES + 1024 + 256 bytes, and in clusters 512 D more
// Macros beside those of common.cuh: M_TILES (1 or 2), QUERY_STAGES (of 128 queries, at least M_TILES), CLUSTER (blocks, 1 to 8),
// ONE_VISIT (1 where one visit of a block or of each block of a cluster is all of a head; always in clusters).

/// Of all rows.
struct Maps {
    RowMaps query, key, value, output, output_gradient, query_gradient, key_gradient, value_gradient;
};

constexpr int WALKING_GROUPS = 2, VALUE_GROUP = 2, KEY_GROUP = 3, THREADS = 4 * GROUP_THREADS;
constexpr int KEY_BLOCK = BOX_ROWS, KEY_STAGES = 2, KEY_TILES = KEY_BLOCK / 8;
constexpr int STAGE_ROWS = BOX_ROWS * WALKING_GROUPS;
constexpr int QUERY_ROWS = STAGE_ROWS * M_TILES;
static_assert(CLUSTER == 1 || ONE_VISIT, "sums go on through a cluster, or are added in memory");
constexpr int SLOTS = WALKING_GROUPS;  // of p with ds, one for each walking group
// Registers of a thread. Heads beyond a panel take walking groups more: their products by single chunks.
constexpr bool PANEL_ALONE = HEAD_DIM <= 64;
constexpr int WALKING_REGISTERS = PANEL_ALONE ? 168 : 184, OTHER_REGISTERS = PANEL_ALONE ? 88 : 72;
typedef PanelLayout<STAGE_ROWS> QueryLayout;
typedef BoxLayout KeyLayout;
typedef float Scores[KEY_TILES][4];

// Shared memory: stages of queries with do, stages of keys with values, o of a stage or dv on its way out, slots of p with ds,
// dq and dk on their way out, statistics, zeros, barriers.
constexpr int QUERY_STAGE_BYTES = 2 * QueryLayout::BYTES;
constexpr int PANEL_BYTES = 64 * 128, SLOT_BYTES = 2 * PANEL_BYTES;
constexpr int KEYS_OFFSET = QUERY_STAGES * QUERY_STAGE_BYTES;
constexpr int OUTPUT_OFFSET = KEYS_OFFSET + KEY_STAGES * KEY_STAGE_BYTES;
constexpr int SLOTS_OFFSET = OUTPUT_OFFSET + QueryLayout::BYTES;
constexpr int STAGED_OFFSET = SLOTS_OFFSET + SLOTS * SLOT_BYTES;
constexpr int STATISTICS_OFFSET = STAGED_OFFSET + (WALKING_GROUPS + 1) * KeyLayout::BYTES;
constexpr int ZEROS_OFFSET = STATISTICS_OFFSET + QUERY_STAGES * STAGE_ROWS * 8;
// Sums of dv and dk from the block before, as the threads of their group hold them.
constexpr int SUMS_OFFSET = ZEROS_OFFSET + 64 * 16, SUMS_BYTES = CHUNKS * GROUP_THREADS * 16;
constexpr int BARRIERS_OFFSET = SUMS_OFFSET + (CLUSTER > 1 ? 2 * SUMS_BYTES : 0);
static_assert(KeyLayout::BYTES <= SLOT_BYTES, "a slot holds 64 rows on their way out");

__device__ __forceinline__ u32 query_tile(u32 shared, int stage) { return shared + stage * QUERY_STAGE_BYTES; }
__device__ __forceinline__ u32 upstream_tile(u32 shared, int stage) {
    return query_tile(shared, stage) + QueryLayout::BYTES;
}
/// Of a group's rows on their way out. The second 64 queries of a walking group go by way of its slot.
__device__ __forceinline__ u32 staged_tile(u32 shared, int group, int m = 0) {
    if (m > 0) return shared + SLOTS_OFFSET + group * SLOT_BYTES;
    if (group == VALUE_GROUP) return shared + OUTPUT_OFFSET;
    return shared + STAGED_OFFSET + min(group, WALKING_GROUPS) * KeyLayout::BYTES;
}
/// `what` is 0 for p, 1 for ds.
__device__ __forceinline__ u32 panel(u32 shared, int slot, int what) {
    return shared + SLOTS_OFFSET + (2 * slot + what) * PANEL_BYTES;
}
__device__ __forceinline__ u32 statistics(u32 shared, int stage) {
    return shared + STATISTICS_OFFSET + stage * STAGE_ROWS * 8;
}

// Barriers: do with o that arrived, queries with do and statistics, keys with values; keys that no walking group needs any more;
// p and ds written and taken; in clusters, sums of the block before that arrived, and own ones that the next block has taken.
__device__ __forceinline__ u32 upstream_arrived(u32 shared) { return barrier(shared + BARRIERS_OFFSET, 0); }
__device__ __forceinline__ u32 queries_arrived(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, 1 + stage);
}
__device__ __forceinline__ u32 keys_arrived(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, 1 + QUERY_STAGES + stage);
}
__device__ __forceinline__ u32 keys_left(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, 1 + QUERY_STAGES + KEY_STAGES + stage);
}
__device__ __forceinline__ u32 written(u32 shared, int slot, int what) {
    return barrier(shared + BARRIERS_OFFSET, 1 + QUERY_STAGES + 2 * KEY_STAGES + 2 * slot + what);
}
__device__ __forceinline__ u32 taken(u32 shared, int slot, int what) { return written(shared, slot + SLOTS, what); }
template <bool keys> __device__ __forceinline__ u32 sums_arrived(u32 shared) {
    return barrier(shared + BARRIERS_OFFSET, 1 + QUERY_STAGES + 2 * KEY_STAGES + 4 * SLOTS + keys);
}
template <bool keys> __device__ __forceinline__ u32 sums_taken(u32 shared) { return sums_arrived<keys>(shared) + 16; }

__device__ __forceinline__ void make_barriers(u32 shared) {
    make_barrier(upstream_arrived(shared), 1);
    // The key group's request, and the warps of the value group when they have made statistics.
    for (int stage = 0; stage < QUERY_STAGES; stage++) make_barrier(queries_arrived(shared, stage), 1 + GROUP_WARPS);
    for (int stage = 0; stage < KEY_STAGES; stage++) {
        make_barrier(keys_arrived(shared, stage), 1);
        make_barrier(keys_left(shared, stage), WALKING_GROUPS * GROUP_WARPS);
    }
    for (int slot = 0; slot < SLOTS; slot++)
        for (int what = 0; what < 2; what++) {
            make_barrier(written(shared, slot, what), GROUP_WARPS);
            make_barrier(taken(shared, slot, what), GROUP_WARPS);
        }
    if (CLUSTER > 1) {
        make_barrier(sums_arrived<false>(shared), 1);
        make_barrier(sums_arrived<true>(shared), 1);
        make_barrier(sums_taken<false>(shared), GROUP_WARPS);
        make_barrier(sums_taken<true>(shared), GROUP_WARPS);
        publish_barriers();
    }
}

/// What a block of threads works on at a time: a block of queries of a part of a head's. Found anew where it is needed, for the
/// sake of registers.
struct Visit {
    int work = blockIdx.x, block = 0;  // of all parts of heads; of the part

    __device__ __forceinline__ bool valid(const Arguments &a) const { return work < a.parts * a.heads * a.batch; }
    __device__ __forceinline__ int part(const Arguments &a) const { return work % a.parts; }
    __device__ __forceinline__ int h(const Arguments &a) const { return work / a.parts % a.heads; }
    __device__ __forceinline__ int b(const Arguments &a) const { return work / a.parts / a.heads; }

    __device__ __forceinline__ static int share(const Arguments &a) {
        if (ONE_VISIT) return 1;
        return ((a.queries + QUERY_ROWS - 1) / QUERY_ROWS + a.parts - 1) / a.parts;
    }
    __device__ __forceinline__ int first_query(const Arguments &a) const {
        return (part(a) * share(a) + block) * QUERY_ROWS;
    }
    __device__ __forceinline__ bool is_last(const Arguments &a) const {
        return ONE_VISIT || block + 1 == share(a) || first_query(a) + QUERY_ROWS >= a.queries;
    }
    __device__ __forceinline__ void next(const Arguments &a) {
        if (is_last(a)) work += gridDim.x, block = 0;
        else block++;
    }
};

// The walking groups.

/// Bits for the keys of a thread's scores `[n][i]`, `2 n + i % 2`.
__device__ __forceinline__ u32 visible_keys(const Arguments &a, int b, int first_key) {
    if (a.mask == nullptr && first_key + KEY_BLOCK <= a.keys) return ~0u;
    u32 visible = 0;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            visible |= u32(key_visible(a, b, first_key + n * 8 + threadIdx.x % 4 * 2 + j)) << (2 * n + j);
    return visible;
}

/// Scores become `p`. Where the key is hidden it is zero: past the end of the keys the exponential may be infinite.
__device__ __forceinline__ void make_probabilities(
    Scores &s, const Arguments &a, int b, int h, int row, int first_key, const float (&log_sum)[2]) {
    const float log2_scale = a.scale * LOG2_E;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first_key + n * 8 + threadIdx.x % 4 * 2 + i % 2;
            if (HAS_BIAS) s[n][i] = s[n][i] * log2_scale + bias_at(a, b, h, row + i / 2 * 8, key);
            s[n][i] = exp2_of(s[n][i] * (HAS_BIAS ? 1.0f : log2_scale) - log_sum[i / 2]);
        }
    const u32 visible = visible_keys(a, b, first_key);
    if (visible == ~0u) return;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (!(visible >> (2 * n + i % 2) & 1)) s[n][i] = 0.0f;
}

__device__ __forceinline__ void store_bias_gradient(
    const Scores &ds, const Arguments &a, int b, int h, int row, int first_key) {
    float *head = a.bias_partial + head_index(a, b, h) * a.keys;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first_key + n * 8 + threadIdx.x % 4 * 2 + i % 2, query = row + i / 2 * 8;
            if (key < a.keys && query < a.queries) head[i64(query) * a.keys + key] = ds[n][i];
        }
}

/// Columns `16 k..+16` of a warp's 16 rows, as left factors.
__device__ __forceinline__ void pack(u32 (&left)[1][4], const Scores &c, int k) {
    pack_left(left, reinterpret_cast<const float (&)[1][KEY_TILES][4]>(c), k);
}

/// The same to a panel, for left factors whose columns lead.
__device__ __forceinline__ void store_left(const u32 (&left)[1][4], u32 panel, int k) {
    const int lane = threadIdx.x % 32, row = warp_row() + lane % 16;
    store_matrices(panel + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16, left[0]);
}

struct Walk {
    int group, b, h, first_query;
};

/// 64 queries by 64 keys: p and ds to their slot, and `dq (+)= ds k`, still under way at the end.
/// `before` is called when the products of earlier walks have ended.
template <class Before>
__device__ __forceinline__ void walk(
    float (&dq)[CHUNKS][4], const Arguments &a, const Walk &at, u32 shared, int m, int query_stage, int key_stage,
    int first_key, int round, Before before) {
    const u32 queries = query_tile(shared, query_stage), upstream = upstream_tile(shared, query_stage);
    const u32 keys = key_tile(shared + KEYS_OFFSET, key_stage), values = value_tile(shared + KEYS_OFFSET, key_stage);
    const u32 zeros = shared + ZEROS_OFFSET;
    const int stage_row = at.group * 64 + own_row(), row = at.first_query + m * STAGE_ROWS + stage_row;
    Scores s, dp;
    begin_products();
    multiply_rows<QueryLayout, KeyLayout>(s, queries, at.group * 64, keys, zeros);
    commit_products();
    wait_products<1>();
    hold(dq);
    before();
    begin_products();
    multiply_rows<QueryLayout, KeyLayout>(dp, upstream, at.group * 64, values, zeros);
    commit_products();
    float log_sum[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
                     : "=f"(log_sum[i]), "=f"(delta[i])
                     : "r"(statistics(shared, query_stage) + (stage_row + i * 8) * 8)
                     : "memory");
    wait_products<1>();
    hold(s);
    make_probabilities(s, a, at.b, at.h, row, first_key, log_sum);
    __syncwarp();  // lanes hide keys of their own
    wait_barrier(taken(shared, at.group, 0), round - 1);
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++) {
        u32 left[1][4];
        pack(left, s, k);
        store_left(left, panel(shared, at.group, 0), k);
    }
    publish();
    arrive_as_warp(written(shared, at.group, 0));
    wait_products<0>();
    hold(dp);
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dp[n][i] = s[n][i] * (dp[n][i] - delta[i / 2]);
    if constexpr (HAS_BIAS)
        if (a.bias_partial != nullptr) {
            store_bias_gradient(dp, a, at.b, at.h, row, first_key);
            __syncwarp();  // past the end, some lanes store nothing
        }
    wait_barrier(taken(shared, at.group, 1), round - 1);
    u32 left[KEY_TILES / 2][1][4];
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++) {
        pack(left[k], dp, k);
        store_left(left[k], panel(shared, at.group, 1), k);
    }
    publish();
    arrive_as_warp(written(shared, at.group, 1));
    begin_products();
    multiply_columns<KeyLayout>(dq, left, keys, first_key > 0);
    commit_products();
}

__device__ __forceinline__ void walk_all(const Arguments &a, const Maps &maps, u32 shared, int group) {
    Ring<KEY_STAGES> keys;
    Ring<QUERY_STAGES> queries;
    int round = 0;
    const int blocks = key_blocks(a);
    for (Visit visit; visit.valid(a); visit.next(a)) {
        const Walk at = {group, visit.b(a), visit.h(a), visit.first_query(a)};
        float dq[M_TILES][CHUNKS][4];
        Ring<QUERY_STAGES> after = queries;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            wait_barrier(keys_arrived(shared, keys.stage), keys.round);
            after = queries;
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                if (block == 0) wait_barrier(queries_arrived(shared, after.stage), after.round);
                walk(dq[m], a, at, shared, m, after.stage, keys.stage, block * KEY_BLOCK, round++, [&] {
                    if (m > 0) return;
                    if (block > 0) arrive_as_warp(keys_left(shared, (keys.stage + 1) % KEY_STAGES));
                    else meet_with_boxes_left(group);  // dq of the visit before, by way of the slot and another tile
                });
                after.next();
            }
            if (block + 1 < blocks) keys.next();
        }
        queries = after;
        wait_products<0>();
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            hold(dq[m]);
            if (a.query_gradient.data == nullptr) continue;
            for (int what = 0; what < 2 && m > 0; what++) wait_barrier(taken(shared, group, what), round - 1);
            const float factor[2] = {a.scale, a.scale};
            store_results(
                dq[m], factor, staged_tile(shared, group, m), group, maps.query_gradient, at.b, at.h,
                at.first_query + m * STAGE_ROWS + group * 64);
        }
        arrive_as_warp(keys_left(shared, keys.stage));
        keys.next();
    }
}

// The groups of keys and values.

/// `c (+)= left^T rows`: `left` a panel of 64 rows, `rows` 64 rows of a tile from `row` on.
template <class LAYOUT>
__device__ __forceinline__ void multiply_transposed(float (&c)[CHUNKS][4], u32 left, u32 tile, int row, bool add) {
    const Operand a = panel_operand(left), panels = panel_operand(tile + row * 128);
    const Operand rest = chunk_operand(tile + PANELS * LAYOUT::PANEL_BYTES + row * 16, 128, LAYOUT::CHUNK_BYTES);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            Product<8>::shared<1, 1>(
                part<8>(c, 8 * panel), a.at(k * 2048), panels.at(panel * LAYOUT::PANEL_BYTES + k * 2048), add || k > 0);
        if constexpr (REST > 0)
            Product<REST_TILES>::template shared<1, 1>(
                part<REST_TILES>(c, CHUNKS - REST_TILES), a.at(k * 2048), rest.at(k * 256), add || k > 0);
    }
}

/// What one thread of each group requests ahead of the work on it: of the key group queries, keys and values, of the other do
/// with o.
template <bool keys> struct Ahead {
    u32 shared;
    Visit of_queries, of_keys;
    int m = 0, block = 0;
    Ring<QUERY_STAGES> query_ring;
    Ring<KEY_STAGES> key_ring;
    // The value group's: a stage whose statistics are not there yet, and this thread's log-sum.
    int pending = -1, requests = 0;
    float log_sum;

    __device__ __forceinline__ explicit Ahead(u32 shared) : shared(shared) {}

    __device__ __forceinline__ static int thread() { return threadIdx.x % GROUP_THREADS; }

    /// The next 128 queries, if there are more. Their stage must be free.
    __device__ __forceinline__ void request_queries(const Arguments &a, const Maps &maps) {
        finish_queries();
        if (!of_queries.valid(a)) return;
        const int stage = query_ring.stage, b = of_queries.b(a), h = of_queries.h(a);
        const int first = of_queries.first_query(a) + m * STAGE_ROWS;
        if (thread() == 0) {
            const u32 arrived = keys ? queries_arrived(shared, stage) : upstream_arrived(shared);
            const u32 tile = keys ? query_tile(shared, stage) : upstream_tile(shared, stage);
            const RowMaps &rows = keys ? maps.query : maps.output_gradient;
            if (!keys) wait_boxes_left();  // dv, from where o goes
            expect_bytes(arrived, keys ? QueryLayout::BYTES : 2 * QueryLayout::BYTES);
            for (int row = 0; row < STAGE_ROWS; row += BOX_ROWS) {
                copy_rows_of<QueryLayout>(tile, row, rows, b, h, first + row, arrived);
                if (!keys) copy_rows_of<QueryLayout>(shared + OUTPUT_OFFSET, row, maps.output, b, h, first + row, arrived);
            }
        }
        if (!keys) {
            pending = stage;
            log_sum = INFINITY_F32;  // past the end, it makes p zero
            if (first + thread() < a.queries) log_sum = a.log_sums[head_index(a, b, h) + first + thread()];
        }
        __syncwarp();  // one thread alone asked for boxes
        query_ring.next();
        if (++m < M_TILES) return;
        m = 0;
        of_queries.next(a);
    }

    /// Log-sums to the base 2 and `rowsum(do * o)` of the stage that was requested last, a row for each thread.
    __device__ __forceinline__ void finish_queries() {
        if (pending < 0) return;
        wait_barrier(upstream_arrived(shared), requests++);
        const u32 upstream = upstream_tile(shared, pending), output = shared + OUTPUT_OFFSET;
        float delta = 0.0f;
#pragma unroll 3
        for (int chunk = 0; chunk < CHUNKS; chunk++)
            delta += dot_of_chunk(upstream + QueryLayout::at(thread(), chunk), output + QueryLayout::at(thread(), chunk));
        asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(statistics(shared, pending) + thread() * 8),
                     "f"(log_sum * LOG2_E), "f"(delta)
                     : "memory");
        arrive_as_warp(queries_arrived(shared, pending));
        pending = -1;
        meet_group(VALUE_GROUP);  // o may be copied over
    }

    /// The next 64 keys and values, as soon as the walking groups leave their stage.
    __device__ __forceinline__ void request_keys(const Arguments &a, const Maps &maps) {
        if (!keys || !of_keys.valid(a)) return;
        const int stage = key_ring.stage, b = of_keys.b(a), h = of_keys.h(a);
        if (thread() == 0) {
            const u32 arrived = keys_arrived(shared, stage);
            wait_barrier(keys_left(shared, stage), key_ring.round - 1);
            expect_bytes(arrived, KEY_STAGE_BYTES);
            copy_rows_of<KeyLayout>(key_tile(shared + KEYS_OFFSET, stage), 0, maps.key, b, h, block * KEY_BLOCK, arrived);
            copy_rows_of<KeyLayout>(value_tile(shared + KEYS_OFFSET, stage), 0, maps.value, b, h, block * KEY_BLOCK, arrived);
        }
        __syncwarp();
        key_ring.next();
        if (++block < key_blocks(a)) return;
        block = 0;
        of_keys.next(a);
    }
};

/// dk or dv of 64 keys over 128 queries, added. do is read until ds is made: its stage must not be free before.
template <bool keys>
__device__ __forceinline__ void add_products(
    float (&c)[CHUNKS][4], u32 shared, int round, int stage, bool add) {
    const u32 tile = keys ? query_tile(shared, stage) : upstream_tile(shared, stage);
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        wait_barrier(written(shared, slot, keys), round);
        begin_products();
        multiply_transposed<QueryLayout>(c, panel(shared, slot, keys), tile, slot * 64, add || slot > 0);
        commit_products();
        if (!keys) wait_barrier(written(shared, slot, 1), round);
        wait_products<0>();
        hold(c);
        arrive_as_warp(taken(shared, slot, keys));
    }
}

/// Sums of the blocks of threads before this one of the cluster; `step` numbers the blocks of keys of all visits.
template <bool keys>
__device__ __forceinline__ void take_sums(float (&c)[CHUNKS][4], u32 shared, int rank, int step) {
    const int thread = threadIdx.x % GROUP_THREADS;
    const u32 arrived = sums_arrived<keys>(shared), place = shared + SUMS_OFFSET + keys * SUMS_BYTES + thread * 16;
    if (thread == 0 && step == 0) expect_bytes(arrived, SUMS_BYTES);
    __syncwarp();
    wait_cluster_barrier(arrived, step);
#pragma unroll
    for (int n = 0; n < CHUNKS; n++)
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(c[n][0]), "=f"(c[n][1]), "=f"(c[n][2]), "=f"(c[n][3])
                     : "r"(place + n * GROUP_THREADS * 16)
                     : "memory");
    if (thread == 0) expect_bytes(arrived, SUMS_BYTES);
    __syncwarp();
    if (thread % 32 == 0) arrive_in_order_at(sums_taken<keys>(shared), rank - 1);
    __syncwarp();
}

/// The way on, to the next block of threads.
template <bool keys>
__device__ __forceinline__ void send_sums(const float (&c)[CHUNKS][4], u32 shared, int rank, int step) {
    wait_cluster_barrier(sums_taken<keys>(shared), step - 1);
    const u32 place = shared + SUMS_OFFSET + keys * SUMS_BYTES + threadIdx.x % GROUP_THREADS * 16;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) send_to(place + n * GROUP_THREADS * 16, c[n], sums_arrived<keys>(shared), rank + 1);
}

/// dk or dv of 64 keys, to memory.
template <bool keys>
__device__ __forceinline__ void finish_keys(
    const float (&c)[CHUNKS][4], const Arguments &a, const Maps &maps, const Visit &at, u32 shared, int block) {
    const Rows &gradient = keys ? a.key_gradient : a.value_gradient;
    const float scale = keys ? a.scale : 1.0f;
    if (gradient.data == nullptr) return;
    if (ONE_VISIT || (at.block == 0 && at.is_last(a) && a.parts == 1)) {
        const RowMaps &rows = keys ? maps.key_gradient : maps.value_gradient;
        const int group = keys ? KEY_GROUP : VALUE_GROUP;
        meet_with_boxes_left(group);
        const float factor[2] = {scale, scale};
        store_results(
            c, factor, staged_tile(shared, group), group, rows, at.b(a), at.h(a), block * KEY_BLOCK);
        return;
    }
    const i64 head = ((i64(keys ? 0 : a.parts) + at.part(a)) * a.batch + at.b(a)) * a.heads + at.h(a);
    const Target to = {
        head_of(gradient, at.b(a), at.h(a)), u32(gradient.token), a.partial + head * a.keys * HEAD_DIM, a.keys, scale,
        at.block == 0, at.is_last(a) && a.parts == 1};
    finish_rows<CHUNKS>(c, to, block * KEY_BLOCK + warp_row(), 0);
    __syncwarp();  // past the end, some lanes store nothing
}

// With a stage to spare, the queries for the last one that a visit frees may come later: not all copies at once.
constexpr int LATE_STAGES = QUERY_STAGES > M_TILES ? 1 : 0;

template <bool keys> __device__ __forceinline__ void sum_all(const Arguments &a, const Maps &maps, u32 shared) {
    Ahead<keys> ahead(shared);
    Visit at;
    Ring<QUERY_STAGES> queries;
    const int blocks = key_blocks(a);
    for (int n = 0; n < KEY_STAGES; n++) ahead.request_keys(a, maps);
    const int rank = CLUSTER > 1 ? rank_in_cluster() : 0;
    int round = 0, block = 0, query_requests = QUERY_STAGES, step = 0;
    bool first_visit = true;
#pragma unroll 1
    while (true) {
#pragma unroll 1
        for (int n = 0; n < query_requests; n++) ahead.request_queries(a, maps);
        if (!at.valid(a)) break;
        float c[CHUNKS][4];
        Ring<QUERY_STAGES> after = queries;
#pragma unroll 1
        for (int m = 0; m < M_TILES; m++) {
            if (m == 0 && (block > 0 || !first_visit)) ahead.request_keys(a, maps);
            if (ahead.pending == after.stage) ahead.finish_queries();
            if (block == 0) wait_barrier(queries_arrived(shared, after.stage), after.round);
            if (m == 0 && rank > 0) {
                ahead.finish_queries();  // nobody here should wait for the other block longer than this group
                take_sums<keys>(c, shared, rank, step);
            }
            add_products<keys>(c, shared, round++, after.stage, m > 0 || rank > 0);
            after.next();
        }
        ahead.finish_queries();  // dv goes where o is
        if (rank + 1 < CLUSTER) send_sums<keys>(c, shared, rank, step);
        else finish_keys<keys>(c, a, maps, at, shared, block);
        step++;
        query_requests = block == 0 && !first_visit ? LATE_STAGES : 0;
        if (++block < blocks) continue;
        meet_group(keys ? KEY_GROUP : VALUE_GROUP);  // all its products have read what may be copied over now
        query_requests += M_TILES - LATE_STAGES;
        block = 0;
        first_visit = false;
        at.next(a);
        queries = after;
    }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && CLUSTER > 1
#define CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERS
#endif

extern "C" __global__ void CLUSTERS __launch_bounds__(THREADS, 1)
    attention_backward_wgmma(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere an empty kernel that nobody starts
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int group = warp_index() / 4;
    clear_zeros<64>(shared + ZEROS_OFFSET);
    if (threadIdx.x == 0) make_barriers(shared);
    publish();
    __syncthreads();
    if (CLUSTER > 1) meet_cluster();
    if (group < WALKING_GROUPS) {
        take_registers<WALKING_REGISTERS>();
        walk_all(a, maps, shared, group);
    } else {
        give_registers<OTHER_REGISTERS>();
        if (group == KEY_GROUP) sum_all<true>(a, maps, shared);
        else sum_all<false>(a, maps, shared);
    }
    wait_boxes_left();  // shared memory goes with the last thread
    if (CLUSTER > 1) {
        // No block ends while another may write to it.
        __syncwarp();
        meet_cluster();
    }
#endif
}
