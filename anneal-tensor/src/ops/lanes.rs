//! Reductions of rows of f32 in interleaved partial results, added up in a fixed order, which is
//! what lets the compiler use vectors without changing what is computed.
//!
//! To be called inside `vectorize`.

use crate::{DType, Float};

/// Partial results of a row: enough vectors of the widest unit to hide the latency of an addition.
const LANES: usize = 64;

/// A row in f32: itself if it is so already, else converted into `memory` of the same length.
#[inline(always)]
pub(crate) fn in_f32<'a, T: Float>(row: &'a [T], memory: &'a mut [f32]) -> &'a [f32] {
    if T::DTYPE == DType::F32 {
        return bytemuck::cast_slice(row);
    }
    memory.iter_mut().zip(row).for_each(|(to, from)| *to = from.to_f32());
    memory
}

/// Folds the values with `step` in lanes that begin at `start`, and the lanes with `merge`.
#[inline(always)]
pub(crate) fn fold(
    values: &[f32],
    start: f32,
    step: impl Fn(f32, f32) -> f32,
    merge: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = step(lanes[lane], chunk[lane]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, *value);
    }
    merged(lanes, merge)
}

/// The sum of the values.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    fold(values, 0.0, |sum, value| sum + value, |a, b| a + b)
}

/// The sum of `term` over pairs of values from two rows of one length.
#[inline(always)]
pub(crate) fn sum_pairs(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in rest.enumerate() {
        lanes[lane] += term(*a, *b);
    }
    merged(lanes, |a, b| a + b)
}

#[inline(always)]
fn merged(mut lanes: [f32; LANES], merge: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = merge(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}
