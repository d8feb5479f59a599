// Attention backward on CUDA, shapes of kernel_backward_hopper. Text before kernel_gradient.

#define QUERY_BLOCK 64
#define DS_BUFFERS 2
constexpr int THREADS = 128 * GROUPS;
constexpr int GROUP_KEYS = 64 * M_TILES;
constexpr int KEY_ROWS = GROUP_KEYS * GROUPS;
typedef ChunkLayout<KEY_ROWS> KeyLayout;
typedef ChunkLayout<QUERY_BLOCK> QueryLayout;
constexpr int KEY_BYTES = CHUNKS * KeyLayout::CHUNK_STRIDE;
constexpr int QUERY_BYTES = CHUNKS * QueryLayout::CHUNK_STRIDE;
typedef Layout<16, KEY_ROWS * 16> DsLayout;  // rows are keys, chunks are of queries
constexpr int DS_BYTES = QUERY_BLOCK / 8 * DsLayout::CHUNK_STRIDE;

__device__ __forceinline__ int own_row(int warp, int m) { return warp / 4 * GROUP_KEYS + m * 64 + warp % 4 * 16; }
