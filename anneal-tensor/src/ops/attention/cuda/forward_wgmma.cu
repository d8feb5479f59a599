// Attention forward by warpgroups of sm_90a.
//
// FlashAttention-2 (arXiv 2307.08691), algorithm 1. A group owns 64 queries; queries and keys are read from shared memory,
// probabilities are left factors in registers. Groups fill the matrix unit while others are at their softmax (2407.08608,
// section 3.1, without its explicit order): they wait for boxes of rows, never for each other. One thread more requests the boxes;
// blocks of threads stay for several heads, whose queries and keys arrive while the heads before are at work.
//
// attention_forward_wgmma(Arguments, ForwardMaps): as attention_forward_mma.
//   grid   as many blocks as run at once, at most ceil(queries / (64 GROUPS)) heads batch
//   block  128 (GROUPS + 1) threads
//   shared 128 D (2 GROUPS + 2 STAGES) + 1024 + 16 (2 + STAGES) bytes
// Macros beside those of common.cuh: GROUPS (warpgroups), M_TILES (1), KEY_BLOCK (64), STAGES (blocks of keys in
// flight), GROUP_REGISTERS (of a thread of a group).

struct ForwardMaps {
    RowMaps query, key, value, output;
};

constexpr int THREADS = GROUP_THREADS * (GROUPS + 1), REQUESTING_REGISTERS = 24;
constexpr int QUERY_ROWS = BOX_ROWS * GROUPS, QUERY_STAGES = 2;
static_assert(KEY_BLOCK == BOX_ROWS && M_TILES == 1, "products of 64 by 64 scores");
constexpr int TILE_BYTES = BoxLayout::BYTES;

// Shared memory: stages of queries, which outputs leave by, stages of keys with values, zeros, barriers.
constexpr int KEYS_OFFSET = QUERY_STAGES * GROUPS * TILE_BYTES;
constexpr int ZEROS_OFFSET = KEYS_OFFSET + STAGES * KEY_STAGE_BYTES;
constexpr int BARRIERS_OFFSET = ZEROS_OFFSET + BOX_ROWS * 16;

__device__ __forceinline__ u32 query_tile(u32 shared, int stage, int group) {
    return shared + (stage * GROUPS + group) * TILE_BYTES;
}
// Barriers: boxes that arrived, and stages that nobody needs any more.
__device__ __forceinline__ u32 queries_arrived(u32 shared, int stage) { return barrier(shared + BARRIERS_OFFSET, stage); }
__device__ __forceinline__ u32 queries_left(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, QUERY_STAGES + stage);
}
__device__ __forceinline__ u32 keys_arrived(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, 2 * QUERY_STAGES + stage);
}
__device__ __forceinline__ u32 keys_left(u32 shared, int stage) {
    return barrier(shared + BARRIERS_OFFSET, 2 * QUERY_STAGES + STAGES + stage);
}

__device__ __forceinline__ void make_barriers(u32 shared) {
    for (int stage = 0; stage < QUERY_STAGES; stage++) {
        make_barrier(queries_arrived(shared, stage), 1);
        make_barrier(queries_left(shared, stage), GROUPS);
    }
    for (int stage = 0; stage < STAGES; stage++) {
        make_barrier(keys_arrived(shared, stage), 1);
        make_barrier(keys_left(shared, stage), GROUPS * GROUP_WARPS);
    }
}

/// What a block of threads works on at a time: 64 GROUPS queries of a head.
struct Visit {
    int b, h, first_query;

    __device__ __forceinline__ Visit(const Arguments &a, int work) {
        const int blocks = (a.queries + QUERY_ROWS - 1) / QUERY_ROWS;
        first_query = work % blocks * QUERY_ROWS;
        h = work / blocks % a.heads;
        b = work / blocks / a.heads;
    }

    __device__ __forceinline__ static int count(const Arguments &a) {
        return (a.queries + QUERY_ROWS - 1) / QUERY_ROWS * a.heads * a.batch;
    }
};

/// The requesting thread.
__device__ __forceinline__ void request_all(const Arguments &a, const ForwardMaps &maps, u32 shared) {
    Ring<QUERY_STAGES> queries;
    Ring<STAGES> keys;
    const int blocks = key_blocks(a);
    const u32 stages = shared + KEYS_OFFSET;
#pragma unroll 1
    for (int work = blockIdx.x; work < Visit::count(a); work += gridDim.x) {
        const Visit at(a, work);
        wait_barrier(queries_left(shared, queries.stage), queries.round - 1);
        const u32 arrived = queries_arrived(shared, queries.stage);
        expect_bytes(arrived, GROUPS * TILE_BYTES);
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++)
            copy_rows_of<BoxLayout>(
                query_tile(shared, queries.stage, group), 0, maps.query, at.b, at.h, at.first_query + group * BOX_ROWS,
                arrived);
        queries.next();
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            wait_barrier(keys_left(shared, keys.stage), keys.round - 1);
            const u32 arrived = keys_arrived(shared, keys.stage);
            expect_bytes(arrived, KEY_STAGE_BYTES);
            const u32 key = key_tile(stages, keys.stage), value = value_tile(stages, keys.stage);
            copy_rows_of<BoxLayout>(key, 0, maps.key, at.b, at.h, block * KEY_BLOCK, arrived);
            copy_rows_of<BoxLayout>(value, 0, maps.value, at.b, at.h, block * KEY_BLOCK, arrived);
            keys.next();
        }
    }
}

/// Maxima are taken of unscaled scores, which needs a scale that is not negative.
__device__ __forceinline__ void negate(float (&s)[1][KEY_TILES][4]) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] = -s[0][n][i];
}

/// One block of keys.
__device__ __forceinline__ void attend(
    RowState &state, const Arguments &a, const Position &at, u32 queries, u32 keys, u32 values, u32 zeros, int first_key,
    float log2_scale, float factor) {
    float s[1][KEY_TILES][4];
    begin_products();
    multiply_rows<BoxLayout, BoxLayout>(s[0], queries, 0, keys, zeros);
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
    multiply_columns<BoxLayout>(state.output[0], left, values, true);
    commit_products();
    wait_products<0>();
    hold(state.output);
}

/// A group: its 64 queries of each visit.
__device__ __forceinline__ void attend_all(const Arguments &a, const ForwardMaps &maps, u32 shared, int group) {
    Ring<QUERY_STAGES> queries;
    Ring<STAGES> keys;
    const int blocks = key_blocks(a);
    const float log2_scale = fmaxf(fabsf(a.scale) * LOG2_E, 1e-30f);  // never infinity times zero
    const float factor = HAS_BIAS ? 1.0f : log2_scale;
    const u32 stages = shared + KEYS_OFFSET;
    const bool leads = threadIdx.x % GROUP_THREADS == 0;
#pragma unroll 1
    for (int work = blockIdx.x; work < Visit::count(a); work += gridDim.x) {
        const Visit visit(a, work);
        // Warps are counted over the block's rows.
        const Position at = {visit.b, visit.h, visit.first_query, warp_index(), int(threadIdx.x % 32)};
        const u32 tile = query_tile(shared, queries.stage, group);
        RowState state;
        clear_state(state);
        wait_barrier(queries_arrived(shared, queries.stage), queries.round);
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            wait_barrier(keys_arrived(shared, keys.stage), keys.round);
            attend(
                state, a, at, tile, key_tile(stages, keys.stage), value_tile(stages, keys.stage),
                shared + ZEROS_OFFSET, block * KEY_BLOCK, log2_scale, factor);
            arrive_as_warp(keys_left(shared, keys.stage));
            keys.next();
            if (block > 0 || work == blockIdx.x) continue;
            // Outputs of the visit before have left by now: its stage may be requested.
            if (leads) {
                wait_boxes_left();
                arrive(queries_left(shared, 1 - queries.stage));
            }
            __syncwarp();
        }
        meet_group(group);  // all products have read the queries: outputs leave by their place
        float inverse[M_TILES][2];
        last_factors(state, inverse, a, at, factor);
        __syncwarp();  // some lanes alone stored log-sums
        const int first = visit.first_query + group * BOX_ROWS;
        store_results(state.output[0], inverse[0], tile, group, maps.output, visit.b, visit.h, first);
        queries.next();
    }
    if (leads) wait_boxes_left();  // shared memory goes with the last thread
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward_wgmma(const __grid_constant__ Arguments a, const __grid_constant__ ForwardMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere an empty kernel that nobody starts
    extern __shared__ __align__(1024) unsigned char memory[];
    const u32 shared = shared_address(memory);
    const int group = warp_index() / 4;
    clear_zeros<BOX_ROWS>(shared + ZEROS_OFFSET);
    if (threadIdx.x == 0) make_barriers(shared);
    publish();
    __syncthreads();
    if (group < GROUPS) {
        take_registers<GROUP_REGISTERS>();
        attend_all(a, maps, shared, group);
    } else {
        give_registers<REQUESTING_REGISTERS>();
        if (threadIdx.x == GROUPS * GROUP_THREADS) request_all(a, maps, shared);
    }
#endif
}
