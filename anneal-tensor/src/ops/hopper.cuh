// Hopper (sm_90a): products by warpgroups of four warps (wgmma), barriers in shared memory, copies of boxes by tensor maps.
//
// Text that goes before kernels for that architecture alone. ELEMENT_IS_BF16: 1 for bf16, 0 for f16 operands.
// The descriptor's fields are those of the PTX manual ("matrix descriptor", wgmma).

/// An operand's descriptor; moving it is one addition.
struct Operand {
    u32 low, high;

    __device__ __forceinline__ u64 at(u32 bytes) const { return u64(low + (bytes >> 4)) | u64(high) << 32; }
};

/// An address as descriptors hold it: in a cluster, the bits above those of the memory name the block.
__device__ __forceinline__ u32 place_of(u32 address) { return (address & 0x3ffff) >> 4; }

/// Of a panel: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ Operand panel_operand(u32 address) {
    return {place_of(address) | 1 << 16, 1024 >> 4 | 1 << 30};
}

/// Of panels side by side, `bytes` apart, of 64 elements that lead across the depth: groups of 8 in depth are 1024 bytes
/// apart.
__device__ __forceinline__ Operand panels_operand(u32 address, u32 bytes) {
    return {place_of(address) | bytes >> 4 << 16, 1024 >> 4 | 1 << 30};
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
// Results of four tiles from tile `n` on.
#define FOUR_RESULTS(c, n) \
    "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]), \
    "+f"(c[n + 1][0]), "+f"(c[n + 1][1]), "+f"(c[n + 1][2]), "+f"(c[n + 1][3]), \
    "+f"(c[n + 2][0]), "+f"(c[n + 2][1]), "+f"(c[n + 2][2]), "+f"(c[n + 2][3]), \
    "+f"(c[n + 3][0]), "+f"(c[n + 3][1]), "+f"(c[n + 3][2]), "+f"(c[n + 3][3])
#define RESULTS_16(c) FOUR_RESULTS(c, 0), FOUR_RESULTS(c, 4), FOUR_RESULTS(c, 8), FOUR_RESULTS(c, 12)
#define NAMES_1 "%0,%1,%2,%3"
#define NAMES_2 NAMES_1 ",%4,%5,%6,%7"
#define NAMES_3 NAMES_2 ",%8,%9,%10,%11"
#define NAMES_4 NAMES_3 ",%12,%13,%14,%15"
#define NAMES_5 NAMES_4 ",%16,%17,%18,%19"
#define NAMES_6 NAMES_5 ",%20,%21,%22,%23"
#define NAMES_7 NAMES_6 ",%24,%25,%26,%27"
#define NAMES_8 NAMES_7 ",%28,%29,%30,%31"
#define NAMES_16 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

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
DEFINE_PRODUCT(16, 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")

// Barriers in shared memory, 8 bytes each: waiting for a phase without stopping where all threads meet.

__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
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

/// Arrives at the barrier of the same address in block `rank` of the cluster. Orders no writes of this thread for the other
/// block: that would wait for all of them to reach memory.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

/// The same for what this thread read, and wrote for the other block.
__device__ __forceinline__ void arrive_in_order_at(u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

/// `wait_barrier` where other blocks of the cluster arrive, or write to this one.
__device__ __forceinline__ void wait_cluster_barrier(u32 barrier, int phase) {
    asm volatile(
        "{.reg .pred done;\n"
        "again_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;}" ::"r"(barrier),
        "r"(phase & 1)
        : "memory");
}

/// Writes to the place of the same address in block `rank` of the cluster; the bytes count at its barrier of that address.
__device__ __forceinline__ void send_to(u32 place, const float (&values)[4], u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 remote, counted;\n"
        "mapa.shared::cluster.u32 remote, %0, %6;\n"
        "mapa.shared::cluster.u32 counted, %1, %6;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [remote], {%2,%3,%4,%5}, [counted];}" ::"r"(place),
        "r"(barrier), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(rank)
        : "memory");
}

/// Arrives, and lets the phase end only when so many bytes were copied.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Copies a multiple of 16 bytes; they count at the barrier.
__device__ __forceinline__ void copy_bytes(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
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

/// Copies the box at `place` of a map of four dimensions; its bytes count at the barrier.
__device__ __forceinline__ void copy_box(u32 to, const void *map, const int (&place)[4], u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(map), "r"(place[0]), "r"(place[1]), "r"(place[2]), "r"(place[3]), "r"(barrier)
        : "memory");
}

/// Starts writing the box at `place` from shared memory; what lies outside of the map is left out. `publish` and a meeting
/// of the threads that wrote it go before.
__device__ __forceinline__ void store_box(u32 from, const void *map, const int (&place)[4]) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(from),
                 "l"(map), "r"(place[0]), "r"(place[1]), "r"(place[2]), "r"(place[3])
                 : "memory");
}

__device__ __forceinline__ void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until the boxes that this thread stores have left shared memory.
__device__ __forceinline__ void wait_boxes_left() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ u32 load_word(u32 address) {
    u32 word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
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
