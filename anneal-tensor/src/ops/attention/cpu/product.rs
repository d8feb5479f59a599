//! The small matrix product under all of attention: `target (+)= left * right`.
//!
//! The left side is read one element at a time, in whatever layout it has, and multiplied with
//! whole vectors of rows of the right side; sums stay in registers over the whole depth.
//! Attention keeps scores as `[keys, queries]`, so that no product needs a transposed score.
//! Each element of the target sums over the depth in order, however the tiles are cut.

use super::ahead::Ahead;
use super::simd::{Rows, Simd};

/// The left operand: element (row, depth) at `row * row_stride + depth * depth_stride`,
/// one of the two strides being 1.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pointer: *const f32,
    stride: usize,
    transposed: bool,
}

impl Left {
    /// Rows as they lie in memory.
    pub fn rows(rows: Rows<*const f32>) -> Self {
        Self { pointer: rows.pointer, stride: rows.stride, transposed: false }
    }

    /// Memory holds the transposed operand: each of its rows is one step in depth.
    pub fn columns(rows: Rows<*const f32>) -> Self {
        Self { pointer: rows.pointer, stride: rows.stride, transposed: true }
    }

    /// The same from row `row` on.
    #[inline(always)]
    unsafe fn below(self, row: usize) -> Self {
        let step = if self.transposed { 1 } else { self.stride };
        // SAFETY: the caller names a row of the operand, or the one after the last.
        Self { pointer: unsafe { self.pointer.add(row * step) }, ..self }
    }
}

/// Sizes of a product; `columns` in vectors.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
}

/// `target = left * right`, or `target += left * right`.
///
/// # Safety
/// The operands cover the shape, and the target overlaps neither of the others.
pub(super) unsafe fn product<S: Simd>(
    simd: S,
    shape: Shape,
    left: Left,
    right: Rows<*const f32>,
    target: Rows<*mut f32>,
    accumulate: bool,
    ahead: &Ahead,
) {
    let chunks = shape.columns.div_ceil(S::MOST_COLUMNS);
    for chunk in 0..chunks {
        let column = shape.columns * chunk / chunks;
        let columns = shape.columns * (chunk + 1) / chunks - column;
        let (tiles, height) = equal_tiles(shape.rows, S::most_rows(columns));
        // SAFETY: tiles lie within the shape.
        unsafe {
            let (right, target) = (right.at(0, column * S::LANES), target.at(0, column * S::LANES));
            let column = TileColumn { left, right, target, depth: shape.depth, accumulate, ahead };
            column.run(simd, tiles, height, columns);
            let done = tiles * height;
            if done < shape.rows {
                let left = left.below(done);
                let rest = TileColumn { left, target: target.at(done, 0), ..column };
                rest.run(simd, 1, shape.rows - done, columns);
            }
        }
    }
}

/// Number and height of tiles of nearly equal height, so that none is too short to fill the
/// pipeline; less than one tile may remain.
#[inline(always)]
fn equal_tiles(rows: usize, most: usize) -> (usize, usize) {
    if rows <= most {
        return (1, rows);
    }
    let height = rows.div_ceil(rows.div_ceil(most));
    (rows / height, height)
}

/// Steps in depth between two tests of the loop.
const UNROLL: usize = 4;

/// Tiles of one height below each other.
struct TileColumn<'a> {
    left: Left,
    right: Rows<*const f32>,
    target: Rows<*mut f32>,
    depth: usize,
    accumulate: bool,
    ahead: &'a Ahead,
}

impl TileColumn<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, simd: S, tiles: usize, rows: usize, columns: usize) {
        macro_rules! sizes {
            ($($columns:literal: $($rows:literal)*;)*) => {
                match (columns, rows) {
                    // SAFETY: the caller's promise.
                    $($(($columns, $rows) => unsafe {
                        if self.left.transposed {
                            self.sized::<S, $rows, $columns, true>(simd, tiles)
                        } else {
                            self.sized::<S, $rows, $columns, false>(simd, tiles)
                        }
                    },)*)*
                    // Nothing to compute.
                    _ => debug_assert!(tiles == 0 || rows == 0, "no tile of {rows} x {columns}"),
                }
            };
        }
        sizes! {
            1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16;
            2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14;
            3: 1 2 3 4 5 6 7 8;
            4: 1 2 3 4 5 6;
            5: 1 2 3 4 5;
        }
    }

    unsafe fn sized<S: Simd, const R: usize, const C: usize, const TRANSPOSED: bool>(
        &self,
        simd: S,
        tiles: usize,
    ) {
        let Self { mut left, right, mut target, depth, accumulate, ahead } = *self;
        simd.call(
            #[inline(always)]
            || {
                for _ in 0..tiles {
                    // SAFETY: the caller's promise.
                    unsafe {
                        tile::<S, R, C, TRANSPOSED>(simd, left, right, target, depth, accumulate, ahead);
                        left = left.below(R);
                        target = target.at(R, 0);
                    }
                }
            },
        )
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const C: usize, const TRANSPOSED: bool>(
    simd: S,
    mut left: Left,
    mut right: Rows<*const f32>,
    target: Rows<*mut f32>,
    depth: usize,
    accumulate: bool,
    ahead: &Ahead,
) {
    let mut sums = [[simd.splat(0.0); C]; R];
    let mut requests = ahead.requests(depth / UNROLL);
    // SAFETY: the caller's promise.
    unsafe {
        if accumulate {
            for r in 0..R {
                for c in 0..C {
                    sums[r][c] = simd.load(target.row(r).add(c * S::LANES));
                }
            }
        }
        // Few iterations, so that the processor foresees the end of the loop; tall tiles of
        // rows far apart have too many addresses for it.
        let mut rest = depth;
        if TRANSPOSED || R <= 8 {
            for _ in 0..depth / UNROLL {
                steps::<S, R, C, UNROLL, TRANSPOSED>(simd, &mut sums, &mut left, &mut right);
                requests.next();
            }
            rest = depth % UNROLL;
        }
        for _ in 0..rest {
            steps::<S, R, C, 1, TRANSPOSED>(simd, &mut sums, &mut left, &mut right);
        }
        for r in 0..R {
            for c in 0..C {
                simd.store(target.row(r).add(c * S::LANES), sums[r][c]);
            }
        }
    }
}

/// Adds `STEPS` steps in depth to the sums and moves on.
#[inline(always)]
unsafe fn steps<S: Simd, const R: usize, const C: usize, const STEPS: usize, const TRANSPOSED: bool>(
    simd: S,
    sums: &mut [[S::Vector; C]; R],
    left: &mut Left,
    right: &mut Rows<*const f32>,
) {
    let (row_stride, depth_stride) = if TRANSPOSED { (1, left.stride) } else { (left.stride, 1) };
    // SAFETY: the caller's promise.
    unsafe {
        for step in 0..STEPS {
            let mut row = [simd.splat(0.0); C];
            for c in 0..C {
                row[c] = simd.load(right.row(step).add(c * S::LANES));
            }
            for r in 0..R {
                let factor = simd.splat(*left.pointer.add(r * row_stride + step * depth_stride));
                for c in 0..C {
                    sums[r][c] = simd.mul_add(factor, row[c], sums[r][c]);
                }
            }
        }
        left.pointer = left.pointer.add(STEPS * depth_stride);
        right.pointer = right.pointer.add(STEPS * right.stride);
    }
}
