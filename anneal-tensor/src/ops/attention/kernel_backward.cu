// Attention backward on tensor cores, deterministic: no atomics, every sum in a fixed order.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, with scores transposed: a block of threads keeps
// `16 M_TILES WARPS` keys and walks over the queries by `QUERY_BLOCK`. A warp owns rows of keys, so
// `p^T` and `ds^T` leave the matrix unit as left factors of `dv += p^T do` and `dk += ds^T q`
// and the sums stay in registers. `dq = ds k` runs over all keys of the block: `ds^T` goes through
// shared memory, and warps take rows of queries instead.
//
//   s^T = k q^T          p^T = 2^(s^T scale log2 e + bias - lse)
//   dp^T = v do^T        ds^T = p^T * (dp^T - rowsum(do * o))
//
// With at most `16 M_TILES WARPS` keys (256 tokens of an image) one pass makes all gradients. With
// more, a block of threads goes over its share of the keys and adds to `dq` in f32 in memory, which
// each thread reads back as it wrote it; shares of several blocks are added by attention_reduce_queries.
//
// attention_backward(Arguments): reads all but the gradients; writes query_gradient (one part) or
// query_partial[part] (several; also scratch of one part with several blocks of keys), key_gradient,
// value_gradient and, where not null, bias_partial. Every element of them is written.
//   grid   (parts, heads, batch); parts at most ceil(keys / (16 M_TILES WARPS))
//   block  32 WARPS threads
//   shared see SHARED_BYTES
// Macros beside those of kernel_common: WARPS (4 or 8), M_TILES (of 16 keys a warp), QUERY_BLOCK (32
// or 64), SUB_QUERIES (16 or 32: those of one walk through scores), DS_BUFFERS (2: `dq` of a block
// of queries overlaps with the next block's scores; 1: it does not, for less shared memory),
// MIN_BLOCKS. Rows of heads must be 16-byte aligned. Not done: dropout, causal masks.

constexpr int THREADS = 32 * WARPS;
constexpr int WARP_KEYS = 16 * M_TILES;
constexpr int KEY_ROWS = WARP_KEYS * WARPS;
constexpr int SUB_TILES = SUB_QUERIES / 8;
constexpr int ROW_PASSES = QUERY_BLOCK / (THREADS / LANES_PER_ROW);  // rows of queries a thread copies
constexpr int KEY_BYTES = KEY_ROWS * ROW_BYTES;
constexpr int QUERY_BYTES = QUERY_BLOCK * ROW_BYTES;
constexpr int DS_ROW_BYTES = QUERY_BLOCK * 2 + 16;  // `ds^T`: a row for each key
constexpr int DS_BYTES = KEY_ROWS * DS_ROW_BYTES;
constexpr int STATISTICS_BYTES = QUERY_BLOCK * 8;

// Shared memory: keys, values, queries twice, do twice, o, ds^T, statistics twice.
constexpr int QUERY_OFFSET = 2 * KEY_BYTES;
constexpr int UPSTREAM_OFFSET = QUERY_OFFSET + 2 * QUERY_BYTES;
constexpr int OUTPUT_OFFSET = UPSTREAM_OFFSET + 2 * QUERY_BYTES;
constexpr int DS_OFFSET = OUTPUT_OFFSET + QUERY_BYTES;
constexpr int STATISTICS_OFFSET = DS_OFFSET + DS_BUFFERS * DS_BYTES;
constexpr int SHARED_BYTES = STATISTICS_OFFSET + 2 * STATISTICS_BYTES;

// Work on `dq`: 16 rows of queries and a share of the columns for each warp.
constexpr int ROW_GROUPS = QUERY_BLOCK / 16;
constexpr int COLUMN_GROUPS = WARPS / ROW_GROUPS;
constexpr int COLUMN_TILES = (CHUNKS + COLUMN_GROUPS - 1) / COLUMN_GROUPS;
static_assert(ROW_PASSES * THREADS == QUERY_BLOCK * LANES_PER_ROW, "each thread copies whole passes");
static_assert(COLUMN_GROUPS * ROW_GROUPS == WARPS, "warps share dq evenly");

struct Place {
    int b, h, warp, lane;
    u32 shared;
    int first_key;
    bool first_visit, last_visit;  // of this block of threads, over its blocks of keys
    u32 visible;                   // bit `2 m + i`: key `16 m + 8 i + lane / 4` of the warp
    bool all_visible;              // for the whole block
};

struct KeyGradients {
    float key[M_TILES][CHUNKS][4], value[M_TILES][CHUNKS][4];
};

__device__ __forceinline__ u32 query_tile(const Place& at, int block) { return at.shared + QUERY_OFFSET + block % 2 * QUERY_BYTES; }
__device__ __forceinline__ u32 upstream_tile(const Place& at, int block) { return at.shared + UPSTREAM_OFFSET + block % 2 * QUERY_BYTES; }
__device__ __forceinline__ u32 ds_tile(const Place& at, int block) { return at.shared + DS_OFFSET + block % DS_BUFFERS * DS_BYTES; }
__device__ __forceinline__ u32 statistics(const Place& at, int block) { return at.shared + STATISTICS_OFFSET + block % 2 * STATISTICS_BYTES; }

/// Log-sums of the rows that this thread copies; plus infinity past the end makes `p` zero there.
struct LogSums {
    float of[ROW_PASSES];
};

__device__ __forceinline__ void start_queries(const Arguments& a, const Place& at, int block, LogSums& log_sums) {
    const int first = block * QUERY_BLOCK;
    copy_rows<QUERY_BLOCK, THREADS>(query_tile(at, block), head_of(a.query, at.b, at.h), a.query.token, first, a.queries);
    copy_rows<QUERY_BLOCK, THREADS>(
        upstream_tile(at, block), head_of(a.output_gradient, at.b, at.h), a.output_gradient.token, first, a.queries);
    copy_rows<QUERY_BLOCK, THREADS>(
        at.shared + OUTPUT_OFFSET, head_of(a.output, at.b, at.h), a.output.token, first, a.queries);
    commit_copies();
#pragma unroll
    for (int pass = 0; pass < ROW_PASSES; pass++) {
        const int row = first + pass * (THREADS / LANES_PER_ROW) + threadIdx.x / LANES_PER_ROW;
        log_sums.of[pass] = row < a.queries ? a.log_sums[head_index(a, at.b, at.h) + row] : INFINITY_F32;
    }
}

__device__ __forceinline__ float dot_of_chunk(u32 left, u32 right) {
    u32 x[4], y[4];
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(left) : "memory");
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(right) : "memory");
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += to_f32<ELEMENT>(u16(x[i])) * to_f32<ELEMENT>(u16(y[i]));
        sum += to_f32<ELEMENT>(u16(x[i] >> 16)) * to_f32<ELEMENT>(u16(y[i] >> 16));
    }
    return sum;
}

/// Row sums of `do * o` and log-sums, as pairs. A thread reads only what it copied itself, so its
/// own copies need to have arrived, not those of others.
__device__ __forceinline__ void write_statistics(const Place& at, int block, const LogSums& log_sums) {
#pragma unroll
    for (int pass = 0; pass < ROW_PASSES; pass++) {
        const int row = pass * (THREADS / LANES_PER_ROW) + threadIdx.x / LANES_PER_ROW;
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += LANES_PER_ROW) {
            const int chunk = c + threadIdx.x % LANES_PER_ROW;
            if (chunk >= CHUNKS) continue;
            const u32 offset = row * ROW_BYTES + chunk * 16;
            sum += dot_of_chunk(upstream_tile(at, block) + offset, at.shared + OUTPUT_OFFSET + offset);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (threadIdx.x % LANES_PER_ROW == 0)
            asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(statistics(at, block) + row * 8), "f"(log_sums.of[pass] * LOG2_E), "f"(sum) : "memory");
    }
}

typedef float Scores[M_TILES][SUB_TILES][4];

/// `p` where the key is hidden is zero; past the end of the keys the exponential may be infinite.
__device__ __forceinline__ void hide_keys(Scores& p, const Place& at) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (at.visible >> (2 * m + i / 2) & 1) continue;
#pragma unroll
            for (int n = 0; n < SUB_TILES; n++) p[m][n][i] = 0.0f;
        }
}

__device__ __forceinline__ void add_bias(Scores& s, const Arguments& a, const Place& at, int first_query, float factor) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = at.first_key + at.warp * WARP_KEYS + m * 16 + i / 2 * 8 + at.lane / 4;
                const int query = first_query + n * 8 + at.lane % 4 * 2 + i % 2;
                s[m][n][i] = s[m][n][i] * factor + bias_at(a, at.b, at.h, query, key);
            }
}

__device__ __forceinline__ void store_bias_gradient(const Scores& ds, const Arguments& a, const Place& at, int first_query) {
    float* head = a.bias_partial + head_index(a, at.b, at.h) * a.keys;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = at.first_key + at.warp * WARP_KEYS + m * 16 + i / 2 * 8 + at.lane / 4;
                const int query = first_query + n * 8 + at.lane % 4 * 2 + i % 2;
                if (key < a.keys && query < a.queries) head[i64(query) * a.keys + key] = ds[m][n][i];
            }
}

/// Scores become `p^T` and `dp^T` becomes `ds^T`; `pairs` are the statistics of the columns.
__device__ __forceinline__ void softmax_gradient(Scores& s, Scores& dp, const Place& at, u32 pairs, float factor) {
    float log_sum[SUB_TILES][2], delta[SUB_TILES][2];
#pragma unroll
    for (int n = 0; n < SUB_TILES; n++)
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(log_sum[n][0]), "=f"(delta[n][0]), "=f"(log_sum[n][1]), "=f"(delta[n][1])
                     : "r"(pairs + n * 64 + at.lane % 4 * 16) : "memory");
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = exp2_fast(s[m][n][i] * factor - log_sum[n][i % 2]);
    if (!at.all_visible) hide_keys(s, at);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - delta[n][i % 2]);
}

/// `dv += p^T do` (or `dk += ds^T q`) over the queries of `columns`.
__device__ __forceinline__ void add_products(float (&c)[M_TILES][CHUNKS][4], const u32 (&left)[SUB_TILES / 2][M_TILES][4], u32 columns) {
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) multiply_columns<0>(c, left[k], columns + k * 16 * ROW_BYTES);
}

__device__ __forceinline__ void store_ds(const u32 (&left)[SUB_TILES / 2][M_TILES][4], const Place& at, u32 tile) {
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++)
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = at.warp * WARP_KEYS + m * 16 + i % 2 * 8 + at.lane / 4;
                const u32 address = tile + row * DS_ROW_BYTES + (2 * k + i / 2) * 16 + at.lane % 4 * 4;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(left[k][m][i]) : "memory");
            }
}

/// All that a warp does with `SUB_QUERIES` queries of a block for its own keys.
__device__ __forceinline__ void walk_queries(KeyGradients& sums, const Arguments& a, const Place& at, int block, int sub, float log2_scale) {
    const u32 own_rows = at.shared + at.warp * WARP_KEYS * ROW_BYTES;
    const u32 queries = query_tile(at, block) + sub * SUB_QUERIES * ROW_BYTES;
    const u32 upstream = upstream_tile(at, block) + sub * SUB_QUERIES * ROW_BYTES;
    const int first_query = block * QUERY_BLOCK + sub * SUB_QUERIES;
    Scores s, dp;
    clear(s);
    multiply_rows(s, left_address(own_rows), Right(queries));
    clear(dp);
    multiply_rows(dp, left_address(own_rows + KEY_BYTES), Right(upstream));
    if constexpr (BIAS != 0) add_bias(s, a, at, first_query, log2_scale);
    softmax_gradient(s, dp, at, statistics(at, block) + sub * SUB_QUERIES * 8, BIAS == 0 ? log2_scale : 1.0f);
    if constexpr (BIAS != 0)
        if (a.bias_partial != nullptr) store_bias_gradient(dp, a, at, first_query);

    u32 left[SUB_TILES / 2][M_TILES][4];
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) pack_left(left[k], s, k);
    add_products(sums.value, left, column_address(upstream));
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) pack_left(left[k], dp, k);
    store_ds(left, at, ds_tile(at, block) + sub * SUB_QUERIES * 2);
    add_products(sums.key, left, column_address(queries));
}

/// Reads or writes this thread's part of `dq`: f32 while blocks of keys remain, else final.
template <int FIRST, int COUNT>
__device__ __forceinline__ void finish_queries(float (&c)[1][COUNT][4], const Arguments& a, const Place& at, int first_row) {
    const bool final = at.last_visit && gridDim.x == 1;
    float* partial = a.query_partial + blockIdx.x * (i64(a.batch) * a.heads * a.queries * HEAD_DIM);
    element* head = head_of(a.query_gradient, at.b, at.h);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = first_row + i * 8 + at.lane / 4;
        if (row >= a.queries) continue;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const int column = (FIRST + n) * 8 + at.lane % 4 * 2;
            float* sums = partial + (head_index(a, at.b, at.h) + row) * HEAD_DIM + column;
            if (!at.first_visit) {
                const float2 before = *reinterpret_cast<float2*>(sums);
                c[0][n][2 * i] += before.x;
                c[0][n][2 * i + 1] += before.y;
            }
            if (final)
                *reinterpret_cast<u32*>(head + row * a.query_gradient.token + column) =
                    pack<ELEMENT>(c[0][n][2 * i] * a.scale, c[0][n][2 * i + 1] * a.scale);
            else
                *reinterpret_cast<float2*>(sums) = make_float2(c[0][n][2 * i], c[0][n][2 * i + 1]);
        }
    }
}

/// `dq = ds k` for 16 queries and the eights `FIRST..FIRST + COUNT` of columns.
template <int FIRST, int COUNT>
__device__ __forceinline__ void query_gradients(const Arguments& a, const Place& at, int block) {
    const int rows = at.warp % ROW_GROUPS * 16;
    const u32 ds = ds_tile(at, block) + (at.lane % 8 + at.lane / 16 * 8) * DS_ROW_BYTES + at.lane / 8 % 2 * 16 + rows * 2;
    const u32 columns = column_address(at.shared);
    float c[1][COUNT][4];
    clear(c);
#pragma unroll 4
    for (int k = 0; k < KEY_ROWS / 16; k++) {
        u32 left[1][4];
        load_4_transposed(left[0], ds + k * 16 * DS_ROW_BYTES);
        multiply_columns<FIRST>(c, left, columns + k * 16 * ROW_BYTES);
    }
    finish_queries<FIRST>(c, a, at, block * QUERY_BLOCK + rows);
}

template <int GROUP = 0>
__device__ __forceinline__ void query_gradients_of_warp(const Arguments& a, const Place& at, int block) {
    constexpr int FIRST = GROUP * COLUMN_TILES;
    constexpr int COUNT = CHUNKS - FIRST < COLUMN_TILES ? CHUNKS - FIRST : COLUMN_TILES;
    if constexpr (GROUP < COLUMN_GROUPS && COUNT > 0) {
        if (at.warp / ROW_GROUPS == GROUP) query_gradients<FIRST, COUNT>(a, at, block);
        else query_gradients_of_warp<GROUP + 1>(a, at, block);
    }
}

__device__ __forceinline__ void find_visible(const Arguments& a, Place& at) {
    at.visible = 0;
    at.all_visible = a.mask == nullptr && at.first_key + KEY_ROWS <= a.keys;
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) {
        const int key = at.first_key + at.warp * WARP_KEYS + i * 8 + at.lane / 4;
        at.visible |= u32(key_visible(a, at.b, key)) << i;
    }
}

/// Both go through the warp's own rows of values, which no other warp reads.
__device__ __forceinline__ void store_key_gradients(const KeyGradients& sums, const Arguments& a, const Place& at) {
    const u32 tile = at.shared + KEY_BYTES + at.warp * WARP_KEYS * ROW_BYTES;
    const int first = at.first_key + at.warp * WARP_KEYS;
    float factor[M_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) factor[i / 2][i % 2] = 1.0f;
    if (a.value_gradient.data != nullptr)
        store_rows(sums.value, factor, tile, head_of(a.value_gradient, at.b, at.h), a.value_gradient.token, first, a.keys);
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++) factor[i / 2][i % 2] = a.scale;
    if (a.key_gradient.data != nullptr)
        store_rows(sums.key, factor, tile, head_of(a.key_gradient, at.b, at.h), a.key_gradient.token, first, a.keys);
}

__device__ __forceinline__ void visit_keys(const Arguments& a, Place& at, float log2_scale) {
    LogSums log_sums;
    copy_rows<KEY_ROWS, THREADS>(at.shared, head_of(a.key, at.b, at.h), a.key.token, at.first_key, a.keys);
    copy_rows<KEY_ROWS, THREADS>(at.shared + KEY_BYTES, head_of(a.value, at.b, at.h), a.value.token, at.first_key, a.keys);
    start_queries(a, at, 0, log_sums);
    find_visible(a, at);
    KeyGradients sums;
    clear(sums.key);
    clear(sums.value);
    const int blocks = (a.queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
    const bool wants_queries = a.query_gradient.data != nullptr;
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        wait_copies<0>();
        write_statistics(at, block, log_sums);
        __syncthreads();
        if (block + 1 < blocks) start_queries(a, at, block + 1, log_sums);
        if (DS_BUFFERS == 2 && block > 0 && wants_queries) query_gradients_of_warp(a, at, block - 1);
#pragma unroll 1
        for (int sub = 0; sub < QUERY_BLOCK / SUB_QUERIES; sub++) walk_queries(sums, a, at, block, sub, log2_scale);
        if (DS_BUFFERS == 1) {
            __syncthreads();
            if (wants_queries) query_gradients_of_warp(a, at, block);
        }
    }
    if (DS_BUFFERS == 2) {
        __syncthreads();
        if (wants_queries) query_gradients_of_warp(a, at, blocks - 1);
    }
    store_key_gradients(sums, a, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char shared[];
    Place at;
    at.b = blockIdx.z;
    at.h = blockIdx.y;
    at.warp = threadIdx.x / 32;
    at.lane = threadIdx.x % 32;
    at.shared = shared_address(shared);
    const float log2_scale = a.scale * LOG2_E;
    const int blocks = (a.keys + KEY_ROWS - 1) / KEY_ROWS;
    const int share = (blocks + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * share, end = min(first + share, blocks);
#pragma unroll 1
    for (int block = first; block < end; block++) {
        at.first_key = block * KEY_ROWS;
        at.first_visit = block == first;
        at.last_visit = block + 1 == end;
        if (!at.first_visit) __syncthreads();  // others may still read keys and statistics
        visit_keys(a, at, log2_scale);
    }
}
