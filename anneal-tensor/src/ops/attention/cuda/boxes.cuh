// Attention on Hopper: boxes of rows by the copy engine, and what keeps groups of warps in step.
//
// Text after wgmma.cuh, before the kernels whose blocks of threads stay for many heads.

/// Maps of the driver over `(D, H, N or M, B)` of rows. Boxes are 64 rows of a head by 64 columns swizzled by 128 bytes, and by
/// the 8 columns of a chunk for what is left of the head dim.
struct alignas(64) Map {
    u64 words[16];
};
struct RowMaps {
    Map panels, chunks;
};

constexpr int GROUP_THREADS = 128, GROUP_WARPS = GROUP_THREADS / 32, BOX_ROWS = 64;
typedef PanelLayout<BOX_ROWS> BoxLayout;

/// Copies 64 rows of a head, from `first` on, to rows of a tile.
template <class LAYOUT>
__device__ __forceinline__ void copy_rows_of(
    u32 tile, int row, const RowMaps &maps, int b, int h, int first, u32 barrier) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
        copy_box(tile + LAYOUT::PANEL_BYTES * panel + row * 128, &maps.panels, {panel * 64, h, first, b}, barrier);
#pragma unroll
    for (int chunk = 0; chunk < REST; chunk++)
        copy_box(
            tile + PANELS * LAYOUT::PANEL_BYTES + LAYOUT::CHUNK_BYTES * chunk + row * 16, &maps.chunks,
            {PANELS * 64 + chunk * 8, h, first, b}, barrier);
}

/// The way back, of a tile of 64 rows, started by one thread.
__device__ __forceinline__ void store_rows_of(u32 tile, const RowMaps &maps, int b, int h, int first) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
        store_box(tile + BoxLayout::PANEL_BYTES * panel, &maps.panels, {panel * 64, h, first, b});
#pragma unroll
    for (int chunk = 0; chunk < REST; chunk++)
        store_box(
            tile + PANELS * BoxLayout::PANEL_BYTES + BoxLayout::CHUNK_BYTES * chunk, &maps.chunks,
            {PANELS * 64 + chunk * 8, h, first, b});
    commit_boxes();
}

/// Every warp of a group arrives once, and is together again afterwards: instructions of the whole warp may follow.
__device__ __forceinline__ void arrive_as_warp(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
    __syncwarp();
}

/// A stage of a ring, and how often the ring was gone through.
template <int LENGTH> struct Ring {
    int stage = 0, round = 0;

    __device__ __forceinline__ void next() {
        if (++stage == LENGTH) stage = 0, round++;
    }
};

/// Number `number` of the barriers from an address on.
__device__ __forceinline__ u32 barrier(u32 barriers, int number) { return barriers + number * 8; }

// Stages of 64 keys with their values, from `stages` on.
constexpr int KEY_STAGE_BYTES = 2 * BoxLayout::BYTES;
__device__ __forceinline__ u32 key_tile(u32 stages, int stage) { return stages + stage * KEY_STAGE_BYTES; }
__device__ __forceinline__ u32 value_tile(u32 stages, int stage) { return key_tile(stages, stage) + BoxLayout::BYTES; }
__device__ __forceinline__ int key_blocks(const Arguments &a) { return (a.keys + BOX_ROWS - 1) / BOX_ROWS; }

/// The first of a warp's rows, and of a thread's, in their group's 64.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 4 * 16; }
__device__ __forceinline__ int own_row() { return warp_row() + threadIdx.x % 32 / 4; }

/// Meets the group when all that it stored has left shared memory.
__device__ __forceinline__ void meet_with_boxes_left(int group) {
    if (threadIdx.x % GROUP_THREADS == 0) wait_boxes_left();
    __syncwarp();
    meet_group(group);
}

/// 64 rows of a group's results times `factor`, that of each of a thread's two rows, stored while the group goes on. The tile
/// that they go by is free.
__device__ __forceinline__ void store_results(
    const float (&c)[CHUNKS][4], const float (&factor)[2], u32 tile, int group, const RowMaps &maps, int b, int h,
    int first) {
    stage_rows<BoxLayout>(c, factor, tile, warp_row());
    publish();
    meet_group(group);
    if (threadIdx.x % GROUP_THREADS == 0) store_rows_of(tile, maps, b, h, first);
    __syncwarp();
}
