//! What is done to a tile of C after its last block of depth, while it lies in the first-level cache.

use half::{bf16, f16};

use super::super::element::{Element, ElementType};
use super::super::{math, vectorize};
use super::kernel::MAX_COLUMNS;
use super::{Activation, Epilogue, Gemm};

/// The last step for the tiles of one panel of columns.
///
/// Rows are worked on over the panel's whole width, so that every loop has a fixed length and stays
/// in registers; the rows of a narrower panel take a detour through buffers of that width.
pub(super) struct Finish<'a> {
    problem: &'a Gemm<'a>,
    width: usize,
    column: usize,
    columns: usize,
    bias: [f32; MAX_COLUMNS],
}

/// True when the kernel may write C itself and nothing remains to be done.
pub(super) fn is_plain(problem: &Gemm) -> bool {
    problem.c.element == ElementType::F32
        && problem.bias.is_none()
        && matches!(problem.epilogue, Epilogue::None)
}

impl<'a> Finish<'a> {
    /// For `columns` of the panel of `width` that starts at `column`.
    ///
    /// # Safety
    /// The problem's operands are valid.
    pub(super) unsafe fn new(problem: &'a Gemm<'a>, width: usize, column: usize, columns: usize) -> Self {
        let mut values = [0.0; MAX_COLUMNS];
        if let Some(bias) = problem.bias {
            for (offset, value) in values[..columns].iter_mut().enumerate() {
                // SAFETY: `columns` values from `column` on.
                *value = unsafe { load::<1>(bias.at(0, column + offset).pointer, bias.element) }[0];
            }
        }
        Self { problem, width, column, columns, bias: values }
    }

    /// Fetches what [`Finish::tile`] will touch beside C, to be called ahead of the tile's product.
    pub(super) fn prefetch(&self, row: usize, rows: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some((_, element)) = self.preactivation(row) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for row in row..row + rows {
                let (line, _) = self.preactivation(row).expect("the same for every row");
                for offset in (0..self.width * element.size()).step_by(64) {
                    // SAFETY: a hint; it does not access memory.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(offset).cast()) };
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (row, rows);
    }

    /// Row `row` of the pre-activation that is written or read, if any.
    #[inline(always)]
    fn preactivation(&self, row: usize) -> Option<(*mut u8, ElementType)> {
        match self.problem.epilogue {
            Epilogue::Activation { preactivation: Some(out), .. } => {
                Some((out.at(row, self.column).pointer, out.element))
            }
            Epilogue::ActivationBackward { preactivation, .. } => {
                Some((preactivation.at(row, self.column).pointer.cast_mut(), preactivation.element))
            }
            _ => None,
        }
    }

    /// Finishes the rows `row .. row + rows`, whose sums lie at `sums` with `stride`.
    ///
    /// # Safety
    /// As [`Finish::new`]; `sums` covers the tile (and may be C itself).
    pub(super) unsafe fn tile(&self, row: usize, rows: usize, sums: *const f32, stride: usize) {
        // SAFETY: passed on.
        unsafe {
            match self.width {
                32 => self.tile_of::<32>(row, rows, sums, stride),
                16 => self.tile_of::<16>(row, rows, sums, stride),
                width => unreachable!("no kernel has panels of {width} columns"),
            }
        }
    }

    unsafe fn tile_of<const W: usize>(&self, row: usize, rows: usize, sums: *const f32, stride: usize) {
        vectorize(
            #[inline(always)]
            || {
                for i in 0..rows {
                    // SAFETY: passed on.
                    unsafe {
                        let sums = sums.add(i * stride);
                        let c = self.problem.c.at(row + i, self.column).pointer;
                        let other = self.preactivation(row + i).map_or(c, |(line, _)| line);
                        if self.columns == W {
                            self.whole_row::<W>(sums, c, other);
                        } else {
                            self.partial_row::<W>(sums, c, other);
                        }
                    }
                }
            },
        )
    }

    unsafe fn partial_row<const W: usize>(&self, sums: *const f32, c: *mut u8, other: *mut u8) {
        let mut buffers = [[0.0f32; W]; 3];
        let [wide_sums, wide_c, wide_other] = &mut buffers;
        let c_bytes = self.columns * self.problem.c.element.size();
        let (_, other_element) = self.preactivation(0).unwrap_or((c, self.problem.c.element));
        let other_bytes = self.columns * other_element.size();
        let (wide_c, wide_other) = (wide_c.as_mut_ptr().cast::<u8>(), wide_other.as_mut_ptr().cast::<u8>());
        // SAFETY: the row's own columns; what is only written may be uninitialised, so is not read.
        unsafe {
            wide_sums.as_mut_ptr().copy_from_nonoverlapping(sums, self.columns);
            if self.problem.accumulate {
                wide_c.copy_from_nonoverlapping(c, c_bytes);
            }
            let reads = matches!(self.problem.epilogue, Epilogue::ActivationBackward { .. });
            if reads {
                wide_other.copy_from_nonoverlapping(other, other_bytes);
            }
            self.whole_row::<W>(wide_sums.as_ptr(), wide_c, wide_other);
            c.copy_from_nonoverlapping(wide_c, c_bytes);
            if !reads && self.preactivation(0).is_some() {
                other.copy_from_nonoverlapping(wide_other, other_bytes);
            }
        }
    }

    /// One row of `W` columns; `other` is its pre-activation.
    #[inline(always)]
    unsafe fn whole_row<const W: usize>(&self, sums: *const f32, c: *mut u8, other: *mut u8) {
        let problem = self.problem;
        // SAFETY: the caller's.
        unsafe {
            let mut value = load::<W>(sums.cast(), ElementType::F32);
            if problem.accumulate && problem.c.element != ElementType::F32 {
                let before = load::<W>(c, problem.c.element);
                value.iter_mut().zip(before).for_each(|(value, before)| *value += before);
            }
            if problem.bias.is_some() {
                value.iter_mut().zip(&self.bias).for_each(|(value, bias)| *value += bias);
            }
            match problem.epilogue {
                Epilogue::None => {}
                Epilogue::Activation { function, preactivation } => {
                    if let Some(out) = preactivation {
                        store(other, out.element, &value);
                    }
                    match function {
                        Activation::GeluTanh => value.iter_mut().for_each(|x| *x = math::gelu_tanh(*x)),
                        Activation::Silu => value.iter_mut().for_each(|x| *x = math::silu(*x)),
                    }
                }
                Epilogue::ActivationBackward { function, preactivation } => {
                    let at = load::<W>(other, preactivation.element);
                    let pairs = value.iter_mut().zip(at);
                    match function {
                        Activation::GeluTanh => {
                            pairs.for_each(|(x, at)| *x *= math::gelu_tanh_derivative(at))
                        }
                        Activation::Silu => pairs.for_each(|(x, at)| *x *= math::silu_derivative(at)),
                    }
                }
            }
            store(c, problem.c.element, &value);
        }
    }
}

#[inline(always)]
unsafe fn load<const W: usize>(from: *const u8, element: ElementType) -> [f32; W] {
    // SAFETY: the caller's.
    unsafe {
        match element {
            ElementType::F32 => *from.cast::<[f32; W]>(),
            ElementType::Bf16 => bf16::widen(*from.cast::<[bf16; W]>()),
            ElementType::F16 => f16::widen(*from.cast::<[f16; W]>()),
        }
    }
}

#[inline(always)]
unsafe fn store<const W: usize>(to: *mut u8, element: ElementType, values: &[f32; W]) {
    // SAFETY: the caller's.
    unsafe {
        match element {
            ElementType::F32 => *to.cast::<[f32; W]>() = *values,
            ElementType::Bf16 => *to.cast::<[bf16; W]>() = Element::narrow(values),
            ElementType::F16 => *to.cast::<[f16; W]>() = Element::narrow(values),
        }
    }
}
