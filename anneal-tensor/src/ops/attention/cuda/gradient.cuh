// Attention on CUDA, the backward pass of backward_mma.cu around its products: shapes, statistics, `p` and `ds`, results.
//
// Text before backward_mma.cu and after partial.cuh.
//
//   s^T = k q^T          p^T = 2^(s^T scale log2 e + bias - lse)
//   dp^T = v do^T        ds^T = p^T * (dp^T - rowsum(do * o))

constexpr int THREADS = 32 * WARPS;
constexpr int WARP_KEYS = 16 * M_TILES;
constexpr int KEY_ROWS = WARP_KEYS * WARPS;
constexpr int KEY_BYTES = KEY_ROWS * ROW_BYTES;
constexpr int QUERY_BYTES = QUERY_BLOCK * ROW_BYTES;
constexpr int DS_ROW_BYTES = QUERY_BLOCK * 2 + 16;  // `ds^T`: a row for each key
constexpr int DS_BYTES = KEY_ROWS * DS_ROW_BYTES;
typedef TileLayout KeyLayout;
typedef TileLayout QueryLayout;

__device__ __forceinline__ int own_row(int warp, int m) { return warp * WARP_KEYS + m * 16; }

constexpr int SUB_TILES = SUB_QUERIES / 8;
constexpr int ROW_PASSES = QUERY_BLOCK / (THREADS / LANES_PER_ROW);  // rows of queries a thread copies
constexpr int STATISTICS_BYTES = QUERY_BLOCK * 8;
static_assert(ROW_PASSES * THREADS == QUERY_BLOCK * LANES_PER_ROW, "each thread copies whole passes");

// Shared memory: keys, values, queries twice, do twice, o, ds^T, statistics twice.
constexpr int QUERY_OFFSET = 2 * KEY_BYTES;
constexpr int UPSTREAM_OFFSET = QUERY_OFFSET + 2 * QUERY_BYTES;
constexpr int OUTPUT_OFFSET = UPSTREAM_OFFSET + 2 * QUERY_BYTES;
constexpr int DS_OFFSET = OUTPUT_OFFSET + QUERY_BYTES;
constexpr int STATISTICS_OFFSET = DS_OFFSET + DS_BUFFERS * DS_BYTES;

struct Place {
    int b, h, warp, lane;
    u32 shared;
    int first_key;
    bool first_visit, last_visit;  // of this block of threads, over its blocks of keys
    u32 visible;                   // bit `2 m + i`: key `own_row(m) + 8 i + lane / 4`
    bool all_visible;              // for the whole block
};

struct KeyGradients {
    float key[M_TILES][CHUNKS][4], value[M_TILES][CHUNKS][4];
};

__device__ __forceinline__ u32 key_tile(const Place &at) { return at.shared; }
__device__ __forceinline__ u32 value_tile(const Place &at) { return at.shared + KEY_BYTES; }
__device__ __forceinline__ u32 query_tile(const Place &at, int block) {
    return at.shared + QUERY_OFFSET + block % 2 * QUERY_BYTES;
}
__device__ __forceinline__ u32 upstream_tile(const Place &at, int block) {
    return at.shared + UPSTREAM_OFFSET + block % 2 * QUERY_BYTES;
}
__device__ __forceinline__ u32 output_tile(const Place &at) { return at.shared + OUTPUT_OFFSET; }
__device__ __forceinline__ u32 ds_tile(const Place &at, int block) {
    return at.shared + DS_OFFSET + block % DS_BUFFERS * DS_BYTES;
}
__device__ __forceinline__ u32 statistics(const Place &at, int block) {
    return at.shared + STATISTICS_OFFSET + block % 2 * STATISTICS_BYTES;
}

/// Log-sums of the rows that this thread copies; plus infinity past the end makes `p` zero there.
struct LogSums {
    float of[ROW_PASSES];
};

__device__ __forceinline__ void start_keys(const Arguments &a, const Place &at) {
    copy_rows<KeyLayout, KEY_ROWS, THREADS>(
        key_tile(at), head_of(a.key, at.b, at.h), a.key.token, at.first_key, a.keys);
    copy_rows<KeyLayout, KEY_ROWS, THREADS>(
        value_tile(at), head_of(a.value, at.b, at.h), a.value.token, at.first_key, a.keys);
}

__device__ __forceinline__ void start_queries(const Arguments &a, const Place &at, int block, LogSums &log_sums) {
    const int first = block * QUERY_BLOCK;
    copy_rows<QueryLayout, QUERY_BLOCK, THREADS>(
        query_tile(at, block), head_of(a.query, at.b, at.h), a.query.token, first, a.queries);
    copy_own_rows<QueryLayout, QUERY_BLOCK, THREADS>(
        upstream_tile(at, block), head_of(a.output_gradient, at.b, at.h), a.output_gradient.token, first,
        a.queries);
    copy_own_rows<QueryLayout, QUERY_BLOCK, THREADS>(
        output_tile(at), head_of(a.output, at.b, at.h), a.output.token, first, a.queries);
    commit_copies();
#pragma unroll
    for (int pass = 0; pass < ROW_PASSES; pass++) {
        const int row = first + pass * (THREADS / LANES_PER_ROW) + threadIdx.x / LANES_PER_ROW;
        log_sums.of[pass] = row < a.queries ? a.log_sums[head_index(a, at.b, at.h) + row] : INFINITY_F32;
    }
}

/// Row sums of `do * o` and log-sums, as pairs. A thread reads only what it copied itself, so its
/// own copies need to have arrived, not those of others.
__device__ __forceinline__ void write_statistics(const Place &at, int block, const LogSums &log_sums) {
#pragma unroll
    for (int pass = 0; pass < ROW_PASSES; pass++) {
        const int row = pass * (THREADS / LANES_PER_ROW) + threadIdx.x / LANES_PER_ROW;
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += LANES_PER_ROW) {
            const int chunk = c + threadIdx.x % LANES_PER_ROW;
            if (chunk >= CHUNKS) continue;
            const u32 offset = QueryLayout::at(row, chunk);
            sum += dot_of_chunk(upstream_tile(at, block) + offset, output_tile(at) + offset);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (threadIdx.x % LANES_PER_ROW == 0)
            asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(statistics(at, block) + row * 8),
                         "f"(log_sums.of[pass] * LOG2_E), "f"(sum)
                         : "memory");
    }
}

/// A thread's scores of its tiles of 16 keys with the queries walked at a time.
typedef float Scores[M_TILES][SUB_TILES][4];

/// Key and query of a thread's score `[m][n][i]`.
__device__ __forceinline__ int key_of(const Place &at, int m, int i) {
    return at.first_key + own_row(at.warp, m) + i / 2 * 8 + at.lane / 4;
}

__device__ __forceinline__ int query_of(const Place &at, int first_query, int n, int i) {
    return first_query + n * 8 + at.lane % 4 * 2 + i % 2;
}

/// `p` where the key is hidden is zero; past the end of the keys the exponential may be infinite.
__device__ __forceinline__ void hide_keys(Scores &p, const Place &at) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (at.visible >> (2 * m + i / 2) & 1) continue;
#pragma unroll
            for (int n = 0; n < SUB_TILES; n++) p[m][n][i] = 0.0f;
        }
}

__device__ __forceinline__ void add_bias(
    Scores &s, const Arguments &a, const Place &at, int first_query, float factor) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][n][i] = s[m][n][i] * factor +
                             bias_at(a, at.b, at.h, query_of(at, first_query, n, i), key_of(at, m, i));
}

__device__ __forceinline__ void store_bias_gradient(
    const Scores &ds, const Arguments &a, const Place &at, int first_query) {
    float *head = a.bias_partial + head_index(a, at.b, at.h) * a.keys;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = key_of(at, m, i), query = query_of(at, first_query, n, i);
                if (key < a.keys && query < a.queries) head[i64(query) * a.keys + key] = ds[m][n][i];
            }
}

/// Log-sum and `rowsum(do * o)` of a thread's columns.
struct Columns {
    float log_sum[SUB_TILES][2], delta[SUB_TILES][2];

    __device__ __forceinline__ void load(const Place &at, u32 pairs) {
#pragma unroll
        for (int n = 0; n < SUB_TILES; n++) {
            const u32 address = pairs + n * 64 + at.lane % 4 * 16;
            asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                         : "=f"(log_sum[n][0]), "=f"(delta[n][0]), "=f"(log_sum[n][1]), "=f"(delta[n][1])
                         : "r"(address)
                         : "memory");
        }
    }
};

/// Scores become `p^T`.
__device__ __forceinline__ void make_probabilities(
    Scores &s, const Columns &columns, const Arguments &a, const Place &at, int first_query,
    float log2_scale) {
    if constexpr (HAS_BIAS) add_bias(s, a, at, first_query, log2_scale);
    const float factor = HAS_BIAS ? 1.0f : log2_scale;
#pragma unroll
    for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = exp2_of(s[m][n][i] * factor - columns.log_sum[n][i % 2]);
    if (!at.all_visible) hide_keys(s, at);
}

/// `dp^T` becomes `ds^T`.
__device__ __forceinline__ void make_gradients(
    Scores &dp, const Scores &p, const Columns &columns, const Arguments &a, const Place &at,
    int first_query) {
#pragma unroll
    for (int n = 0; n < SUB_TILES; n++)
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) dp[m][n][i] = p[m][n][i] * (dp[m][n][i] - columns.delta[n][i % 2]);
    if constexpr (HAS_BIAS)
        if (a.bias_partial != nullptr) store_bias_gradient(dp, a, at, first_query);
}

/// Rows of `dq` in a thread's hands, `first_row + 8 i`, eights of columns from `first_tile`.
template <int COUNT>
__device__ __forceinline__ void finish_queries(
    const float (&c)[COUNT][4], const Arguments &a, const Place &at, int first_row, int first_tile) {
    const i64 head = (i64(blockIdx.x) * a.batch + at.b) * a.heads + at.h;
    const Target to = {
        head_of(a.query_gradient, at.b, at.h), u32(a.query_gradient.token), a.partial + head * a.queries * HEAD_DIM,
        a.queries, a.scale, at.first_visit, at.last_visit && gridDim.x == 1};
    finish_rows<COUNT>(c, to, first_row, first_tile);
}

__device__ __forceinline__ void find_visible(const Arguments &a, Place &at) {
    at.visible = 0;
    at.all_visible = a.mask == nullptr && at.first_key + KEY_ROWS <= a.keys;
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; i++)
        at.visible |= u32(key_visible(a, at.b, key_of(at, i / 2, i % 2 * 2))) << i;
}

/// Both go through the warp's own rows of values, which no other warp reads any more.
__device__ __forceinline__ void store_key_gradients(const KeyGradients &sums, const Arguments &a, const Place &at) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        const int row = own_row(at.warp, m), first = at.first_key + row;
        const float one[1][2] = {{1.0f, 1.0f}}, scale[1][2] = {{a.scale, a.scale}};
        if (a.value_gradient.data != nullptr)
            store_rows<KeyLayout, 1>(
                reinterpret_cast<const float (&)[1][CHUNKS][4]>(sums.value[m]), one, value_tile(at), row,
                head_of(a.value_gradient, at.b, at.h), a.value_gradient.token, first, a.keys);
        if (a.key_gradient.data != nullptr)
            store_rows<KeyLayout, 1>(
                reinterpret_cast<const float (&)[1][CHUNKS][4]>(sums.key[m]), scale, value_tile(at), row,
                head_of(a.key_gradient, at.b, at.h), a.key_gradient.token, first, a.keys);
    }
}

__device__ __forceinline__ void visit_keys(const Arguments &a, Place &at);

/// This block's share of the keys, block after block.
__device__ __forceinline__ void visit_share(const Arguments &a, u32 shared) {
    Place at;
    at.b = blockIdx.z;
    at.h = blockIdx.y;
    at.warp = warp_index();
    at.lane = threadIdx.x % 32;
    at.shared = shared;
    const int blocks = (a.keys + KEY_ROWS - 1) / KEY_ROWS;
    const int share = (blocks + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * share, end = min(first + share, blocks);
#pragma unroll 1
    for (int block = first; block < end; block++) {
        at.first_key = block * KEY_ROWS;
        at.first_visit = block == first;
        at.last_visit = block + 1 == end;
        if (!at.first_visit) __syncthreads();  // others may still read keys and statistics
        visit_keys(a, at);
    }
}
