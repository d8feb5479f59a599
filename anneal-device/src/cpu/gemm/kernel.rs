//! The table of micro-kernels and the choice among them at run time.

use std::sync::OnceLock;

use super::super::element::ElementType;

/// The widest panel of any kernel.
pub(super) const MAX_COLUMNS: usize = 32;

/// One register tile: `out (+)= A B` over one block of the depth.
pub(super) struct Tile {
    pub depth: usize,
    /// Element `(i, k)` of A at `i * a_row_stride + k * a_depth_stride`; one of the strides is 1.
    pub a: *const f32,
    pub a_row_stride: usize,
    pub a_depth_stride: usize,
    /// Element `(k, j)` of B at `k * b_depth_stride + j`; a whole panel's width is readable.
    pub b: *const f32,
    pub b_depth_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    pub rows: usize,
    pub columns: usize,
    /// What later tiles read of A and of B, to be fetched on the way: a line for every eight depths.
    pub fetch: [Fetch; 3],
    /// Adds to `out`, which is otherwise not read.
    pub accumulate: bool,
}

/// A line to fetch into the second-level cache, and bytes to the next one.
#[derive(Clone, Copy)]
pub(super) struct Fetch {
    pub start: *const u8,
    pub step: usize,
}

impl Fetch {
    /// Fetches what is in the cache already: costs next to nothing.
    pub(super) fn nothing(start: *const f32) -> Self {
        Self { start: start.cast(), step: 0 }
    }
}

/// Panels to pack. Lane `l` at depth `k` of the source goes, in f32, to lane `l % width` of panel
/// `l / width`: to `target[l / width * panel_stride + k * width + l % width]`. The lanes that the
/// last panel has beyond `lanes` are zeroed.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub source: *const u8,
    pub element: ElementType,
    pub lane_stride: usize,
    pub depth_stride: usize,
    pub lanes: usize,
    pub depth: usize,
    pub width: usize,
    pub target: *mut f32,
    pub panel_stride: usize,
}

/// A micro-kernel: tiles of up to `rows` by `columns`.
pub(super) struct Kernel {
    pub name: &'static str,
    pub rows: usize,
    pub columns: usize,
    pub tile: unsafe fn(&Tile),
    /// Packs one panel whose depth is contiguous (a transposition).
    pub pack_transposed: unsafe fn(&Panels),
    /// Packs whole panels of `rows` adjacent f32 lanes, if there is a way of its own.
    pub pack_adjacent: Option<unsafe fn(&Panels)>,
}

/// The kernels that this machine can run, best first.
pub(super) fn available() -> &'static [&'static Kernel] {
    static AVAILABLE: OnceLock<Vec<&'static Kernel>> = OnceLock::new();
    AVAILABLE.get_or_init(|| {
        let mut kernels: Vec<&'static Kernel> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            if wide {
                kernels.push(&super::avx512::KERNEL);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push(&super::avx2::KERNEL);
            }
        }
        kernels.push(&super::portable::KERNEL);
        kernels
    })
}

pub(super) fn best() -> &'static Kernel {
    available()[0]
}
