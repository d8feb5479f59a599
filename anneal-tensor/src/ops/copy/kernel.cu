// target[i] = source[i] for any strides on either side, in words of BYTES bytes; of up to PIECES pairs at once.
//
// A piece: source and target, SIZE bytes an element (without a source the target becomes zeros). Layouts are of each
// piece, or one for all (LAYOUTS 1): the count of words; walk: sizes, and strides of source and target in elements,
// with a word's elements as one element of the innermost dimension. The widest word is used whose elements are
// neighbours and aligned on both sides of every piece.
// Grid: any number of blocks, and in y the number of pieces; a thread has several loads under way before it stores.
// Deterministic; no target overlaps another or a source.

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

struct Layout {
    u64 count;
    Walk<2> walk;
};

struct Pieces {
    Layout layouts[LAYOUTS];
    struct {
        const u8 *source;
        u8 *target;
    } list[PIECES];
};

extern "C" __global__ void __launch_bounds__(256) copy_strided(const __grid_constant__ Pieces pieces) {
    const u32 index = PIECES == 1 ? 0 : blockIdx.y;
    const Layout &layout = pieces.layouts[LAYOUTS == 1 ? 0 : index];
    const u8 *__restrict__ source = pieces.list[index].source;
    u8 *__restrict__ target = pieces.list[index].target;
    INDEX stride = gridDim.x * blockDim.x, total = INDEX(layout.count);
    for (INDEX first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += AHEAD * stride) {
        Word words[AHEAD];
        INDEX offsets[AHEAD][2];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            INDEX position = first + ahead * stride;
            if (position >= total) break;
            starts(layout.walk, position, offsets[ahead]);
            words[ahead] = Word{};
            if (source) words[ahead] = *reinterpret_cast<const Word *>(source + u64(offsets[ahead][0]) * SIZE);
        }
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            if (first + ahead * stride >= total) break;
            *reinterpret_cast<Word *>(target + u64(offsets[ahead][1]) * SIZE) = words[ahead];
        }
    }
}
