//! The CPU matrix multiply: `C = f(A B + beta C + bias)`, on which every dense kernel rests.
//!
//! Contract. A is `[rows, depth]` and B `[depth, columns]` with any strides (a transpose is a swap
//! of strides); C is `[rows, columns]` with contiguous rows at a row stride. Each operand is f32,
//! bf16 or f16; arithmetic is f32, and C is rounded once, when stored. Without `accumulate` C is
//! never read. An element of C is a sum over fixed blocks of the depth (each a chain of fused
//! multiply-adds in order of depth), whose boundaries depend on `depth` alone: its bits are the
//! same for any number of threads, any tile it falls into, and any number of rows and columns
//! beside it. They differ between the AVX-512 and AVX2 kernels (the same bits) and the portable one.
//!
//! Method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and
//! the BLIS papers: panels of B, packed, stay in the first-level cache; blocks of A in the second;
//! a register tile of C is written once per depth block. A is read where it lies when it is f32
//! with a unit stride either way. Epilogues run on each tile of C while it is in the first level.
//!
//! Not done: splitting the depth over threads, integer types, AMX, negative strides.

mod blocks;
mod driver;
mod epilogue;
mod kernel;
mod operands;
mod pack;
mod scratch;
mod sums;
mod task;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub use sums::column_sums;

use std::marker::PhantomData;

use super::element::{Element, ElementType};
use crate::ThreadPool;

/// A read-only matrix operand: element `(i, j)` lies at `pointer + i * row_stride + j * column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub(super) pointer: *const u8,
    pub(super) element: ElementType,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
    lifetime: PhantomData<&'a u8>,
}
// SAFETY: a read-only view; the constructor's contract covers the memory.
unsafe impl Send for Matrix<'_> {}
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    /// Strides are in elements; zero repeats.
    ///
    /// # Safety
    /// Every element that the product addresses must be readable, and written by nobody, for `'a`;
    /// `pointer` must be aligned to the element.
    pub unsafe fn new(
        pointer: *const u8,
        element: ElementType,
        row_stride: usize,
        column_stride: usize,
    ) -> Self {
        Self { pointer, element, row_stride, column_stride, lifetime: PhantomData }
    }

    /// Row-major `[len / columns, columns]` over a whole slice.
    pub fn from_slice<T: Element>(values: &'a [T], columns: usize) -> Self {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "the slice is not whole rows");
        // SAFETY: the borrow holds the memory; the bounds are the caller's at `gemm`.
        unsafe { Self::new(values.as_ptr().cast(), T::TYPE, columns, 1) }
    }

    /// The same memory seen as the transposed matrix.
    pub fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// The matrix that starts at element `(row, column)` of this one.
    pub(super) fn at(self, row: usize, column: usize) -> Self {
        let offset = (row * self.row_stride + column * self.column_stride) * self.element.size();
        Self { pointer: self.pointer.wrapping_add(offset), ..self }
    }
}

/// A writable matrix whose rows are contiguous: `(i, j)` lies at `pointer + i * row_stride + j`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixMut<'a> {
    pub(super) pointer: *mut u8,
    pub(super) element: ElementType,
    pub(super) row_stride: usize,
    lifetime: PhantomData<&'a mut u8>,
}
// SAFETY: the constructor's contract gives the product sole use of the memory.
unsafe impl Send for MatrixMut<'_> {}
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// The stride is in elements and at least the number of columns.
    ///
    /// # Safety
    /// Every element that the product addresses must be writable and used by nobody else for `'a`;
    /// `pointer` must be aligned to the element. (Contents may be uninitialised unless accumulated to.)
    pub unsafe fn new(pointer: *mut u8, element: ElementType, row_stride: usize) -> Self {
        Self { pointer, element, row_stride, lifetime: PhantomData }
    }

    /// Row-major `[len / columns, columns]` over a whole slice.
    pub fn from_slice<T: Element>(values: &'a mut [T], columns: usize) -> Self {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "the slice is not whole rows");
        // SAFETY: the borrow holds the memory; the bounds are the caller's at `gemm`.
        unsafe { Self::new(values.as_mut_ptr().cast(), T::TYPE, columns) }
    }

    pub(super) fn at(self, row: usize, column: usize) -> Self {
        let offset = (row * self.row_stride + column) * self.element.size();
        Self { pointer: self.pointer.wrapping_add(offset), ..self }
    }
}

/// The non-linearities that fuse into the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// [`gelu_tanh`](super::math::gelu_tanh)
    GeluTanh,
    /// [`silu`](super::math::silu)
    Silu,
}

/// What happens to `v = A B + beta C + bias` before it is stored.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// `C = v`
    None,
    /// `C = activation(v)`, and `v` itself into `preactivation` (of C's shape) for the backward pass.
    Activation { function: Activation, preactivation: Option<MatrixMut<'a>> },
    /// `C = v * activation'(preactivation)`: the gradient of the pre-activation, when `v` is the
    /// gradient of the activation's value. `preactivation` is of C's shape with unit column stride.
    ActivationBackward { function: Activation, preactivation: Matrix<'a> },
}

/// Sums of A's rows over the depth, on the way: with `A = dY^T` the gradient of a bias.
#[derive(Clone, Copy, Debug)]
pub struct RowSums<'a> {
    pub(super) pointer: *mut f32,
    pub(super) accumulate: bool,
    lifetime: PhantomData<&'a mut f32>,
}
// SAFETY: as for `MatrixMut`.
unsafe impl Send for RowSums<'_> {}
unsafe impl Sync for RowSums<'_> {}

impl<'a> RowSums<'a> {
    /// Adds to `values` when `accumulate`, else overwrites without reading.
    ///
    /// # Safety
    /// `rows` values must be writable and used by nobody else for `'a`.
    pub unsafe fn new(values: *mut f32, accumulate: bool) -> Self {
        Self { pointer: values, accumulate, lifetime: PhantomData }
    }

    /// The sums from `row` on.
    fn from(self, row: usize) -> Self {
        Self { pointer: self.pointer.wrapping_add(row), ..self }
    }
}

/// One product, `C = epilogue(A B + beta C + bias)`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    pub c: MatrixMut<'a>,
    /// Adds C's present contents to the product (beta = 1).
    pub accumulate: bool,
    /// One value for each column: a matrix whose row stride is not used.
    pub bias: Option<Matrix<'a>>,
    pub epilogue: Epilogue<'a>,
    pub row_sums: Option<RowSums<'a>>,
}

impl<'a> Gemm<'a> {
    /// The plain product `C = A B` with `A [rows, depth]` and `B [depth, columns]`.
    pub fn new(
        (rows, columns, depth): (usize, usize, usize),
        a: Matrix<'a>,
        b: Matrix<'a>,
        c: MatrixMut<'a>,
    ) -> Self {
        let (accumulate, bias, epilogue, row_sums) = (false, None, Epilogue::None, None);
        Self { rows, columns, depth, a, b, c, accumulate, bias, epilogue, row_sums }
    }

    /// The part of the product that yields `rows` rows of C from `row` on.
    fn row_range(&self, row: usize, rows: usize) -> Self {
        Self {
            rows,
            a: self.a.at(row, 0),
            c: self.c.at(row, 0),
            epilogue: self.epilogue.at(row, 0),
            row_sums: self.row_sums.map(|sums| sums.from(row)),
            ..*self
        }
    }

    /// The part of the product that yields `columns` columns of C from `column` on.
    fn column_range(&self, column: usize, columns: usize) -> Self {
        Self {
            columns,
            b: self.b.at(0, column),
            c: self.c.at(0, column),
            bias: self.bias.map(|bias| bias.at(0, column)),
            epilogue: self.epilogue.at(0, column),
            // The first range alone has the sums: they are of A, which every range shares.
            row_sums: self.row_sums.filter(|_| column == 0),
            ..*self
        }
    }

    /// Panics on strides by which rows of C would overlap: a broken invariant of the caller.
    fn check(&self) {
        let stride = |matrix: &MatrixMut| matrix.row_stride >= self.columns || self.rows <= 1;
        assert!(stride(&self.c), "gemm: C's rows overlap");
        match &self.epilogue {
            Epilogue::Activation { preactivation: Some(out), .. } => {
                assert!(stride(out), "gemm: the pre-activation's rows overlap");
            }
            Epilogue::ActivationBackward { preactivation, .. } => {
                assert!(
                    preactivation.column_stride == 1,
                    "gemm: the pre-activation's rows must be contiguous"
                );
            }
            _ => {}
        }
    }
}

impl Epilogue<'_> {
    fn at(self, row: usize, column: usize) -> Self {
        match self {
            Epilogue::None => Epilogue::None,
            Epilogue::Activation { function, preactivation } => {
                Epilogue::Activation { function, preactivation: preactivation.map(|out| out.at(row, column)) }
            }
            Epilogue::ActivationBackward { function, preactivation } => {
                Epilogue::ActivationBackward { function, preactivation: preactivation.at(row, column) }
            }
        }
    }
}

/// Computes the product on all threads of the pool (inline when called from one of its tasks).
///
/// # Safety
/// The operands must cover the shape: A `[rows, depth]`, B `[depth, columns]`, C and the
/// pre-activation `[rows, columns]`, `bias` `[columns]`, `row_sums` `[rows]`; what is written must
/// overlap nothing else of the product. (The constructors' contracts say for how long.)
pub unsafe fn gemm(pool: &ThreadPool, problem: &Gemm) {
    problem.check();
    // SAFETY: passed on.
    unsafe { driver::parallel(kernel::best(), pool, problem) }
}

/// Computes the product on the calling thread: for use inside a task of the pool.
///
/// # Safety
/// As [`gemm`].
pub unsafe fn gemm_serial(problem: &Gemm) {
    problem.check();
    // SAFETY: passed on.
    unsafe { driver::serial(kernel::best(), problem) }
}

/// The micro-kernel in use on this machine: `avx512`, `avx2` or `portable`.
pub fn kernel_name() -> &'static str {
    kernel::best().name
}

#[cfg(test)]
mod tests;
