// Attention on CUDA, rows of a head in shared memory: asynchronous copies in, whole chunks out.
//
// Text between common.cuh and the kernels of tensor cores. A row is HEAD_DIM / 8 chunks of 16
// bytes; where a chunk of a row lies in a tile is the layout's choice, LAYOUT::at(row, chunk). Offsets within a
// head fit 32 bits (rows times their stride, in elements).

constexpr int CHUNKS = HEAD_DIM / 8;
constexpr int WHOLE = CHUNKS / 8 * 8, REMAINDER = CHUNKS % 8;  // eight lanes take whole 128 bytes, fewer the rest
constexpr int REMAINDER_LANES = REMAINDER > 4 ? 8 : REMAINDER > 2 ? 4 : REMAINDER > 1 ? 2 : 1;
// Threads that share a row's results, or the copy of a row that they read themselves.
constexpr int LANES_PER_ROW = 4;
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 128, "head dim");
static_assert(sizeof(element) == 2, "tensor cores take bf16 or f16");

/// This thread's warp, in a form that the compiler knows to be the same for all of it.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

/// Starts copying chunks `FIRST..FIRST + COUNT` of rows; `LANES` neighbours share a row.
template <class LAYOUT, int ROWS, int THREADS, int LANES, int FIRST, int COUNT>
__device__ __forceinline__ void copy_chunks(u32 tile, const element *head, u32 stride, int first, int limit) {
    constexpr int STEP = THREADS / LANES;
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int start = 0; start < ROWS; start += STEP) {
        const int row = start + threadIdx.x / LANES;
        const bool valid = first + row < limit;
        const u32 offset = valid ? (first + row) * stride : 0;
        if (ROWS % STEP == 0 || row < ROWS) {
#pragma unroll
            for (int c = 0; c < COUNT; c += LANES) {
                const int chunk = FIRST + c + lane;
                if (c + LANES <= COUNT || chunk < FIRST + COUNT)
                    copy_16(tile + LAYOUT::at(row, chunk), head + (offset + chunk * 8), valid);
            }
        }
    }
}

/// Starts copying rows `first..first + ROWS` of a head; rows from `limit` on become zeros. Eight
/// lanes take 128 bytes of a row, which touches the fewest sectors of memory; then come the rest.
template <class LAYOUT, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(u32 tile, const element *head, u32 stride, int first, int limit) {
    if constexpr (WHOLE > 0) copy_chunks<LAYOUT, ROWS, THREADS, 8, 0, WHOLE>(tile, head, stride, first, limit);
    if constexpr (REMAINDER > 0)
        copy_chunks<LAYOUT, ROWS, THREADS, REMAINDER_LANES, WHOLE, REMAINDER>(tile, head, stride, first, limit);
}

/// The same by four lanes a row: thread `t` copies, and may read before others see it, row `t / 4`.
template <class LAYOUT, int ROWS, int THREADS>
__device__ __forceinline__ void copy_own_rows(u32 tile, const element *head, u32 stride, int first, int limit) {
    copy_chunks<LAYOUT, ROWS, THREADS, LANES_PER_ROW, 0, CHUNKS>(tile, head, stride, first, limit);
}

/// Of eight elements of each in shared memory.
__device__ __forceinline__ float dot_of_chunk(u32 left, u32 right) {
    u32 x[4], y[4];
    load_chunk(x, left);
    load_chunk(y, right);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += half_of_word<element>(x[i], 0) * half_of_word<element>(y[i], 0);
        sum += half_of_word<element>(x[i], 1) * half_of_word<element>(y[i], 1);
    }
    return sum;
}

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
}

/// Results as left factors: of columns `16 k..16 k + 16` the pieces that this thread holds already.
template <int M, int N>
__device__ __forceinline__ void pack_left(u32 (&a)[M][4], const float (&c)[M][N][4], int k) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[m][i] = word_of_pair<element>(c[m][2 * k + i / 2][i % 2 * 2], c[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

/// Puts a warp's 16 rows of results, times `factor`, into rows `tile_row..+16` of a tile.
template <class LAYOUT>
__device__ __forceinline__ void stage_rows(
    const float (&c)[CHUNKS][4], const float (&factor)[2], u32 tile, int tile_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
        const u32 upper = word_of_pair<element>(c[n][0] * factor[0], c[n][1] * factor[0]);
        const u32 lower = word_of_pair<element>(c[n][2] * factor[1], c[n][3] * factor[1]);
#if __CUDA_ARCH__ >= 900
        const u32 address = tile + LAYOUT::at(tile_row + lane % 16, n);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(upper),
                     "r"(lower)
                     : "memory");
#else
        const u32 address = tile + LAYOUT::at(tile_row + lane / 4, n) + lane % 4 * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(upper) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + LAYOUT::at(tile_row + 8 + lane / 4, n) + lane % 4 * 4),
                     "r"(lower)
                     : "memory");
#endif
    }
}

/// Stores chunks `FIRST..FIRST + COUNT` of 16 rows of a tile; `LANES` neighbours share a row.
template <class LAYOUT, int LANES, int FIRST, int COUNT>
__device__ __forceinline__ void store_chunks(
    u32 tile, int tile_row, element *head, u32 stride, int first, int limit) {
    constexpr int STEP = 32 / LANES, PASSES = (16 + STEP - 1) / STEP, STEPS = (COUNT + LANES - 1) / LANES;
    const int lane = threadIdx.x % 32, chunk = FIRST + lane % LANES;
    u32 words[PASSES][STEPS][4];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int row = pass * STEP + lane / LANES;
            if (row < 16) load_chunk(words[pass][step], tile + LAYOUT::at(tile_row + row, chunk + step * LANES));
        }
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int row = pass * STEP + lane / LANES;
            const bool valid = row < 16 && first + row < limit && chunk + step * LANES < FIRST + COUNT;
            store_16(head + ((first + row) * stride + (chunk + step * LANES) * 8), words[pass][step], valid);
        }
}

/// Stores a warp's 16 `M` rows of results, times `factor`, to rows `first..limit` of a head, in whole
/// chunks: through a tile's rows from `tile_row` on, which no other warp reads any more.
template <class LAYOUT, int M>
__device__ __forceinline__ void store_rows(
    const float (&c)[M][CHUNKS][4], const float (&factor)[M][2], u32 tile, int tile_row, element *head, u32 stride,
    int first, int limit) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++) stage_rows<LAYOUT>(c[m], factor[m], tile, tile_row + 16 * m);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = tile_row + 16 * m, to = first + 16 * m;
        if constexpr (WHOLE > 0) store_chunks<LAYOUT, 8, 0, WHOLE>(tile, row, head, stride, to, limit);
        if constexpr (REMAINDER > 0)
            store_chunks<LAYOUT, REMAINDER_LANES, WHOLE, REMAINDER>(tile, row, head, stride, to, limit);
    }
}
