//! Backward for queries, keys and values (arXiv 2307.08691, algorithm 2, with the loops over
//! queries outside): the gradients of one head's keys and values stay in the second-level
//! cache and grow with each block of queries.
//!
//! When there are few heads, tasks take parts of the queries, and the parts' gradients of keys
//! and values are added up in order afterwards: bits do not depend on the number of threads.

use anneal_device::{Device, Purpose, ThreadPool};

use super::ahead::Ahead;
use super::block::{KEY_BLOCK, Queries, Saved, Scratch, block_queries};
use super::keys::{KeyList, KeyScratch, Keys};
use super::memory::{HeadRows, View, with_scratch};
use super::product::{Left, Shape, product};
use super::simd::{Rows, Simd, Work, dispatch};
use super::{Cut, Gradients, Problem, Share};
use crate::parallel::Shared;
use crate::{DType, Result, Tensor};

/// The wanted gradients.
#[derive(Clone, Copy)]
struct Targets {
    query: Option<View>,
    key: Option<View>,
    value: Option<View>,
}

/// Partial gradients `[heads, parts, 2, M, width]` of keys and values.
#[derive(Clone, Copy)]
struct Partials {
    memory: Shared<f32>,
    parts: usize,
    rows: usize,
    width: usize,
}

impl Partials {
    unsafe fn rows(&self, head: usize, part: usize, which: usize) -> Rows<*mut f32> {
        let piece = (head * self.parts + part) * 2 + which;
        // SAFETY: within the memory by its shape.
        let start = unsafe { self.memory.pointer().add(piece * self.rows * self.width) };
        Rows::new(start, self.width)
    }
}

pub(super) fn run(
    pool: &ThreadPool,
    problem: &Problem,
    saved: &Saved,
    gradients: &Gradients,
    device: &Device,
) -> Result<()> {
    let view = |gradient: &Option<Tensor>| gradient.as_ref().map(View::of_heads);
    let targets =
        Targets { query: view(&gradients.query), key: view(&gradients.key), value: view(&gradients.value) };
    let cut = Cut::of_backward(&problem.sizes);
    if cut.parts == 1 {
        cut.run(pool, problem.sizes.queries, |share| {
            dispatch(problem.unit, Task { problem, saved, targets, share, partials: None });
        });
        return Ok(());
    }
    // The widest vector unit's padding serves all.
    let width = problem.sizes.dim.next_multiple_of(16);
    let sizes = [cut.heads, cut.parts, 2, problem.sizes.keys, width];
    let memory = Tensor::empty_for(device, &sizes, DType::F32, Purpose::Workspace)?;
    let memory = Shared::new(memory.pointer::<f32>());
    let partials = Partials { memory, parts: cut.parts, rows: problem.sizes.keys, width };
    cut.run(pool, problem.sizes.queries, |share| {
        dispatch(problem.unit, Task { problem, saved, targets, share, partials: Some(partials) });
    });
    pool.run(cut.heads, |head| dispatch(problem.unit, AddUp { problem, targets, partials, head }));
    Ok(())
}

/// A share of the heads and queries.
struct Task<'a> {
    problem: &'a Problem,
    saved: &'a Saved,
    targets: Targets,
    share: Share,
    partials: Option<Partials>,
}

impl Work for Task<'_> {
    fn run<S: Simd>(self, simd: S) {
        let sizes = &self.problem.sizes;
        let padded = sizes.dim.next_multiple_of(S::LANES);
        let held = if self.partials.is_some() { 0 } else { sizes.keys * padded };
        let [b0, b1, b2, b3, b4, b5, b6, b7, b8] = Scratch::sizes::<S>(self.problem);
        let [key, value, index] = KeyScratch::sizes::<S>(self.problem);
        let query = block_queries::<S>() * padded;
        let pieces = [b0, b1, b2, b3, b4, b5, b6, b7, b8, key, value, index, query, held, held];
        with_scratch(pieces, |pieces| {
            let [b0, b1, b2, b3, b4, b5, b6, b7, b8, key, value, index, query, key_sums, value_sums] = pieces;
            let scratch = Scratch::new([b0, b1, b2, b3, b4, b5, b6, b7, b8]);
            let mut ahead = Ahead::nothing();
            for head in self.share.heads.clone() {
                self.look_ahead(&mut ahead, head);
                let at = (head / sizes.heads, head % sizes.heads);
                // SAFETY: scratch has the sizes asked for; tasks own disjoint rows of the targets.
                unsafe {
                    let keys = Keys::read(simd, self.problem, at.0, at.1, KeyScratch { key, value, index });
                    let held = [key_sums, value_sums].map(|piece| Rows::new(piece, padded));
                    let pass = HeadPass {
                        task: &self,
                        at,
                        keys: &keys,
                        query: Rows::new(query, padded),
                        ahead: &ahead,
                    };
                    pass.run(simd, head, held, &scratch);
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
            let at = (next / sizes.heads, next % sizes.heads);
            let of_queries = [Some(self.problem.query), Some(self.saved.upstream), Some(self.saved.output)];
            for view in of_queries.into_iter().chain([self.targets.query]).flatten() {
                ahead.add(view.head(at.0, at.1), queries.start, queries.len(), sizes.dim);
            }
            let of_keys =
                [Some(self.problem.key), Some(self.problem.value), self.targets.key, self.targets.value];
            for view in of_keys.into_iter().flatten() {
                ahead.add(view.head(at.0, at.1), 0, sizes.keys, sizes.dim);
            }
        }
    }
}

/// One head of a task.
struct HeadPass<'a> {
    task: &'a Task<'a>,
    at: (usize, usize),
    keys: &'a Keys,
    /// `[queries, D]`, scratch for the gradient of a block of queries.
    query: Rows<*mut f32>,
    ahead: &'a Ahead,
}

impl HeadPass<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, simd: S, head: usize, held: [Rows<*mut f32>; 2], scratch: &Scratch) {
        let Task { problem, targets, share, partials, .. } = self.task;
        let queries = &share.queries;
        let dim = problem.sizes.dim;
        let gradients =
            [targets.key, targets.value].map(|view| view.map(|view| view.head(self.at.0, self.at.1)));
        // Where rows are f32 and lie well, the products write and add to the gradients themselves.
        let whole = partials.is_none() && self.keys.list.index.is_none();
        let single = queries.len() <= block_queries::<S>();
        let direct = gradients.map(|rows| {
            let rows = rows.filter(|rows| whole && (single || !rows.rows_collide()));
            rows.and_then(|rows| rows.direct::<S>(0, dim))
        });
        // SAFETY: the caller's promise.
        unsafe {
            let sums = [0, 1].map(|which| match partials {
                Some(partials) => partials.rows(head, share.part, which),
                None => direct[which].unwrap_or(held[which]),
            });
            if queries.is_empty() {
                let columns = dim.div_ceil(S::LANES) * S::LANES;
                sums.iter().for_each(|sums| clear(*sums, self.keys.list.count, columns));
            }
            for start in queries.clone().step_by(block_queries::<S>()) {
                let range = start..(start + block_queries::<S>()).min(queries.end);
                let block = Queries::read(
                    simd,
                    problem,
                    self.task.saved,
                    self.at,
                    range,
                    self.keys.list.count,
                    problem.scale,
                    scratch,
                );
                self.block(simd, &block, sums, start > queries.start, scratch);
            }
            for which in [0, 1] {
                if let (Some(gradient), None, None) = (gradients[which], direct[which], partials) {
                    write_keys(simd, problem, &self.keys.list, sums[which].read(), gradient);
                }
            }
        }
    }

    /// Adds a block of queries to the gradients of keys and values, and writes its own.
    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        simd: S,
        block: &Queries,
        [key_sums, value_sums]: [Rows<*mut f32>; 2],
        accumulate: bool,
        scratch: &Scratch,
    ) {
        let (targets, dim) = (&self.task.targets, self.task.problem.sizes.dim);
        let (count, columns) = (block.range.len(), dim.div_ceil(S::LANES));
        let target = targets.query.map(|view| view.head(self.at.0, self.at.1));
        let single = self.keys.list.count <= KEY_BLOCK;
        let direct = target.filter(|rows| self.keys.list.count > 0 && (single || !rows.rows_collide()));
        let direct = direct.and_then(|rows| rows.direct::<S>(block.range.start, dim));
        let query = direct.unwrap_or(self.query);
        // SAFETY: the caller's promise.
        unsafe {
            for start in (0..self.keys.list.count).step_by(KEY_BLOCK) {
                let rows = KEY_BLOCK.min(self.keys.list.count - start);
                let (p, ds) = block.scores(simd, self.keys, start..start + rows, scratch, self.ahead);
                let shape = Shape { rows, columns, depth: count };
                let of_values = (targets.value, p, block.upstream, value_sums);
                for (wanted, left, right, sums) in [of_values, (targets.key, ds, block.query, key_sums)] {
                    if wanted.is_some() {
                        let (left, sums) = (Left::rows(left), sums.at(start, 0));
                        product(simd, shape, left, right, sums, accumulate, self.ahead);
                    }
                }
                if target.is_some() {
                    let shape = Shape { rows: count, columns, depth: rows };
                    product(
                        simd,
                        shape,
                        Left::columns(ds),
                        self.keys.key.at(start, 0),
                        query,
                        start > 0,
                        self.ahead,
                    );
                }
            }
            let Some(target) = target.filter(|_| direct.is_none()) else { return };
            if self.keys.list.count == 0 {
                clear(query, count, columns * S::LANES);
            }
            simd.call(
                #[inline(always)]
                || {
                    for row in 0..count {
                        let values = std::slice::from_raw_parts(query.row(row), dim);
                        target.write(block.range.start + row, values, 1.0);
                    }
                },
            );
        }
    }
}

unsafe fn clear(rows: Rows<*mut f32>, count: usize, width: usize) {
    for row in 0..count {
        // SAFETY: the caller's promise.
        unsafe { rows.row(row).write_bytes(0, width) };
    }
}

/// Writes the gradients of a head's keys (or values); masked ones get zeros.
unsafe fn write_keys<S: Simd>(
    simd: S,
    problem: &Problem,
    keys: &KeyList,
    rows: Rows<*const f32>,
    target: HeadRows,
) {
    let dim = problem.sizes.dim;
    simd.call(
        #[inline(always)]
        || {
            // SAFETY: rows and keys lie within the problem.
            unsafe {
                if keys.index.is_some() {
                    (0..problem.sizes.keys).for_each(|key| target.clear(key, dim));
                }
                for row in 0..keys.count {
                    let values = std::slice::from_raw_parts(rows.row(row), dim);
                    target.write(keys.position(row), values, 1.0);
                }
            }
        },
    );
}

/// Adds the parts' gradients of one head's keys and values.
struct AddUp<'a> {
    problem: &'a Problem,
    targets: Targets,
    partials: Partials,
    head: usize,
}

impl Work for AddUp<'_> {
    fn run<S: Simd>(self, simd: S) {
        let sizes = &self.problem.sizes;
        let (batch, head) = (self.head / sizes.heads, self.head % sizes.heads);
        let Partials { parts, rows, width, .. } = self.partials;
        let index = if self.problem.mask.is_some() { sizes.keys } else { 0 };
        with_scratch([index], |[index]| {
            for (which, view) in [self.targets.key, self.targets.value].into_iter().enumerate() {
                let Some(view) = view else { continue };
                // SAFETY: heads are different tasks; scratch has the size asked for.
                unsafe {
                    let keys = KeyList::new(self.problem, batch, index);
                    let total = self.partials.rows(self.head, 0, which);
                    let total = std::slice::from_raw_parts_mut(total.pointer, rows * width);
                    for part in 1..parts {
                        let other = self.partials.rows(self.head, part, which);
                        let other = std::slice::from_raw_parts(other.pointer, keys.count * width);
                        simd.call(
                            #[inline(always)]
                            || total.iter_mut().zip(other).for_each(|(sum, value)| *sum += value),
                        );
                    }
                    let rows = Rows::new(total.as_ptr(), width);
                    write_keys(simd, self.problem, &keys, rows, view.head(batch, head));
                }
            }
        });
    }
}
