// Attention on CUDA, tensor cores of sm_90a: products by warpgroups of four warps (wgmma).
//
// Text after rows.cuh and hopper.cuh, before the Hopper kernels. 64 rows by 8 TILES columns of results; a thread
// of warp `w % 4` holds what it would hold of mma.sync's 16 x 8 results for rows `16 (w % 4)..`.
// A tile in shared memory is a panel of 128 bytes a row for every 64 columns, its chunks exchanged by the
// row as the swizzle of 128 bytes wants it, then single chunks for what is left of the head dim (one
// for 72), each a column of 16 bytes a row without swizzle. Nothing is padded, copies write whole
// rows of banks, and both parts can lead by rows or by columns. Tiles start at multiples of 1024 bytes.

constexpr int PANELS = HEAD_DIM / 64;
constexpr int REST = HEAD_DIM % 64 / 8;  // chunks beyond the panels
// Of products, which are never empty.
constexpr int REST_TILES = REST > 0 ? REST : 1;

template <int ROW_COUNT> struct PanelLayout {
    static constexpr int ROWS = ROW_COUNT;
    static constexpr int PANEL_BYTES = ROWS * 128, CHUNK_BYTES = ROWS * 16;
    static constexpr int BYTES = ROWS * HEAD_DIM * 2;
    static __device__ __forceinline__ u32 at(int row, int chunk) {
        if (chunk < 8 * PANELS) return chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
        return PANELS * PANEL_BYTES + (chunk - 8 * PANELS) * CHUNK_BYTES + row * 16;
    }
};

/// Of single chunks: `leading` and `stride` are those of the manual, by which operand leads.
__device__ __forceinline__ Operand chunk_operand(u32 address, u32 leading, u32 stride) {
    return {place_of(address) | leading >> 4 << 16, stride >> 4};
}

/// `N` consecutive tiles of results.
template <int N, int ALL>
__device__ __forceinline__ float (&part(float (&c)[ALL][4], int first))
    [N][4] { return reinterpret_cast<float (&)[N][4]>(c[first]); }

/// `c = left right^T` over the head dim: rows `left_row..+64` by the first 8 N. `zeros` is a chunk of
/// zero rows that follows both tiles in memory and completes an odd last chunk.
template <class LEFT, class RIGHT, int N>
__device__ __forceinline__
    void multiply_rows(float (&c)[N][4], u32 left, int left_row, u32 right, u32 zeros) {
    const Operand x = panel_operand(left + left_row * 128), y = panel_operand(right);
#pragma unroll
    for (int depth = 0; depth < 4 * PANELS; depth++)
        Product<N>::template shared<0, 0>(
            c, x.at(depth / 4 * LEFT::PANEL_BYTES + depth % 4 * 32),
            y.at(depth / 4 * RIGHT::PANEL_BYTES + depth % 4 * 32), depth > 0);
    const u32 left_rest = left + PANELS * LEFT::PANEL_BYTES + left_row * 16;
    const u32 right_rest = right + PANELS * RIGHT::PANEL_BYTES;
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

/// `c (+)= a rows`, `a` being `STEPS` fragments side by side: 64 x 16 STEPS times the first rows of a tile, all columns.
template <class LAYOUT, int STEPS>
__device__ __forceinline__ void multiply_columns(
    float (&c)[CHUNKS][4], const u32 (&a)[STEPS][1][4], u32 tile, bool add) {
    const Operand panels = panel_operand(tile);
    const Operand rest = chunk_operand(tile + PANELS * LAYOUT::PANEL_BYTES, 128, LAYOUT::CHUNK_BYTES);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            Product<8>::registers<1>(
                part<8>(c, 8 * panel), a[k][0], panels.at(panel * LAYOUT::PANEL_BYTES + k * 16 * 128), add || k > 0);
        if constexpr (REST > 0)
            Product<REST_TILES>::template registers<1>(
                part<REST_TILES>(c, CHUNKS - REST_TILES), a[k][0], rest.at(k * 16 * 16), add || k > 0);
    }
}

template <int ROWS> __device__ __forceinline__ void clear_zeros(u32 zeros) {
    if (threadIdx.x < ROWS)
        asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(zeros + threadIdx.x * 16), "r"(0) : "memory");
}
