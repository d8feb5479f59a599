// Hopper (sm_90a): products by warpgroups of four warps (wgmma), barriers in shared memory, copies of boxes by tensor maps.
//
// Text that goes before kernels for that architecture alone. ELEMENT_IS_BF16: 1 for bf16, 0 for f16 operands.
// The descriptor's fields are those of the PTX manual ("matrix descriptor", wgmma).

/// An operand's descriptor; moving it is one addition.
struct Operand {
    u32 low, high;

    __device__ __forceinline__ u64 at(u32 bytes) const { return u64(low + (bytes >> 4)) | u64(high) << 32; }
};

/// Of a panel: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ Operand panel_operand(u32 address) {
    return {address >> 4 | 1 << 16, 1024 >> 4 | 1 << 30};
}

/// Of panels side by side, `bytes` apart, of 64 elements that lead across the depth: groups of 8 in depth are 1024 bytes
/// apart.
__device__ __forceinline__ Operand panels_operand(u32 address, u32 bytes) {
    return {address >> 4 | bytes >> 4 << 16, 1024 >> 4 | 1 << 30};
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

template <int N> __device__ __forceinline__ void hold(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
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
#define RESULTS_9(c) RESULTS_8(c), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3])
#define RESULTS_10(c) RESULTS_9(c), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3])
#define RESULTS_11(c) RESULTS_10(c), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3])
#define RESULTS_12(c) RESULTS_11(c), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3])
#define RESULTS_13(c) RESULTS_12(c), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3])
#define RESULTS_14(c) RESULTS_13(c), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3])
#define RESULTS_15(c) RESULTS_14(c), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3])
#define RESULTS_16(c) RESULTS_15(c), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
#define RESULTS_17(c) RESULTS_16(c), "+f"(c[16][0]), "+f"(c[16][1]), "+f"(c[16][2]), "+f"(c[16][3])
#define RESULTS_18(c) RESULTS_17(c), "+f"(c[17][0]), "+f"(c[17][1]), "+f"(c[17][2]), "+f"(c[17][3])
#define RESULTS_19(c) RESULTS_18(c), "+f"(c[18][0]), "+f"(c[18][1]), "+f"(c[18][2]), "+f"(c[18][3])
#define RESULTS_20(c) RESULTS_19(c), "+f"(c[19][0]), "+f"(c[19][1]), "+f"(c[19][2]), "+f"(c[19][3])
#define RESULTS_21(c) RESULTS_20(c), "+f"(c[20][0]), "+f"(c[20][1]), "+f"(c[20][2]), "+f"(c[20][3])
#define RESULTS_22(c) RESULTS_21(c), "+f"(c[21][0]), "+f"(c[21][1]), "+f"(c[21][2]), "+f"(c[21][3])
#define RESULTS_23(c) RESULTS_22(c), "+f"(c[22][0]), "+f"(c[22][1]), "+f"(c[22][2]), "+f"(c[22][3])
#define RESULTS_24(c) RESULTS_23(c), "+f"(c[23][0]), "+f"(c[23][1]), "+f"(c[23][2]), "+f"(c[23][3])
#define RESULTS_25(c) RESULTS_24(c), "+f"(c[24][0]), "+f"(c[24][1]), "+f"(c[24][2]), "+f"(c[24][3])
#define RESULTS_26(c) RESULTS_25(c), "+f"(c[25][0]), "+f"(c[25][1]), "+f"(c[25][2]), "+f"(c[25][3])
#define RESULTS_27(c) RESULTS_26(c), "+f"(c[26][0]), "+f"(c[26][1]), "+f"(c[26][2]), "+f"(c[26][3])
#define RESULTS_28(c) RESULTS_27(c), "+f"(c[27][0]), "+f"(c[27][1]), "+f"(c[27][2]), "+f"(c[27][3])
#define RESULTS_29(c) RESULTS_28(c), "+f"(c[28][0]), "+f"(c[28][1]), "+f"(c[28][2]), "+f"(c[28][3])
#define RESULTS_30(c) RESULTS_29(c), "+f"(c[29][0]), "+f"(c[29][1]), "+f"(c[29][2]), "+f"(c[29][3])
#define RESULTS_31(c) RESULTS_30(c), "+f"(c[30][0]), "+f"(c[30][1]), "+f"(c[30][2]), "+f"(c[30][3])
#define RESULTS_32(c) RESULTS_31(c), "+f"(c[31][0]), "+f"(c[31][1]), "+f"(c[31][2]), "+f"(c[31][3])
#define NAMES_1 "%0,%1,%2,%3"
#define NAMES_2 NAMES_1 ",%4,%5,%6,%7"
#define NAMES_3 NAMES_2 ",%8,%9,%10,%11"
#define NAMES_4 NAMES_3 ",%12,%13,%14,%15"
#define NAMES_5 NAMES_4 ",%16,%17,%18,%19"
#define NAMES_6 NAMES_5 ",%20,%21,%22,%23"
#define NAMES_7 NAMES_6 ",%24,%25,%26,%27"
#define NAMES_8 NAMES_7 ",%28,%29,%30,%31"
#define NAMES_9 NAMES_8 ",%32,%33,%34,%35"
#define NAMES_10 NAMES_9 ",%36,%37,%38,%39"
#define NAMES_11 NAMES_10 ",%40,%41,%42,%43"
#define NAMES_12 NAMES_11 ",%44,%45,%46,%47"
#define NAMES_13 NAMES_12 ",%48,%49,%50,%51"
#define NAMES_14 NAMES_13 ",%52,%53,%54,%55"
#define NAMES_15 NAMES_14 ",%56,%57,%58,%59"
#define NAMES_16 NAMES_15 ",%60,%61,%62,%63"
#define NAMES_17 NAMES_16 ",%64,%65,%66,%67"
#define NAMES_18 NAMES_17 ",%68,%69,%70,%71"
#define NAMES_19 NAMES_18 ",%72,%73,%74,%75"
#define NAMES_20 NAMES_19 ",%76,%77,%78,%79"
#define NAMES_21 NAMES_20 ",%80,%81,%82,%83"
#define NAMES_22 NAMES_21 ",%84,%85,%86,%87"
#define NAMES_23 NAMES_22 ",%88,%89,%90,%91"
#define NAMES_24 NAMES_23 ",%92,%93,%94,%95"
#define NAMES_25 NAMES_24 ",%96,%97,%98,%99"
#define NAMES_26 NAMES_25 ",%100,%101,%102,%103"
#define NAMES_27 NAMES_26 ",%104,%105,%106,%107"
#define NAMES_28 NAMES_27 ",%108,%109,%110,%111"
#define NAMES_29 NAMES_28 ",%112,%113,%114,%115"
#define NAMES_30 NAMES_29 ",%116,%117,%118,%119"
#define NAMES_31 NAMES_30 ",%120,%121,%122,%123"
#define NAMES_32 NAMES_31 ",%124,%125,%126,%127"

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
DEFINE_PRODUCT(32, 256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

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

// Clusters of blocks, and boxes of a tensor map's matrix that the copy engine brings.

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Meets all threads of the cluster.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/// Lets the cluster and the copy engine see barriers that this thread made; `meet_cluster` follows.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Arrives at the barrier of the same address in block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

/// Arrives, and lets the phase end only when so many bytes were copied.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Copies the box at column `x` and row `y` of a map's matrix; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(u32 to, const void *map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}

/// The same to both blocks of a cluster of two, at the same place and barrier of each.
__device__ __forceinline__ void copy_box_to_both(u32 to, const void *map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
            "r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(u16(3))
        : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements to shared memory; lane `l` names row `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void store_matrices(u32 address, const u32 (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Registers of each thread of a warpgroup; what some give up others may take.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
