// Products on Hopper (sm_90a) that end in an activation: C = A B of 16-bit elements, summed in f32.
//
//   BACKWARD 0  p = C + bias, y = act(p); p only if it is not null
//   BACKWARD 1  y = C act'(p), h = act(p), partials = sums of y over the rows of a tile; h may be p
// ELEMENT, ELEMENT_IS_BF16: the type of all matrices. ACTIVATION: 1 GELU by its tanh form, 2 SiLU.
//
// A [rows, depth]; B [depth, columns], of which BACKWARD 0 has the transpose [columns, depth] in memory; both by tensor maps,
// swizzled by 128 bytes, with boxes of (columns of memory, rows of memory): A (64, TILE_ROWS), B (64, TILE_DEPTH / 2), its
// transpose (64, TILE_COLUMNS / 2). bias [columns], or null; y, p, h [rows, columns]; all contiguous, rows of whole 16
// bytes; partials [tiles of rows, columns].
//
// Grid: clusters of two blocks, as many as run at once; 512 threads. Of a block's first eight warps one copies tiles in, and
// six do the epilogue of a tile while the other eight are at the next one: these multiply, 64 rows a warpgroup. Results
// go to the epilogue by way of shared memory, rounded to elements: so it costs the matrix units only the time of writing
// 64 KB there, however long it waits for device memory. The two blocks of a cluster work on neighbouring tiles of rows and
// the same columns, and each copies half of B for both.
// Every result is summed in one order, by depth; partials by rows of a thread, then over threads. No atomics.

typedef ELEMENT T;
constexpr int CLUSTER = 2;
constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, TILE_DEPTH = 64, HALF_ROWS = 64;
constexpr int STAGES = 3, MULTIPLYING_GROUPS = 2, FIRST_MULTIPLYING = 256, THREADS = 512;
// Of a thread: what those that multiply need is given by the others.
constexpr int MULTIPLYING_REGISTERS = 168, OTHER_REGISTERS = 88;
constexpr int A_BYTES = TILE_ROWS * TILE_DEPTH * 2, STAGE_BYTES = A_BYTES + TILE_COLUMNS * TILE_DEPTH * 2;
// A panel: 64 elements (128 bytes) of each of 64 rows of memory.
constexpr int PANEL_BYTES = 64 * 128;
// Columns of one product: all at once would not fit the registers that the compiler grants before some are given away.
constexpr int SIDE = TILE_COLUMNS / 2, SIDE_BYTES = SIDE * TILE_DEPTH * 2;

// In the epilogue neighbours take 8 columns each of a row, all threads ROWS_TOGETHER rows, and a thread two such passes
// at once, PAIRS times for a tile. Its arguments are copied AHEAD pairs before it needs them.
constexpr int FINISHING_THREADS = 192, LANES = TILE_COLUMNS / 8, ROWS_TOGETHER = FINISHING_THREADS / LANES;
static_assert(FINISHING_THREADS % LANES == 0, "every thread of the epilogue has work");
constexpr int PAIRS = (TILE_ROWS + 2 * ROWS_TOGETHER - 1) / (2 * ROWS_TOGETHER), AHEAD = 2;
// The pair that is the first to need the second half of a tile, and the last to need the first.
constexpr int FIRST_OF_SECOND = HALF_ROWS / ROWS_TOGETHER / 2, LAST_OF_FIRST = (HALF_ROWS - 1) / ROWS_TOGETHER / 2;

// Shared memory: stages, results between the multiplying and the epilogue, then the bias of all tiles whose copies may be
// under way or the sums of rows and the arguments ahead, then barriers.
constexpr int STAGED = STAGES * STAGE_BYTES, EXTRA = STAGED + TILE_ROWS * TILE_COLUMNS * 2;
constexpr int BIASES = STAGES + 1, BIAS_BYTES = TILE_COLUMNS * 2;
constexpr int ARGUMENTS = EXTRA + ROWS_TOGETHER * TILE_COLUMNS * 4, PASS_BYTES = FINISHING_THREADS * 16;
constexpr int BARRIERS = BACKWARD ? ARGUMENTS + AHEAD * 2 * PASS_BYTES : EXTRA + BIASES * BIAS_BYTES;

/// A tensor map of the driver.
struct alignas(64) Map {
    u64 words[16];
};

__device__ __forceinline__ u32 full(u32 base, int stage) { return base + BARRIERS + 8 * stage; }
__device__ __forceinline__ u32 empty(u32 base, int stage) { return base + BARRIERS + 8 * (STAGES + stage); }
__device__ __forceinline__ u32 written(u32 base, int half) { return base + BARRIERS + 8 * (2 * STAGES + half); }
__device__ __forceinline__ u32 taken(u32 base, int half) { return base + BARRIERS + 8 * (2 * STAGES + 2 + half); }

/// Where a chunk of 16 bytes of a tile's results lies: exchanged by the row, so that eight rows fill all banks.
__device__ __forceinline__ u32 staged(u32 base, int row, int chunk) {
    return base + STAGED + row * (TILE_COLUMNS * 2) + (chunk ^ row % 8) * 16;
}

/// The tiles of a block: every `stride`-th from `first` on; columns first.
struct Tiles {
    int rows, columns, steps, column_tiles, count, first, stride, rank;

    __device__ __forceinline__ int row(int tile) const { return (tile / column_tiles * CLUSTER + rank) * TILE_ROWS; }
    __device__ __forceinline__ int column(int tile) const { return tile % column_tiles * TILE_COLUMNS; }
};

/// The copying thread: both operands' tiles, stage by stage, and the bias of a tile with its first stage.
__device__ __forceinline__ void copy_tiles(u32 base, const Map *a, const Map *b, const T *bias, const Tiles &tiles) {
    int stage = 0, phase = 0, bias_place = 0;
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.stride) {
        const int row = tiles.row(tile), column = tiles.column(tile);
        for (int step = 0; step < tiles.steps; step++) {
            wait_barrier(empty(base, stage), phase ^ 1);
            const u32 barrier = full(base, stage), a_tile = base + stage * STAGE_BYTES, b_tile = a_tile + A_BYTES;
            const int depth = step * TILE_DEPTH;
            if (!BACKWARD && bias != nullptr && step == 0) {
                const u32 bytes = min(TILE_COLUMNS, tiles.columns - column) * 2;
                expect_bytes(barrier, STAGE_BYTES + bytes);
                copy_bytes(base + EXTRA + bias_place * BIAS_BYTES, bias + column, bytes, barrier);
                if (++bias_place == BIASES) bias_place = 0;
            } else {
                expect_bytes(barrier, STAGE_BYTES);
            }
            copy_box(a_tile, a, depth, row, barrier);
            // Each block of a cluster copies its share of B to both.
            if (BACKWARD) {
                const int share = tiles.rank * (TILE_DEPTH / CLUSTER);
                for (int panel = 0; panel < TILE_COLUMNS / 64; panel++)
                    copy_box_to_both(
                        b_tile + panel * PANEL_BYTES + share * 128, b, column + panel * 64, depth + share, barrier);
            } else {
                const int share = tiles.rank * (TILE_COLUMNS / CLUSTER);
                copy_box_to_both(b_tile + share * 128, b, depth, column + share, barrier);
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

/// Rounds 64 rows of results, and puts them where the epilogue takes them. `bias` is in shared memory, or zero.
__device__ __forceinline__ void stage_results(const float (&c)[2][SIDE / 8][4], u32 base, int half, u32 bias) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // A lane's row and chunk in the four 8 x 8 matrices that are stored together: rows 0 and 8, chunks n and n + 1.
    const int row = half * HALF_ROWS + warp * 16 + lane % 16, chunk = lane / 16;
#pragma unroll
    for (int n = 0; n < TILE_COLUMNS / 8; n += 2) {
        u32 words[4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float add[2] = {};
            if (!BACKWARD && bias != 0) {
                const u32 pair = load_word(bias + (n + m) * 16 + lane % 4 * 4);
                add[0] = half_of_word<T>(pair, 0), add[1] = half_of_word<T>(pair, 1);
            }
            const float(&sums)[4] = c[(n + m) / (SIDE / 8)][(n + m) % (SIDE / 8)];
            words[2 * m] = word_of_pair<T>(sums[0] + add[0], sums[1] + add[1]);
            words[2 * m + 1] = word_of_pair<T>(sums[2] + add[0], sums[3] + add[1]);
        }
        store_matrices(staged(base, row, n + chunk), words);
    }
}

/// A multiplying group: 64 rows of each tile.
__device__ __forceinline__ void multiply_tiles(u32 base, bool biased, int half, const Tiles &tiles) {
    const int thread = threadIdx.x % 128;
    float c[2][SIDE / 8][4];
    int stage = 0, phase = 0, staged_phase = 0, bias_place = 0;
    const Operand a = panel_operand(base + half * PANEL_BYTES);
    const Operand b = BACKWARD ? panels_operand(base + A_BYTES, PANEL_BYTES) : panel_operand(base + A_BYTES);
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.stride) {
        for (int step = 0; step < tiles.steps; step++) {
            wait_barrier(full(base, stage), phase);
            begin_products();
#pragma unroll
            for (int k = 0; k < TILE_DEPTH / 16; k++)
#pragma unroll
                for (int side = 0; side < 2; side++)
                    Product<SIDE / 8>::shared<0, BACKWARD>(
                        c[side], a.at(stage * STAGE_BYTES + k * 32),
                        b.at(stage * STAGE_BYTES + side * SIDE_BYTES + k * (BACKWARD ? 2048 : 32)), step > 0 || k > 0);
            commit_products();
            // The products of the stage before have ended: its place is free in both blocks.
            wait_products<1>();
            if (step > 0 && thread < CLUSTER) arrive_at(empty(base, (stage + STAGES - 1) % STAGES), thread);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        wait_products<0>();
        hold(c);
        if (thread < CLUSTER) arrive_at(empty(base, (stage + STAGES - 1) % STAGES), thread);
        wait_barrier(taken(base, half), staged_phase ^ 1);
        stage_results(c, base, half, biased ? base + EXTRA + bias_place * BIAS_BYTES : 0);
        arrive(written(base, half));
        staged_phase ^= 1;
        if (++bias_place == BIASES) bias_place = 0;
    }
}

/// What a thread of the epilogue works on: 8 columns of every few rows.
struct Share {
    int lane = (threadIdx.x - 32) % LANES, together = (threadIdx.x - 32) / LANES;

    __device__ __forceinline__ int row(int pass) const { return together + pass * ROWS_TOGETHER; }
};

/// The arguments of a thread, copied to places of its own: of loads to registers a warp could tell only few apart,
/// and would wait for the last.
struct Ahead {
    const T *p;
    u32 places;
    int tile, pair = 0, place = 0, row, column;

    __device__ __forceinline__ Ahead(const T *p, u32 base, const Tiles &tiles, Share share)
        : p(p), places(base + ARGUMENTS + (threadIdx.x - 32) * 16), tile(tiles.first) {
        locate(tiles, share);
        for (int k = 0; k < AHEAD && BACKWARD; k++) request(tiles, share);
    }

    __device__ __forceinline__ void locate(const Tiles &tiles, Share share) {
        row = tile < tiles.count ? tiles.row(tile) : tiles.rows;
        column = tiles.column(tile) + share.lane * 8;
    }

    /// Starts the copies of one more pair.
    __device__ __forceinline__ void request(const Tiles &tiles, Share share) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int in_tile = share.row(2 * pair + k);
            const bool valid = in_tile < TILE_ROWS && row + in_tile < tiles.rows && column < tiles.columns;
            const i64 at = valid ? i64(row + in_tile) * tiles.columns + column : 0;
            copy_16(places + (2 * place + k) * PASS_BYTES, p + at, valid);
        }
        commit_copies();
        if (++place == AHEAD) place = 0;
        if (++pair < PAIRS) return;
        pair = 0;
        tile += tiles.stride;
        locate(tiles, share);
    }

    /// The pair that was requested first, of those whose place is not taken anew. `request` takes it.
    __device__ __forceinline__ void take(Held<T, 8> (&arguments)[2]) const {
        wait_copies<AHEAD - 1>();
#pragma unroll
        for (int k = 0; k < 2; k++) load_chunk(arguments[k].words, places + (2 * place + k) * PASS_BYTES);
    }
};

/// Two rows' results to what is stored, at `at`; sums of gradients over rows.
__device__ __forceinline__ void finish_pair(
    const Held<T, 8> (&arguments)[2], const Held<T, 8> (&results)[2], const i64 (&at)[2], const bool (&valid)[2], T *y,
    T *p, T *h, float (&sums)[8]) {
    Held<T, 8> value[2], gradient[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float values[8], gradients[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float derivative;
            value_and_derivative(BACKWARD ? arguments[k][e] : results[k][e], values[e], derivative);
            gradients[e] = results[k][e] * derivative;
            sums[e] += gradients[e];
        }
        value[k] = rounded<T>(values), gradient[k] = rounded<T>(gradients);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (BACKWARD) {
            store_16(y + at[k], gradient[k].words, valid[k]);
            store_16(h + at[k], value[k].words, valid[k]);
        } else {
            store_16(p + at[k], results[k].words, valid[k] && p != nullptr);
            store_16(y + at[k], value[k].words, valid[k]);
        }
    }
}

__device__ __forceinline__ void meet_finishing() {
    asm volatile("bar.sync 1, %0;" ::"n"(FINISHING_THREADS) : "memory");
}

/// Sums of a tile's rows, over the threads that share columns.
__device__ __forceinline__ void write_sums(
    const float (&sums)[8], char *memory, float *partials, int tile, Share share, const Tiles &tiles) {
    float *shared = reinterpret_cast<float *>(memory + EXTRA);
    const int row = tiles.row(tile), column = tiles.column(tile);
#pragma unroll
    for (int e = 0; e < 8; e++) shared[share.together * TILE_COLUMNS + share.lane * 8 + e] = sums[e];
    meet_finishing();
#pragma unroll
    for (int at = threadIdx.x - 32; at < TILE_COLUMNS; at += FINISHING_THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < ROWS_TOGETHER; part++) sum += shared[part * TILE_COLUMNS + at];
        if (row < tiles.rows && column + at < tiles.columns)
            partials[i64(row / TILE_ROWS) * tiles.columns + column + at] = sum;
    }
    meet_finishing();
}

/// The threads of the epilogue.
__device__ __forceinline__ void finish_tiles(
    u32 base, char *memory, T *y, T *p, T *h, float *partials, const Tiles &tiles) {
    const Share share;
    int phase = 0;
    Ahead ahead(p, base, tiles, share);
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.stride, phase ^= 1) {
        const int row = tiles.row(tile), column = tiles.column(tile) + share.lane * 8;
        float sums[8] = {};
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; pair++) {
            if (pair == 0) wait_barrier(written(base, 0), phase);
            if (pair == FIRST_OF_SECOND) wait_barrier(written(base, 1), phase);
            Held<T, 8> arguments[2] = {}, results[2];
            i64 at[2];
            bool valid[2];
            if (BACKWARD) ahead.take(arguments);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int in_tile = share.row(2 * pair + k);
                load_chunk(results[k].words, staged(base, in_tile, share.lane));
                valid[k] = in_tile < TILE_ROWS && row + in_tile < tiles.rows && column < tiles.columns;
                at[k] = i64(row + in_tile) * tiles.columns + column;
#pragma unroll
                for (int word = 0; word < 4; word++)
                    if (!valid[k]) results[k].words[word] = 0;
            }
            finish_pair(arguments, results, at, valid, y, p, h, sums);
            if (BACKWARD) ahead.request(tiles, share);
            if (pair == LAST_OF_FIRST) arrive(taken(base, 0));
            if (pair == PAIRS - 1) arrive(taken(base, 1));
        }
        if (BACKWARD) write_sums(sums, memory, partials, tile, share, tiles);
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERS
#endif

extern "C" __global__ void CLUSTERS __launch_bounds__(THREADS, 1)
product_wgmma(const __grid_constant__ Map a, const __grid_constant__ Map b, const T *bias, T *y, T *p, T *h,
              float *partials, int rows, int columns, int depth) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere an empty kernel that nobody starts
    extern __shared__ __align__(1024) char memory[];
    u32 base = shared_address(memory);
    // In a cluster it holds the block's rank, which would be read again at each use.
    asm volatile("" : "+r"(base));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            make_barrier(full(base, stage), 1);
            make_barrier(empty(base, stage), CLUSTER * MULTIPLYING_GROUPS);
        }
        for (int half = 0; half < 2; half++) {
            make_barrier(written(base, half), 128);
            make_barrier(taken(base, half), FINISHING_THREADS);
        }
        publish_barriers();
    }
    meet_cluster();

    Tiles tiles;
    tiles.rows = rows, tiles.columns = columns, tiles.rank = rank_in_cluster();
    tiles.steps = (depth + TILE_DEPTH - 1) / TILE_DEPTH;
    tiles.column_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    tiles.count = (rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS) * tiles.column_tiles;
    tiles.first = blockIdx.x / CLUSTER, tiles.stride = gridDim.x / CLUSTER;
    if (threadIdx.x >= FIRST_MULTIPLYING) {
        take_registers<MULTIPLYING_REGISTERS>();
        multiply_tiles(base, bias != nullptr, (threadIdx.x - FIRST_MULTIPLYING) / 128, tiles);
    } else {
        give_registers<OTHER_REGISTERS>();
        if (threadIdx.x == 0) copy_tiles(base, &a, &b, bias, tiles);
        if (threadIdx.x >= 32 && threadIdx.x < 32 + FINISHING_THREADS)
            finish_tiles(base, memory, y, p, h, partials, tiles);
    }
    // A block that ended early could be copied to by the other.
    __syncwarp();
    meet_cluster();
#endif
}
