//! The gradient of the bias: that of the scores, summed over the dimensions in which the bias is
//! broadcast.
//!
//! A pass of its own, whose tasks are blocks of the bias and take the heads that share them in
//! order: sums need no memory beyond a block and do not depend on the number of threads, at
//! the price of computing scores and their gradients once more.

use std::ops::Range;

use anneal_device::ThreadPool;

use super::ahead::Ahead;
use super::block::{KEY_BLOCK, Queries, Saved, Scratch, block_queries, transposed};
use super::keys::{KeyScratch, Keys};
use super::memory::{View, with_scratch};
use super::simd::{Rows, Simd, Work, dispatch};
use super::{LEAST_QUERIES, Problem};
use crate::Tensor;

pub(super) fn run(pool: &ThreadPool, problem: &Problem, saved: &Saved, gradient: &Tensor) {
    let [batches, heads] = [gradient.size(0), gradient.size(1)];
    let members = |size: usize, index: usize, all: usize| if size == 1 { 0..all } else { index..index + 1 };
    let parts = problem.sizes.queries.div_ceil(LEAST_QUERIES);
    let target = View::of_bias(gradient);
    pool.run(batches * heads * parts, |task| {
        let (pair, part) = (task / parts, task % parts);
        let (batch, head) = (pair / heads, pair % heads);
        let start = part * LEAST_QUERIES;
        let task = Task {
            problem,
            saved,
            target,
            batches: members(batches, batch, problem.sizes.batch),
            heads: members(heads, head, problem.sizes.heads),
            queries: start..(start + LEAST_QUERIES).min(problem.sizes.queries),
        };
        dispatch(problem.unit, task);
    });
}

/// Some rows of the bias, and the heads that share them.
struct Task<'a> {
    problem: &'a Problem,
    saved: &'a Saved,
    target: View,
    batches: Range<usize>,
    heads: Range<usize>,
    queries: Range<usize>,
}

impl Work for Task<'_> {
    fn run<S: Simd>(self, simd: S) {
        let sizes = &self.problem.sizes;
        let width = sizes.keys.next_multiple_of(S::LANES);
        let [b0, b1, b2, b3, b4, b5, b6, b7, b8] = Scratch::sizes::<S>(self.problem);
        let [key, value, index] = KeyScratch::sizes::<S>(self.problem);
        let pieces = [b0, b1, b2, b3, b4, b5, b6, b7, b8, key, value, index, self.queries.len() * width];
        with_scratch(pieces, |pieces| {
            let [b0, b1, b2, b3, b4, b5, b6, b7, b8, key, value, index, sums] = pieces;
            let scratch = Scratch::new([b0, b1, b2, b3, b4, b5, b6, b7, b8]);
            let sums = Rows::new(sums, width);
            // SAFETY: scratch has the sizes asked for; tasks own disjoint rows of the target.
            unsafe {
                sums.pointer.write_bytes(0, self.queries.len() * width);
                for batch in self.batches.clone() {
                    for head in self.heads.clone() {
                        let keys =
                            Keys::read(simd, self.problem, batch, head, KeyScratch { key, value, index });
                        self.add_head(simd, (batch, head), &keys, sums, &scratch);
                    }
                }
                let target = self.target.head(self.batches.start, self.heads.start);
                for (row, query) in self.queries.clone().enumerate() {
                    let values = std::slice::from_raw_parts(sums.row(row), sizes.keys);
                    simd.call(
                        #[inline(always)]
                        || target.write(query, values, 1.0),
                    );
                }
            }
        });
    }
}

impl Task<'_> {
    unsafe fn add_head<S: Simd>(
        &self,
        simd: S,
        at: (usize, usize),
        keys: &Keys,
        sums: Rows<*mut f32>,
        scratch: &Scratch,
    ) {
        let step = block_queries::<S>();
        let ahead = Ahead::nothing();
        for start in self.queries.clone().step_by(step) {
            let range = start..(start + step).min(self.queries.end);
            let count = range.len();
            // SAFETY: as in `run`.
            unsafe {
                let block =
                    Queries::read(simd, self.problem, self.saved, at, range, keys.list.count, 1.0, scratch);
                for first in (0..keys.list.count).step_by(KEY_BLOCK) {
                    let depth = KEY_BLOCK.min(keys.list.count - first);
                    let (_, gradients) = block.scores(simd, keys, first..first + depth, scratch, &ahead);
                    let rows = Rows::new(scratch.bias.rows, depth.next_multiple_of(S::LANES));
                    let rows = transposed(simd, gradients, depth, gradients.stride, 1.0, rows);
                    for row in 0..count {
                        let values = std::slice::from_raw_parts(rows.row(row), depth);
                        let target = sums.row(start - self.queries.start + row);
                        add_row(simd, keys, first, values, target);
                    }
                }
            }
        }
    }
}

/// Adds the gradients of one query's scores for the keys from row `first` on.
#[inline(always)]
unsafe fn add_row<S: Simd>(simd: S, keys: &Keys, first: usize, values: &[f32], target: *mut f32) {
    simd.call(
        #[inline(always)]
        || {
            // SAFETY: positions lie within the row of the bias.
            unsafe {
                if keys.list.index.is_none() {
                    let target = std::slice::from_raw_parts_mut(target.add(first), values.len());
                    target.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                } else {
                    for (row, value) in values.iter().enumerate() {
                        *target.add(keys.list.position(first + row)) += value;
                    }
                }
            }
        },
    );
}
