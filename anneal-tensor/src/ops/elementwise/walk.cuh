// Walking strided memory; goes before the kernels that do. INDEX: u32, or u64 where 32 bits do not reach.

#define MOST_AXES 6

// Dimensions that N operands share, innermost first; strides in elements.
template <int N> struct Walk {
    u64 axes;
    u64 sizes[MOST_AXES];
    u64 strides[N][MOST_AXES];
};

// Where each operand's element at this position lies.
template <int N>
__device__ __forceinline__ void starts(const Walk<N> &walk, INDEX position, INDEX (&offsets)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) offsets[n] = 0;
#pragma unroll
    for (int axis = 0; axis < MOST_AXES; ++axis) {
        // The outermost dimension needs no division.
        bool last = axis + 1 >= walk.axes;
        INDEX index = last ? position : position % INDEX(walk.sizes[axis]);
#pragma unroll
        for (int n = 0; n < N; ++n) offsets[n] += index * INDEX(walk.strides[n][axis]);
        if (last) break;
        position /= INDEX(walk.sizes[axis]);
    }
}
