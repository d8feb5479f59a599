//! Attention on the CPU. See `forward` and `backward` for the blocks, `product` for the
//! arithmetic. Scores are held to the base 2: `scale * log2(e)` is multiplied into the queries
//! as they are transposed, which saves a multiplication per score.

mod ahead;
mod backward;
mod bias_gradient;
mod block;
mod forward;
mod keys;
mod memory;
mod product;
mod simd;

use std::ops::Range;

use anneal_device::ThreadPool;

use super::{Gradients, Operands, Saved, Sizes};
use crate::parallel::Shared;
use crate::{Result, Tensor};
use memory::View;
use simd::Unit;

/// What all kernels know.
struct Problem {
    unit: Unit,
    sizes: Sizes,
    scale: f32,
    query: View,
    key: View,
    value: View,
    bias: Option<View>,
    mask: Option<Mask>,
}

/// A mask `[B, M]` whose last dimension is contiguous.
#[derive(Clone, Copy)]
struct Mask {
    memory: Shared<u8>,
    stride: usize,
}

impl Problem {
    fn new(unit: Unit, sizes: &Sizes, scale: f32, operands: &Operands) -> Self {
        let mask = operands.mask.as_ref();
        Self {
            unit,
            sizes: *sizes,
            scale,
            query: View::of_heads(&operands.query),
            key: View::of_heads(&operands.key),
            value: View::of_heads(&operands.value),
            bias: operands.bias.as_ref().map(View::of_bias),
            mask: mask
                .map(|mask| Mask { memory: Shared::new(mask.pointer::<u8>()), stride: mask.strides()[0] }),
        }
    }
}

/// Multiply-adds per task: enough to hide the fork.
const WORK_PER_TASK: usize = 1 << 20;
/// Queries that a block of any vector unit holds at most.
const LEAST_QUERIES: usize = 64;

/// How work is cut into tasks: small heads share one, a large head is cut along its queries.
#[derive(Clone, Copy)]
struct Cut {
    heads: usize,
    parts: usize,
    heads_per_task: usize,
}

impl Cut {
    /// Forward gives the same bits however it is cut, so that the threads may decide.
    fn of_forward(sizes: &Sizes, threads: usize) -> Self {
        Self::new(sizes, 4 * threads, LEAST_QUERIES)
    }

    /// The parts of a head are added up, so that their number depends on the sizes alone; there
    /// are few, because each has gradients of all keys of its head.
    fn of_backward(sizes: &Sizes) -> Self {
        Self::new(sizes, 32, 256)
    }

    fn new(sizes: &Sizes, wanted_tasks: usize, least_queries: usize) -> Self {
        let heads = sizes.batch * sizes.heads;
        let work = 2 * sizes.queries * sizes.keys * sizes.dim;
        let parts = (wanted_tasks / heads.max(1)).min(sizes.queries / least_queries).max(1);
        let parts = if work / parts < WORK_PER_TASK { 1 } else { parts };
        let heads_per_task = if parts > 1 { 1 } else { (WORK_PER_TASK / work.max(1)).max(1) };
        Self { heads, parts, heads_per_task }
    }

    /// Calls `work` with each task.
    fn run(&self, pool: &ThreadPool, queries: usize, work: impl Fn(Share) + Sync) {
        let groups = self.heads.div_ceil(self.heads_per_task);
        let count = groups * self.parts;
        let first_head = |task: usize| task / self.parts * self.heads_per_task;
        pool.run(count, |task| {
            // Tasks go around the threads nearly in turn.
            let later = task + pool.threads();
            let first = first_head(task);
            work(Share {
                heads: first..(first + self.heads_per_task).min(self.heads),
                part: task % self.parts,
                queries: self.range(task % self.parts, queries),
                next: (later < count).then(|| (first_head(later), self.range(later % self.parts, queries))),
            });
        });
    }

    /// The part's range out of `count` queries.
    fn range(&self, part: usize, count: usize) -> Range<usize> {
        count * part / self.parts..count * (part + 1) / self.parts
    }
}

/// A task's share of the work.
struct Share {
    /// Counted over the batch.
    heads: Range<usize>,
    part: usize,
    queries: Range<usize>,
    /// Head and queries that this thread is likely to meet next.
    next: Option<(usize, Range<usize>)>,
}

impl Share {
    /// What comes after head `head` of this share.
    fn after(&self, head: usize) -> Option<(usize, Range<usize>)> {
        if self.queries.len() < LEAST_QUERIES {
            // Too little work for all the requests, and rows of small heads follow each other closely.
            return None;
        }
        if head + 1 < self.heads.end { Some((head + 1, self.queries.clone())) } else { self.next.clone() }
    }
}

fn widest_unit() -> Unit {
    Unit::present().next().expect("plain arrays are always there")
}

/// Writes the output `[B, N, H, D]` and, for backward, the logarithms of the sums `[B, H, N]`.
pub(super) fn forward(
    pool: &ThreadPool,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    output: &Tensor,
    log_sums: Option<&Tensor>,
) {
    let problem = Problem::new(widest_unit(), sizes, scale, operands);
    forward_of(pool, &problem, output, log_sums);
}

fn forward_of(pool: &ThreadPool, problem: &Problem, output: &Tensor, log_sums: Option<&Tensor>) {
    let log_sums = log_sums.map(|tensor| Shared::new(tensor.pointer::<f32>()));
    let target = forward::Target { output: View::of_heads(output), log_sums };
    let cut = Cut::of_forward(&problem.sizes, pool.threads());
    cut.run(pool, problem.sizes.queries, |share| forward::run(problem, target, share));
}

/// Writes the wanted gradients.
///
/// # Errors
/// If there is no memory for partial sums.
pub(super) fn backward(
    pool: &ThreadPool,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Result<()> {
    let problem = Problem::new(widest_unit(), sizes, scale, operands);
    backward_of(pool, &problem, saved, gradients)
}

fn backward_of(pool: &ThreadPool, problem: &Problem, saved: &Saved, gradients: &Gradients) -> Result<()> {
    let views = block::Saved {
        upstream: View::of_heads(&saved.upstream),
        output: View::of_heads(&saved.output),
        log_sums: Shared::new(saved.log_sums.pointer::<f32>()),
    };
    if gradients.query.is_some() || gradients.key.is_some() || gradients.value.is_some() {
        backward::run(pool, problem, &views, gradients, saved.output.device())?;
    }
    if let Some(bias) = &gradients.bias {
        bias_gradient::run(pool, problem, &views, bias);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
