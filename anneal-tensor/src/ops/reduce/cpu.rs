use anneal_device::cpu::vectorize;
use anneal_device::{Purpose, ThreadPool};

use super::Axes;
use crate::ops::elementwise::cpu::map;
use crate::ops::row_blocks::RowBlocks;
use crate::ops::{lanes, scratch};
use crate::parallel::{ELEMENTS_PER_TASK, Shared};
use crate::{DType, Float, Result, Tensor, for_float};

/// A run of the innermost dimension is cut into pieces of this many elements if it is summed up,
const PIECE: usize = 4096;
/// and of this many if it stays, so that a task's results remain in the first-level cache.
const COLUMNS: usize = 4096;

trait Combine: Sync {
    const START: f32;
    fn combine(a: f32, b: f32) -> f32;
}

struct Sum;
impl Combine for Sum {
    const START: f32 = 0.0;
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        a + b
    }
}

struct Max;
impl Combine for Max {
    const START: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        // A NaN on either side stays.
        if b > a || b.is_nan() { b } else { a }
    }
}

/// `out (+)= factor * sum of x` over the flagged dimensions of a contiguous tensor; `out` is f32.
///
/// The caller alone writes the memory of `out`.
pub(in crate::ops) fn sum(
    pool: &ThreadPool,
    x: &Tensor,
    flags: &[bool],
    factor: f32,
    out: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    reduce::<Sum>(pool, x, flags, out, |value, sum| sum * factor + if accumulate { value } else { 0.0 })
}

pub(super) fn max(pool: &ThreadPool, x: &Tensor, flags: &[bool], out: &mut Tensor) -> Result<()> {
    reduce::<Max>(pool, x, flags, out, |_, max| max)
}

/// How a reduction walks memory: groups of runs, each group giving one number or a row of them.
struct Plan {
    axes: Axes,
    /// The length of the pieces that the innermost dimension is cut into.
    piece: usize,
}

impl Plan {
    fn new(sizes: &[usize], flags: &[bool]) -> Self {
        let axes = Axes::new(sizes, flags);
        let piece = axes.inner.min(if axes.inner_goes { PIECE } else { COLUMNS }).max(1);
        Self { axes, piece }
    }

    fn pieces(&self) -> usize {
        self.axes.inner.div_ceil(self.piece)
    }

    /// Groups that give a number or a row each, and runs of each group.
    fn counts(&self) -> (usize, usize) {
        let (kept, gone) = self.axes.counts();
        if self.axes.inner_goes { (kept, gone * self.pieces()) } else { (kept * self.pieces(), gone) }
    }

    /// The memory of one run.
    fn run(&self, group: usize, run: usize) -> std::ops::Range<usize> {
        let pieces = self.pieces();
        let (group, run, piece) = match self.axes.inner_goes {
            true => (group, run / pieces, run % pieces),
            false => (group / pieces, run, group % pieces),
        };
        let start = offset(&self.axes.kept, group) + offset(&self.axes.gone, run);
        start + piece * self.piece..start + self.axes.inner.min((piece + 1) * self.piece)
    }

    /// The part of the output that a group gives.
    fn output(&self, group: usize) -> std::ops::Range<usize> {
        if self.axes.inner_goes {
            return group..group + 1;
        }
        let (row, piece) = (group / self.pieces(), group % self.pieces());
        let inner = self.axes.inner;
        row * inner + piece * self.piece..row * inner + inner.min((piece + 1) * self.piece)
    }
}

/// Offset of a number counted over dimensions listed from the inside.
fn offset(axes: &[(usize, usize)], index: usize) -> usize {
    let mut rest = index;
    axes.iter()
        .map(|(size, stride)| {
            let position = rest % size;
            rest /= size;
            position * stride
        })
        .sum()
}

fn reduce<C: Combine>(
    pool: &ThreadPool,
    x: &Tensor,
    flags: &[bool],
    out: &mut Tensor,
    finish: impl Fn(f32, f32) -> f32 + Sync,
) -> Result<()> {
    assert_eq!(out.dtype(), DType::F32);
    let plan = Plan::new(x.dims(), flags);
    let (groups, runs) = plan.counts();
    let blocks = RowBlocks::new(groups, runs, plan.piece);
    let width = if plan.axes.inner_goes { 1 } else { plan.piece };
    let sizes = [blocks.count(), width];
    let partial = Tensor::empty_for(x.device(), &sizes, DType::F32, Purpose::Workspace)?;
    let shared = Shared::new(partial.pointer::<f32>());
    for_float!("reduction", x.dtype(), T => {
        let x = x.data::<T>();
        blocks.run(pool, |block| {
            // SAFETY: each block is worked on once.
            let result = unsafe { shared.slice(block.index * width, width) };
            result.fill(C::START);
            let first = block.first - block.group * runs;
            for run in first..first + block.rows {
                let values = &x[plan.run(block.group, run)];
                match plan.axes.inner_goes {
                    true => result[0] = C::combine(result[0], along::<T, C>(values)),
                    false => across::<T, C>(result, values),
                }
            }
        });
        Ok(())
    })?;
    // SAFETY: the caller alone writes this memory.
    let out = Shared::new(unsafe { out.shared_data_mut::<f32>() }.as_mut_ptr());
    let parts = partial.data::<f32>();
    let per_group = blocks.per_group();
    let per_task = (ELEMENTS_PER_TASK / (per_group * width)).max(1);
    pool.run(groups.div_ceil(per_task), |task| {
        for group in task * per_task..((task + 1) * per_task).min(groups) {
            let range = plan.output(group);
            // SAFETY: outputs of different groups do not overlap.
            let out = unsafe { out.slice(range.start, range.len()) };
            for (column, out) in out.iter_mut().enumerate() {
                let mut result = parts[group * per_group * width + column];
                for part in 1..per_group {
                    result = C::combine(result, parts[(group * per_group + part) * width + column]);
                }
                *out = finish(*out, result);
            }
        }
    });
    Ok(())
}

/// One number from a run.
fn along<T: Float, C: Combine>(values: &[T]) -> f32 {
    scratch::rows(values.len(), |[row]| {
        vectorize(
            #[inline(always)]
            || lanes::fold(lanes::in_f32(values, row), C::START, C::combine, C::combine),
        )
    })
}

/// A run combined into a row of results.
fn across<T: Float, C: Combine>(results: &mut [f32], values: &[T]) {
    vectorize(
        #[inline(always)]
        || {
            for (result, value) in results.iter_mut().zip(values) {
                *result = C::combine(*result, value.to_f32());
            }
        },
    );
}

/// `dx = factor * gradient`, broadcast.
pub(super) fn expand(pool: &ThreadPool, gradient: &Tensor, factor: f32, dx: &Tensor) {
    map(
        pool,
        [gradient],
        dx,
        #[inline(always)]
        move |[g]| g * factor,
    );
}

/// One where `x` is its maximum, else zero.
pub(super) fn equal(pool: &ThreadPool, x: &Tensor, maximum: &Tensor, out: &Tensor) {
    map(
        pool,
        [x, maximum],
        out,
        #[inline(always)]
        move |[x, y]| if x == y { 1.0 } else { 0.0 },
    );
}

/// The gradient of each maximum in equal shares; `of` are x, the maxima, and how many share each.
pub(super) fn share(pool: &ThreadPool, gradient: &Tensor, of: [&Tensor; 3], dx: &Tensor) {
    let [x, maximum, ties] = of;
    map(
        pool,
        [gradient, x, maximum, ties],
        dx,
        #[inline(always)]
        move |[g, x, y, n]| if x == y { g / n } else { 0.0 },
    );
}
