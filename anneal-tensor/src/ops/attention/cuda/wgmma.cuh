// Attention on CUDA, tensor cores of sm_90a: products by warpgroups of four warps (wgmma).
//
// Text after rows.cuh and hopper.cuh, before the Hopper kernels. 64 rows by 8 TILES columns of results; a thread
// of warp `w % 4` holds what it would hold of mma.sync's 16 x 8 results for rows `16 (w % 4)..`.
// A tile in shared memory is a panel of 128 bytes a row for every 64 columns, its chunks exchanged by the
// row as the swizzle of 128 bytes wants it, then single chunks for what is left of the head dim (one
// for 72), each a column of 16 bytes a row without swizzle. Nothing is padded, copies write whole
// rows of banks, and both parts can lead by rows or by columns. Tiles start at multiples of 1024 bytes.

constexpr int PANELS = HEAD_DIM / 64;

/// With PANEL_COUNT below PANELS more of the columns, or all, lie in single chunks. That costs the copy engine more, but a product
/// whose columns lead then takes them all at once: 8 columns alone take the matrix unit half the time of 64.
template <int ROW_COUNT, int PANEL_COUNT = PANELS> struct PanelLayout {
    static constexpr int ROWS = ROW_COUNT, PANELS = PANEL_COUNT;
    static constexpr int CHUNKS = HEAD_DIM / 8 - 8 * PANELS;  // beyond the panels
    static constexpr int PANEL_BYTES = ROWS * 128, CHUNK_BYTES = ROWS * 16;
    static constexpr int BYTES = ROWS * HEAD_DIM * 2, CHUNKS_OFFSET = PANELS * PANEL_BYTES;
    static __device__ __forceinline__ u32 at(int row, int chunk) {
        if (chunk < 8 * PANELS) return chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
        return CHUNKS_OFFSET + (chunk - 8 * PANELS) * CHUNK_BYTES + row * 16;
    }
};

/// Of single chunks: `leading` and `stride` are those of the manual, by which operand leads.
__device__ __forceinline__ Operand chunk_operand(u32 address, u32 leading, u32 stride) {
    return {place_of(address) | leading >> 4 << 16, stride >> 4};
}

/// Rows of a tile from `row` on as an operand whose rows lead, 16 columns at a time.
template <class LAYOUT> struct RowOperand {
    Operand panels, chunks;

    __device__ __forceinline__ RowOperand(u32 tile, int row)
        : panels(panel_operand(tile + row * 128)),
          chunks(chunk_operand(tile + LAYOUT::CHUNKS_OFFSET + row * 16, LAYOUT::CHUNK_BYTES, 128)) {}

    __device__ __forceinline__ u64 at(int depth) const {
        if (depth < 4 * LAYOUT::PANELS) return panels.at(depth / 4 * LAYOUT::PANEL_BYTES + depth % 4 * 32);
        return chunks.at((2 * depth - 8 * LAYOUT::PANELS) * LAYOUT::CHUNK_BYTES);
    }
};

/// The last of an odd number of chunks, completed by `zeros`, a chunk of zero rows that follows in memory.
template <class LAYOUT> __device__ __forceinline__ u64 last_chunk(u32 tile, int row, u32 zeros) {
    const u32 address = tile + LAYOUT::CHUNKS_OFFSET + (LAYOUT::CHUNKS - 1) * LAYOUT::CHUNK_BYTES + row * 16;
    return chunk_operand(address, zeros - address, 128).at(0);
}

/// `N` consecutive tiles of results.
template <int N, int ALL>
__device__ __forceinline__ float (&part(float (&c)[ALL][4], int first))
    [N][4] { return reinterpret_cast<float (&)[N][4]>(c[first]); }

/// `c = left right^T` over the head dim: rows `left_row..+64` by rows `right_row..+8 N`.
template <class LEFT, class RIGHT, int N>
__device__ __forceinline__
    void multiply_rows(float (&c)[N][4], u32 left, int left_row, u32 right, int right_row, u32 zeros) {
    const RowOperand<LEFT> x(left, left_row);
    const RowOperand<RIGHT> y(right, right_row);
#pragma unroll
    for (int depth = 0; depth < HEAD_DIM / 16; depth++)
        Product<N>::template shared<0, 0>(c, x.at(depth), y.at(depth), depth > 0);
    if constexpr (HEAD_DIM % 16 != 0)
        Product<N>::template shared<0, 0>(
            c, last_chunk<LEFT>(left, left_row, zeros), last_chunk<RIGHT>(right, right_row, zeros), HEAD_DIM > 16);
}

/// Rows of a tile from `row` on as an operand whose columns lead, 16 rows at a time.
template <class LAYOUT> struct ColumnOperand {
    Operand panels, chunks;

    __device__ __forceinline__ ColumnOperand(u32 tile, int row)
        : panels(panel_operand(tile + row * 128)),
          chunks(chunk_operand(tile + LAYOUT::CHUNKS_OFFSET + row * 16, 128, LAYOUT::CHUNK_BYTES)) {}

    /// Of 64 columns.
    __device__ __forceinline__ u64 panel(int panel, int depth) const {
        return panels.at(panel * LAYOUT::PANEL_BYTES + depth * 2048);
    }
    /// Of all columns in single chunks.
    __device__ __forceinline__ u64 rest(int depth) const { return chunks.at(depth * 256); }
};

/// `c += a rows`, `a` being `STEPS` fragments side by side: 64 x 16 STEPS times rows of a tile from `row` on, all
/// columns.
template <class LAYOUT, int STEPS>
__device__ __forceinline__ void multiply_columns(
    float (&c)[CHUNKS][4], const u32 (&a)[STEPS][1][4], u32 tile, int row) {
    const ColumnOperand<LAYOUT> b(tile, row);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
#pragma unroll
        for (int panel = 0; panel < LAYOUT::PANELS; panel++)
            Product<8>::registers<1>(part<8>(c, 8 * panel), a[k][0], b.panel(panel, k), 1);
        if constexpr (LAYOUT::CHUNKS > 0)
            Product<LAYOUT::CHUNKS>::template registers<1>(
                part<LAYOUT::CHUNKS>(c, CHUNKS - LAYOUT::CHUNKS), a[k][0], b.rest(k), 1);
    }
}

template <int ROWS> __device__ __forceinline__ void clear_zeros(u32 zeros) {
    if (threadIdx.x < ROWS)
        asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(zeros + threadIdx.x * 16), "r"(0) : "memory");
}
