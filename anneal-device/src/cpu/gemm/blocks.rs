//! The sizes of blocks, from those of the caches: 48 KiB and 2 MiB a core.

/// Largest depth block: with it a panel of B fills two thirds of the first-level cache.
const DEPTH_BLOCK: usize = 256;
/// Depth blocks that a block of A spans: a tile of C is brought in once for all of them.
const BLOCKS_IN_GROUP: usize = 3;
/// The most depth of one group.
pub(super) const DEPTH_GROUP: usize = DEPTH_BLOCK * BLOCKS_IN_GROUP;
/// Rows of a block of A, which at the deepest takes a quarter of the second-level cache.
pub(super) const ROWS_OF_A: usize = 168;

/// A function of the depth alone, because it fixes the order of the additions.
pub(super) fn depth_block(depth: usize) -> usize {
    let blocks = depth.div_ceil(DEPTH_BLOCK).max(1);
    depth.div_ceil(blocks).next_multiple_of(8).max(8)
}

/// Depths of the groups into which the depth blocks are gathered.
pub(super) fn depth_group(depth: usize) -> usize {
    let block = depth_block(depth);
    let blocks = depth.div_ceil(block).max(1);
    let groups = blocks.div_ceil(BLOCKS_IN_GROUP);
    blocks.div_ceil(groups) * block
}
