// Attention forward by warpgroups of sm_90a: forward_mma.cu's walk with wgmma.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 1. A warpgroup owns 64 queries; queries and keys are
// read from shared memory, probabilities are left factors in registers. Several warpgroups on a
// multiprocessor fill the matrix unit while others are at their softmax (2407.08608, section 3.1,
// without its explicit order): they wait for copies and for free stages, never for each other's step.
//
// attention_forward_wgmma(Arguments): as attention_forward_mma.
//   grid   (ceil(queries / (64 GROUPS)), heads, batch)
//   block  128 GROUPS threads
//   shared 2 HEAD_DIM (64 GROUPS + 2 STAGES KEY_BLOCK) + 1024 + 16 STAGES bytes
// Macros beside those of common.cuh: GROUPS (warpgroups), M_TILES (1), KEY_BLOCK (64), STAGES (blocks of keys in
// flight, at least 3), MIN_BLOCKS (resident on a multiprocessor).

constexpr int THREADS = 128 * GROUPS;
constexpr int QUERY_ROWS = 64 * GROUPS;
typedef PanelLayout<QUERY_ROWS> QueryLayout;
typedef PanelLayout<KEY_BLOCK> KeyLayout;
constexpr int KEY_BYTES = KeyLayout::BYTES;
static_assert(KEY_BLOCK == 64 && M_TILES == 1, "products of 64 by 64 scores");
constexpr int STAGE_BYTES = 2 * KEY_BYTES;
constexpr int STAGES_OFFSET = QueryLayout::BYTES;
constexpr int ZERO_ROWS = 64;
constexpr int ZEROS_OFFSET = STAGES_OFFSET + STAGES * STAGE_BYTES;

__device__ __forceinline__ void start_block(const Arguments &a, const Position &at, u32 stages, int block) {
    const u32 stage = stages + block % STAGES * STAGE_BYTES;
    const int first = block * KEY_BLOCK;
    copy_rows<KeyLayout, KEY_BLOCK, THREADS>(stage, head_of(a.key, at.b, at.h), a.key.token, first, a.keys);
    copy_rows<KeyLayout, KEY_BLOCK, THREADS>(
        stage + KEY_BYTES, head_of(a.value, at.b, at.h), a.value.token, first, a.keys);
}

/// Maxima are taken of unscaled scores, which needs a scale that is not negative.
__device__ __forceinline__ void negate(float (&s)[1][KEY_TILES][4]) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] = -s[0][n][i];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_forward_wgmma(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere an empty kernel that nobody starts
    extern __shared__ __align__(1024) unsigned char shared[];
    const Position at = {
        int(blockIdx.z), int(blockIdx.y), int(blockIdx.x) * QUERY_ROWS, warp_index(), int(threadIdx.x % 32)};
    const u32 query_tile = shared_address(shared), stages = query_tile + STAGES_OFFSET;
    const u32 zeros = query_tile + ZEROS_OFFSET, full = zeros + ZERO_ROWS * 16, empty = full + STAGES * 8;
    const int blocks = (a.keys + KEY_BLOCK - 1) / KEY_BLOCK;
    const float log2_scale = fmaxf(fabsf(a.scale) * LOG2_E, 1e-30f);  // never infinity times zero
    const float factor = HAS_BIAS ? 1.0f : log2_scale;

    if (threadIdx.x < STAGES) {
        make_barrier(full + threadIdx.x * 8, THREADS);
        make_barrier(empty + threadIdx.x * 8, THREADS / 32);
    }
    clear_zeros<ZERO_ROWS>(zeros);
    publish();
    __syncthreads();
    copy_rows<QueryLayout, QUERY_ROWS, THREADS>(
        query_tile, head_of(a.query, at.b, at.h), a.query.token, at.first_query, a.queries);
    for (int block = 0; block < min(STAGES, blocks); block++) {
        start_block(a, at, stages, block);
        arrive_with_copies(full + block * 8);
    }
    RowState state;
    clear_state(state);
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        const int ahead = block + STAGES - 2;  // takes the place of `block - 2`: a block's slack between warpgroups
        if (block >= 2 && ahead < blocks) {
            wait_barrier(empty + ahead % STAGES * 8, ahead / STAGES - 1);
            start_block(a, at, stages, ahead);
            arrive_with_copies(full + ahead % STAGES * 8);
        }
        wait_barrier(full + block % STAGES * 8, block / STAGES);
        publish();
        const u32 key_tile = stages + block % STAGES * STAGE_BYTES;
        const int first_key = block * KEY_BLOCK;
        float s[1][KEY_TILES][4];
        begin_products();
        multiply_rows<QueryLayout, KeyLayout>(s[0], query_tile, at.warp / 4 * 64, key_tile, zeros);
        commit_products();
        wait_products<0>();
        hold(s);
        if (a.scale < 0.0f) negate(s);
        if constexpr (HAS_BIAS) add_bias(s, a, at, first_key, log2_scale);
        if (a.mask != nullptr || first_key + KEY_BLOCK > a.keys) hide_keys(s, a, at, first_key);
        softmax_block(state, s, factor);

        u32 left[KEY_TILES / 2][1][4];
#pragma unroll
        for (int k = 0; k < KEY_TILES / 2; k++) pack_left(left[k], s, k);
        hold(state.output);
        begin_products();
        multiply_columns<KeyLayout>(state.output[0], left, key_tile + KEY_BYTES);
        commit_products();
        wait_products<0>();
        hold(state.output);
        if (at.lane == 0) arrive(empty + block % STAGES * 8);
    }
    meet_group(at.warp / 4);  // its queries become room for outputs
    finish<QueryLayout>(state, a, at, query_tile, factor);
#endif
}
