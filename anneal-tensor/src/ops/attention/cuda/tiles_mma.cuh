// Attention backward on CUDA, shapes of backward_mma.cu. Text before gradient.cuh.

constexpr int THREADS = 32 * WARPS;
constexpr int WARP_KEYS = 16 * M_TILES;
constexpr int KEY_ROWS = WARP_KEYS * WARPS;
constexpr int KEY_BYTES = KEY_ROWS * ROW_BYTES;
constexpr int QUERY_BYTES = QUERY_BLOCK * ROW_BYTES;
constexpr int DS_ROW_BYTES = QUERY_BLOCK * 2 + 16;  // `ds^T`: a row for each key
constexpr int DS_BYTES = KEY_ROWS * DS_ROW_BYTES;
typedef TileLayout KeyLayout;
typedef TileLayout QueryLayout;

__device__ __forceinline__ int own_row(int warp, int m) { return warp * WARP_KEYS + m * 16; }
