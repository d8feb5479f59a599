// target[i] = source[i] for any strides on either side, in words of BYTES bytes.
//
// source, target: SIZE bytes an element; walk: sizes, and strides of source and target in elements, with a word's
// elements as one element of the innermost dimension; count words. The widest word is used whose
// elements are neighbours and aligned on both sides.
// Any grid; a thread has several loads under way before it stores. Deterministic; the sides do not overlap.

#if BYTES == 16
struct alignas(16) Word {
    u64 halves[2];
};
#elif BYTES == 8
typedef u64 Word;
#elif BYTES == 4
typedef u32 Word;
#elif BYTES == 2
typedef u16 Word;
#else
typedef u8 Word;
#endif

#define AHEAD 4

extern "C" __global__ void __launch_bounds__(256)
    copy_strided(const u8 *__restrict__ source, u8 *__restrict__ target, Walk<2> walk, u64 count) {
    INDEX stride = gridDim.x * blockDim.x, total = INDEX(count);
    for (INDEX first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += AHEAD * stride) {
        Word words[AHEAD];
        INDEX offsets[AHEAD][2];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            INDEX position = first + ahead * stride;
            if (position >= total) break;
            starts(walk, position, offsets[ahead]);
            words[ahead] = *reinterpret_cast<const Word *>(source + u64(offsets[ahead][0]) * SIZE);
        }
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            if (first + ahead * stride >= total) break;
            *reinterpret_cast<Word *>(target + u64(offsets[ahead][1]) * SIZE) = words[ahead];
        }
    }
}
