//! What the passes share: transposed operands, the bias of a block, and, for backward, the
//! probabilities of a block and the gradient of its scores.

use std::ops::Range;

use super::Problem;
use super::ahead::Ahead;
use super::keys::{KeyList, Keys, few_rows};
use super::memory::{HeadRows, View};
use super::product::{Left, Shape, product};
use super::simd::{Rows, Simd};
use crate::parallel::Shared;

/// Writes `rows` x `width` elements, times `factor`, as `[width, rows]`; missing rows up to a
/// whole vector become zeros.
///
/// # Safety
/// The source's rows are padded to whole vectors; the target holds as many rows.
#[inline(always)]
pub(super) unsafe fn transposed<S: Simd>(
    simd: S,
    source: Rows<*const f32>,
    rows: usize,
    width: usize,
    factor: f32,
    target: Rows<*mut f32>,
) -> Rows<*const f32> {
    simd.call(
        #[inline(always)]
        || {
            for row in (0..rows).step_by(S::LANES) {
                for column in (0..width).step_by(S::LANES) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let rows = (rows - row).min(S::LANES);
                        simd.transpose(source.at(row, column), rows, factor, target.at(column, row));
                    }
                }
            }
        },
    );
    target.read()
}

/// Scratch for the bias of a block.
#[derive(Clone, Copy)]
pub(super) struct BiasScratch {
    /// `[queries, keys]`
    pub rows: *mut f32,
    /// `[keys, queries]`
    pub transposed: *mut f32,
}

impl BiasScratch {
    /// Elements of the two pieces, for blocks of `queries` x `keys`.
    pub fn sizes<S: Simd>(problem: &Problem, queries: usize, keys: usize) -> [usize; 2] {
        match problem.bias {
            Some(_) => [queries * keys.next_multiple_of(S::LANES); 2],
            None => [0; 2],
        }
    }
}

/// Adds the bias of `queries` and the rows `range` of the keys to scores `[keys, queries]`.
///
/// # Safety
/// Scratch has room for the block; rows and keys lie within the problem.
pub(super) unsafe fn add_bias<S: Simd>(
    simd: S,
    bias: HeadRows,
    queries: Range<usize>,
    keys: KeyList,
    range: Range<usize>,
    scores: Rows<*mut f32>,
    scratch: BiasScratch,
) {
    let count = range.len();
    let rows = Rows::new(scratch.rows, count.next_multiple_of(S::LANES));
    let added = Rows::new(scratch.transposed, scores.stride);
    // SAFETY: the caller's promise.
    unsafe {
        match keys.index {
            None => bias.at_column(range.start).read(simd, queries.start, queries.len(), count, rows),
            Some(index) => bias.gather(queries.clone(), index.add(range.start), count, rows),
        }
        let added = transposed(simd, rows.read(), queries.len(), count, std::f32::consts::LOG2_E, added);
        simd.call(
            #[inline(always)]
            || {
                for key in 0..count {
                    for lanes in (0..scores.stride).step_by(S::LANES) {
                        let place = scores.row(key).add(lanes);
                        let sum = simd.add(simd.load(place), simd.load(added.row(key).add(lanes)));
                        simd.store(place, sum);
                    }
                }
            },
        );
    }
}

/// Vectors of queries in a block of backward.
const QUERY_VECTORS: usize = 4;
/// Keys in a block of backward: its two score arrays stay in the first-level cache.
pub(super) const KEY_BLOCK: usize = 128;
/// Widest block of queries on any vector unit.
const MOST_QUERIES: usize = QUERY_VECTORS * 16;

/// Queries of a block of backward.
pub(super) const fn block_queries<S: Simd>() -> usize {
    QUERY_VECTORS * S::LANES
}

/// What forward saved, and the gradient of its output.
pub(super) struct Saved {
    pub upstream: View,
    pub output: View,
    /// `[B, H, N]`, to the base 2.
    pub log_sums: Shared<f32>,
}

/// Scratch for a block of backward.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    query_rows: *mut f32,
    upstream_rows: *mut f32,
    output_rows: *mut f32,
    query: *mut f32,
    upstream: *mut f32,
    pub probabilities: *mut f32,
    pub score_gradients: *mut f32,
    pub bias: BiasScratch,
}

impl Scratch {
    /// Elements of each piece.
    pub fn sizes<S: Simd>(problem: &Problem) -> [usize; 9] {
        let queries = block_queries::<S>();
        let keys = problem.sizes.keys.min(KEY_BLOCK);
        let rows = queries * problem.sizes.dim.next_multiple_of(S::LANES);
        let [bias, transposed] = BiasScratch::sizes::<S>(problem, queries, keys);
        [rows, rows, rows, rows, rows, queries * keys, queries * keys, bias, transposed]
    }

    pub fn new(pieces: [*mut f32; 9]) -> Self {
        let [
            query_rows,
            upstream_rows,
            output_rows,
            query,
            upstream,
            probabilities,
            score_gradients,
            rows,
            transposed,
        ] = pieces;
        let bias = BiasScratch { rows, transposed };
        Self { query_rows, upstream_rows, output_rows, query, upstream, probabilities, score_gradients, bias }
    }
}

/// A block of queries of one head, ready for backward.
pub(super) struct Queries<'a> {
    problem: &'a Problem,
    batch: usize,
    head: usize,
    pub range: Range<usize>,
    pub vectors: usize,
    /// `[queries, D]`
    pub query: Rows<*const f32>,
    /// `[queries, D]`
    pub upstream: Rows<*const f32>,
    /// `[D, queries]`, times `scale * log2(e)`.
    query_transposed: Rows<*const f32>,
    /// `[D, queries]`, times the upstream factor.
    upstream_transposed: Rows<*const f32>,
    lanes: Lanes,
    /// Whether `delta` is known before the scores.
    from_output: bool,
}

/// A number for each query.
#[repr(align(64))]
struct Lanes {
    log_sums: [f32; MOST_QUERIES],
    /// `rowsum(do * o)` times the upstream factor.
    delta: [f32; MOST_QUERIES],
}

impl<'a> Queries<'a> {
    /// `keys` take part in all; `upstream_factor` multiplies the gradient of the scores.
    ///
    /// # Safety
    /// The range is one block within the problem; scratch has the sizes of [`Scratch::sizes`].
    #[inline(always)]
    pub unsafe fn read<S: Simd>(
        simd: S,
        problem: &'a Problem,
        saved: &Saved,
        (batch, head): (usize, usize),
        range: Range<usize>,
        keys: usize,
        upstream_factor: f32,
        scratch: &Scratch,
    ) -> Self {
        let (start, count, dim) = (range.start, range.len(), problem.sizes.dim);
        let vectors = count.div_ceil(S::LANES);
        let width = vectors * S::LANES;
        let mut lanes = Lanes { log_sums: [0.0; MOST_QUERIES], delta: [0.0; MOST_QUERIES] };
        // SAFETY: the caller's promise.
        unsafe {
            let rows =
                |view: View, scratch| few_rows(simd, view.head(batch, head), start, count, dim, scratch);
            let query = rows(problem.query, scratch.query_rows);
            let upstream = rows(saved.upstream, scratch.upstream_rows);
            let first = (batch * problem.sizes.heads + head) * problem.sizes.queries + start;
            lanes.log_sums[..count].copy_from_slice(saved.log_sums.slice(first, count));
            // Keys of a single block give the same from `p` and `dp`, without the output.
            let from_output = keys > KEY_BLOCK;
            if from_output {
                let output = rows(saved.output, scratch.output_rows);
                lanes.row_products(simd, upstream, output, count, dim, upstream_factor);
            }
            let factor = problem.scale * std::f32::consts::LOG2_E;
            let query_transposed = Rows::new(scratch.query, width);
            let query_transposed = transposed(simd, query, count, dim, factor, query_transposed);
            let upstream_transposed = Rows::new(scratch.upstream, width);
            let upstream_transposed =
                transposed(simd, upstream, count, dim, upstream_factor, upstream_transposed);
            Self {
                problem,
                batch,
                head,
                range,
                vectors,
                query,
                upstream,
                query_transposed,
                upstream_transposed,
                lanes,
                from_output,
            }
        }
    }

    /// For rows `range` of the keys: probabilities and gradients of scores, `[keys, queries]`.
    ///
    /// # Safety
    /// The range is one block of the keys; scratch has the sizes of [`Scratch::sizes`].
    #[inline(always)]
    pub unsafe fn scores<S: Simd>(
        &self,
        simd: S,
        keys: &Keys,
        range: Range<usize>,
        scratch: &Scratch,
        ahead: &Ahead,
    ) -> (Rows<*const f32>, Rows<*const f32>) {
        let width = self.vectors * S::LANES;
        let shape = Shape { rows: range.len(), columns: self.vectors, depth: self.problem.sizes.dim };
        let scores = Rows::new(scratch.probabilities, width);
        let gradients = Rows::new(scratch.score_gradients, width);
        // SAFETY: the caller's promise.
        unsafe {
            product(
                simd,
                shape,
                Left::rows(keys.key.at(range.start, 0)),
                self.query_transposed,
                scores,
                false,
                ahead,
            );
            let values = Left::rows(keys.value.at(range.start, 0));
            product(simd, shape, values, self.upstream_transposed, gradients, false, ahead);
            if let Some(bias) = self.problem.bias {
                let bias = bias.head(self.batch, self.head);
                add_bias(simd, bias, self.range.clone(), keys.list, range.clone(), scores, scratch.bias);
            }
            if self.from_output {
                self.lanes.apply::<S, false>(simd, scores, gradients, range.len(), self.vectors);
            } else {
                self.lanes.apply::<S, true>(simd, scores, gradients, range.len(), self.vectors);
            }
        }
        (scores.read(), gradients.read())
    }
}

impl Lanes {
    #[inline(always)]
    unsafe fn row_products<S: Simd>(
        &mut self,
        simd: S,
        upstream: Rows<*const f32>,
        output: Rows<*const f32>,
        rows: usize,
        dim: usize,
        factor: f32,
    ) {
        simd.call(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let mut sum = simd.splat(0.0);
                    for column in (0..dim).step_by(S::LANES) {
                        // SAFETY: rows are padded to whole vectors.
                        unsafe {
                            let a = simd.load(upstream.row(row).add(column));
                            let b = simd.load(output.row(row).add(column));
                            sum = simd.mul_add(a, b, sum);
                        }
                    }
                    self.delta[row] = simd.sum(sum) * factor;
                }
            },
        );
    }

    /// `p = 2^(score - log_sum)` in place of the scores, `ds = p * (dp - delta)` in place of `dp`;
    /// with `ALL` keys at hand, `delta` is the sum of `p * dp` (the same as `rowsum(do * o)`).
    #[inline(always)]
    unsafe fn apply<S: Simd, const ALL: bool>(
        &self,
        simd: S,
        scores: Rows<*mut f32>,
        gradients: Rows<*mut f32>,
        keys: usize,
        vectors: usize,
    ) {
        simd.call(
            #[inline(always)]
            || {
                for vector in 0..vectors {
                    let lanes = vector * S::LANES;
                    // SAFETY: lanes lie within the arrays, keys within the rows.
                    unsafe {
                        let log_sum = simd.load(self.log_sums.as_ptr().add(lanes));
                        let mut delta = simd.load(self.delta.as_ptr().add(lanes));
                        let (scores, gradients) = (scores.at(0, lanes), gradients.at(0, lanes));
                        for key in 0..keys {
                            let p = simd.exp2(simd.sub(simd.load(scores.row(key)), log_sum));
                            simd.store(scores.row(key), p);
                            let dp = simd.load(gradients.row(key));
                            if ALL {
                                delta = simd.mul_add(p, dp, delta);
                            } else {
                                simd.store(gradients.row(key), simd.mul(p, simd.sub(dp, delta)));
                            }
                        }
                        if ALL {
                            for key in 0..keys {
                                let (p, dp) = (simd.load(scores.row(key)), simd.load(gradients.row(key)));
                                simd.store(gradients.row(key), simd.mul(p, simd.sub(dp, delta)));
                            }
                        }
                    }
                }
            },
        );
    }
}
