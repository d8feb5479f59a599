// Attention backward by warps on tensor cores, deterministic: no races, every sum in a fixed order.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, with scores transposed: a block of threads keeps
// `16 M_TILES WARPS` keys and walks over the queries by `QUERY_BLOCK`. A warp owns rows of keys, so
// `p^T` and `ds^T` leave the matrix unit as left factors of `dv += p^T do` and `dk += ds^T q`
// and the sums stay in registers. `dq = ds k` runs over all keys of the block: `ds^T` goes through
// shared memory, and warps take rows of queries instead.
//
// With at most `16 M_TILES WARPS` keys (256 tokens of an image) one pass makes all gradients. With
// more, a block of threads goes over its share of the keys and adds to `dq` in f32 in memory, where each
// address belongs to one thread; shares of several blocks are added by attention_reduce_rows.
//
// attention_backward_mma(Arguments): reads all but the gradients; writes query_gradient (one part) or
// partial[part] (several; also scratch of one part with several blocks of keys), key_gradient,
// value_gradient and, where not null, bias_partial. Every element of them is written.
//   grid   (parts, heads, batch), such that each part gets one of the ceil(keys / (16 M_TILES WARPS)) blocks
//   block  32 WARPS threads
//   shared (2 * 16 M_TILES WARPS + 5 QUERY_BLOCK) * ROW_BYTES + DS_BUFFERS * 16 M_TILES WARPS *
//          (2 QUERY_BLOCK + 16) + 16 QUERY_BLOCK bytes
// Macros beside those of common.cuh: WARPS (4 or 8), M_TILES (of 16 keys a warp), QUERY_BLOCK (32
// or 64), SUB_QUERIES (16 or 32: those of one walk through scores), DS_BUFFERS (2: `dq` of a block
// of queries overlaps with the next block's scores; 1: it does not, for less shared memory),
// MIN_BLOCKS. Rows of heads must be 16-byte aligned. Not done: dropout, causal masks.

// Work on `dq`: 16 rows of queries and a share of the columns for each warp.
constexpr int ROW_GROUPS = QUERY_BLOCK / 16;
constexpr int COLUMN_GROUPS = WARPS / ROW_GROUPS;
constexpr int COLUMN_TILES = (CHUNKS + COLUMN_GROUPS - 1) / COLUMN_GROUPS;
static_assert(COLUMN_GROUPS * ROW_GROUPS == WARPS, "warps share dq evenly");

/// `dv += p^T do` (or `dk += ds^T q`) over the queries of `columns`.
__device__ __forceinline__ void add_products(
    float (&c)[M_TILES][CHUNKS][4], const u32 (&left)[SUB_TILES / 2][M_TILES][4], u32 columns) {
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) multiply_columns<0>(c, left[k], columns + k * 16 * ROW_BYTES);
}

__device__ __forceinline__ void store_ds(const u32 (&left)[SUB_TILES / 2][M_TILES][4], const Place &at, u32 tile) {
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++)
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = own_row(at.warp, m) + i % 2 * 8 + at.lane / 4;
                const u32 address = tile + row * DS_ROW_BYTES + (2 * k + i / 2) * 16 + at.lane % 4 * 4;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(left[k][m][i]) : "memory");
            }
}

/// All that a warp does with `SUB_QUERIES` queries of a block for its own keys.
__device__ __forceinline__ void walk_queries(
    KeyGradients &sums, const Arguments &a, const Place &at, int block, int sub) {
    const u32 own = own_row(at.warp, 0) * ROW_BYTES;
    const u32 queries = query_tile(at, block) + sub * SUB_QUERIES * ROW_BYTES;
    const u32 upstream = upstream_tile(at, block) + sub * SUB_QUERIES * ROW_BYTES;
    const u32 pairs = statistics(at, block) + sub * SUB_QUERIES * 8;
    const int first_query = block * QUERY_BLOCK + sub * SUB_QUERIES;
    Scores s, dp;
    clear(s);
    multiply_rows(s, left_address(key_tile(at) + own), Right(queries));
    clear(dp);
    multiply_rows(dp, left_address(value_tile(at) + own), Right(upstream));
    Columns columns;
    columns.load(at, pairs);
    make_probabilities(s, columns, a, at, first_query, a.scale * LOG2_E);
    make_gradients(dp, s, columns, a, at, first_query);

    u32 left[SUB_TILES / 2][M_TILES][4];
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) pack_left(left[k], s, k);
    add_products(sums.value, left, column_address(upstream));
#pragma unroll
    for (int k = 0; k < SUB_TILES / 2; k++) pack_left(left[k], dp, k);
    store_ds(left, at, ds_tile(at, block) + sub * SUB_QUERIES * 2);
    add_products(sums.key, left, column_address(queries));
}

/// `dq = ds k` for 16 queries and the eights `FIRST..FIRST + COUNT` of columns.
template <int FIRST, int COUNT>
__device__ __forceinline__ void query_gradients(const Arguments &a, const Place &at, int block) {
    const int rows = at.warp % ROW_GROUPS * 16;
    const u32 ds =
        ds_tile(at, block) + (at.lane % 8 + at.lane / 16 * 8) * DS_ROW_BYTES + at.lane / 8 % 2 * 16 + rows * 2;
    const u32 columns = column_address(key_tile(at));
    float c[1][COUNT][4];
    clear(c);
#pragma unroll 4
    for (int k = 0; k < KEY_ROWS / 16; k++) {
        u32 left[1][4];
        load_4_transposed(left[0], ds + k * 16 * DS_ROW_BYTES);
        multiply_columns<FIRST>(c, left, columns + k * 16 * ROW_BYTES);
    }
    finish_queries<COUNT>(c[0], a, at, block * QUERY_BLOCK + rows, FIRST);
}

template <int GROUP = 0>
__device__ __forceinline__ void query_gradients_of_warp(const Arguments &a, const Place &at, int block) {
    constexpr int FIRST = GROUP * COLUMN_TILES;
    constexpr int COUNT = CHUNKS - FIRST < COLUMN_TILES ? CHUNKS - FIRST : COLUMN_TILES;
    if constexpr (GROUP < COLUMN_GROUPS && COUNT > 0) {
        if (at.warp / ROW_GROUPS == GROUP) query_gradients<FIRST, COUNT>(a, at, block);
        else query_gradients_of_warp<GROUP + 1>(a, at, block);
    }
}

__device__ __forceinline__ void visit_keys(const Arguments &a, Place &at) {
    LogSums log_sums;
    start_keys(a, at);
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
        for (int sub = 0; sub < QUERY_BLOCK / SUB_QUERIES; sub++) walk_queries(sums, a, at, block, sub);
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_backward_mma(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char shared[];
    visit_share(a, shared_address(shared));
}
