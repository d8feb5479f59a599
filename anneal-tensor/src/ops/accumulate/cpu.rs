use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::{Float, Result, Tensor, for_float};

pub(super) fn add_assign(pool: &ThreadPool, target: &mut Tensor, other: &Tensor) -> Result<()> {
    for_float!("accumulate", target.dtype(), T => {
        let other = other.data::<T>();
        parts_mut(pool, target.data_mut::<T>(), ELEMENTS_PER_TASK, |index, part| {
            let other = &other[index * ELEMENTS_PER_TASK..][..part.len()];
            vectorize(#[inline(always)] || {
                for (sum, value) in part.iter_mut().zip(other) {
                    *sum = T::from_f32(sum.to_f32() + value.to_f32());
                }
            });
        });
        Ok(())
    })
}

pub(super) fn into_f32(
    pool: &ThreadPool,
    sink: &mut Tensor,
    gradient: &Tensor,
    accumulate: bool,
) -> Result<()> {
    for_float!("accumulate", gradient.dtype(), T => {
        let gradient = gradient.data::<T>();
        // SAFETY: a sink is written by backward alone, one op at a time.
        let sink = unsafe { sink.shared_data_mut::<f32>() };
        parts_mut(pool, sink, ELEMENTS_PER_TASK, |index, part| {
            let gradient = &gradient[index * ELEMENTS_PER_TASK..][..part.len()];
            vectorize(#[inline(always)] || {
                for (sum, value) in part.iter_mut().zip(gradient) {
                    *sum = value.to_f32() + if accumulate { *sum } else { 0.0 };
                }
            });
        });
        Ok(())
    })
}
