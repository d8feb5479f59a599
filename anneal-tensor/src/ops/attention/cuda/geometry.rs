//! Tile sizes, shared memory and grids of the attention kernels.
//!
//! What they were measured by: `benchmarks/2026-11-25-h200-attention-backward`, `-few-rows-and-forward` and `-clusters`.

use anneal_device::cuda::{Launch, Properties};

use crate::{DType, Tensor};

/// Which units make the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Warpgroups on tensor cores (wgmma): compute capability 9.0.
    Warpgroups,
    /// Warps on tensor cores (mma.sync): from 8.0 on.
    Warps,
    /// Plain loops: any dtype, head dim and alignment.
    Plain,
}

impl Family {
    /// The fastest that takes the tensors, all `[B, N or M, H, D]` with contiguous rows.
    pub(super) fn of(properties: &Properties, tensors: &[&Tensor]) -> Self {
        let dim = tensors[0].size(3);
        let half = [DType::BF16, DType::F16].contains(&tensors[0].dtype());
        if !half || !dim.is_multiple_of(8) || dim > 128 || !tensors.iter().all(|tensor| is_aligned(tensor)) {
            return Self::Plain;
        }
        match properties.compute {
            (9, 0) => Self::Warpgroups,
            (8.., _) => Self::Warps,
            _ => Self::Plain,
        }
    }

    /// The family that makes the gradients.
    pub(super) fn backward(self, dim: usize) -> Self {
        match self {
            Self::Warpgroups if dim > WIDEST_BY_WARPGROUPS => Self::Warps,
            family => family,
        }
    }
}

const CLUSTER: &str = "CLUSTER";
/// Blocks of a cluster that every device of the generation takes.
const LARGEST_CLUSTER: usize = 8;
/// Widest heads whose gradients by warpgroups fit the registers.
const WIDEST_BY_WARPGROUPS: usize = 80;

/// Rows that start at multiples of 16 bytes, at 32-bit offsets within a head.
fn is_aligned(tensor: &Tensor) -> bool {
    let strides = (0..3).filter(|axis| tensor.size(*axis) > 1).map(|axis| tensor.strides()[axis]);
    tensor.address().addr().is_multiple_of(16)
        && strides.into_iter().all(|stride| stride % 8 == 0)
        && tensor.size(1) * tensor.strides()[1] < 1 << 31
}

/// What a kernel is compiled and started with.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    macros: Vec<(&'static str, usize)>,
    /// Queries (forward, and backward by warpgroups) or keys of a block of threads.
    pub(super) rows: usize,
    threads: usize,
    shared: usize,
}

/// Bytes from row to row of the kernels of warps: an odd number of 16-byte chunks.
fn row_bytes(dim: usize) -> usize {
    ((dim / 8) | 1) * 16
}

impl Geometry {
    pub(super) fn macros(&self) -> Vec<(&'static str, String)> {
        self.macros.iter().map(|(name, value)| (*name, value.to_string())).collect()
    }

    pub(super) fn launch(&self, grid: [usize; 3]) -> Launch {
        Launch::new(grid, self.threads).shared(self.shared)
    }

    /// `heads` are those of all images.
    pub(super) fn forward(
        family: Family,
        dim: usize,
        queries: usize,
        heads: usize,
        properties: &Properties,
    ) -> Self {
        match family {
            Family::Warpgroups => {
                let few = heads * queries.div_ceil(256) < properties.multiprocessors;
                Self::forward_of_warpgroups(dim, few || queries <= 128)
            }
            Family::Warps => Self::forward_of_warps(dim),
            Family::Plain => Self::first_that_fits(Self::all_plain(dim), properties.shared_memory_per_block),
        }
    }

    pub(super) fn backward(family: Family, dim: usize, queries: usize, properties: &Properties) -> Self {
        match family {
            Family::Warpgroups => Self::backward_of_warpgroups(dim, queries, true),
            Family::Warps => {
                Self::first_that_fits(Self::all_backward_of_warps(dim), properties.shared_memory_per_block)
            }
            Family::Plain => Self::first_that_fits(Self::all_plain(dim), properties.shared_memory_per_block),
        }
    }

    /// The first that asks for no more shared memory than a block may have, or the last.
    fn first_that_fits(mut all: Vec<Self>, shared_memory_per_block: usize) -> Self {
        let fits = |geometry: &Self| geometry.shared <= shared_memory_per_block;
        let first = all.iter().position(fits).unwrap_or(all.len() - 1);
        all.swap_remove(first)
    }

    /// `few` queries, of all heads, are dealt to smaller blocks of threads, so that they fill the device.
    pub(super) fn forward_of_warpgroups(dim: usize, few: bool) -> Self {
        // Narrow heads leave four groups the registers that they need.
        let (groups, registers) = if few || dim > 80 { (2, 240) } else { (4, 112) };
        let (key_block, stages) = (64, if dim > 80 { 4 } else { 6 });
        let macros = vec![
            ("GROUPS", groups),
            ("M_TILES", 1),
            ("KEY_BLOCK", key_block),
            ("STAGES", stages),
            ("GROUP_REGISTERS", registers),
        ];
        let shared = 128 * dim * (2 * groups + 2 * stages) + 1024 + 16 * (2 + stages);
        Self { macros, rows: 64 * groups, threads: 128 * (groups + 1), shared }
    }

    /// With `clusters` the blocks of threads that share a head's queries form one, where it has room for what they send
    /// each other.
    pub(super) fn backward_of_warpgroups(dim: usize, queries: usize, clusters: bool) -> Self {
        let tiles = if queries > 128 { 2 } else { 1 };
        let rows = 128 * tiles;
        let blocks = queries.div_ceil(rows);
        let narrow = dim <= 72;
        let cluster = if clusters && narrow && blocks <= LARGEST_CLUSTER { blocks } else { 1 };
        // With a stage to spare, the next head's first queries arrive while this head is at work.
        let stages = if narrow && cluster == 1 { 3 } else { 2 };
        let macros = vec![
            ("M_TILES", tiles),
            ("QUERY_STAGES", stages),
            (CLUSTER, cluster),
            ("ONE_VISIT", usize::from(blocks == cluster)),
        ];
        let sums = if cluster > 1 { 512 * dim } else { 0 };
        let shared = dim * (512 * stages + 1152) + 32_768 + 1024 * stages + 1024 + 256 + sums;
        Self { macros, rows, threads: 512, shared }
    }

    /// Blocks of threads of a cluster.
    pub(super) fn cluster(&self) -> usize {
        self.macros.iter().find(|(name, _)| *name == CLUSTER).map_or(1, |(_, blocks)| *blocks)
    }

    pub(super) fn forward_of_warps(dim: usize) -> Self {
        let (warps, tiles, key_block, stages) = (4, if dim <= 80 { 2 } else { 1 }, 64, 2);
        let rows = 16 * tiles * warps;
        let macros = vec![
            ("WARPS", warps),
            ("M_TILES", tiles),
            ("KEY_BLOCK", key_block),
            ("STAGES", stages),
            ("MIN_BLOCKS", 2),
        ];
        let shared = (rows + 2 * stages * key_block) * row_bytes(dim);
        Self { macros, rows, threads: 32 * warps, shared }
    }

    /// The fastest first; the last fits the shared memory of every device.
    pub(super) fn all_backward_of_warps(dim: usize) -> Vec<Self> {
        let of = |[warps, tiles, query_block, sub_queries, buffers]: [usize; 5]| {
            let rows = 16 * tiles * warps;
            let macros = vec![
                ("WARPS", warps),
                ("M_TILES", tiles),
                ("QUERY_BLOCK", query_block),
                ("SUB_QUERIES", sub_queries),
                ("DS_BUFFERS", buffers),
                ("MIN_BLOCKS", 1),
            ];
            let ds = buffers * rows * (2 * query_block + 16);
            let shared = (2 * rows + 5 * query_block) * row_bytes(dim) + ds + 16 * query_block;
            Self { macros, rows, threads: 32 * warps, shared }
        };
        let narrow = [[8, 2, 64, 16, 2], [4, 2, 32, 16, 1]].map(of);
        let wide = [[8, 1, 64, 32, 1], [4, 1, 32, 32, 1]].map(of);
        if dim <= 80 { narrow.into() } else { wide.into() }
    }

    /// The fastest first; the last fits the shared memory of every device up to a head dim of 768.
    pub(super) fn all_plain(dim: usize) -> Vec<Self> {
        const LANES: usize = 8;
        let of = |tile: usize| {
            let shared = 4 * (4 * tile * (dim | 1) + 2 * tile * (tile + 1) + 2 * tile);
            Self { macros: vec![("TILE", tile)], rows: tile, threads: tile * LANES, shared }
        };
        let tiles: &[usize] = if dim <= 256 { &[32, 16, 8] } else { &[16, 8] };
        tiles.iter().copied().map(of).collect()
    }
}

/// Parts that the blocks of keys of backward by warps are dealt to, none of them empty: enough to fill the device, few
/// enough that their sums stay cheap.
pub(super) fn parts_of_keys(blocks: usize, heads: usize, multiprocessors: usize) -> usize {
    let enough = (6 * multiprocessors).div_ceil(heads).min(4).max(multiprocessors.div_ceil(heads));
    without_empty(blocks, enough)
}

/// Parts that the blocks of queries of backward by warpgroups are dealt to: those that are over first, one block of threads a
/// multiprocessor, where each part costs about a sixteenth for its sums.
pub(super) fn parts_of_queries(blocks: usize, heads: usize, multiprocessors: usize) -> usize {
    let cost = |parts: &usize| {
        (parts * heads).div_ceil(multiprocessors) * blocks.div_ceil(*parts) * (PART_COST + parts)
    };
    (1..=MOST_PARTS).map(|parts| without_empty(blocks, parts)).min_by_key(cost).expect("there is one")
}

const PART_COST: usize = 16;
const MOST_PARTS: usize = 16;

/// So many parts, or fewer, so that each has a block.
fn without_empty(blocks: usize, parts: usize) -> usize {
    blocks.div_ceil(blocks.div_ceil(parts.min(blocks)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_blocks_and_none_is_empty() {
        for blocks in 1..40 {
            for heads in [1, 16, 256, 4096] {
                for parts in [parts_of_keys, parts_of_queries].map(|parts| parts(blocks, heads, 132)) {
                    let share = blocks.div_ceil(parts);
                    let covered = (parts - 1) * share < blocks && parts * share >= blocks;
                    assert!(covered, "{blocks} {heads} {parts}");
                }
            }
        }
    }

    #[test]
    fn parts_of_queries_are_those_that_are_over_first() {
        // Sixteen blocks of queries (4096 tokens); times in blocks, of one part and of the best.
        let parts = |heads| parts_of_queries(16, heads, 132);
        assert_eq!(parts(64), 2); // 16, 8
        assert_eq!(parts(80), 3); // 16, 12: 2 times 6 blocks
        assert_eq!(parts(128), 1); // 16; two parts take 16 too
        assert_eq!(parts(512), 1);
        assert_eq!(parts(16), 8); // 16, 2
        assert_eq!(parts(1), 16); // 16, 1
    }

    #[test]
    fn plain_loops_take_the_largest_tile_that_fits_the_device() {
        // sm_86 and sm_89, sm_80, sm_90: bytes that a block may have.
        let devices = [101_376, 166_912, 232_448];
        let rows = |dim, device| Geometry::first_that_fits(Geometry::all_plain(dim), device).rows;
        assert_eq!(devices.map(|device| rows(160, device)), [32, 32, 32]);
        assert_eq!(devices.map(|device| rows(256, device)), [16, 32, 32]);
        assert_eq!(devices.map(|device| rows(512, device)), [8, 16, 16]);
        for (dim, device) in (1..=768).flat_map(|dim| devices.map(|device| (dim, device))) {
            let geometry = Geometry::first_that_fits(Geometry::all_plain(dim), device);
            assert!(geometry.shared <= device, "head dim {dim}: {geometry:?}");
        }
    }

    #[test]
    fn shared_memory_fits_the_devices() {
        for dim in (8..=128).step_by(8) {
            let hopper = 232_448;
            assert!(
                [false, true].iter().all(|few| Geometry::forward_of_warpgroups(dim, *few).shared <= hopper)
            );
            if Family::Warpgroups.backward(dim) == Family::Warpgroups {
                for (queries, clusters) in [(64, true), (256, true), (300, true), (2048, true), (300, false)]
                {
                    assert!(Geometry::backward_of_warpgroups(dim, queries, clusters).shared <= hopper);
                }
            }
            // sm_86 and sm_89 have the least.
            assert!(Geometry::forward_of_warps(dim).shared <= 101_376);
            assert!(Geometry::all_backward_of_warps(dim).last().unwrap().shared <= 101_376);
        }
    }
}
