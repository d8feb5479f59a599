//! Sums over one dimension of an operand, for the gradients of biases.
//!
//! Contract: the order of additions depends on the shape alone, never on the number of threads.

use half::{bf16, f16};

use super::super::element::{Element, ElementType};
use super::super::vectorize;
use super::{Matrix, RowSums};
use crate::ThreadPool;

/// Rows that one task of [`column_sums`] adds up.
const ROWS: usize = 128;

/// `sums[j] (+)= sum over i of matrix(i, j)` for a `[rows, columns]` matrix of unit column stride.
///
/// # Safety
/// The matrix covers `[rows, columns]`.
pub unsafe fn column_sums(
    pool: &ThreadPool,
    matrix: Matrix,
    rows: usize,
    sums: &mut [f32],
    accumulate: bool,
) {
    assert!(matrix.column_stride == 1, "column_sums: the matrix's rows must be contiguous");
    let columns = sums.len();
    let chunks = rows.div_ceil(ROWS);
    if !accumulate {
        sums.fill(0.0);
    }
    super::scratch::with_panels(|storage| {
        let partial = storage.reserve(chunks * columns) as usize;
        pool.run(chunks, |chunk| {
            let first = chunk * ROWS;
            // SAFETY: each chunk has its own row of the partial sums.
            unsafe {
                let out = (partial as *mut f32).add(chunk * columns);
                out.write_bytes(0, columns);
                let out = std::slice::from_raw_parts_mut(out, columns);
                add_lines(matrix.at(first, 0), ROWS.min(rows - first), matrix.row_stride, out);
            }
        });
        for chunk in 0..chunks {
            // SAFETY: written above.
            let part =
                unsafe { std::slice::from_raw_parts((partial as *const f32).add(chunk * columns), columns) };
            for (sum, part) in sums.iter_mut().zip(part) {
                *sum += part;
            }
        }
    });
}

/// Adds the sums of one block of A over its depth, `first` telling whether it is the depth's first.
///
/// # Safety
/// `a` covers `[rows, depth]`, the sums `rows`.
pub(super) unsafe fn add_row_sums(sums: RowSums, a: Matrix, rows: usize, depth: usize, first: bool) {
    // SAFETY: passed on.
    unsafe {
        if first && !sums.accumulate {
            sums.pointer.write_bytes(0, rows);
        }
        let sums = std::slice::from_raw_parts_mut(sums.pointer, rows);
        if a.row_stride == 1 {
            return add_lines(a, depth, a.column_stride, sums);
        }
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum += match a.element {
                ElementType::F32 => line_sum::<f32>(a.at(row, 0), depth),
                ElementType::Bf16 => line_sum::<bf16>(a.at(row, 0), depth),
                ElementType::F16 => line_sum::<f16>(a.at(row, 0), depth),
            };
        }
    }
}

/// `sums[j] += sum over l of matrix.pointer[l * stride + j]`.
unsafe fn add_lines(matrix: Matrix, lines: usize, stride: usize, sums: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match matrix.element {
            ElementType::F32 => add_lines_of::<f32>(matrix.pointer.cast(), lines, stride, sums),
            ElementType::Bf16 => add_lines_of::<bf16>(matrix.pointer.cast(), lines, stride, sums),
            ElementType::F16 => add_lines_of::<f16>(matrix.pointer.cast(), lines, stride, sums),
        }
    }
}

unsafe fn add_lines_of<T: Element>(source: *const T, lines: usize, stride: usize, sums: &mut [f32]) {
    const WIDTH: usize = 64;
    vectorize(
        #[inline(always)]
        || {
            let (whole, rest) = sums.as_chunks_mut::<WIDTH>();
            for (chunk, sums) in whole.iter_mut().enumerate() {
                let mut total = [0.0f32; WIDTH];
                for line in 0..lines {
                    // SAFETY: within the operand.
                    let values = unsafe { &*source.add(line * stride + chunk * WIDTH).cast::<[T; WIDTH]>() };
                    for (total, value) in total.iter_mut().zip(values) {
                        *total += value.to_f32();
                    }
                }
                sums.iter_mut().zip(total).for_each(|(sum, total)| *sum += total);
            }
            let offset = whole.len() * WIDTH;
            for (index, sum) in rest.iter_mut().enumerate() {
                let mut total = 0.0;
                for line in 0..lines {
                    // SAFETY: within the operand.
                    total += unsafe { *source.add(line * stride + offset + index) }.to_f32();
                }
                *sum += total;
            }
        },
    )
}

unsafe fn line_sum<T: Element>(line: Matrix, depth: usize) -> f32 {
    let source = line.pointer.cast::<T>();
    // SAFETY: within the operand.
    (0..depth).map(|k| unsafe { *source.add(k * line.column_stride) }.to_f32()).sum()
}
