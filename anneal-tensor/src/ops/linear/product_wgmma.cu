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
// Grid: clusters of two blocks, as many as run at once; 640 threads. A block's first eight warps do the epilogue of a tile while
// the next eight are at the next one: these multiply, 64 rows a warpgroup. Of the last four one copies tiles in. Results
// go to the epilogue by way of shared memory, rounded to elements: so it costs the matrix units only the time of writing
// 64 KB there, however long it waits for device memory. Two warps on each of a multiprocessor's four schedulers do the epilogue:
// its arithmetic is what they wait for, and uneven shares would leave schedulers idle. The two blocks of a cluster work on
// neighbouring tiles of rows and the same columns, and each copies half of B for both.
// Every result is summed in one order, by depth; partials by rows of a thread, then over threads. No atomics.

typedef ELEMENT T;
constexpr int CLUSTER = 2;
constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, TILE_DEPTH = 64, HALF_ROWS = 64;
constexpr int STAGES = 3, MULTIPLYING_GROUPS = 2;
// Warps of the epilogue, then those that multiply, then the one that copies.
constexpr int FINISHING_WARPS = 8, FINISHING_THREADS = 32 * FINISHING_WARPS;
constexpr int FIRST_COPYING = FINISHING_THREADS + MULTIPLYING_GROUPS * 128, THREADS = FIRST_COPYING + 128;
// Of a thread: what those that multiply need is given by the others.
constexpr int MULTIPLYING_REGISTERS = 160, FINISHING_REGISTERS = 64, COPYING_REGISTERS = 32;
constexpr int A_BYTES = TILE_ROWS * TILE_DEPTH * 2, STAGE_BYTES = A_BYTES + TILE_COLUMNS * TILE_DEPTH * 2;
// A panel: 64 elements (128 bytes) of each of 64 rows of memory.
constexpr int PANEL_BYTES = 64 * 128;
// Columns of one product: all at once would not fit the registers that the compiler grants before some are given away.
constexpr int SIDE = TILE_COLUMNS / 2, SIDE_BYTES = SIDE * TILE_DEPTH * 2;

// In the epilogue a warp takes a row at a time, 8 columns a lane.
constexpr int PASSES = TILE_ROWS / FINISHING_WARPS, HALF_PASSES = HALF_ROWS / FINISHING_WARPS;
// Products over few elements leave the epilogue little time: lines of arguments are brought to the second level cache so many
// rows ahead. Deeper ones would be slower for it.
constexpr int ROWS_BROUGHT = 4, MOST_STEPS_TO_BRING = 8;
static_assert(TILE_COLUMNS == 32 * 8 && TILE_COLUMNS == FINISHING_THREADS, "a warp has a row, a thread the sum of a column");

// Shared memory: stages, results between the multiplying and the epilogue, then the bias of all tiles whose copies may be
// under way or the sums of the warps' rows, of two tiles in turns, then barriers.
constexpr int STAGED = STAGES * STAGE_BYTES, EXTRA = STAGED + TILE_ROWS * TILE_COLUMNS * 2;
constexpr int BIASES = STAGES + 1, BIAS_BYTES = TILE_COLUMNS * 2, SUMS_BYTES = FINISHING_WARPS * TILE_COLUMNS * 4;
constexpr int BARRIERS = EXTRA + (BACKWARD ? 2 * SUMS_BYTES : BIASES * BIAS_BYTES);

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
            __syncwarp();  // two threads alone arrive
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        wait_products<0>();
        hold(c);
        if (thread < CLUSTER) arrive_at(empty(base, (stage + STAGES - 1) % STAGES), thread);
        __syncwarp();
        wait_barrier(taken(base, half), staged_phase ^ 1);
        stage_results(c, base, half, biased ? base + EXTRA + bias_place * BIAS_BYTES : 0);
        arrive(written(base, half));
        staged_phase ^= 1;
        if (++bias_place == BIASES) bias_place = 0;
    }
}

/// In how many rows of a tile a thread of the epilogue has 8 columns; its rows are FINISHING_WARPS apart.
__device__ __forceinline__ int rows_of_thread(const Tiles &tiles, int tile) {
    const int row = tiles.row(tile) + threadIdx.x / 32, column = tiles.column(tile) + threadIdx.x % 32 * 8;
    if (column >= tiles.columns || row >= tiles.rows) return 0;
    return (tiles.rows - row + FINISHING_WARPS - 1) / FINISHING_WARPS;
}

/// 16 bytes of memory that nobody needs again soon: they make way in the caches for the operands. If `valid`, without a branch; else
/// zeros are loaded.
__device__ __forceinline__ void load_passing(u32 (&words)[4], const void *from, bool valid) {
    asm volatile(
        "{.reg .pred valid; setp.ne.b32 valid, %5, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@valid ld.global.cs.v4.b32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(from), "r"(int(valid))
        : "memory");
}

__device__ __forceinline__ void store_passing(void *to, const u32 (&words)[4], bool valid) {
    asm volatile(
        "{.reg .pred valid; setp.ne.b32 valid, %5, 0; @valid st.global.cs.v4.b32 [%0], {%1,%2,%3,%4};}" ::"l"(to),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(int(valid))
        : "memory");
}

/// One row's results to what is stored, at `at`; sums of gradients over rows.
__device__ __forceinline__ void finish_row(
    const Held<T, 8> &argument, const Held<T, 8> &results, i64 at, bool valid, T *y, T *p, T *h, float (&sums)[8]) {
    float values[8], gradients[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        float derivative;
        value_and_derivative(BACKWARD ? argument[e] : results[e], values[e], derivative);
        gradients[e] = results[e] * derivative;
        sums[e] += gradients[e];
    }
    const Held<T, 8> value = rounded<T>(values), gradient = rounded<T>(gradients);
    if (BACKWARD) {
        store_passing(y + at, gradient.words, valid);
        store_passing(h + at, value.words, valid);
    } else {
        store_passing(p + at, results.words, valid && p != nullptr);
        store_passing(y + at, value.words, valid);
    }
}

/// Sums of a tile's rows, over the warps. `sums` of a tile lie where those of the tile before are not.
__device__ __forceinline__ void write_sums(
    const float (&sums)[8], float *shared, float *partials, int tile, const Tiles &tiles) {
    const int row = tiles.row(tile), column = tiles.column(tile) + threadIdx.x;
    float *own = shared + threadIdx.x / 32 * TILE_COLUMNS + threadIdx.x % 32 * 8;
#pragma unroll
    for (int e = 0; e < 8; e += 4)
        *reinterpret_cast<float4 *>(own + e) = {sums[e], sums[e + 1], sums[e + 2], sums[e + 3]};
    asm volatile("bar.sync 1, %0;" ::"n"(FINISHING_THREADS) : "memory");
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < FINISHING_WARPS; warp++) sum += shared[warp * TILE_COLUMNS + threadIdx.x];
    if (row < tiles.rows && column < tiles.columns) partials[i64(row / TILE_ROWS) * tiles.columns + column] = sum;
}

__device__ __forceinline__ i64 first_place(const Tiles &tiles, int tile) {
    return i64(tiles.row(tile) + threadIdx.x / 32) * tiles.columns + tiles.column(tile) + threadIdx.x % 32 * 8;
}

/// Starts bringing this thread's line to the second level cache.
__device__ __forceinline__ void bring_line(const T *from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

/// The threads of the epilogue. An argument is loaded while the row before it is finished.
__device__ __forceinline__ void finish_tiles(
    u32 base, char *memory, T *y, T *p, T *h, float *partials, const Tiles &tiles) {
    const i64 distance = i64(FINISHING_WARPS) * tiles.columns;
    const u32 own = staged(base, threadIdx.x / 32, threadIdx.x % 32);
    const bool brings = BACKWARD && tiles.steps <= MOST_STEPS_TO_BRING;
    int phase = 0;
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.stride, phase ^= 1) {
        const int count = rows_of_thread(tiles, tile), next = tile + tiles.stride;
        i64 at = first_place(tiles, tile);
        if (brings && next < tiles.count)
            for (int row = 0; row < min(ROWS_BROUGHT, rows_of_thread(tiles, next)); row++)
                bring_line(p + first_place(tiles, next) + row * distance);
        float sums[8] = {};
        Held<T, 8> coming{};
        if (BACKWARD) load_passing(coming.words, p + at, count > 0);
#pragma unroll 2
        for (int pass = 0; pass < PASSES; pass++, at += distance) {
            if (pass % HALF_PASSES == 0) wait_barrier(written(base, pass / HALF_PASSES), phase);
            const Held<T, 8> argument = coming;
            if (BACKWARD) load_passing(coming.words, p + at + distance, pass + 1 < PASSES && pass + 1 < count);
            if (brings && pass + ROWS_BROUGHT < min(PASSES, count)) bring_line(p + at + ROWS_BROUGHT * distance);
            Held<T, 8> results;
            load_chunk(results.words, own + pass * FINISHING_WARPS * TILE_COLUMNS * 2);
            finish_row(argument, results, at, pass < count, y, p, h, sums);
            if (pass % HALF_PASSES == HALF_PASSES - 1) arrive(taken(base, pass / HALF_PASSES));
        }
        if (BACKWARD)
            write_sums(sums, reinterpret_cast<float *>(memory + EXTRA + phase * SUMS_BYTES), partials, tile, tiles);
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
    __syncwarp();
    meet_cluster();

    Tiles tiles;
    tiles.rows = rows, tiles.columns = columns, tiles.rank = rank_in_cluster();
    tiles.steps = (depth + TILE_DEPTH - 1) / TILE_DEPTH;
    tiles.column_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    tiles.count = (rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS) * tiles.column_tiles;
    tiles.first = blockIdx.x / CLUSTER, tiles.stride = gridDim.x / CLUSTER;
    if (threadIdx.x >= FIRST_COPYING) {
        give_registers<COPYING_REGISTERS>();
        if (threadIdx.x == FIRST_COPYING) copy_tiles(base, &a, &b, bias, tiles);
    } else if (threadIdx.x >= FINISHING_THREADS) {
        take_registers<MULTIPLYING_REGISTERS>();
        multiply_tiles(base, bias != nullptr, (threadIdx.x - FINISHING_THREADS) / 128, tiles);
    } else {
        give_registers<FINISHING_REGISTERS>();
        finish_tiles(base, memory, y, p, h, partials, tiles);
    }
    // A block that ended early could be copied to by the other.
    __syncwarp();
    meet_cluster();
#endif
}
