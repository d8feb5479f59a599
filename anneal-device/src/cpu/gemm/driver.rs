//! How a product is shared out: passes over B, tasks for the threads.

use super::Gemm;
use super::blocks::{DEPTH_GROUP, ROWS_OF_A};
use super::kernel::Kernel;
use super::operands::Packed;
use super::scratch::with_panels;
use super::task::task;
use crate::ThreadPool;

/// Values of packed B that are held at once; beyond, the columns are taken in several passes.
const PANEL_BUDGET: usize = 4 << 20;
/// The same when one thread packs B for itself: what it then finds in its second-level cache.
const OWN_PANEL_BUDGET: usize = 256 << 10;
/// Columns of a task that comes back to C for a second group of depths: C stays in that cache too.
const REVISITED_COLUMNS: usize = 768;
/// Blocks of A in a task: all but the first are fetched while the one before is worked on.
const TASK_BLOCKS: usize = 3;
/// Fewer rows than this are not worth a separate pass over B: threads share out the columns.
const FEW_ROWS: usize = 96;
/// Multiply-adds below which waking threads costs more than it saves.
const SERIAL_WORK: usize = 200_000;

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
            let packed = Packed::reserve(kernel, &part, storage);
            let pieces = packed.pieces(kernel, &part);
            pool.run(pieces, |piece| {
                // SAFETY: each piece is written by one task.
                unsafe { packed.pack(kernel, &part, piece) }
            });
            let grid = Grid::new(kernel, &part, threads);
            pool.run(grid.count(), |index| {
                let (block, column) = grid.block(&part, index);
                // SAFETY: every task has its own block of C.
                unsafe { task(kernel, &block, packed.from(kernel, column)) }
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
    let budget = if problem.depth > DEPTH_GROUP { PANEL_BUDGET } else { OWN_PANEL_BUDGET };
    let step = columns_at_once(kernel, problem, budget);
    for column in (0..columns).step_by(step) {
        let part = problem.column_range(column, step.min(columns - column));
        with_panels(|storage| {
            let packed = Packed::reserve(kernel, &part, storage);
            let grid = Grid::new(kernel, &part, 1);
            // SAFETY: passed on.
            unsafe {
                for piece in 0..packed.pieces(kernel, &part) {
                    packed.pack(kernel, &part, piece);
                }
                for index in 0..grid.count() {
                    let (block, column) = grid.block(&part, index);
                    task(kernel, &block, packed.from(kernel, column));
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
pub(super) struct Pieces {
    length: usize,
    unit: usize,
    units: usize,
    pub(super) count: usize,
}

impl Pieces {
    pub(super) fn new(length: usize, unit: usize, count: usize) -> Self {
        let units = length.div_ceil(unit);
        Self { length, unit, units, count: count.clamp(1, units.max(1)) }
    }

    /// Start and length of piece `index`.
    pub(super) fn range(&self, index: usize) -> (usize, usize) {
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
        let revisits = problem.depth > DEPTH_GROUP;
        let widest = if revisits { REVISITED_COLUMNS } else { usize::MAX };
        let columns = Pieces::new(problem.columns, kernel.columns, problem.columns.div_ceil(widest));
        let height = TASK_BLOCKS * ROWS_OF_A;
        // A multiple of the threads, so that none is left with a whole extra task.
        let count = problem.rows.div_ceil(height).next_multiple_of(threads);
        Self { rows: Pieces::new(problem.rows, kernel.rows, count), columns }
    }

    fn count(&self) -> usize {
        self.rows.count * self.columns.count
    }

    /// The part of the product that is task `index`, and its first column.
    fn block<'a>(&self, problem: &Gemm<'a>, index: usize) -> (Gemm<'a>, usize) {
        // Neighbouring tasks share columns, and so find their panels of B in the cache.
        let (row, rows) = self.rows.range(index % self.rows.count);
        let (column, columns) = self.columns.range(index / self.rows.count);
        (problem.row_range(row, rows).column_range(column, columns), column)
    }
}
