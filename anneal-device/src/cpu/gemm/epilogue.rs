//! What is done to a tile of C after its last block of depth, while it lies in the first-level cache.

use half::{bf16, f16};

use super::super::element::{Element, ElementType};
use super::super::{math, vectorize};
use super::kernel::MAX_COLUMNS;
use super::{Activation, Epilogue, Gemm, Matrix, MatrixMut};

/// A row of a tile. Always worked on whole, so that the loops have a fixed length.
type Row = [f32; MAX_COLUMNS];

/// The last step for the tiles of one panel of columns.
pub(super) struct Finish<'a> {
    problem: &'a Gemm<'a>,
    column: usize,
    columns: usize,
    bias: Option<Row>,
}

/// True when the kernel may write C itself and nothing remains to be done.
pub(super) fn is_plain(problem: &Gemm) -> bool {
    problem.c.element == ElementType::F32
        && problem.bias.is_none()
        && matches!(problem.epilogue, Epilogue::None)
}

impl<'a> Finish<'a> {
    /// # Safety
    /// The problem's operands are valid.
    pub(super) unsafe fn new(problem: &'a Gemm<'a>, column: usize, columns: usize) -> Self {
        let bias = problem.bias.map(|bias| {
            let mut row = [0.0; MAX_COLUMNS];
            // A bias of any stride: its values are read once for a panel.
            for (offset, value) in row[..columns].iter_mut().enumerate() {
                // SAFETY: `columns` values from `column` on.
                unsafe { load(bias.at(0, column + offset), std::slice::from_mut(value)) };
            }
            row
        });
        Self { problem, column, columns, bias }
    }

    /// Finishes the rows `row .. row + rows`, whose sums lie at `sums` with `stride`.
    ///
    /// # Safety
    /// As [`Finish::new`]; `sums` covers the tile (and may be C itself).
    pub(super) unsafe fn tile(&self, row: usize, rows: usize, sums: *const f32, stride: usize) {
        vectorize(
            #[inline(always)]
            || {
                for i in 0..rows {
                    // SAFETY: passed on.
                    unsafe { self.row(row + i, sums.add(i * stride)) }
                }
            },
        )
    }

    #[inline(always)]
    unsafe fn row(&self, row: usize, sums: *const f32) {
        let (problem, columns) = (self.problem, self.columns);
        let mut value = [0.0; MAX_COLUMNS];
        // SAFETY: the tile's sums, C and the pre-activation cover row `row` of the panel.
        unsafe {
            load_row(sums, &mut value[..columns]);
            let c = problem.c.at(row, self.column);
            if problem.accumulate && c.element != ElementType::F32 {
                let mut before = [0.0; MAX_COLUMNS];
                load(c.read(), &mut before[..columns]);
                add(&mut value, &before);
            }
            if let Some(bias) = &self.bias {
                add(&mut value, bias);
            }
            match problem.epilogue {
                Epilogue::None => {}
                Epilogue::Activation { function, preactivation } => {
                    if let Some(out) = preactivation {
                        store(out.at(row, self.column), &value[..columns]);
                    }
                    activate(function, &mut value);
                }
                Epilogue::ActivationBackward { function, preactivation } => {
                    let mut before = [0.0; MAX_COLUMNS];
                    load(preactivation.at(row, self.column), &mut before[..columns]);
                    multiply_by_derivative(function, &mut value, &before);
                }
            }
            store(c, &value[..columns]);
        }
    }
}

#[inline(always)]
fn add(value: &mut Row, other: &Row) {
    for (value, other) in value.iter_mut().zip(other) {
        *value += other;
    }
}

#[inline(always)]
fn activate(function: Activation, value: &mut Row) {
    match function {
        Activation::GeluTanh => value.iter_mut().for_each(|x| *x = math::gelu_tanh(*x)),
        Activation::Silu => value.iter_mut().for_each(|x| *x = math::silu(*x)),
    }
}

#[inline(always)]
fn multiply_by_derivative(function: Activation, value: &mut Row, at: &Row) {
    match function {
        Activation::GeluTanh => {
            value.iter_mut().zip(at).for_each(|(x, at)| *x *= math::gelu_tanh_derivative(*at))
        }
        Activation::Silu => value.iter_mut().zip(at).for_each(|(x, at)| *x *= math::silu_derivative(*at)),
    }
}

impl MatrixMut<'_> {
    fn read(&self) -> Matrix<'_> {
        // SAFETY: the product owns the memory.
        unsafe { Matrix::new(self.pointer, self.element, self.row_stride, 1) }
    }
}

#[inline(always)]
unsafe fn load(from: Matrix, into: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match from.element {
            ElementType::F32 => load_row(from.pointer.cast::<f32>(), into),
            ElementType::Bf16 => load_row(from.pointer.cast::<bf16>(), into),
            ElementType::F16 => load_row(from.pointer.cast::<f16>(), into),
        }
    }
}

#[inline(always)]
unsafe fn load_row<T: Element>(from: *const T, into: &mut [f32]) {
    for (index, value) in into.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *value = unsafe { *from.add(index) }.to_f32();
    }
}

#[inline(always)]
unsafe fn store(to: MatrixMut, values: &[f32]) {
    // SAFETY: the caller's.
    unsafe {
        match to.element {
            ElementType::F32 => store_row(to.pointer.cast::<f32>(), values),
            ElementType::Bf16 => store_row(to.pointer.cast::<bf16>(), values),
            ElementType::F16 => store_row(to.pointer.cast::<f16>(), values),
        }
    }
}

#[inline(always)]
unsafe fn store_row<T: Element>(to: *mut T, values: &[f32]) {
    for (index, value) in values.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { *to.add(index) = T::from_f32(*value) };
    }
}
