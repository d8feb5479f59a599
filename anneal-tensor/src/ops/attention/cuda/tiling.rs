//! Which of our kernels serves a head dim on a GPU, in which shape, and what it is compiled with.

use anneal_device::cuda::Source;

/// The texts of a kernel, one after the other; those for warpgroups are empty elsewhere than on sm_90a.
macro_rules! texts {
    ($name:literal: $($file:literal),+) => {
        Source {
            name: $name,
            code: concat!($(include_str!(concat!("../kernel_", $file, ".cu")), "\n"),+),
        }
    };
    (sm_90a $name:literal: $($file:literal),+) => {
        Source {
            name: $name,
            code: concat!(
                "#if __CUDA_ARCH__ == 900\n",
                $(include_str!(concat!("../kernel_", $file, ".cu")), "\n",)+
                "#endif\n"
            ),
        }
    };
}

const FORWARD: Source = texts!("attention_forward": "common", "rows", "matrix", "softmax", "forward");
const FORWARD_HOPPER: Source =
    texts!(sm_90a "attention_forward_hopper": "common", "rows", "wgmma", "softmax", "forward_hopper");
const BACKWARD: Source =
    texts!("attention_backward": "common", "rows", "matrix", "tiles", "gradient", "backward");
const BACKWARD_HOPPER: Source = texts!(sm_90a "attention_backward_hopper": "common", "rows", "wgmma", "tiles_hopper", "gradient", "backward_hopper");
pub(super) const REDUCE: Source = texts!("attention_reduce": "common", "reduce");
pub(super) const GENERIC: Source = texts!("attention_generic": "common", "generic");

pub(super) const SOURCES: [Source; 6] = [FORWARD, FORWARD_HOPPER, BACKWARD, BACKWARD_HOPPER, REDUCE, GENERIC];

/// Largest head dim of the kernels that use the matrix unit.
pub(super) const MATRIX_UNIT_DIM: usize = 128;

/// A kernel of the matrix unit in one shape.
#[derive(Clone)]
pub(super) struct Tiling {
    pub source: Source,
    pub kernel: &'static str,
    /// Beside those that every kernel takes.
    pub macros: Vec<(&'static str, usize)>,
    pub threads: usize,
    /// Queries (forward) or keys (backward) of one block of threads.
    pub rows: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

/// Bytes from row to row of a tile of whole rows.
fn row_bytes(dim: usize) -> usize {
    ((dim / 8) | 1) * 16
}

/// Shapes of the forward kernel, the preferred one first.
pub(super) fn forward_tilings(hopper: bool, dim: usize) -> Vec<Tiling> {
    let small = dim <= 80;
    let warps = |m_tiles: usize| {
        let (warps, key_block, stages) = (4, 64, 2);
        let rows = 16 * m_tiles * warps;
        let macros = vec![
            ("WARPS", warps),
            ("M_TILES", m_tiles),
            ("KEY_BLOCK", key_block),
            ("STAGES", stages),
            ("MIN_BLOCKS", 2),
        ];
        let shared = (rows + 2 * stages * key_block) * row_bytes(dim);
        Tiling { source: FORWARD, kernel: "attention_forward", macros, threads: 32 * warps, rows, shared }
    };
    let warpgroups = || {
        let (groups, key_block, stages) = (2, 64, 4);
        let macros = vec![
            ("GROUPS", groups),
            ("M_TILES", 1),
            ("KEY_BLOCK", key_block),
            ("STAGES", stages),
            ("MIN_BLOCKS", if small { 2 } else { 1 }),
        ];
        let (source, kernel) = (FORWARD_HOPPER, "attention_forward_hopper");
        let rows = 64 * groups;
        let tiles = 16 * rows + 16 + 2 * stages * (16 * key_block + 16);
        let shared = dim / 8 * tiles + 16 * key_block.max(64) + 16 * stages;
        Tiling { source, kernel, macros, threads: 128 * groups, rows, shared }
    };
    let mut all = Vec::new();
    all.extend(hopper.then(warpgroups));
    all.extend(small.then(|| warps(2)));
    all.push(warps(1));
    all
}

/// Shapes of the backward kernel, the preferred one first; the last fits every GPU.
pub(super) fn backward_tilings(hopper: bool, dim: usize) -> Vec<Tiling> {
    let small = dim <= 80;
    let warps = |[warps, m_tiles, query_block, ds_buffers]: [usize; 4]| {
        let rows = 16 * m_tiles * warps;
        let macros = vec![
            ("WARPS", warps),
            ("M_TILES", m_tiles),
            ("QUERY_BLOCK", query_block),
            ("SUB_QUERIES", 32),
            ("DS_BUFFERS", ds_buffers),
            ("MIN_BLOCKS", 1),
        ];
        let tiles = (2 * rows + 5 * query_block) * row_bytes(dim);
        let shared = tiles + ds_buffers * rows * (2 * query_block + 16) + 16 * query_block;
        Tiling { source: BACKWARD, kernel: "attention_backward", macros, threads: 32 * warps, rows, shared }
    };
    let warpgroups = || {
        let (groups, m_tiles) = (2, if small { 2 } else { 1 });
        let macros = vec![("GROUPS", groups), ("M_TILES", m_tiles), ("SUB_QUERIES", 32), ("MIN_BLOCKS", 1)];
        let (source, kernel) = (BACKWARD_HOPPER, "attention_backward_hopper");
        let rows = 64 * m_tiles * groups;
        let shared = dim / 8 * (2 * (16 * rows + 16) + 5 * 1040) + 256 * rows + 2048;
        Tiling { source, kernel, macros, threads: 128 * groups, rows, shared }
    };
    let mut all = Vec::new();
    all.extend(hopper.then(warpgroups));
    all.extend(small.then(|| warps([8, 2, 64, 2])));
    all.push(warps([8, 1, 64, 1]));
    all.extend(small.then(|| warps([4, 2, 32, 1])));
    all.push(warps([4, 1, 32, 1]));
    all
}

/// Rows of a tile of the generic kernels, and their shared memory in bytes; `None` if no tile fits.
pub(super) fn generic_tile(dim: usize, available: usize) -> Option<(usize, usize)> {
    let shared = |tile: usize| 4 * (4 * tile * (dim | 1) + 2 * tile * (tile + 1) + 2 * tile);
    [32, 16].into_iter().map(|tile| (tile, shared(tile))).find(|(_, shared)| *shared <= available)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of shared memory that one block may have on sm_80, sm_86 and sm_89, and sm_90.
    const SHARED: [(usize, bool); 3] = [(163 << 10, false), (99 << 10, false), (227 << 10, true)];

    #[test]
    fn every_head_dim_has_a_shape_on_every_gpu() {
        for (available, hopper) in SHARED {
            for dim in (8..=MATRIX_UNIT_DIM).step_by(8) {
                for tilings in [forward_tilings(hopper, dim), backward_tilings(hopper, dim)] {
                    assert!(tilings.iter().any(|tiling| tiling.shared <= available), "{dim} in {available}");
                }
            }
            assert!(generic_tile(320, available).is_some());
        }
    }
}
