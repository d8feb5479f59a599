//! Element-wise functions on the CPU, in f32 inside.
//!
//! Chunks of each input are brought into f32 rows that stay in the first-level cache, and the
//! result leaves through such a row too. So each function is compiled once rather than once a
//! combination of dtypes, and the result may lie in the memory of an input of the same layout.

use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use super::{Walk, broadcast_strides};
use crate::parallel::ELEMENTS_PER_TASK;
use crate::{DType, Float, Result, Tensor, for_float};

/// Elements of a chunk: a few rows of this length fit the first-level cache beside the data.
const CHUNK: usize = 512;

/// `out[i] = f(inputs[i])`, each input broadcast to the sizes of the contiguous `out`.
///
/// The caller alone writes the memory of `out`.
pub(crate) fn map<const N: usize>(
    pool: &ThreadPool,
    inputs: [&Tensor; N],
    out: &Tensor,
    f: impl Fn([f32; N]) -> f32 + Sync + Copy,
) {
    assert!(out.is_contiguous(), "the result of an element-wise function must be contiguous");
    let total = out.elements();
    let strides = inputs.map(|input| broadcast_strides(input, out.dims()));
    let walk: Walk<N> = Walk::new(out.dims(), std::array::from_fn(|operand| &strides[operand][..]));
    let (run_len, steps) = walk.inner;
    pool.run(total.div_ceil(ELEMENTS_PER_TASK), |task| {
        let end = ((task + 1) * ELEMENTS_PER_TASK).min(total);
        let mut position = task * ELEMENTS_PER_TASK;
        let mut memory = [[0.0f32; CHUNK]; N];
        let mut result = [0.0f32; CHUNK];
        while position < end {
            let (run, within) = (position / run_len, position % run_len);
            let len = CHUNK.min(run_len - within).min(end - position);
            let starts = walk.starts(run);
            let mut operand = 0;
            let rows: [&[f32]; N] = memory.each_mut().map(|memory| {
                let start = starts[operand] + within * steps[operand];
                operand += 1;
                load(inputs[operand - 1], start, steps[operand - 1], &mut memory[..len])
            });
            compute(f, rows, &mut result[..len]);
            store(&result[..len], out, position);
            position += len;
        }
    });
}

/// Takes `f` by value: numbers that it carries then are in registers, not behind a reference
/// that the results might overwrite for all that the compiler knows.
fn compute<const N: usize>(f: impl Fn([f32; N]) -> f32, rows: [&[f32]; N], result: &mut [f32]) {
    vectorize(
        #[inline(always)]
        move || {
            let len = result.len();
            let rows = rows.map(|row| &row[..len]);
            for index in 0..len {
                result[index] = f(std::array::from_fn(
                    #[inline(always)]
                    |operand| rows[operand][index],
                ));
            }
        },
    );
}

/// Elements `start`, `start + step`, .. of the tensor's memory, as many as `into` holds: in place if
/// they are f32 neighbours, else in `into`.
fn load<'a>(tensor: &'a Tensor, start: usize, step: usize, into: &'a mut [f32]) -> &'a [f32] {
    if step == 1 && tensor.dtype() == DType::F32 {
        // SAFETY: the walk stays within the view, and the result is stored after its inputs are read.
        return unsafe { std::slice::from_raw_parts(tensor.pointer::<f32>().add(start), into.len()) };
    }
    let loaded: Result<()> = for_float!("element-wise", tensor.dtype(), T => {
        // SAFETY: the walk stays within the view, whose strides these are.
        let from = unsafe { tensor.pointer::<T>().add(start) };
        match step {
            0 => into.fill(unsafe { *from }.to_f32()),
            1 => {
                let from = unsafe { std::slice::from_raw_parts(from, into.len()) };
                vectorize(#[inline(always)] || {
                    into.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
                });
            }
            _ => {
                for (index, to) in into.iter_mut().enumerate() {
                    *to = unsafe { *from.add(index * step) }.to_f32();
                }
            }
        }
        Ok(())
    });
    loaded.expect("dtypes are checked before kernels run");
    into
}

fn store(values: &[f32], out: &Tensor, start: usize) {
    let stored: Result<()> = for_float!("element-wise", out.dtype(), T => {
        // SAFETY: each position is in one task, and within the contiguous output.
        let to = unsafe { std::slice::from_raw_parts_mut(out.pointer::<T>().add(start), values.len()) };
        vectorize(#[inline(always)] || {
            to.iter_mut().zip(values).for_each(|(to, from)| *to = T::from_f32(*from));
        });
        Ok(())
    });
    stored.expect("dtypes are checked before kernels run");
}
