//! One block of C: the loops around the kernel.
//!
//! From the outside in: blocks of A's rows, groups of depth (a block of A is packed: second-level
//! cache), panels of B, depth blocks (a panel's block: first-level cache), tiles of rows.

use std::ops::Range;

use super::super::element::ElementType;
use super::Gemm;
use super::blocks::{ROWS_OF_A, depth_block, depth_group};
use super::driver::Pieces;
use super::epilogue::{Finish, is_plain};
use super::kernel::{Fetch, Kernel, Tile};
use super::operands::{Block, Packed, Source};
use super::scratch::{Storage, with_blocks};
use super::sums::add_row_sums;

/// Computes the whole product, whose B is in `panels`.
///
/// # Safety
/// The problem's operands are valid and nobody else writes its C.
pub(super) unsafe fn task(kernel: &Kernel, problem: &Gemm, panels: Packed) {
    let source = Source::new(problem);
    let pieces = Pieces::new(problem.rows, kernel.rows, problem.rows.div_ceil(ROWS_OF_A));
    let group = depth_group(problem.depth);
    let step = depth_block(problem.depth);
    // At least one group: a product of no depth is zero, not nothing.
    let groups = problem.depth.div_ceil(group).max(1);
    let blocks: usize = pieces.count * groups;
    let extent = |index: usize| {
        let (row, rows) = pieces.range(index / groups);
        let k = index % groups * group;
        (row..row + rows, k..problem.depth.min(k + group))
    };
    with_blocks(|a_storage, c_storage| {
        for index in 0..blocks {
            let (rows, depths) = extent(index);
            let out = Sums::new(kernel, problem, &rows, groups == 1, c_storage);
            // SAFETY: passed on.
            unsafe {
                if let Some(sums) = problem.row_sums {
                    for k in depths.clone().step_by(step) {
                        let a = problem.a.at(rows.start, k);
                        add_row_sums(sums.from(rows.start), a, rows.len(), step.min(depths.end - k), k == 0);
                    }
                }
                let a = source.block(kernel, rows, depths, a_storage);
                let next = (index + 1 < blocks).then(|| extent(index + 1));
                Walk { kernel, problem, panels, source: &source, a, next, out, step }.multiply();
            }
        }
    })
}

/// Where sums grow: C itself, or f32 storage when C is of another format.
struct Sums {
    pointer: *mut f32,
    stride: usize,
    /// From one panel of columns to the next: zero when the storage is used again for each.
    panel_stride: usize,
    first_row: usize,
}

impl Sums {
    fn new(
        kernel: &Kernel,
        problem: &Gemm,
        rows: &Range<usize>,
        single: bool,
        storage: &mut Storage,
    ) -> Self {
        let c = problem.c;
        if c.element == ElementType::F32 {
            return Self {
                pointer: c.pointer.cast(),
                stride: c.row_stride,
                panel_stride: kernel.columns,
                first_row: 0,
            };
        }
        let panel_stride = rows.len() * kernel.columns;
        let panels = if single { 1 } else { problem.columns.div_ceil(kernel.columns) };
        Self {
            pointer: storage.reserve(panels * panel_stride),
            stride: kernel.columns,
            panel_stride: if single { 0 } else { panel_stride },
            first_row: rows.start,
        }
    }

    fn at(&self, row: usize, panel: usize) -> *mut f32 {
        self.pointer.wrapping_add((row - self.first_row) * self.stride + panel * self.panel_stride)
    }
}

/// The work with one block of A.
struct Walk<'a> {
    kernel: &'a Kernel,
    problem: &'a Gemm<'a>,
    panels: Packed,
    source: &'a Source<'a>,
    a: Block,
    /// Rows and depths of the block after this one.
    next: Option<(Range<usize>, Range<usize>)>,
    out: Sums,
    /// Depths of a tile.
    step: usize,
}

impl Walk<'_> {
    /// # Safety
    /// As [`task`].
    unsafe fn multiply(&self) {
        let Self { kernel, problem, .. } = *self;
        let finishing = self.a.depths.end == problem.depth && !is_plain(problem);
        for column in (0..problem.columns).step_by(kernel.columns) {
            let columns = kernel.columns.min(problem.columns - column);
            // SAFETY: the caller's.
            let finish = finishing.then(|| unsafe { Finish::new(problem, kernel.columns, column, columns) });
            // At least one turn, as in `task`.
            for k in (self.a.depths.start..self.a.depths.end.max(1)).step_by(self.step) {
                let depths = k..self.a.depths.end.min(k + self.step);
                let finish = finish.as_ref().filter(|_| depths.end == problem.depth);
                // SAFETY: the caller's.
                unsafe { self.column_of_tiles(column, columns, depths, finish) };
            }
        }
    }

    /// The tiles of one panel's depth block.
    unsafe fn column_of_tiles(
        &self,
        column: usize,
        columns: usize,
        depths: Range<usize>,
        finish: Option<&Finish>,
    ) {
        let Self { kernel, problem, .. } = *self;
        let onto_c = problem.accumulate && problem.c.element == ElementType::F32;
        let fetches = Fetches::new(self, column, &depths);
        for row in self.a.rows.clone().step_by(kernel.rows) {
            let a = self.a.at(kernel, row, depths.start);
            let tile = Tile {
                depth: depths.len(),
                a,
                a_row_stride: self.a.row_stride,
                a_depth_stride: self.a.depth_stride,
                b: self.panels.at(kernel, column, depths.start),
                b_depth_stride: kernel.columns,
                out: self.out.at(row, column / kernel.columns),
                out_stride: self.out.stride,
                rows: kernel.rows.min(self.a.rows.end - row),
                columns,
                fetch: fetches.of_tile(self, (row - self.a.rows.start) / kernel.rows, a),
                accumulate: onto_c || depths.start > 0,
            };
            if let Some(finish) = finish {
                finish.prefetch(row, tile.rows);
            }
            // SAFETY: the caller's.
            unsafe {
                (kernel.tile)(&tile);
                if let Some(finish) = finish {
                    finish.tile(row, tile.rows, tile.out, tile.out_stride);
                }
            }
        }
    }
}

/// What the tiles of one column fetch for later.
struct Fetches {
    /// Tiles in this column, and in all columns before it.
    tiles: usize,
    before: usize,
    /// Tiles in all columns.
    total: usize,
    /// The panel of B that comes next.
    b: *const f32,
}

impl Fetches {
    fn new(walk: &Walk, column: usize, depths: &Range<usize>) -> Self {
        let kernel = walk.kernel;
        let tiles = walk.a.rows.len().div_ceil(kernel.rows);
        let steps = walk.a.depths.len().div_ceil(walk.step);
        let step = (depths.start - walk.a.depths.start) / walk.step;
        let before = (column / kernel.columns * steps + step) * tiles;
        let total = walk.problem.columns.div_ceil(kernel.columns) * steps * tiles;
        let (next_column, next_k) = if depths.end < walk.a.depths.end {
            (column, depths.end)
        } else {
            (column + kernel.columns, walk.a.depths.start)
        };
        // After the last panel come the first ones again, for the next block of A.
        let next_column = if next_column < walk.problem.columns { next_column } else { 0 };
        Self { tiles, before, total, b: walk.panels.at(kernel, next_column, next_k) }
    }

    /// The shares of a tile whose own A is at `here`.
    fn of_tile(&self, walk: &Walk, tile: usize, here: *const f32) -> [Fetch; 3] {
        let index = self.before + tile;
        let of_a = |index| {
            let (rows, depths) = walk.next.as_ref()?;
            walk.source.fetch(index, rows, depths, walk.step)
        };
        let share = walk.step * walk.kernel.columns * size_of::<f32>() / self.tiles;
        let start = self.b.cast::<u8>().wrapping_add(tile * share);
        let b = Fetch { start, step: share / (walk.step / 8) };
        let nothing = Fetch::nothing(here);
        [of_a(index).unwrap_or(nothing), of_a(self.total + index).unwrap_or(nothing), b]
    }
}
