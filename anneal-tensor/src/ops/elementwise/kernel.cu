// out[i] = FUNCTION(in_0[i], in_1[i], ..), each input broadcast and of any strides; in float.
//
// inputs: addresses of INPUTS operands of element types T0, T1, ..; out of type OUT, contiguous, `count`
// elements. walk: sizes of out and strides of the inputs, with packs of PACK neighbours as the elements of the
// innermost dimension, so that an access is 16 bytes of the widest type. FUNCTION: a function of `of`, given
// by the source before this; first, second: numbers that it may use.
// Any grid; a thread computes packs of PACK elements, neighbours on neighbouring threads. What is left of a
// single dimension follows one by one. out may be the memory of an input of its layout: a thread reads
// its elements before it writes them. Deterministic.

struct Operands {
    const void *at[INPUTS];
};

template <int V, typename T>
__device__ __forceinline__ void fetch(float (&to)[V], const void *base, INDEX offset, bool repeated) {
    const T *from = static_cast<const T *>(base) + offset;
    if (repeated) {
        float value = to_float(*from);
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = value;
    } else {
        load_pack<V>(to, from);
    }
}

template <int V>
__device__ __forceinline__ void compute(const Operands &inputs, const INDEX (&offsets)[INPUTS],
                                        const bool (&repeated)[INPUTS], OUT *out, float first,
                                        float second) {
    float values[INPUTS][V], results[V];
    fetch<V, T0>(values[0], inputs.at[0], offsets[0], repeated[0]);
#if INPUTS > 1
    fetch<V, T1>(values[1], inputs.at[1], offsets[1], repeated[1]);
#endif
#if INPUTS > 2
    fetch<V, T2>(values[2], inputs.at[2], offsets[2], repeated[2]);
#endif
#if INPUTS > 3
    fetch<V, T3>(values[3], inputs.at[3], offsets[3], repeated[3]);
#endif
#pragma unroll
    for (int i = 0; i < V; ++i) {
        float in[INPUTS];
#pragma unroll
        for (int n = 0; n < INPUTS; ++n) in[n] = values[n][i];
        results[i] = FUNCTION(in, first, second);
    }
    store_pack<V>(out, results);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(Operands inputs, OUT *out, Walk<INPUTS> walk, u64 count, float first, float second) {
    INDEX stride = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
    INDEX packs = INDEX(count) / PACK;
    bool repeated[INPUTS];
#pragma unroll
    for (int n = 0; n < INPUTS; ++n) repeated[n] = walk.strides[n][0] == 0;
    for (INDEX pack = thread; pack < packs; pack += stride) {
        INDEX offsets[INPUTS];
        starts(walk, pack, offsets);
        compute<PACK>(inputs, offsets, repeated, out + pack * PACK, first, second);
    }
    for (INDEX i = packs * PACK + thread; i < INDEX(count); i += stride) {
        INDEX offsets[INPUTS];
#pragma unroll
        for (int n = 0; n < INPUTS; ++n) offsets[n] = repeated[n] ? 0 : i;
        compute<1>(inputs, offsets, repeated, out + i, first, second);
    }
}
