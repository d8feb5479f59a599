use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::{Float, Result, Tensor, for_float};

pub(super) fn convert(pool: &ThreadPool, input: &Tensor, output: &mut Tensor) -> Result<()> {
    for_float!("cast", input.dtype(), From => {
        for_float!("cast", output.dtype(), To => {
            let input = input.data::<From>();
            parts_mut(pool, output.data_mut::<To>(), ELEMENTS_PER_TASK, |index, part| {
                let input = &input[index * ELEMENTS_PER_TASK..][..part.len()];
                vectorize(#[inline(always)] || {
                    for (to, from) in part.iter_mut().zip(input) {
                        *to = To::from_f32(from.to_f32());
                    }
                });
            });
            Ok(())
        })
    })
}
