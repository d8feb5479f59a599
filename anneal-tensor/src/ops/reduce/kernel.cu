// Sums and maxima over dimensions of a contiguous tensor, in float: out = factor * (sum of x) (+ out).
//
// ELEMENT: x's element type. MAXIMUM: the maximum instead of the sum; a NaN among the elements is the maximum.
// kept, gone: sizes and strides of the dimensions that stay and that go (Axes in mod.rs), with PACK
// neighbours of the innermost dimension as one. A group is what one index of the dimensions that stay gives;
// it is cut into `parts` parts of `part` positions each, whose results lie at out[group * parts + part ..]; a
// second launch adds those up. The order of additions depends on the shape alone: deterministic.

#ifdef MAXIMUM
#define START __int_as_float(0xff800000)
__device__ __forceinline__ float combine(float a, float b) { return b > a || b != b ? b : a; }
#else
#define START 0.0f
__device__ __forceinline__ float combine(float a, float b) { return a + b; }
#endif

#define THREADS 256

struct Finish {
    float factor;
    u32 accumulate;
};

__device__ __forceinline__ void finish(float *out, float value, Finish how) {
    value *= how.factor;
    *out = how.accumulate ? value + *out : value;
}

__device__ __forceinline__ float combine_warp(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

#ifdef LANES
// The innermost dimension goes: a number for each group. LANES threads (32 or THREADS) take a part;
// grid: parts of all groups over THREADS / LANES. kept, gone: the innermost dimension is the first of
// gone; count: positions of a group.
extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_rows(const ELEMENT *x, float *out, Walk<1> kept, Walk<1> gone, u64 groups, u64 count, u64 parts, u64 part,
                Finish how) {
    INDEX task = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    if (task >= INDEX(groups * parts)) return;
    int lane = threadIdx.x % LANES;
    INDEX base[1];
    starts(kept, task / INDEX(parts), base);
    INDEX first = task % INDEX(parts) * INDEX(part);
    INDEX end = first + INDEX(part) < INDEX(count) ? first + INDEX(part) : INDEX(count);
    float results[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) results[i] = START;
#pragma unroll 4
    for (INDEX position = first + lane; position < end; position += LANES) {
        INDEX offset[1];
        starts(gone, position, offset);
        float values[PACK];
        load_pack<PACK>(values, x + base[0] + offset[0]);
#pragma unroll
        for (int i = 0; i < PACK; ++i) results[i] = combine(results[i], values[i]);
    }
    float result = results[0];
#pragma unroll
    for (int i = 1; i < PACK; ++i) result = combine(result, results[i]);
    result = combine_warp(result);
#if LANES > 32
    __shared__ float of_warps[LANES / 32];
    if (lane % 32 == 0) of_warps[lane / 32] = result;
    __syncthreads();
    if (lane >= 32) return;
    result = combine_warp(lane < LANES / 32 ? of_warps[lane] : START);
#endif
    if (lane == 0) finish(out + task, result, how);
}
#else
// The innermost dimension stays: a row of `inner` numbers for each group. Blocks of (columns, rows) threads,
// both powers of two; grid: tiles of columns, then parts, then groups. gone: no innermost dimension in it;
// count: rows of a group.
extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_columns(const ELEMENT *x, float *out, Walk<1> kept, Walk<1> gone, u64 inner, u64 count, u64 parts,
                   u64 part, Finish how) {
    __shared__ float shared[PACK][THREADS];
    INDEX tiles = (INDEX(inner) / PACK + blockDim.x - 1) / blockDim.x;
    INDEX column = (blockIdx.x % tiles * blockDim.x + threadIdx.x) * PACK;
    INDEX task = blockIdx.x / tiles;
    bool active = column < INDEX(inner);
    INDEX base[1];
    starts(kept, task / INDEX(parts), base);
    INDEX first = task % INDEX(parts) * INDEX(part);
    INDEX end = first + INDEX(part) < INDEX(count) ? first + INDEX(part) : INDEX(count);
    float results[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) results[i] = START;
    if (active) {
#pragma unroll 4
        for (INDEX row = first + threadIdx.y; row < end; row += blockDim.y) {
            INDEX offset[1];
            starts(gone, row, offset);
            float values[PACK];
            load_pack<PACK>(values, x + base[0] + offset[0] + column);
#pragma unroll
            for (int i = 0; i < PACK; ++i) results[i] = combine(results[i], values[i]);
        }
    }
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PACK; ++i) shared[i][thread] = results[i];
    for (u32 rows = blockDim.y / 2; rows > 0; rows /= 2) {
        __syncthreads();
        if (threadIdx.y < rows) {
            int other = thread + rows * blockDim.x;
#pragma unroll
            for (int i = 0; i < PACK; ++i) shared[i][thread] = combine(shared[i][thread], shared[i][other]);
        }
    }
    if (!active || threadIdx.y > 0) return;
#pragma unroll
    for (int i = 0; i < PACK; ++i) finish(out + task * INDEX(inner) + column + i, shared[i][thread], how);
}
#endif
