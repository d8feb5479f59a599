// y = sum over k of coefficient_k * x_k, terms added in the order of k, in float.
//
// ELEMENT: element type of y and of all x_k, contiguous, `count` elements. terms: addresses of x_k, and the
// coefficients where each is one number. BY_SAMPLE: coefficient_k is instead table[k, b] of sample b, of
// [terms, samples] in memory, because it changes from step to step; a sample has per_sample elements.
// Any grid; a thread computes packs of PACK elements (a sample's are whole packs), then what is left one by
// one. Deterministic.

#define MOST_TERMS 16

struct Terms {
    const ELEMENT *x[MOST_TERMS];
    float coefficients[MOST_TERMS];
    u32 count;
    u32 samples;
};

template <int V>
__device__ __forceinline__ void combine(const Terms &terms, const float *table, ELEMENT *y, u64 at,
                                        u64 per_sample) {
    float sums[V];
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
#ifdef BY_SAMPLE
    table += u64(u32(at / per_sample));
#endif
#pragma unroll 4
    for (u32 k = 0; k < terms.count; ++k) {
#ifdef BY_SAMPLE
        float coefficient = table[u64(k) * terms.samples];
#else
        float coefficient = terms.coefficients[k];
#endif
        float values[V];
        load_pack<V>(values, terms.x[k] + at);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i] += coefficient * values[i];
    }
    store_pack<V>(y + at, sums);
}

extern "C" __global__ void __launch_bounds__(256)
    linear_combination(Terms terms, const float *table, ELEMENT *y, u64 count, u64 per_sample) {
    u64 stride = u64(gridDim.x) * blockDim.x, thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    u64 packs = count / PACK;
    for (u64 pack = thread; pack < packs; pack += stride)
        combine<PACK>(terms, table, y, pack * PACK, per_sample);
    for (u64 i = packs * PACK + thread; i < count; i += stride) combine<1>(terms, table, y, i, per_sample);
}
