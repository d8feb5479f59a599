//! Forward: for a block of queries, scores of a block of keys at a time, with a running maximum
//! and sum (arXiv 2307.08691, algorithm 1). Queries lie across the lanes, so that maximum,
//! exponential and sum need no work between lanes.

use std::ops::Range;

use super::ahead::Ahead;
use super::block::{BiasScratch, add_bias, transposed};
use super::keys::{KeyScratch, Keys, few_rows};
use super::memory::{View, with_scratch};
use super::product::{Left, Shape, product};
use super::simd::{Rows, Simd, Work, dispatch};
use super::{Problem, Share};
use crate::parallel::Shared;

/// Vectors of queries in a block.
const QUERY_VECTORS: usize = 4;
/// Keys in a block: scores and values of a block stay in the first-level cache.
const KEY_BLOCK: usize = 128;
/// Widest block of queries on any vector unit.
const MOST_QUERIES: usize = QUERY_VECTORS * 16;

/// What forward writes.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub output: View,
    /// `[B, H, N]`, to the base 2.
    pub log_sums: Option<Shared<f32>>,
}

/// A share of the heads and queries.
pub(super) fn run(problem: &Problem, target: Target, share: Share) {
    dispatch(problem.unit, Task { problem, target, share });
}

struct Task<'a> {
    problem: &'a Problem,
    target: Target,
    share: Share,
}

struct Scratch {
    query_rows: *mut f32,
    /// `[D, queries]`
    query: *mut f32,
    /// `[keys, queries]`
    scores: *mut f32,
    /// `[queries, D]`
    output: *mut f32,
    bias: BiasScratch,
}

impl Work for Task<'_> {
    fn run<S: Simd>(self, simd: S) {
        let width = QUERY_VECTORS * S::LANES;
        let padded = self.problem.sizes.dim.next_multiple_of(S::LANES);
        let [key, value, index] = KeyScratch::sizes::<S>(self.problem);
        let keys_held = self.problem.sizes.keys.min(KEY_BLOCK);
        let bias = BiasScratch::sizes::<S>(self.problem, width, keys_held);
        let sizes = [
            width * padded,
            width * padded,
            keys_held * width,
            width * padded,
            bias[0],
            bias[1],
            key,
            value,
            index,
        ];
        with_scratch(sizes, |[query_rows, query, scores, output, bias_rows, bias, key, value, index]| {
            let bias = BiasScratch { rows: bias_rows, transposed: bias };
            let scratch = Scratch { query_rows, query, scores, output, bias };
            let mut ahead = Ahead::nothing();
            for index_of_head in self.share.heads.clone() {
                self.look_ahead(&mut ahead, index_of_head);
                let (batch, head) =
                    (index_of_head / self.problem.sizes.heads, index_of_head % self.problem.sizes.heads);
                // SAFETY: scratch has the sizes asked for; tasks own disjoint rows of the target.
                unsafe {
                    let keys = Keys::read(simd, self.problem, batch, head, KeyScratch { key, value, index });
                    for start in self.share.queries.clone().step_by(width) {
                        let rows = start..(start + width).min(self.share.queries.end);
                        let block = Block {
                            problem: self.problem,
                            target: self.target,
                            batch,
                            head,
                            rows,
                            ahead: &ahead,
                        };
                        block.run(simd, &keys, &scratch);
                    }
                }
            }
        });
    }
}

impl Task<'_> {
    /// Aims at the rows of the head after `head`.
    fn look_ahead(&self, ahead: &mut Ahead, head: usize) {
        ahead.restart();
        let sizes = &self.problem.sizes;
        if let Some((next, queries)) = self.share.after(head) {
            let (batch, head) = (next / sizes.heads, next % sizes.heads);
            ahead.add(self.problem.query.head(batch, head), queries.start, queries.len(), sizes.dim);
            ahead.add(self.problem.key.head(batch, head), 0, sizes.keys, sizes.dim);
            ahead.add(self.problem.value.head(batch, head), 0, sizes.keys, sizes.dim);
            ahead.add(self.target.output.head(batch, head), queries.start, queries.len(), sizes.dim);
        }
    }
}

/// A block of queries of one head.
struct Block<'a> {
    problem: &'a Problem,
    target: Target,
    batch: usize,
    head: usize,
    rows: Range<usize>,
    ahead: &'a Ahead,
}

impl Block<'_> {
    unsafe fn run<S: Simd>(&self, simd: S, keys: &Keys, scratch: &Scratch) {
        let dim = self.problem.sizes.dim;
        let columns = dim.div_ceil(S::LANES);
        let count = self.rows.len();
        let vectors = count.div_ceil(S::LANES);
        let width = vectors * S::LANES;
        let mut running = Running::new();
        // SAFETY: scratch has the sizes asked for; rows and keys lie within the problem.
        unsafe {
            let query = self.problem.query.head(self.batch, self.head);
            let rows = few_rows(simd, query, self.rows.start, count, dim, scratch.query_rows);
            let factor = self.problem.scale * std::f32::consts::LOG2_E;
            let query = transposed(simd, rows, count, dim, factor, Rows::new(scratch.query, width));
            let scores = Rows::new(scratch.scores, width);
            let output = Rows::new(scratch.output, columns * S::LANES);
            for start in (0..keys.list.count).step_by(KEY_BLOCK) {
                let depth = KEY_BLOCK.min(keys.list.count - start);
                let shape = Shape { rows: depth, columns: vectors, depth: dim };
                product(simd, shape, Left::rows(keys.key.at(start, 0)), query, scores, false, self.ahead);
                if let Some(bias) = self.problem.bias {
                    let bias = bias.head(self.batch, self.head);
                    add_bias(
                        simd,
                        bias,
                        self.rows.clone(),
                        keys.list,
                        start..start + depth,
                        scores,
                        scratch.bias,
                    );
                }
                let rescale = running.exponentials(simd, scores, depth, vectors);
                if start > 0 {
                    scale_rows(simd, output, count, columns, &rescale);
                }
                let shape = Shape { rows: count, columns, depth };
                product(
                    simd,
                    shape,
                    Left::columns(scores.read()),
                    keys.value.at(start, 0),
                    output,
                    start > 0,
                    self.ahead,
                );
            }
            self.finish(simd, &running, output, keys.list.count == 0);
        }
    }

    /// Divides by the sums and writes the rows.
    unsafe fn finish<S: Simd>(&self, simd: S, running: &Running, rows: Rows<*mut f32>, no_keys: bool) {
        let output = self.target.output.head(self.batch, self.head);
        let dim = self.problem.sizes.dim;
        simd.call(
            #[inline(always)]
            || {
                let mut factors = [0.0; MOST_QUERIES];
                for (factor, sum) in factors.iter_mut().zip(&running.sum) {
                    *factor = if *sum == 0.0 { 0.0 } else { 1.0 / sum };
                }
                for row in 0..self.rows.len() {
                    // SAFETY: as in `run`.
                    unsafe {
                        if no_keys {
                            output.clear(self.rows.start + row, dim);
                        } else {
                            let values = std::slice::from_raw_parts(rows.row(row), dim);
                            output.write(self.rows.start + row, values, factors[row]);
                        }
                    }
                }
                if let Some(log_sums) = self.target.log_sums {
                    let head = self.batch * self.problem.sizes.heads + self.head;
                    let start = head * self.problem.sizes.queries + self.rows.start;
                    // SAFETY: the queries of this block are this task's alone.
                    let log_sums = unsafe { log_sums.slice(start, self.rows.len()) };
                    running.write_log_sums(log_sums);
                }
            },
        );
    }
}

/// `output[i] *= factors[i]`.
unsafe fn scale_rows<S: Simd>(
    simd: S,
    output: Rows<*mut f32>,
    rows: usize,
    columns: usize,
    factors: &[f32; MOST_QUERIES],
) {
    simd.call(
        #[inline(always)]
        || {
            for row in 0..rows {
                let factor = simd.splat(factors[row]);
                for column in 0..columns {
                    // SAFETY: within the rows.
                    unsafe {
                        let place = output.row(row).add(column * S::LANES);
                        simd.store(place, simd.mul(simd.load(place), factor));
                    }
                }
            }
        },
    );
}

/// Maximum and sum of exponentials of the scores so far, for each query.
#[repr(align(64))]
struct Running {
    maximum: [f32; MOST_QUERIES],
    sum: [f32; MOST_QUERIES],
}

impl Running {
    fn new() -> Self {
        Self { maximum: [f32::NEG_INFINITY; MOST_QUERIES], sum: [0.0; MOST_QUERIES] }
    }

    /// Replaces the scores by `2^(score - maximum)`; returns by what earlier sums and outputs shrink.
    unsafe fn exponentials<S: Simd>(
        &mut self,
        simd: S,
        scores: Rows<*mut f32>,
        keys: usize,
        vectors: usize,
    ) -> [f32; MOST_QUERIES] {
        let mut rescale = [1.0; MOST_QUERIES];
        simd.call(
            #[inline(always)]
            || {
                for vector in 0..vectors {
                    let lanes = vector * S::LANES;
                    // SAFETY: lanes lie within the arrays and the rows of scores.
                    unsafe {
                        let column = scores.at(0, lanes);
                        let before = simd.load(self.maximum.as_ptr().add(lanes));
                        let maximum = maximum(simd, column.read(), keys, before);
                        // A query whose scores are all minus infinity: any finite maximum gives zeros.
                        let finite = simd.max(maximum, simd.splat(f32::MIN));
                        let shrink = simd.exp2(simd.sub(before, finite));
                        let sum = exponentials(simd, column, keys, finite);
                        let earlier = simd.load(self.sum.as_ptr().add(lanes));
                        simd.store(self.sum.as_mut_ptr().add(lanes), simd.mul_add(earlier, shrink, sum));
                        simd.store(self.maximum.as_mut_ptr().add(lanes), finite);
                        simd.store(rescale.as_mut_ptr().add(lanes), shrink);
                    }
                }
            },
        );
        rescale
    }

    /// `maximum + log2(sum)`.
    #[inline(always)]
    fn write_log_sums(&self, target: &mut [f32]) {
        for (target, (maximum, sum)) in target.iter_mut().zip(self.maximum.iter().zip(&self.sum)) {
            let logarithm = log2(*sum);
            // Without a key to attend to any finite value serves: backward meets no finite score.
            *target = if *sum == 0.0 { 0.0 } else { maximum + logarithm };
        }
    }
}

/// Independent chains that hide the latency of one instruction.
const CHAINS: usize = 4;

#[inline(always)]
unsafe fn maximum<S: Simd>(simd: S, column: Rows<*const f32>, keys: usize, start: S::Vector) -> S::Vector {
    let mut chains = [start; CHAINS];
    let whole = keys - keys % CHAINS;
    // SAFETY: rows below `keys`.
    unsafe {
        for key in (0..whole).step_by(CHAINS) {
            for chain in 0..CHAINS {
                chains[chain] = simd.max(simd.load(column.row(key + chain)), chains[chain]);
            }
        }
        for key in whole..keys {
            chains[0] = simd.max(simd.load(column.row(key)), chains[0]);
        }
    }
    simd.max(simd.max(chains[0], chains[1]), simd.max(chains[2], chains[3]))
}

/// Replaces scores by exponentials and returns their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(
    simd: S,
    column: Rows<*mut f32>,
    keys: usize,
    maximum: S::Vector,
) -> S::Vector {
    let mut chains = [simd.splat(0.0); CHAINS];
    let whole = keys - keys % CHAINS;
    // SAFETY: rows below `keys`.
    unsafe {
        for key in (0..whole).step_by(CHAINS) {
            for chain in 0..CHAINS {
                let place = column.row(key + chain);
                let value = simd.exp2(simd.sub(simd.load(place), maximum));
                simd.store(place, value);
                chains[chain] = simd.add(chains[chain], value);
            }
        }
        for key in whole..keys {
            let place = column.row(key);
            let value = simd.exp2(simd.sub(simd.load(place), maximum));
            simd.store(place, value);
            chains[0] = simd.add(chains[0], value);
        }
    }
    simd.add(simd.add(chains[0], chains[1]), simd.add(chains[2], chains[3]))
}

/// Logarithm to the base 2 of a positive normal number, to an absolute error of some 1e-7;
/// branch-free, so that loops vectorise.
#[inline(always)]
fn log2(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    // x = 2^e m with m in [sqrt(1/2), sqrt(2)); the inverse hyperbolic tangent's series of log m.
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    let exponent = (bits as i32 >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(SQRT_HALF));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square * (1.0 / 9.0))));
    exponent + (2.0 * std::f32::consts::LOG2_E) * s * series
}

#[cfg(test)]
mod tests {
    use super::log2;

    #[test]
    fn the_logarithm_of_sums_agrees_with_double_precision() {
        for index in 0..200_000u32 {
            let x = 1.0 + (index as f32) * 0.37;
            let expected = f64::from(x).log2();
            assert!((f64::from(log2(x)) - expected).abs() <= 2e-7 * expected.max(1.0), "{x}");
        }
        assert_eq!(log2(1.0), 0.0);
    }
}
