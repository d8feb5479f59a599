//! The loops around the kernels, and how a product is shared out among threads.

use super::super::element::ElementType;
use super::epilogue::{Finish, is_plain};
use super::kernel::{Kernel, Panel, Tile};
use super::scratch::{Storage, with_blocks, with_panels};
use super::{Gemm, pack, sums};
use crate::ThreadPool;

/// Largest depth block: a panel of B of this depth fills two thirds of a 48 KiB first-level cache.
const DEPTH_BLOCK: usize = 384;
/// Values of packed B that are held at once; beyond, the columns are taken in several passes.
const PANEL_BUDGET: usize = 4 << 20;
/// The same when B is packed by the thread that uses it: half of its second-level cache.
const OWN_PANEL_BUDGET: usize = 256 << 10;
/// Values of C that a task revisits with each depth block, so as to stay in the second-level cache.
const TASK_OUTPUT: usize = 96 << 10;
/// Most rows of a task: with a depth block, the block of A that stays in the second-level cache.
const TASK_ROWS: usize = 240;
/// Fewer rows than this are not worth a separate pass over B: threads share out the columns.
const FEW_ROWS: usize = 96;
/// Multiply-adds below which waking threads costs more than it saves.
const SERIAL_WORK: usize = 200_000;

/// A function of the depth alone, because it fixes the order of the additions.
fn depth_block(depth: usize) -> usize {
    let blocks = depth.div_ceil(DEPTH_BLOCK).max(1);
    depth.div_ceil(blocks).next_multiple_of(8).max(8)
}

/// The whole product on all threads of the pool.
///
/// # Safety
/// The problem's operands are valid.
pub(super) unsafe fn parallel(kernel: &Kernel, pool: &ThreadPool, problem: &Gemm) {
    let Gemm { rows, columns, depth, .. } = *problem;
    let threads = pool.threads();
    let work = rows.saturating_mul(columns).saturating_mul(depth);
    if threads == 1 || work < SERIAL_WORK {
        // SAFETY: passed on.
        return unsafe { serial(kernel, problem) };
    }
    if rows <= FEW_ROWS {
        return split_columns(kernel, pool, problem);
    }
    let step = columns_at_once(kernel, problem, PANEL_BUDGET);
    for column in (0..columns).step_by(step) {
        let part = problem.column_range(column, step.min(columns - column));
        with_panels(|storage| {
            let panels = part.columns.div_ceil(kernel.columns);
            let packed = Packed::reserve(kernel, &part, storage);
            pool.run(panels, |panel| {
                // SAFETY: each panel is written by one task.
                unsafe { packed.pack(kernel, &part, panel..panel + 1) }
            });
            let grid = Grid::new(kernel, &part, threads);
            pool.run(grid.rows.count * grid.columns.count, |index| {
                // SAFETY: every task has its own block of C.
                unsafe { task(kernel, &part, &packed, &grid, index) }
            });
        });
    }
}

/// Threads take ranges of columns, and pack only those.
fn split_columns(kernel: &Kernel, pool: &ThreadPool, problem: &Gemm) {
    let pieces = Pieces::new(problem.columns, kernel.columns, pool.threads() * 2);
    pool.run(pieces.count, |index| {
        let (start, length) = pieces.range(index);
        // SAFETY: every task has its own columns of C.
        unsafe { serial(kernel, &problem.column_range(start, length)) }
    });
}

/// The whole product on this thread.
///
/// # Safety
/// The problem's operands are valid.
pub(super) unsafe fn serial(kernel: &Kernel, problem: &Gemm) {
    let columns = problem.columns;
    if problem.rows == 0 || columns == 0 {
        return;
    }
    let step = columns_at_once(kernel, problem, OWN_PANEL_BUDGET);
    for column in (0..columns).step_by(step) {
        let part = problem.column_range(column, step.min(columns - column));
        with_panels(|storage| {
            let packed = Packed::reserve(kernel, &part, storage);
            let grid = Grid::new(kernel, &part, 1);
            // SAFETY: passed on.
            unsafe {
                packed.pack(kernel, &part, 0..part.columns.div_ceil(kernel.columns));
                for index in 0..grid.rows.count * grid.columns.count {
                    task(kernel, &part, &packed, &grid, index);
                }
            }
        });
    }
}

/// Columns whose packed panels fit the budget, in whole panels.
fn columns_at_once(kernel: &Kernel, problem: &Gemm, budget: usize) -> usize {
    let panels = budget / (problem.depth.max(1) * kernel.columns);
    panels.max(1) * kernel.columns
}

/// A length cut into nearly equal pieces of whole units.
struct Pieces {
    length: usize,
    unit: usize,
    units: usize,
    count: usize,
}

impl Pieces {
    fn new(length: usize, unit: usize, count: usize) -> Self {
        let units = length.div_ceil(unit);
        Self { length, unit, units, count: count.clamp(1, units.max(1)) }
    }

    /// Start and length of piece `index`.
    fn range(&self, index: usize) -> (usize, usize) {
        let edge = |index: usize| (self.units * index / self.count * self.unit).min(self.length);
        (edge(index), edge(index + 1) - edge(index))
    }
}

/// How C is cut into tasks.
struct Grid {
    rows: Pieces,
    columns: Pieces,
}

impl Grid {
    fn new(kernel: &Kernel, problem: &Gemm, threads: usize) -> Self {
        let revisits = problem.depth > DEPTH_BLOCK;
        let widest = if revisits { (TASK_OUTPUT / TASK_ROWS * 2).max(kernel.columns) } else { usize::MAX };
        let columns = Pieces::new(problem.columns, kernel.columns, problem.columns.div_ceil(widest));
        let width = problem.columns.div_ceil(columns.count);
        let height = if revisits { (TASK_OUTPUT / width).clamp(48, TASK_ROWS) } else { TASK_ROWS };
        // A multiple of the threads, so that none is left with a whole extra task.
        let tasks = (problem.rows.div_ceil(height) * columns.count).next_multiple_of(threads);
        Self { rows: Pieces::new(problem.rows, kernel.rows, tasks / columns.count), columns }
    }
}

/// B in panels: `[panel][depth][lane]`.
struct Packed {
    pointer: *mut f32,
    panel_stride: usize,
}
// SAFETY: written by disjoint tasks, then only read.
unsafe impl Sync for Packed {}

impl Packed {
    fn reserve(kernel: &Kernel, problem: &Gemm, storage: &mut Storage) -> Self {
        let panel_stride = problem.depth * kernel.columns;
        let panels = problem.columns.div_ceil(kernel.columns);
        Self { pointer: storage.reserve(panels * panel_stride), panel_stride }
    }

    /// # Safety
    /// The problem's B is valid and the panels are nobody else's.
    unsafe fn pack(&self, kernel: &Kernel, problem: &Gemm, panels: std::ops::Range<usize>) {
        for panel in panels {
            let column = panel * kernel.columns;
            let source = problem.b.at(0, column);
            // SAFETY: passed on.
            unsafe {
                let panel = Panel {
                    source: source.pointer,
                    element: source.element,
                    lane_stride: source.column_stride,
                    depth_stride: source.row_stride,
                    lanes: kernel.columns.min(problem.columns - column),
                    width: kernel.columns,
                    depth: problem.depth,
                    target: self.pointer.add(panel * self.panel_stride),
                };
                pack::pack(kernel, &panel);
            }
        }
    }
}

/// One block of A as the kernel reads it.
struct BlockOfA {
    pointer: *const f32,
    row_stride: usize,
    depth_stride: usize,
    /// From one tile's rows to the next.
    panel_stride: usize,
}

impl BlockOfA {
    /// # Safety
    /// The problem's A is valid.
    unsafe fn new(kernel: &Kernel, problem: &Gemm, k: usize, depth: usize, storage: &mut Storage) -> Self {
        let a = problem.a.at(0, k);
        if a.element == ElementType::F32 && (a.row_stride == 1 || a.column_stride == 1) {
            let (row_stride, depth_stride) = (a.row_stride, a.column_stride);
            let pointer = a.pointer.cast();
            return Self { pointer, row_stride, depth_stride, panel_stride: kernel.rows * row_stride };
        }
        let panel_stride = kernel.rows * depth;
        let target = storage.reserve(problem.rows.div_ceil(kernel.rows) * panel_stride);
        for row in (0..problem.rows).step_by(kernel.rows) {
            let panel = Panel {
                source: a.at(row, 0).pointer,
                element: a.element,
                lane_stride: a.row_stride,
                depth_stride: a.column_stride,
                lanes: kernel.rows.min(problem.rows - row),
                width: kernel.rows,
                depth,
                // SAFETY: within what was reserved.
                target: unsafe { target.add(row / kernel.rows * panel_stride) },
            };
            // SAFETY: passed on.
            unsafe { pack::pack(kernel, &panel) };
        }
        Self { pointer: target, row_stride: 1, depth_stride: kernel.rows, panel_stride }
    }
}

/// Where a task's sums grow: C itself, or f32 storage when C is of another format.
struct Sums {
    pointer: *mut f32,
    stride: usize,
    /// One tile is enough when nothing is revisited.
    single: bool,
}

impl Sums {
    fn new(kernel: &Kernel, problem: &Gemm, single: bool, storage: &mut Storage) -> Self {
        if problem.c.element == ElementType::F32 {
            return Self { pointer: problem.c.pointer.cast(), stride: problem.c.row_stride, single: false };
        }
        let stride = if single { kernel.columns } else { problem.columns.next_multiple_of(kernel.columns) };
        let rows = if single { kernel.rows } else { problem.rows };
        Self { pointer: storage.reserve(rows * stride), stride, single }
    }

    fn at(&self, row: usize, column: usize) -> *mut f32 {
        if self.single { self.pointer } else { self.pointer.wrapping_add(row * self.stride + column) }
    }
}

/// One block of C over the whole depth.
///
/// # Safety
/// The problem's operands are valid, `packed` holds its B, and nobody else writes the block.
unsafe fn task(kernel: &Kernel, problem: &Gemm, packed: &Packed, grid: &Grid, index: usize) {
    let (row, rows) = grid.rows.range(index / grid.columns.count);
    let (column, columns) = grid.columns.range(index % grid.columns.count);
    let block = problem.row_range(row, rows).column_range(column, columns);
    let b = packed.pointer.wrapping_add(column / kernel.columns * packed.panel_stride);
    let step = depth_block(problem.depth);
    with_blocks(|a_storage, c_storage| {
        let out = Sums::new(kernel, &block, problem.depth <= step, c_storage);
        // At least one turn: a product of no depth is zero, not nothing.
        for k in (0..problem.depth.max(1)).step_by(step) {
            let depth = step.min(problem.depth - k);
            // SAFETY: passed on.
            unsafe {
                if let Some(sums) = block.row_sums {
                    sums::add_row_sums(sums, block.a.at(0, k), rows, depth, k == 0);
                }
                let a = BlockOfA::new(kernel, &block, k, depth, a_storage);
                let b = b.wrapping_add(k * kernel.columns);
                multiply(kernel, &block, &a, (b, packed.panel_stride), &out, k, depth);
            }
        }
    })
}

/// One depth block of one block of C: panels of B outside, tiles of rows inside.
unsafe fn multiply(
    kernel: &Kernel,
    block: &Gemm,
    a: &BlockOfA,
    (b, panel_stride): (*const f32, usize),
    out: &Sums,
    k: usize,
    depth: usize,
) {
    let onto_c = block.accumulate && block.c.element == ElementType::F32;
    let finishing = k + depth == block.depth && !is_plain(block);
    for column in (0..block.columns).step_by(kernel.columns) {
        let columns = kernel.columns.min(block.columns - column);
        // SAFETY: the caller's.
        let finish = finishing.then(|| unsafe { Finish::new(block, kernel.columns, column, columns) });
        for row in (0..block.rows).step_by(kernel.rows) {
            let tile = Tile {
                depth,
                a: a.pointer.wrapping_add(row / kernel.rows * a.panel_stride),
                a_row_stride: a.row_stride,
                a_depth_stride: a.depth_stride,
                b: b.wrapping_add(column / kernel.columns * panel_stride),
                b_depth_stride: kernel.columns,
                out: out.at(row, column),
                out_stride: out.stride,
                rows: kernel.rows.min(block.rows - row),
                columns,
                accumulate: onto_c || k > 0,
            };
            if let Some(finish) = &finish {
                finish.prefetch(row, tile.rows);
            }
            // SAFETY: the caller's.
            unsafe {
                (kernel.tile)(&tile);
                if let Some(finish) = &finish {
                    finish.tile(row, tile.rows, tile.out, out.stride);
                }
            }
        }
    }
}
