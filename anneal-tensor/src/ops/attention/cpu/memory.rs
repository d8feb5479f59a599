//! Where operands lie: rows of one head in tensors of any float dtype, and scratch of f32.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::simd::{Rows, Simd};
use crate::parallel::Shared;
use crate::{DType, Float, Tensor};

/// A tensor `[B, N, H, D]`, or a bias `[B, H, N, M]`, whose last dimension is contiguous.
#[derive(Clone, Copy)]
pub(super) struct View {
    memory: Shared<u8>,
    dtype: DType,
    batch: usize,
    head: usize,
    row: usize,
}

/// The rows of one head.
#[derive(Clone, Copy)]
pub(super) struct HeadRows {
    memory: Shared<u8>,
    dtype: DType,
    stride: usize,
}

fn bytes_of(tensor: &Tensor) -> Shared<u8> {
    Shared::new(match tensor.dtype() {
        DType::F32 => tensor.pointer::<f32>().cast(),
        DType::BF16 => tensor.pointer::<bf16>().cast(),
        DType::F16 => tensor.pointer::<f16>().cast(),
        other => unreachable!("attention on {other}"),
    })
}

impl View {
    /// Of a tensor `[B, N, H, D]`.
    pub fn of_heads(tensor: &Tensor) -> Self {
        let s = tensor.strides();
        Self { memory: bytes_of(tensor), dtype: tensor.dtype(), batch: s[0], row: s[1], head: s[2] }
    }

    /// Of a bias `[1 or B, 1 or H, N, M]`: no step along a broadcast dimension.
    pub fn of_bias(bias: &Tensor) -> Self {
        let s = bias.strides();
        let step = |axis: usize| if bias.size(axis) == 1 { 0 } else { s[axis] };
        Self { memory: bytes_of(bias), dtype: bias.dtype(), batch: step(0), head: step(1), row: s[2] }
    }

    pub fn head(&self, batch: usize, head: usize) -> HeadRows {
        let offset = (batch * self.batch + head * self.head) * self.dtype.size();
        // SAFETY: batch and head lie within the tensor.
        let memory = Shared::new(unsafe { self.memory.pointer().add(offset) });
        HeadRows { memory, dtype: self.dtype, stride: self.row }
    }
}

/// Runs `$body` with `$kind` bound to the Rust type of a float dtype.
macro_rules! by_dtype {
    ($dtype:expr, $kind:ident => $body:expr) => {
        match $dtype {
            DType::BF16 => {
                type $kind = bf16;
                $body
            }
            DType::F16 => {
                type $kind = f16;
                $body
            }
            _ => {
                type $kind = f32;
                $body
            }
        }
    };
}

impl HeadRows {
    /// The memory itself, if it is f32 and `width` elements of a row are whole vectors.
    #[inline(always)]
    pub fn direct<S: Simd>(&self, start: usize, width: usize) -> Option<Rows<*mut f32>> {
        if self.dtype != DType::F32 || !width.is_multiple_of(S::LANES) {
            return None;
        }
        // SAFETY: the caller names rows of the head.
        let pointer = unsafe { self.memory.pointer().cast::<f32>().add(start * self.stride) };
        Some(Rows::new(pointer, self.stride))
    }

    /// Whether many rows in the first-level cache would throw each other out: strides of a
    /// large power of two leave them few places.
    #[inline(always)]
    pub fn rows_collide(&self) -> bool {
        (self.stride * self.dtype.size()).is_multiple_of(1024)
    }

    /// Copies rows `start..start + count`, elements `columns` of each, converted to f32; the
    /// target's rows are filled up with zeros to whole vectors.
    ///
    /// # Safety
    /// The rows lie within the head; the target holds `count` rows.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(
        &self,
        simd: S,
        start: usize,
        count: usize,
        width: usize,
        target: Rows<*mut f32>,
    ) {
        unsafe { self.read_picked(simd, |row| start + row, count, width, target) }
    }

    /// The same for rows `pick(0..count)`.
    ///
    /// # Safety
    /// As for [`Self::read`].
    #[inline(always)]
    pub unsafe fn read_picked<S: Simd>(
        &self,
        simd: S,
        pick: impl Fn(usize) -> usize,
        count: usize,
        width: usize,
        target: Rows<*mut f32>,
    ) {
        let padded = width.next_multiple_of(S::LANES);
        simd.call(
            #[inline(always)]
            || {
                by_dtype!(self.dtype, T => {
                    for row in 0..count {
                        // SAFETY: the caller's promise.
                        let (source, target) = unsafe {
                            let source = self.memory.pointer().cast::<T>().add(pick(row) * self.stride);
                            (
                                std::slice::from_raw_parts(source, width),
                                std::slice::from_raw_parts_mut(target.row(row), padded),
                            )
                        };
                        convert(source, target);
                    }
                });
            },
        );
    }

    /// Address of row `start`, bytes between rows, and bytes of a row.
    pub fn extent(&self, start: usize, width: usize) -> (usize, usize, usize) {
        let size = self.dtype.size();
        (self.memory.pointer() as usize + start * self.stride * size, self.stride * size, width * size)
    }

    /// The same rows from element `column` on.
    #[inline(always)]
    pub fn at_column(&self, column: usize) -> Self {
        // SAFETY: the caller names an element of the rows.
        let memory = unsafe { self.memory.pointer().add(column * self.dtype.size()) };
        Self { memory: Shared::new(memory), ..*self }
    }

    /// Copies elements `index[..count]` of the rows, converted to f32, and zeros up to the
    /// target's stride.
    ///
    /// # Safety
    /// Rows and elements lie within the head; the target holds them.
    pub unsafe fn gather(&self, rows: Range<usize>, index: *const u32, count: usize, target: Rows<*mut f32>) {
        by_dtype!(self.dtype, T => {
            for (position, row) in rows.enumerate() {
                // SAFETY: the caller's promise.
                let (source, index, target) = unsafe {
                    (
                        self.memory.pointer().cast::<T>().add(row * self.stride),
                        std::slice::from_raw_parts(index, count),
                        std::slice::from_raw_parts_mut(target.row(position), target.stride),
                    )
                };
                for (to, column) in target.iter_mut().zip(index) {
                    // SAFETY: the caller's promise.
                    *to = unsafe { (*source.add(*column as usize)).to_f32() };
                }
                target[count..].fill(0.0);
            }
        });
    }

    /// Writes row `index`: `values * factor`, converted.
    ///
    /// # Safety
    /// The row lies within the head, and nobody else touches it.
    #[inline(always)]
    pub unsafe fn write(&self, index: usize, values: &[f32], factor: f32) {
        by_dtype!(self.dtype, T => {
            // SAFETY: the caller's promise.
            let target = unsafe {
                let start = self.memory.pointer().cast::<T>().add(index * self.stride);
                std::slice::from_raw_parts_mut(start, values.len())
            };
            let (target, last_target) = target.as_chunks_mut::<PIECE>();
            let (values, last_values) = values.as_chunks::<PIECE>();
            for (target, values) in target.iter_mut().zip(values) {
                let mut written = [T::from_f32(0.0); PIECE];
                for index in 0..PIECE {
                    written[index] = T::from_f32(values[index] * factor);
                }
                *target = written;
            }
            for (target, value) in last_target.iter_mut().zip(last_values) {
                *target = T::from_f32(value * factor);
            }
        });
    }

    /// Sets elements of row `index` to zero.
    ///
    /// # Safety
    /// As for [`Self::write`].
    pub unsafe fn clear(&self, index: usize, width: usize) {
        by_dtype!(self.dtype, T => {
            // SAFETY: the caller's promise; zero bits are a zero of every float dtype.
            unsafe { self.memory.pointer().cast::<T>().add(index * self.stride).write_bytes(0, width) }
        });
    }
}

/// Elements that short rows are converted by: all of a piece are read before one is written,
/// because the compiler cannot know that the rows do not overlap.
const PIECE: usize = 16;

/// Converts a row and fills up with zeros.
#[inline(always)]
fn convert<T: Float>(source: &[T], target: &mut [f32]) {
    let (source, last_source) = source.as_chunks::<PIECE>();
    let (target, last_target) = target.split_at_mut(source.len() * PIECE);
    for (target, source) in target.as_chunks_mut::<PIECE>().0.iter_mut().zip(source) {
        let mut values = [0.0; PIECE];
        for index in 0..PIECE {
            values[index] = source[index].to_f32();
        }
        *target = values;
    }
    if !last_target.is_empty() {
        let mut values = [0.0; PIECE];
        values.iter_mut().zip(last_source).for_each(|(to, from)| *to = from.to_f32());
        last_target.copy_from_slice(&values[..last_target.len()]);
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct CacheLine(#[expect(dead_code, reason = "memory, used through pointers")] [f32; 16]);

/// Cache lines between pieces of scratch.
const STAGGER: usize = 5;

thread_local! {
    static SCRATCH: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with pieces of this thread's scratch of `sizes` elements each, aligned to
/// cache lines, of unspecified contents. Memory grows to the largest need and stays.
#[inline(always)]
pub(super) fn with_scratch<const N: usize>(sizes: [usize; N], work: impl FnOnce([*mut f32; N])) {
    SCRATCH.with_borrow_mut(|memory| {
        // Pieces begin at different places within a page: else a store to one delays loads of another.
        let lines = sizes.map(|size| size.div_ceil(16) + STAGGER);
        let total = lines.iter().sum();
        if memory.len() < total {
            memory.resize(total, CacheLine([0.0; 16]));
        }
        let mut next = memory.as_mut_ptr();
        work(lines.map(|lines| {
            let piece = next.cast::<f32>();
            // SAFETY: the pieces end where the memory ends.
            next = unsafe { next.add(lines) };
            piece
        }));
    });
}
