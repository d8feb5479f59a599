// Attention backward on CUDA, shapes of backward_wgmma.cu. Text before gradient.cuh.

#define QUERY_BLOCK 64
#define DS_BUFFERS 2
constexpr int THREADS = 128 * GROUPS;
constexpr int GROUP_KEYS = 64 * M_TILES;
constexpr int KEY_ROWS = GROUP_KEYS * GROUPS;
typedef PanelLayout<KEY_ROWS> KeyLayout;
typedef PanelLayout<QUERY_BLOCK> QueryLayout;
constexpr int KEY_BYTES = KeyLayout::BYTES;
constexpr int QUERY_BYTES = QueryLayout::BYTES;
constexpr int DS_CHUNK_BYTES = KEY_ROWS * 16;  // `ds^T`: a row for each key, in single chunks of 8 queries
constexpr int DS_BYTES = QUERY_BLOCK / 8 * DS_CHUNK_BYTES;

__device__ __forceinline__ int own_row(int warp, int m) { return warp / 4 * GROUP_KEYS + m * 64 + warp % 4 * 16; }
