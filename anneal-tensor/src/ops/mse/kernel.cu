// Sums of squared differences of parts of samples: sums[b, s] = sum over the part of (p - t)^2, in float.
//
// PREDICTION, TARGET: element types of p and t, both [samples, per_sample], contiguous; sums f32 [samples, parts], with
// PART elements to a part. Grid: (parts, samples striding over the y dimension). A second launch (reduce) adds
// the parts up. Deterministic: sums by threads, warps and block in a fixed order.

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
    squared_error(const PREDICTION *p, const TARGET *t, float *sums, i64 samples, i64 per_sample) {
    __shared__ float of_warps[THREADS / 32];
    i64 first = i64(blockIdx.x) * PART;
    i64 end = first + PART < per_sample ? first + PART : per_sample;
    for (i64 sample = blockIdx.y; sample < samples; sample += gridDim.y) {
        float sum = 0.0f;
#pragma unroll 4
        for (i64 i = sample * per_sample + first + threadIdx.x; i < sample * per_sample + end; i += THREADS) {
            float difference = to_float(p[i]) - to_float(t[i]);
            sum += difference * difference;
        }
        sum = warp_sum(sum);
        __syncthreads();
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x < 32) {
            sum = warp_sum(threadIdx.x < THREADS / 32 ? of_warps[threadIdx.x] : 0.0f);
            if (threadIdx.x == 0) sums[sample * gridDim.x + blockIdx.x] = sum;
        }
    }
}
