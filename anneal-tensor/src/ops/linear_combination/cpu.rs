use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::{Float, Result, Tensor, for_float};

/// The running sum of this many elements stays in the first-level cache.
const CHUNK: usize = 1024;

pub(super) fn sum(
    pool: &ThreadPool,
    coefficients: &[&[f32]],
    tensors: &[&Tensor],
    output: &mut Tensor,
) -> Result<()> {
    let per_sample = (output.elements() / coefficients[0].len().max(1)).max(1);
    for_float!("linear_combination", output.dtype(), T => {
        parts_mut(pool, output.data_mut::<T>(), ELEMENTS_PER_TASK, |task, part| {
            let mut position = task * ELEMENTS_PER_TASK;
            let mut rest = part;
            while !rest.is_empty() {
                let sample = position / per_sample;
                let len = CHUNK.min((sample + 1) * per_sample - position).min(rest.len());
                let (chunk, after) = std::mem::take(&mut rest).split_at_mut(len);
                let mut sums = [0.0f32; CHUNK];
                for (coefficients, tensor) in coefficients.iter().zip(tensors) {
                    let values = &tensor.data::<T>()[position..position + len];
                    add_scaled(&mut sums[..len], coefficients[sample], values);
                }
                vectorize(#[inline(always)] || {
                    chunk.iter_mut().zip(&sums).for_each(|(to, from)| *to = T::from_f32(*from));
                });
                rest = after;
                position += len;
            }
        });
        Ok(())
    })
}

fn add_scaled<T: Float>(sums: &mut [f32], coefficient: f32, values: &[T]) {
    vectorize(
        #[inline(always)]
        || sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += coefficient * value.to_f32()),
    );
}
