// Attention on CUDA, tensor cores: rows of a head in shared memory and products of them.
//
// Text between kernel_common and kernel_forward or kernel_backward. Instructions: cp.async,
// ldmatrix and mma.sync of sm_80, which every later architecture has. Fragments are those of the
// PTX manual for m16n8k16: of 16 x 8 results a thread holds rows `lane / 4` and `lane / 4 + 8`,
// columns `lane % 4 * 2` and the next. A head dim of an odd number of eights ends in one m16n8k8,
// so nothing is padded to 16.

constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes
// An odd number of chunks from row to row: 8 rows of a matrix lie in 8 different groups of banks.
constexpr int ROW_BYTES = (CHUNKS % 2 ? CHUNKS : CHUNKS + 1) * 16;
constexpr int DEPTH_16 = HEAD_DIM / 16;
constexpr bool DEPTH_8 = HEAD_DIM % 16 != 0;
constexpr int LANES_PER_ROW = 4;  // threads that copy one row, and share a row's results
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 128, "head dim");
static_assert(ELEMENT == 2 || ELEMENT == 3, "tensor cores take bf16 or f16");

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes, or writes zeros.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Starts copying rows `first..first + ROWS` of a head; rows from `limit` on become zeros.
/// Thread `t` copies chunks `t % 4`, `t % 4 + 4`, ... of row `t / 4`: one pointer for each row.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(u32 tile, const element* head, i64 stride, int first, int limit) {
    constexpr int STEP = THREADS / LANES_PER_ROW;
    const int lane = threadIdx.x % LANES_PER_ROW;
#pragma unroll
    for (int start = 0; start < ROWS; start += STEP) {
        const int row = start + threadIdx.x / LANES_PER_ROW;
        const bool valid = first + row < limit;
        const element* from = valid ? head + (first + row) * stride : head;
        if (ROWS % STEP == 0 || row < ROWS) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c += LANES_PER_ROW) {
                const int chunk = c + lane;
                if (c + LANES_PER_ROW <= CHUNKS || chunk < CHUNKS)
                    copy_16(tile + row * ROW_BYTES + chunk * 16, from + chunk * 8, valid);
            }
        }
    }
}

__device__ __forceinline__ void load_4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_2(u32& r0, u32& r1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r0), "=r"(r1) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_2_transposed(u32& r0, u32& r1, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r0), "=r"(r1) : "r"(address) : "memory");
}

#if ELEMENT == 2
#define MMA_TYPE "bf16.bf16"
#else
#define MMA_TYPE "f16.f16"
#endif

/// `c += a b`: 16 x 16 times 16 x 8.
__device__ __forceinline__ void multiply_16(float (&c)[4], const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// `c += a b`: 16 x 8 times 8 x 8.
__device__ __forceinline__ void multiply_8(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

/// This lane's address for `load_4` of 16 rows x 2 chunks, rows first: the left factor.
__device__ __forceinline__ u32 left_address(u32 tile) {
    const u32 lane = threadIdx.x % 32;
    return tile + lane % 16 * ROW_BYTES + lane / 16 * 16;
}

template <int M, int N> __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
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
__device__ __forceinline__ void multiply_rows_16(float (&c)[M][N][4], const u32 (&a)[M][4], const Right& right, int depth) {
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
__device__ __forceinline__ void multiply_rows_8(float (&c)[M][N][4], const u32 (&a)[M][4], const Right& right) {
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
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], u32 left, const Right& right) {
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

/// Results as left factors: of columns `16 k..16 k + 16` the pieces that this thread holds already.
template <int M, int N>
__device__ __forceinline__ void pack_left(u32 (&a)[M][4], const float (&c)[M][N][4], int k) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[m][i] = pack<ELEMENT>(c[m][2 * k + i / 2][i % 2 * 2], c[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

/// Stores a warp's 16 `M` rows of results, times `factor`, to rows `first..limit` of a head, in whole
/// chunks: through `tile`, rows of shared memory that no other warp reads any more.
template <int M>
__device__ __forceinline__ void store_rows(
    const float (&c)[M][CHUNKS][4], const float (&factor)[M][2], u32 tile, element* head, i64 stride, int first, int limit) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < CHUNKS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 word = pack<ELEMENT>(c[m][n][2 * i] * factor[m][i], c[m][n][2 * i + 1] * factor[m][i]);
                const u32 address = tile + (m * 16 + i * 8 + lane / 4) * ROW_BYTES + n * 16 + lane % 4 * 4;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
            }
    __syncwarp();
#pragma unroll
    for (int start = 0; start < 16 * M; start += 8) {
        const int row = start + lane / LANES_PER_ROW;
        if (first + row >= limit) continue;
        element* to = head + (first + row) * stride;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += LANES_PER_ROW) {
            const int chunk = c + lane % LANES_PER_ROW;
            if (chunk >= CHUNKS) continue;
            uint4 words;
            asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                         : "r"(tile + row * ROW_BYTES + chunk * 16) : "memory");
            *reinterpret_cast<uint4*>(to + chunk * 8) = words;
        }
    }
}
