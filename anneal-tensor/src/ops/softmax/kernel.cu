// Softmax of rows: y = e^(x - max) / sum of e^(x - max); backward dx = y * (g - sum of g * y), in float.
//
// ELEMENT: element type; x, y, g, dx [rows, width], contiguous; dx may be the memory of g. LANES threads (32 or
// THREADS) take a row; grid: rows over THREADS / LANES. A row is read again for each pass, from the cache.
// Neighbours on neighbouring threads. Deterministic: sums by lanes, then in a tree.

#define THREADS 256

template <typename Combine>
__device__ __forceinline__ float of_row(float value, float (&of_warps)[THREADS / 32], Combine combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
#if LANES > 32
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < LANES / 32; ++warp) value = combine(value, of_warps[warp]);
#endif
    return value;
}

__device__ __forceinline__ i64 own_row() {
    return i64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
}

extern "C" __global__ void __launch_bounds__(THREADS) softmax(const ELEMENT *x, ELEMENT *y, i64 rows, i64 width) {
    __shared__ float of_warps[THREADS / 32];
    i64 row = own_row();
    if (row >= rows) return;
    x += row * width;
    y += row * width;
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto plus = [](float a, float b) { return a + b; };
    // Passes over NaN, which appears again in the exponentials.
    float largest = __int_as_float(0xff800000);
#pragma unroll 4
    for (i64 i = threadIdx.x % LANES; i < width; i += LANES) largest = fmaxf(largest, to_float(x[i]));
    largest = of_row(largest, of_warps, larger);
    float sum = 0.0f;
#pragma unroll 4
    for (i64 i = threadIdx.x % LANES; i < width; i += LANES) sum += exp_of(to_float(x[i]) - largest);
    float factor = quotient(1.0f, of_row(sum, of_warps, plus));
    for (i64 i = threadIdx.x % LANES; i < width; i += LANES)
        y[i] = from_float<ELEMENT>(exp_of(to_float(x[i]) - largest) * factor);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_gradient(const ELEMENT *g, const ELEMENT *y, ELEMENT *dx, i64 rows, i64 width) {
    __shared__ float of_warps[THREADS / 32];
    i64 row = own_row();
    if (row >= rows) return;
    g += row * width;
    y += row * width;
    dx += row * width;
    float sum = 0.0f;
#pragma unroll 4
    for (i64 i = threadIdx.x % LANES; i < width; i += LANES) sum += to_float(g[i]) * to_float(y[i]);
    sum = of_row(sum, of_warps, [](float a, float b) { return a + b; });
    for (i64 i = threadIdx.x % LANES; i < width; i += LANES)
        dx[i] = from_float<ELEMENT>(to_float(y[i]) * (to_float(g[i]) - sum));
}
