// Attention on CUDA, tensor cores of sm_90a: products by warpgroups of four warps (wgmma).
//
// Text after rows.cuh, before the Hopper kernels. 64 rows by 8 TILES columns of results; a thread
// of warp `w % 4` holds what it would hold of mma.sync's 16 x 8 results for rows `16 (w % 4)..`.
// A tile in shared memory is a panel of 128 bytes a row for every 64 columns, its chunks exchanged by the
// row as the swizzle of 128 bytes wants it, then single chunks for what is left of the head dim (one
// for 72), each a column of 16 bytes a row without swizzle. Nothing is padded, copies write whole
// rows of banks, and both parts can lead by rows or by columns. Tiles start at multiples of 1024 bytes.
// The descriptor's fields are those of the PTX manual ("matrix descriptor", wgmma).

constexpr int PANELS = HEAD_DIM / 64;
constexpr int REST = HEAD_DIM % 64 / 8;  // chunks beyond the panels
// For arrays, which are never empty.
constexpr int REST_TILES = REST > 0 ? REST : 1, PANEL_COUNT = PANELS > 0 ? PANELS : 1;

template <int ROW_COUNT> struct PanelLayout {
    static constexpr int ROWS = ROW_COUNT;
    static constexpr int PANEL_BYTES = ROWS * 128, CHUNK_BYTES = ROWS * 16;
    static constexpr int BYTES = ROWS * HEAD_DIM * 2;
    static __device__ __forceinline__ u32 at(int row, int chunk) {
        if (chunk < 8 * PANELS) return chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
        return PANELS * PANEL_BYTES + (chunk - 8 * PANELS) * CHUNK_BYTES + row * 16;
    }
};

/// An operand's descriptor; moving it is one addition.
struct Operand {
    u32 low, high;

    __device__ __forceinline__ u64 at(u32 bytes) const { return u64(low + (bytes >> 4)) | u64(high) << 32; }
};

/// Of a panel: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ Operand panel_operand(u32 address) {
    return {address >> 4 | 1 << 16, 1024 >> 4 | 1 << 30};
}

/// Of single chunks: `leading` and `stride` are those of the manual, by which operand leads.
__device__ __forceinline__ Operand chunk_operand(u32 address, u32 leading, u32 stride) {
    return {address >> 4 | leading >> 4 << 16, stride >> 4};
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// Orders this thread's writes to shared memory, its copies that arrived included, before later products.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Keeps the compiler from moving uses of results over a wait.
template <int M, int N> __device__ __forceinline__ void hold(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
            asm volatile("" : "+f"(c[m][n][0]), "+f"(c[m][n][1]), "+f"(c[m][n][2]), "+f"(c[m][n][3])::"memory");
}

/// `c (+)= a b` for 64 x 16 times 16 x 8 TILES; `shared` takes `a` by descriptor, `registers` as fragments.
/// TA, TB: 1 where the columns of `a`, the rows of `b^T` lead (their chunks run along the results).
template <int TILES> struct Product;

#if ELEMENT_IS_BF16
#define WGMMA_TYPE "bf16.bf16"
#else
#define WGMMA_TYPE "f16.f16"
#endif

#define RESULTS_1(c) "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3])
#define RESULTS_2(c) RESULTS_1(c), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3])
#define RESULTS_3(c) RESULTS_2(c), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3])
#define RESULTS_4(c) RESULTS_3(c), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
#define RESULTS_5(c) RESULTS_4(c), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3])
#define RESULTS_6(c) RESULTS_5(c), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3])
#define RESULTS_7(c) RESULTS_6(c), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3])
#define RESULTS_8(c) RESULTS_7(c), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
#define NAMES_1 "%0,%1,%2,%3"
#define NAMES_2 NAMES_1 ",%4,%5,%6,%7"
#define NAMES_3 NAMES_2 ",%8,%9,%10,%11"
#define NAMES_4 NAMES_3 ",%12,%13,%14,%15"
#define NAMES_5 NAMES_4 ",%16,%17,%18,%19"
#define NAMES_6 NAMES_5 ",%20,%21,%22,%23"
#define NAMES_7 NAMES_6 ",%24,%25,%26,%27"
#define NAMES_8 NAMES_7 ",%28,%29,%30,%31"

#define DEFINE_PRODUCT(TILES, N, I0, I1, I2, I3, I4, I5, I6)                                             \
    template <> struct Product<TILES> {                                                                  \
        template <int TA, int TB>                                                                        \
        static __device__ __forceinline__ void shared(float (&c)[TILES][4], u64 a, u64 b, int add) {     \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I2                                             \
                         ", 0;"                                                                          \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." WGMMA_TYPE " {" NAMES_##TILES \
                         "}, " I0 ", " I1 ", p, 1, 1, " I3 ", " I4 ";}"                                  \
                         : RESULTS_##TILES(c)                                                            \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)                                    \
                         : "memory");                                                                    \
        }                                                                                                \
        template <int TB>                                                                                \
        static __device__ __forceinline__ void registers(                                                \
            float (&c)[TILES][4], const u32 (&a)[4], u64 b, int add) {                                   \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I5                                             \
                         ", 0;"                                                                          \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." WGMMA_TYPE " {" NAMES_##TILES \
                         "}, {" I0 "," I1 "," I2 "," I3 "}, " I4 ", p, 1, 1, " I6 ";}"                   \
                         : RESULTS_##TILES(c)                                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB)         \
                         : "memory");                                                                    \
        }                                                                                                \
    };

DEFINE_PRODUCT(1, 8, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
DEFINE_PRODUCT(2, 16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DEFINE_PRODUCT(3, 24, "%12", "%13", "%14", "%15", "%16", "%17", "%18")
DEFINE_PRODUCT(4, 32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DEFINE_PRODUCT(5, 40, "%20", "%21", "%22", "%23", "%24", "%25", "%26")
DEFINE_PRODUCT(6, 48, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
DEFINE_PRODUCT(7, 56, "%28", "%29", "%30", "%31", "%32", "%33", "%34")
DEFINE_PRODUCT(8, 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")

/// `N` consecutive tiles of results.
template <int N, int ALL>
__device__ __forceinline__ float (&part(float (&c)[ALL][4], int first))
    [N][4] { return reinterpret_cast<float (&)[N][4]>(c[first]); }

/// `c = left right^T` over the head dim: rows `left_row..+64` by rows `right_row..+8 N`. `zeros` is a chunk of
/// zero rows that follows both tiles in memory and completes an odd last chunk.
template <class LEFT, class RIGHT, int N>
__device__ __forceinline__
    void multiply_rows(float (&c)[N][4], u32 left, int left_row, u32 right, int right_row, u32 zeros) {
    const Operand x = panel_operand(left + left_row * 128), y = panel_operand(right + right_row * 128);
#pragma unroll
    for (int depth = 0; depth < 4 * PANELS; depth++)
        Product<N>::template shared<0, 0>(
            c, x.at(depth / 4 * LEFT::PANEL_BYTES + depth % 4 * 32),
            y.at(depth / 4 * RIGHT::PANEL_BYTES + depth % 4 * 32), depth > 0);
    const u32 left_rest = left + PANELS * LEFT::PANEL_BYTES + left_row * 16;
    const u32 right_rest = right + PANELS * RIGHT::PANEL_BYTES + right_row * 16;
#pragma unroll
    for (int chunk = 0; chunk < REST; chunk += 2) {
        const u32 left_chunk = left_rest + chunk * LEFT::CHUNK_BYTES,
                  right_chunk = right_rest + chunk * RIGHT::CHUNK_BYTES;
        const bool whole = chunk + 2 <= REST;
        const Operand x = chunk_operand(left_chunk, whole ? LEFT::CHUNK_BYTES : zeros - left_chunk, 128);
        const Operand y = chunk_operand(right_chunk, whole ? RIGHT::CHUNK_BYTES : zeros - right_chunk, 128);
        Product<N>::template shared<0, 0>(c, x.at(0), y.at(0), PANELS > 0 || chunk > 0);
    }
}

/// `c += a rows`, `a` being `STEPS` fragments side by side: 64 x 16 STEPS times rows of a tile from `row` on, all
/// columns.
template <class LAYOUT, int STEPS>
__device__ __forceinline__ void multiply_columns(
    float (&c)[CHUNKS][4], const u32 (&a)[STEPS][1][4], u32 tile, int row) {
    const Operand panels = panel_operand(tile + row * 128);
    const Operand rest = chunk_operand(tile + PANELS * LAYOUT::PANEL_BYTES + row * 16, 128, LAYOUT::CHUNK_BYTES);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            Product<8>::registers<1>(
                part<8>(c, 8 * panel), a[k][0], panels.at(panel * LAYOUT::PANEL_BYTES + k * 16 * 128), 1);
        if constexpr (REST > 0)
            Product<REST_TILES>::template registers<1>(
                part<REST_TILES>(c, CHUNKS - REST_TILES), a[k][0], rest.at(k * 16 * 16), 1);
    }
}

template <int ROWS> __device__ __forceinline__ void clear_zeros(u32 zeros) {
    if (threadIdx.x < ROWS)
        asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(zeros + threadIdx.x * 16), "r"(0) : "memory");
}

// Barriers in shared memory, 8 bytes each: waiting for a phase without stopping where all threads meet.

__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives when this thread's copies so far have.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Waits for the end of phase number `phase`.
__device__ __forceinline__ void wait_barrier(u32 barrier, int phase) {
    asm volatile(
        "{.reg .pred done;\n"
        "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;}" ::"r"(barrier),
        "r"(phase & 1)
        : "memory");
}

/// Meets the threads of this warpgroup.
__device__ __forceinline__ void meet_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}
