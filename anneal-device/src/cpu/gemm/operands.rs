//! The operands as the kernels read them: B in packed panels, A in packed blocks or where it lies.

use std::ops::Range;

use super::super::element::ElementType;
use super::kernel::{Fetch, Kernel, Panels};
use super::scratch::Storage;
use super::{Gemm, Matrix, pack};

/// Depths of B in one packing task.
const PACK_DEPTHS: usize = 64;
/// Up to this many columns, A is not used often enough to be worth packing.
const DIRECT_COLUMNS: usize = 256;
/// Row strides of a multiple of this many bytes crowd a tile of A into few sets of the cache.
const CROWDING_STRIDE: usize = 4096;

/// B in panels: `[panel][depth][lane]`.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    pointer: *mut f32,
    panel_stride: usize,
}
// SAFETY: written by disjoint tasks, then only read.
unsafe impl Sync for Packed {}

impl Packed {
    pub(super) fn reserve(kernel: &Kernel, problem: &Gemm, storage: &mut Storage) -> Self {
        let panel_stride = problem.depth * kernel.columns;
        let panels = problem.columns.div_ceil(kernel.columns);
        Self { pointer: storage.reserve(panels * panel_stride), panel_stride }
    }

    /// Depth `k` of the panel that starts at `column`.
    pub(super) fn at(&self, kernel: &Kernel, column: usize, k: usize) -> *const f32 {
        self.pointer.wrapping_add(column / kernel.columns * self.panel_stride + k * kernel.columns)
    }

    /// The panels from `column` on, which begins one.
    pub(super) fn from(&self, kernel: &Kernel, column: usize) -> Self {
        Self { pointer: self.at(kernel, column, 0).cast_mut(), ..*self }
    }

    /// Pieces that can be packed independently: panels when B's depth is contiguous, and otherwise
    /// ranges of depth over all panels, so that B is read along its rows.
    pub(super) fn pieces(&self, kernel: &Kernel, problem: &Gemm) -> usize {
        if problem.b.column_stride == 1 {
            problem.depth.div_ceil(PACK_DEPTHS)
        } else {
            problem.columns.div_ceil(kernel.columns)
        }
    }

    /// # Safety
    /// The problem's B is valid and the piece is nobody else's.
    pub(super) unsafe fn pack(&self, kernel: &Kernel, problem: &Gemm, piece: usize) {
        let (columns, depths) = if problem.b.column_stride == 1 {
            let start = piece * PACK_DEPTHS;
            (0..problem.columns, start..problem.depth.min(start + PACK_DEPTHS))
        } else {
            let start = piece * kernel.columns;
            (start..problem.columns.min(start + kernel.columns), 0..problem.depth)
        };
        let source = problem.b.at(depths.start, columns.start);
        let panels = Panels {
            source: source.pointer,
            element: source.element,
            lane_stride: source.column_stride,
            depth_stride: source.row_stride,
            lanes: columns.len(),
            depth: depths.len(),
            width: kernel.columns,
            target: self.at(kernel, columns.start, depths.start).cast_mut(),
            panel_stride: self.panel_stride,
        };
        // SAFETY: passed on.
        unsafe { pack::pack(kernel, &panels) };
    }
}

/// A, of which blocks are taken one after the other.
pub(super) struct Source<'a> {
    a: Matrix<'a>,
    direct: bool,
}

/// One block of A: `rows` by `depths`.
pub(super) struct Block {
    pub rows: Range<usize>,
    pub depths: Range<usize>,
    pointer: *const f32,
    pub row_stride: usize,
    pub depth_stride: usize,
    /// From one tile's rows to the next.
    tile_stride: usize,
}

impl Block {
    /// Where the tile that begins at `row` and `k` lies.
    pub(super) fn at(&self, kernel: &Kernel, row: usize, k: usize) -> *const f32 {
        let tile = (row - self.rows.start) / kernel.rows;
        self.pointer.wrapping_add(tile * self.tile_stride + (k - self.depths.start) * self.depth_stride)
    }
}

impl<'a> Source<'a> {
    pub(super) fn new(problem: &Gemm<'a>) -> Self {
        let a = problem.a;
        let row_bytes = a.row_stride * a.element.size();
        // Adjacent depths are read a whole line at a time; adjacent rows are not, and go through
        // the cache better when they have been packed.
        let direct = a.element == ElementType::F32
            && a.column_stride == 1
            && problem.columns <= DIRECT_COLUMNS
            && !row_bytes.is_multiple_of(CROWDING_STRIDE);
        Self { a, direct }
    }

    /// # Safety
    /// A is valid.
    pub(super) unsafe fn block(
        &self,
        kernel: &Kernel,
        rows: Range<usize>,
        depths: Range<usize>,
        storage: &mut Storage,
    ) -> Block {
        let a = self.a.at(rows.start, depths.start);
        if self.direct {
            let (row_stride, depth_stride) = (a.row_stride, a.column_stride);
            let tile_stride = kernel.rows * row_stride;
            return Block { rows, depths, pointer: a.pointer.cast(), row_stride, depth_stride, tile_stride };
        }
        // A line more than needed: tiles at multiples of 4 KiB would crowd into the same sets.
        let tile_stride = (kernel.rows * depths.len()).next_multiple_of(16) + 16;
        let target = storage.reserve(rows.len().div_ceil(kernel.rows) * tile_stride);
        let panels = Panels {
            source: a.pointer,
            element: a.element,
            lane_stride: a.row_stride,
            depth_stride: a.column_stride,
            lanes: rows.len(),
            depth: depths.len(),
            width: kernel.rows,
            target,
            panel_stride: tile_stride,
        };
        // SAFETY: passed on; the target was reserved above.
        unsafe { pack::pack(kernel, &panels) };
        Block { rows, depths, pointer: target, row_stride: 1, depth_stride: kernel.rows, tile_stride }
    }

    /// What the `index`th tile before a block of `rows` by `depths` should fetch of it, when a tile
    /// has `step` depths: a row of so many depths, or an eighth as many lines of adjacent rows.
    pub(super) fn fetch(
        &self,
        index: usize,
        rows: &Range<usize>,
        depths: &Range<usize>,
        step: usize,
    ) -> Option<Fetch> {
        let size = self.a.element.size();
        let adjacent = self.a.row_stride == 1;
        let (lanes, run) = if adjacent { (64 / size, step / 8) } else { (1, step) };
        let runs = depths.len().div_ceil(run);
        let (row, k) = (rows.start + index / runs * lanes, depths.start + index % runs * run);
        let step = if adjacent { self.a.column_stride * size } else { 8 * size };
        (row < rows.end).then(|| Fetch { start: self.a.at(row, k).pointer, step })
    }
}
