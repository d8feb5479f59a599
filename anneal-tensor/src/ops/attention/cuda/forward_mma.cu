// Attention forward on tensor cores: `o = softmax(scale q k^T + bias) v` for each head.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 1: a block of threads keeps `16 M_TILES WARPS`
// queries and walks over the keys by `KEY_BLOCK`; each warp owns whole rows of queries, so maxima,
// sums and outputs stay in its registers and warps meet only where copied blocks arrive.
// Scores are kept to the base 2: `exp(x) = 2^(x log2 e)`, the factor folded into the scale.
//
// attention_forward_mma(Arguments): reads query, key, value, bias, mask; writes output and log_sums.
//   grid   (ceil(queries / (16 M_TILES WARPS)), heads, batch)
//   block  32 WARPS threads
//   shared (16 M_TILES WARPS + 2 STAGES KEY_BLOCK) * ROW_BYTES bytes
// Macros beside those of common.cuh: WARPS, M_TILES (of 16 queries a warp), KEY_BLOCK (a multiple
// of 16), STAGES (blocks of keys in flight, at least 2), MIN_BLOCKS (resident on a multiprocessor).
// Rows of queries, keys, values and outputs must be 16-byte aligned.
// Not done: dropout, causal masks, splitting the keys of few queries over several blocks.

constexpr int THREADS = 32 * WARPS;
constexpr int QUERY_ROWS = WARP_ROWS * WARPS;
constexpr int STAGE_BYTES = 2 * KEY_BLOCK * ROW_BYTES;
constexpr int DEPTHS = DEPTH_16 + DEPTH_8;

__device__ __forceinline__ void start_block(const Arguments &a, const Position &at, u32 stages, int block) {
    const u32 stage = stages + block % STAGES * STAGE_BYTES;
    const int first = block * KEY_BLOCK;
    copy_rows<TileLayout, KEY_BLOCK, THREADS>(stage, head_of(a.key, at.b, at.h), a.key.token, first, a.keys);
    copy_rows<TileLayout, KEY_BLOCK, THREADS>(
        stage + KEY_BLOCK * ROW_BYTES, head_of(a.value, at.b, at.h), a.value.token, first, a.keys);
}

/// Queries as left factors. The softmax takes maxima of unscaled scores, which needs a scale that
/// is not negative: its sign goes into the queries.
__device__ __forceinline__ void load_queries(u32 (&q)[DEPTHS][M_TILES][4], u32 tile, bool negate) {
#pragma unroll
    for (int depth = 0; depth < DEPTHS; depth++) {
        load_left(q[depth], left_address(tile), depth);
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) q[depth][m][i] ^= negate ? 0x80008000u : 0u;
    }
}

__device__ __forceinline__ void compute_scores(
    float (&s)[M_TILES][KEY_TILES][4], const u32 (&q)[DEPTHS][M_TILES][4], u32 key_tile) {
    const Right keys(key_tile);
    clear(s);
#pragma unroll
    for (int depth = 0; depth < DEPTH_16; depth++) multiply_rows_16(s, q[depth], keys, depth);
    if constexpr (DEPTH_8) multiply_rows_8(s, q[DEPTHS - 1], keys);
}

__device__ __forceinline__ void add_values(
    RowState &state, const float (&p)[M_TILES][KEY_TILES][4], u32 value_tile) {
    const u32 columns = column_address(value_tile);
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++) {
        u32 left[M_TILES][4];
        pack_left(left, p, k);
        multiply_columns<0>(state.output, left, columns + k * 16 * ROW_BYTES);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_forward_mma(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) unsigned char shared[];
    const Position at = {
        int(blockIdx.z), int(blockIdx.y), int(blockIdx.x) * QUERY_ROWS, warp_index(), int(threadIdx.x % 32)};
    const u32 query_tile = shared_address(shared);
    const u32 warp_queries = query_tile + at.warp * WARP_ROWS * ROW_BYTES;
    const u32 stages = query_tile + QUERY_ROWS * ROW_BYTES;
    const int blocks = (a.keys + KEY_BLOCK - 1) / KEY_BLOCK;
    const float log2_scale = fmaxf(fabsf(a.scale) * LOG2_E, 1e-30f);  // never infinity times zero
    const float factor = HAS_BIAS ? 1.0f : log2_scale;

    copy_rows<TileLayout, QUERY_ROWS, THREADS>(
        query_tile, head_of(a.query, at.b, at.h), a.query.token, at.first_query, a.queries);
    for (int block = 0; block < STAGES - 1; block++) {
        if (block < blocks) start_block(a, at, stages, block);
        commit_copies();
    }

    u32 q[DEPTHS][M_TILES][4];
    RowState state;
    clear_state(state);
    for (int block = 0; block < blocks; block++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (block == 0) load_queries(q, warp_queries, a.scale < 0.0f);
        if (block + STAGES - 1 < blocks) start_block(a, at, stages, block + STAGES - 1);
        commit_copies();

        const u32 key_tile = stages + block % STAGES * STAGE_BYTES;
        const int first_key = block * KEY_BLOCK;
        float s[M_TILES][KEY_TILES][4];
        compute_scores(s, q, key_tile);
        if constexpr (HAS_BIAS) add_bias(s, a, at, first_key, log2_scale);
        if (a.mask != nullptr || first_key + KEY_BLOCK > a.keys) hide_keys(s, a, at, first_key);
        softmax_block(state, s, factor);
        add_values(state, s, key_tile + KEY_BLOCK * ROW_BYTES);
    }
    finish<TileLayout>(state, a, at, query_tile, factor);
}
