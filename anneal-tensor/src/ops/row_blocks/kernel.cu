// The sums of runs of rows added up: target[group, column] (+)= sum over the group's runs of partial[group, run, which, column].
//
// partial [groups, runs, sums, width] f32. Up to three targets [groups, width], contiguous; a null one is left out. A target is f32 if
// its flag `wide` is set, else of VECTOR; if `accumulate` is set (f32 only), the sum is added to what is there.
//
// Geometry: grid x is groups times `column_blocks`; block (columns, slices). Each slice takes every slices-th run; there
// are several only where runs are many. Deterministic: runs are added in order within a slice, then the slices in order.

struct Target {
    void *gradient;
    int wide;
    int accumulate;
};

__device__ __forceinline__ void write(Target target, i64 at, float sum) {
    if (target.wide) {
        float *to = static_cast<float *>(target.gradient) + at;
        *to = target.accumulate ? *to + sum : sum;
    } else {
        static_cast<VECTOR *>(target.gradient)[at] = from_float<VECTOR>(sum);
    }
}

extern "C" __global__ void sum_runs(
    const float *__restrict__ partial, Target first, Target second, Target third, u32 runs, u32 sums, u32 width,
    u32 column_blocks) {
    __shared__ float slices[SLICES][COLUMNS];
    u32 group = blockIdx.x / column_blocks;
    u32 column = blockIdx.x % column_blocks * COLUMNS + threadIdx.x;
    Target targets[3] = {first, second, third};
#pragma unroll
    for (int which = 0; which < 3; ++which) {
        if (!targets[which].gradient) continue;
        float sum = 0.0f;
        if (column < width)
#pragma unroll 4
            for (u32 run = threadIdx.y; run < runs; run += SLICES)
                sum += partial[((i64(group) * runs + run) * sums + which) * width + column];
        if (SLICES > 1) {
            slices[threadIdx.y][threadIdx.x] = sum;
            __syncthreads();
            sum = 0.0f;
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice) sum += slices[slice][threadIdx.x];
            __syncthreads();
        }
        if (threadIdx.y == 0 && column < width) write(targets[which], i64(group) * width + column, sum);
    }
}
