// Attention on CUDA, tensor cores of sm_80 and later: products of rows in shared memory.
//
// Text after rows.cuh, before forward_mma.cu or backward_mma.cu. Instructions: ldmatrix and
// mma.sync, which every architecture from sm_80 on has. Fragments are those of the
// PTX manual for m16n8k16: of 16 x 8 results a thread holds rows `lane / 4` and `lane / 4 + 8`,
// columns `lane % 4 * 2` and the next. A head dim of an odd number of eights ends in one m16n8k8,
// so nothing is padded to 16.

// An odd number of chunks from row to row: 8 rows of a matrix lie in 8 different groups of banks.
constexpr int ROW_BYTES = (CHUNKS % 2 ? CHUNKS : CHUNKS + 1) * 16;
constexpr int DEPTH_16 = HEAD_DIM / 16;
constexpr bool DEPTH_8 = HEAD_DIM % 16 != 0;

struct TileLayout {
    static __device__ __forceinline__ u32 at(int row, int chunk) { return row * ROW_BYTES + chunk * 16; }
};

__device__ __forceinline__ void load_4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_2(u32 &r0, u32 &r1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r0), "=r"(r1)
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_2_transposed(u32 &r0, u32 &r1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r0), "=r"(r1)
                 : "r"(address)
                 : "memory");
}

#if ELEMENT_IS_BF16
#define MMA_TYPE "bf16.bf16"
#else
#define MMA_TYPE "f16.f16"
#endif

/// `c += a b`: 16 x 16 times 16 x 8.
__device__ __forceinline__ void multiply_16(float (&c)[4], const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// `c += a b`: 16 x 8 times 8 x 8.
__device__ __forceinline__ void multiply_8(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." MMA_TYPE
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

/// This lane's address for `load_4` of 16 rows x 2 chunks, rows first: the left factor.
__device__ __forceinline__ u32 left_address(u32 tile) {
    const u32 lane = threadIdx.x % 32;
    return tile + lane % 16 * ROW_BYTES + lane / 16 * 16;
}

/// Left factors of one depth: 16 `M` rows, 16 or at the last odd 8 columns from `depth * 16`.
template <int M> __device__ __forceinline__ void load_left(u32 (&a)[M][4], u32 lane_address, int depth) {
#pragma unroll
    for (int m = 0; m < M; m++) {
        const u32 address = lane_address + m * 16 * ROW_BYTES + depth * 32;
        if (depth < DEPTH_16) load_4(a[m], address);
        else load_2(a[m][0], a[m][1], address);  // lanes 0 to 15 hold the addresses of both halves
    }
}

/// Addresses of this lane in the rows of a right factor, for products with their transpose.
struct Right {
    u32 pairs;  // for `load_4` of 16 rows x 2 chunks, chunks first
    u32 tail;   // for `load_4` of the last odd chunk of 32 rows

    __device__ __forceinline__ explicit Right(u32 tile) {
        const u32 lane = threadIdx.x % 32;
        pairs = tile + (lane % 8 + lane / 16 * 8) * ROW_BYTES + lane / 8 % 2 * 16;
        tail = tile + lane * ROW_BYTES + DEPTH_16 * 32;
    }
};

/// `c += left right^T` over 16 columns from `depth * 16`: 16 `M` rows by 8 `N` rows.
template <int M, int N>
__device__ __forceinline__ void multiply_rows_16(
    float (&c)[M][N][4], const u32 (&a)[M][4], const Right &right, int depth) {
    static_assert(N % 2 == 0, "right rows are loaded by sixteens");
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 b[4];
        load_4(b, right.pairs + n * 8 * ROW_BYTES + depth * 32);
#pragma unroll
        for (int m = 0; m < M; m++) {
            multiply_16(c[m][n], a[m], b[0], b[1]);
            multiply_16(c[m][n + 1], a[m], b[2], b[3]);
        }
    }
}

/// The same over the last odd 8 columns.
template <int M, int N>
__device__ __forceinline__ void multiply_rows_8(float (&c)[M][N][4], const u32 (&a)[M][4], const Right &right) {
#pragma unroll
    for (int n = 0; n < N; n += 4) {
        u32 b[4];
        const u32 address = right.tail + n * 8 * ROW_BYTES;
        if (n + 4 <= N) load_4(b, address);
        else load_2(b[0], b[1], address);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4 && n + i < N; i++) multiply_8(c[m][n + i], a[m][0], a[m][1], b[i]);
    }
}

/// `c += left right^T`, the left factor's `left_address` given, in shared memory as well.
template <int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], u32 left, const Right &right) {
    u32 a[M][4];
#pragma unroll
    for (int depth = 0; depth < DEPTH_16; depth++) {
        load_left(a, left, depth);
        multiply_rows_16(c, a, right, depth);
    }
    if constexpr (DEPTH_8) {
        load_left(a, left, DEPTH_16);
        multiply_rows_8(c, a, right);
    }
}

/// This lane's address for `load_4_transposed` of 16 rows x 2 chunks: a right factor as it lies.
__device__ __forceinline__ u32 column_address(u32 tile) { return left_address(tile); }

/// `c += a rows`: 16 `M` x 16 times 16 rows of which the eights `FIRST..FIRST + N` of columns are taken.
template <int FIRST, int M, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[M][N][4], const u32 (&a)[M][4], u32 columns) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 b[4];
        const u32 address = columns + (FIRST + n) * 16;
        if (n + 2 <= N) load_4_transposed(b, address);
        else load_2_transposed(b[0], b[1], address);
#pragma unroll
        for (int m = 0; m < M; m++) {
            multiply_16(c[m][n], a[m], b[0], b[1]);
            if (n + 2 <= N) multiply_16(c[m][n + 1], a[m], b[2], b[3]);
        }
    }
}
