// What a linear layer needs besides its products. ELEMENT: element type (T below).
//   activate             y = act(x)
//   activation_backward  out = g * act'(p)
//   recompute_backward   the same in the gradient's own memory, h = act(p), and partial sums of g * act'(p) over rows
//   column_sums          partial sums of g over rows
//   add_partials         sums (+)= sum over parts of partials
// ACTIVATION: 1 GELU by its tanh form, 2 SiLU; 0 where only sums are wanted.
//
// activate, activation_backward: x, y, g, p, out [count], contiguous, any grid; threads stride over packs of 16
// bytes where all pointers allow it. An output may be one of the inputs.
// recompute_backward, column_sums: matrices [rows, columns], contiguous, of which column_sums takes several, one after
// the other. Grid (columns / COLUMNS, parts, matrices) rounded up, 256 threads: a block sums part_rows rows of COLUMNS
// columns, and writes row blockIdx.y of partials [parts, columns], those of the next matrix `distance` elements on;
// where there is one part, that may be the result itself, which is added to if accumulate is set.
// add_partials: grid (columns / 32, matrices) rounded up, block 32 x 16; partials [matrices, parts, columns] to sums
// that lie `distance` elements apart.
//
// Sums are in f32 and in an order that the shape alone decides: rows of a thread, threads of a block,
// blocks of a column. No kernel uses atomics.

typedef ELEMENT T;
constexpr int PACK = 16 / sizeof(T);
constexpr int COLUMNS = 128;
constexpr int LANES = COLUMNS / PACK;
constexpr int THREADS = 256;
constexpr int ROWS = THREADS / LANES;
// Rows of a thread whose loads are under way together: 64 bytes of each thread in both kernels that sum.
constexpr int AHEAD = 4;
constexpr int PAIRS_AHEAD = 2;

// PACK elements, of which `valid` exist; all of them where packs are whole and aligned.
__device__ __forceinline__ Held<T, PACK> load_some(const T *from, int valid, bool whole) {
    if (whole) return hold<PACK>(from);
    float values[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] = i < valid ? to_float(from[i]) : 0.0f;
    return rounded<T>(values);
}

__device__ __forceinline__ void store_some(T *to, const float (&values)[PACK], int valid, bool whole) {
    if (whole) {
        store_pack<PACK>(to, values);
        return;
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i)
        if (i < valid) to[i] = from_float<T>(values[i]);
}

// Adds up the threads of a block that share columns, and writes the block's sums.
__device__ __forceinline__ void
write_sums(const float (&sums)[PACK], float *partials, i64 columns, i64 distance, bool accumulate) {
    __shared__ float shared[ROWS][COLUMNS];
    int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
#pragma unroll
    for (int i = 0; i < PACK; ++i) shared[row][lane * PACK + i] = sums[i];
    __syncthreads();
    i64 column = i64(blockIdx.x) * COLUMNS + threadIdx.x;
    if (threadIdx.x >= COLUMNS || column >= columns) return;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum += shared[r][threadIdx.x];
    float *to = partials + i64(blockIdx.z) * distance + i64(blockIdx.y) * columns + column;
    *to = accumulate ? *to + sum : sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
column_sums(const T *g, float *partials, i64 rows, i64 columns, i64 part_rows, i64 distance, int accumulate) {
    g += i64(blockIdx.z) * rows * columns;
    i64 column = i64(blockIdx.x) * COLUMNS + (threadIdx.x % LANES) * PACK;
    int valid = int(min(i64(PACK), max(i64(0), columns - column)));
    bool whole = columns % PACK == 0 && is_aligned<PACK>(g);
    i64 end = min(rows, (i64(blockIdx.y) + 1) * part_rows);
    float sums[PACK] = {};
    for (i64 row = i64(blockIdx.y) * part_rows + threadIdx.x / LANES; valid > 0 && row < end; row += ROWS * AHEAD) {
        Held<T, PACK> packs[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            packs[k] = {};
            if (row + k * ROWS < end) packs[k] = load_some(g + (row + k * ROWS) * columns + column, valid, whole);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
#pragma unroll
            for (int i = 0; i < PACK; ++i) sums[i] += packs[k][i];
    }
    write_sums(sums, partials, columns, distance, accumulate);
}

extern "C" __global__ void __launch_bounds__(512)
add_partials(const float *partials, float *sums, int parts, i64 columns, i64 distance, int accumulate) {
    __shared__ float shared[16][32];
    partials += i64(blockIdx.y) * parts * columns;
    sums += i64(blockIdx.y) * distance;
    i64 column = i64(blockIdx.x) * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int part = threadIdx.y; part < parts; part += 16) sum += partials[part * columns + column];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) return;
    sum = 0.0f;
#pragma unroll
    for (int r = 0; r < 16; ++r) sum += shared[r][threadIdx.x];
    sums[column] = accumulate ? sums[column] + sum : sum;
}

#if ACTIVATION > 0
extern "C" __global__ void activate(const T *x, T *y, i64 count) {
    bool aligned = is_aligned<PACK>(x) && is_aligned<PACK>(y);
    i64 first = i64(blockIdx.x) * blockDim.x + threadIdx.x, stride = i64(gridDim.x) * blockDim.x;
    i64 packs = aligned ? count / PACK : 0;
    float unused;
    for (i64 pack = first; pack < packs; pack += stride) {
        float values[PACK];
        load_pack<PACK>(values, x + PACK * pack);
#pragma unroll
        for (int i = 0; i < PACK; ++i) value_and_derivative(values[i], values[i], unused);
        store_pack<PACK>(y + PACK * pack, values);
    }
    for (i64 i = PACK * packs + first; i < count; i += stride) {
        float value;
        value_and_derivative(to_float(x[i]), value, unused);
        y[i] = from_float<T>(value);
    }
}

extern "C" __global__ void activation_backward(const T *g, const T *p, T *out, i64 count) {
    bool aligned = is_aligned<PACK>(g) && is_aligned<PACK>(p) && is_aligned<PACK>(out);
    i64 first = i64(blockIdx.x) * blockDim.x + threadIdx.x, stride = i64(gridDim.x) * blockDim.x;
    i64 packs = aligned ? count / PACK : 0;
    float unused, derivative;
    for (i64 pack = first; pack < packs; pack += stride) {
        float values[PACK], arguments[PACK];
        load_pack<PACK>(values, g + PACK * pack);
        load_pack<PACK>(arguments, p + PACK * pack);
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            value_and_derivative(arguments[i], unused, derivative);
            values[i] *= derivative;
        }
        store_pack<PACK>(out + PACK * pack, values);
    }
    for (i64 i = PACK * packs + first; i < count; i += stride) {
        value_and_derivative(to_float(p[i]), unused, derivative);
        out[i] = from_float<T>(to_float(g[i]) * derivative);
    }
}

// h may be p.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
recompute_backward(
    T *g, const T *p, T *h, float *partials, i64 rows, i64 columns, i64 part_rows, i64 distance, int accumulate) {
    i64 column = i64(blockIdx.x) * COLUMNS + (threadIdx.x % LANES) * PACK;
    int valid = int(min(i64(PACK), max(i64(0), columns - column)));
    bool whole = columns % PACK == 0 && is_aligned<PACK>(g) && is_aligned<PACK>(p) && is_aligned<PACK>(h);
    i64 end = min(rows, (i64(blockIdx.y) + 1) * part_rows);
    float sums[PACK] = {};
    for (i64 row = i64(blockIdx.y) * part_rows + threadIdx.x / LANES; valid > 0 && row < end; row += ROWS * PAIRS_AHEAD) {
        Held<T, PACK> gradients[PAIRS_AHEAD], arguments[PAIRS_AHEAD];
#pragma unroll
        for (int k = 0; k < PAIRS_AHEAD; ++k) {
            i64 at = (row + k * ROWS) * columns + column;
            if (row + k * ROWS >= end) continue;
            gradients[k] = load_some(g + at, valid, whole);
            arguments[k] = load_some(p + at, valid, whole);
        }
#pragma unroll
        for (int k = 0; k < PAIRS_AHEAD; ++k) {
            i64 at = (row + k * ROWS) * columns + column;
            if (row + k * ROWS >= end) continue;
            float values[PACK], products[PACK];
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                float derivative;
                value_and_derivative(arguments[k][i], values[i], derivative);
                products[i] = gradients[k][i] * derivative;
                sums[i] += products[i];
            }
            store_some(g + at, products, valid, whole);
            store_some(h + at, values, valid, whole);
        }
    }
    write_sums(sums, partials, columns, distance, accumulate);
}
#endif
