// Product on Hopper (sm_90a) whose epilogue is work that memory bounds: C = A B for 16-bit elements, sums in f32.
//
//   EPILOGUE 0  y = C (+ bias)
//   EPILOGUE 1  p = C + bias, y = act(p), both written; p only if it is not null
//   EPILOGUE 2  y = C act'(p), h = act(p), partials = sums of y over the rows of a tile; h may be p
// ELEMENT, ELEMENT_IS_BF16: the type of all matrices. A_TRANSPOSED, B_TRANSPOSED: which dimension leads in memory, below.
// ACTIVATION: 1 GELU by its tanh form, 2 SiLU.
//
// A [rows, depth], or its transpose in memory [depth, rows] if A_TRANSPOSED; B [depth, columns], or its transpose
// in memory [columns, depth] if B_TRANSPOSED; both by tensor maps with boxes of 64 elements (128 bytes, swizzled) by
// BOX_ROWS below. bias [columns]; y, p, h [rows, columns], contiguous, rows of whole 16 bytes; partials
// [tiles of rows, columns].
//
// Grid: clusters of two blocks, as many as run at once; 384 threads. Of a block's first four warps one copies tiles in, and
// three do the epilogue of a tile while the other eight are at the next one: these multiply, 64 x 256 results each
// warpgroup. Results go to the epilogue by way of shared memory, rounded to elements: so it costs the matrix units only the
// time of writing 64 KB there, however long it waits for device memory. The two blocks of a cluster work on neighbouring
// tiles of rows and the same columns, and each copies half of B for both.
// Every result is summed in one order, by depth; partials by rows of a thread, then by warps. No atomics.

typedef ELEMENT T;
constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, TILE_DEPTH = 64;
constexpr int STAGES = 3;
constexpr int MULTIPLYING_GROUPS = 2;
constexpr int FINISHING_WARPS = 3, FINISHING_THREADS = 32 * FINISHING_WARPS;
constexpr int A_BYTES = TILE_ROWS * TILE_DEPTH * 2, B_BYTES = TILE_COLUMNS * TILE_DEPTH * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
// A panel: 64 elements (128 bytes) of each of some rows of memory.
constexpr int PANEL_BYTES = 64 * 128;
constexpr int HALF_ROWS = 64, HALF_BYTES = HALF_ROWS * TILE_COLUMNS * 2;
constexpr int STAGED = STAGES * STAGE_BYTES;
constexpr int SUMS = STAGED + 2 * HALF_BYTES;
constexpr int BARRIERS = SUMS + (EPILOGUE == 2 ? FINISHING_WARPS * TILE_COLUMNS * 4 : 0);
// Rows whose loads a thread has under way together, and the most rows of a half that a warp finishes.
constexpr int AHEAD = 4;
constexpr int WARP_ROWS = (HALF_ROWS + FINISHING_WARPS - 1) / FINISHING_WARPS;

/// A tensor map of the driver.
struct alignas(64) Map {
    u64 words[16];
};

__device__ __forceinline__ u32 full(u32 base, int stage) { return base + BARRIERS + 8 * stage; }
__device__ __forceinline__ u32 empty(u32 base, int stage) { return base + BARRIERS + 8 * (STAGES + stage); }
__device__ __forceinline__ u32 written(u32 base, int half) { return base + BARRIERS + 8 * (2 * STAGES + half); }
__device__ __forceinline__ u32 taken(u32 base, int half) { return base + BARRIERS + 8 * (2 * STAGES + 2 + half); }

/// Where a chunk of 16 bytes of a staged row lies: exchanged by the row, so that eight rows fill all banks.
__device__ __forceinline__ u32 staged(u32 base, int half, int row, int chunk) {
    return base + STAGED + half * HALF_BYTES + row * (TILE_COLUMNS * 2) + (chunk ^ row % 8) * 16;
}

__device__ __forceinline__ float exp2_of(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

/// 8 elements of a staged row.
__device__ __forceinline__ Held<T, 8> load_staged(u32 address) {
    Held<T, 8> row;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(row.words[0]), "=r"(row.words[1]), "=r"(row.words[2]), "=r"(row.words[3])
                 : "r"(address)
                 : "memory");
    return row;
}

#if ACTIVATION == 1
// GELU by its tanh form is x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ void value_and_derivative(float x, float &value, float &derivative) {
    float square = x * x;
    // -2 u log2 e, and 2 u'.
    float power = x * (-2.302208198f - 0.102943240f * square);
    float s = __fdividef(1.0f, 1.0f + exp2_of(power));
    value = x * s;
    float rest = value - value * s;
    derivative = s + rest * (1.5957691216f + 0.2140644489f * square);
}
#elif ACTIVATION == 2
__device__ __forceinline__ void value_and_derivative(float x, float &value, float &derivative) {
    float s = __fdividef(1.0f, 1.0f + exp2_of(-1.4426950409f * x));
    value = x * s;
    derivative = s + (value - value * s);
}
#endif

/// The copying thread: both operands' tiles, stage by stage.
__device__ __forceinline__ void copy_tiles(
    u32 base, const Map *a, const Map *b, u32 rank, int first, int stride, int tiles, int column_tiles, int steps) {
    int stage = 0, phase = 0;
    for (int tile = first; tile < tiles; tile += stride) {
        const int row = (tile / column_tiles * 2 + rank) * TILE_ROWS, column = tile % column_tiles * TILE_COLUMNS;
        for (int step = 0; step < steps; step++) {
            wait_barrier(empty(base, stage), phase ^ 1);
            const u32 barrier = full(base, stage), a_tile = base + stage * STAGE_BYTES;
            // Each block copies half of B to both.
            const u32 b_tile = a_tile + A_BYTES + rank * (B_BYTES / 2);
            const int depth = step * TILE_DEPTH, half = column + rank * (TILE_COLUMNS / 2);
            expect_bytes(barrier, STAGE_BYTES);
#if A_TRANSPOSED
            copy_box(a_tile, a, row, depth, barrier);
            copy_box(a_tile + PANEL_BYTES, a, row + 64, depth, barrier);
#else
            copy_box(a_tile, a, depth, row, barrier);
#endif
#if B_TRANSPOSED
            copy_box_to_both(b_tile, b, depth, half, barrier);
#else
            copy_box_to_both(b_tile, b, half, depth, barrier);
            copy_box_to_both(b_tile + PANEL_BYTES, b, half + 64, depth, barrier);
#endif
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

/// A multiplying group: 64 rows of each tile.
__device__ __forceinline__ void multiply_tiles(
    u32 base, const T *bias, int columns, int half, int first, int stride, int tiles, int column_tiles, int steps) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    float c[32][4];
    int stage = 0, phase = 0, staged_phase = 0;
    // Of K-leading operands, groups of 8 rows are 1024 bytes apart; of others, groups of 8 in depth are, and
    // panels of 64 follow each other.
    const Operand a = panel_operand(base + half * PANEL_BYTES);
    const Operand b = B_TRANSPOSED ? panel_operand(base + A_BYTES) : panels_operand(base + A_BYTES, PANEL_BYTES);
    for (int tile = first; tile < tiles; tile += stride) {
        for (int step = 0; step < steps; step++) {
            wait_barrier(full(base, stage), phase);
            begin_products();
#pragma unroll
            for (int k = 0; k < TILE_DEPTH / 16; k++)
                Product<32>::shared<A_TRANSPOSED, !B_TRANSPOSED>(
                    c, a.at(stage * STAGE_BYTES + k * (A_TRANSPOSED ? 2048 : 32)),
                    b.at(stage * STAGE_BYTES + k * (B_TRANSPOSED ? 32 : 2048)), step > 0 || k > 0);
            commit_products();
            // The products of the stage before have ended: its place is free in both blocks.
            wait_products<1>();
            if (step > 0 && thread < 2) arrive_at(empty(base, (stage + STAGES - 1) % STAGES), thread);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        wait_products<0>();
        hold(c);
        if (thread < 2) arrive_at(empty(base, (stage + STAGES - 1) % STAGES), thread);

        wait_barrier(taken(base, half), staged_phase ^ 1);
        staged_phase ^= 1;
        const int column = tile % column_tiles * TILE_COLUMNS;
        // A lane's row and chunk in the four 8 x 8 matrices that are stored together: rows 0 and 8, chunks n and n + 1.
        const int row = warp * 16 + lane % 16, chunk = lane / 16;
#pragma unroll
        for (int n = 0; n < 32; n += 2) {
            u32 words[4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float add[2] = {};
                if (EPILOGUE < 2 && bias != nullptr) {
                    const int at = column + 8 * (n + m) + 2 * (lane % 4);
                    if (at < columns) add[0] = to_float(bias[at]), add[1] = to_float(bias[at + 1]);
                }
                words[2 * m] = word_of_pair<T>(c[n + m][0] + add[0], c[n + m][1] + add[1]);
                words[2 * m + 1] = word_of_pair<T>(c[n + m][2] + add[0], c[n + m][3] + add[1]);
            }
            store_matrices(staged(base, half, row, n + chunk), words);
        }
        arrive(written(base, half));
    }
}

__device__ __forceinline__ void meet_finishing() {
    asm volatile("bar.sync 1, %0;" ::"n"(FINISHING_THREADS) : "memory");
}

/// The warps of the epilogue: one takes every third row of half a tile, a lane 8 columns.
__device__ __forceinline__ void finish_tiles(
    u32 base, char *memory, T *y, T *p, T *h, float *partials, i64 rows, i64 columns, u32 rank, int first, int stride,
    int tiles, int column_tiles) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 1;
    typedef Held<T, 8> Row;
    int phase = 0;
    for (int tile = first; tile < tiles; tile += stride, phase ^= 1) {
        const int row_tile = tile / column_tiles * 2 + rank;
        const i64 column = i64(tile % column_tiles) * TILE_COLUMNS + lane * 8;
        float sums[8] = {};
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            const i64 row = i64(row_tile) * TILE_ROWS + half * HALF_ROWS + warp;
            const i64 at = row * columns + column;
            // Rows of this thread that exist.
            const i64 left = min(i64(HALF_ROWS - warp), rows - row) + FINISHING_WARPS - 1;
            const int count = column < columns ? int(max(i64(0), left / FINISHING_WARPS)) : 0;
            Row next[AHEAD];
            if (EPILOGUE == 2)
#pragma unroll
                for (int k = 0; k < AHEAD; k++)
                    if (k < count) next[k] = hold<8>(p + at + FINISHING_WARPS * k * columns);
            wait_barrier(written(base, half), phase);
#pragma unroll
            for (int i = 0; i < WARP_ROWS; i += AHEAD) {
                Row arguments[AHEAD], results[AHEAD];
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    arguments[k] = next[k];
                    if (i + k < count)
                        results[k] = load_staged(staged(base, half, warp + FINISHING_WARPS * (i + k), lane));
                }
                if (EPILOGUE == 2)
#pragma unroll
                    for (int k = 0; k < AHEAD; k++)
                        if (i + AHEAD + k < count)
                            next[k] = hold<8>(p + at + FINISHING_WARPS * (i + AHEAD + k) * columns);
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    if (i + k >= count) continue;
                    const i64 to = at + FINISHING_WARPS * (i + k) * columns;
#if EPILOGUE == 0
                    store_held<8>(y + to, results[k]);
#elif EPILOGUE == 1
                    if (p != nullptr) store_held<8>(p + to, results[k]);
                    float values[8], unused;
#pragma unroll
                    for (int e = 0; e < 8; e++) value_and_derivative(results[k][e], values[e], unused);
                    store_held<8>(y + to, rounded<T>(values));
#else
                    float values[8], gradients[8];
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        float derivative;
                        value_and_derivative(arguments[k][e], values[e], derivative);
                        gradients[e] = results[k][e] * derivative;
                        sums[e] += gradients[e];
                    }
                    store_held<8>(y + to, rounded<T>(gradients));
                    store_held<8>(h + to, rounded<T>(values));
#endif
                }
            }
            // All of this warp's reads of the half have ended.
            __syncwarp();
            if (lane == 0) arrive(taken(base, half));
        }
#if EPILOGUE == 2
        float *shared = reinterpret_cast<float *>(memory + SUMS);
#pragma unroll
        for (int e = 0; e < 8; e += 4)
            *reinterpret_cast<Pack<float, 4> *>(shared + warp * TILE_COLUMNS + lane * 8 + e) =
                Pack<float, 4>{{sums[e], sums[e + 1], sums[e + 2], sums[e + 3]}};
        meet_finishing();
        const i64 first_column = i64(tile % column_tiles) * TILE_COLUMNS;
        if (i64(row_tile) * TILE_ROWS < rows)
#pragma unroll
            for (int at = threadIdx.x - 32; at < TILE_COLUMNS; at += FINISHING_THREADS) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < FINISHING_WARPS; w++) sum += shared[w * TILE_COLUMNS + at];
                if (first_column + at < columns) partials[row_tile * columns + first_column + at] = sum;
            }
        meet_finishing();
#endif
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
product_wgmma(const __grid_constant__ Map a, const __grid_constant__ Map b, const T *bias, T *y, T *p, T *h,
              float *partials, int rows, int columns, int depth) {
    extern __shared__ __align__(1024) char memory[];
    const u32 base = shared_address(memory);
    const int group = threadIdx.x / 128;
    const u32 rank = rank_in_cluster();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            make_barrier(full(base, stage), 1);
            // The multiplying groups of both blocks.
            make_barrier(empty(base, stage), 2 * MULTIPLYING_GROUPS);
        }
        for (int half = 0; half < 2; half++) {
            make_barrier(written(base, half), 128);
            make_barrier(taken(base, half), FINISHING_WARPS);
        }
        publish_barriers();
    }
    meet_cluster();

    const int column_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int tiles = (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS) * column_tiles;
    const int steps = (depth + TILE_DEPTH - 1) / TILE_DEPTH, first = blockIdx.x / 2, stride = gridDim.x / 2;
    if (group > 0) {
        multiply_tiles(base, bias, columns, group - 1, first, stride, tiles, column_tiles, steps);
    } else if (threadIdx.x >= 32) {
        finish_tiles(base, memory, y, p, h, partials, rows, columns, rank, first, stride, tiles, column_tiles);
    } else if (threadIdx.x == 0) {
        copy_tiles(base, &a, &b, rank, first, stride, tiles, column_tiles, steps);
    }
    // A block that ended early could be copied to by the other.
    __syncwarp();
    meet_cluster();
}
