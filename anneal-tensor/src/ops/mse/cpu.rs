use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::ops::elementwise::cpu::map;
use crate::ops::{lanes, scratch};
use crate::parallel::{ELEMENTS_PER_TASK, Shared};
use crate::{Float, Result, Tensor, for_float};

/// Elements whose squares are summed in one go; a sample's sums are then added in order.
const SEGMENT: usize = 4096;

pub(super) fn forward(
    pool: &ThreadPool,
    prediction: &Tensor,
    target: &Tensor,
    output: &mut Tensor,
) -> Result<()> {
    for_float!("mse", prediction.dtype(), P => {
        for_float!("mse", target.dtype(), T => {
            errors(pool, prediction.data::<P>(), target.data::<T>(), output.data_mut::<f32>());
            Ok(())
        })
    })
}

fn errors<P: Float, T: Float>(pool: &ThreadPool, prediction: &[P], target: &[T], output: &mut [f32]) {
    let samples = output.len();
    let per_sample = prediction.len() / samples;
    let segments = per_sample.div_ceil(SEGMENT);
    let mut sums = vec![0.0f32; samples * segments];
    let shared = Shared::new(sums.as_mut_ptr());
    let per_task = (ELEMENTS_PER_TASK / per_sample.min(SEGMENT)).max(1);
    pool.run(sums.len().div_ceil(per_task), |task| {
        for index in task * per_task..((task + 1) * per_task).min(samples * segments) {
            let start = index % segments * SEGMENT;
            let end = (start + SEGMENT).min(per_sample);
            let offset = index / segments * per_sample;
            let range = offset + start..offset + end;
            // SAFETY: each segment is in one task.
            let sum = unsafe { shared.slice(index, 1) };
            sum[0] = squares(&prediction[range.clone()], &target[range]);
        }
    });
    for (error, sums) in output.iter_mut().zip(sums.chunks(segments)) {
        *error = sums.iter().sum::<f32>() / per_sample as f32;
    }
}

fn squares<P: Float, T: Float>(prediction: &[P], target: &[T]) -> f32 {
    scratch::rows(prediction.len(), |[prediction_row, target_row]| {
        vectorize(
            #[inline(always)]
            || {
                let prediction = lanes::in_f32(prediction, prediction_row);
                let target = lanes::in_f32(target, target_row);
                lanes::sum_pairs(prediction, target, |p, t| (p - t) * (p - t))
            },
        )
    })
}

/// `factor * g[b] * (prediction - target)`; `gradient` has the rank of the prediction.
pub(super) fn backward(
    pool: &ThreadPool,
    gradient: &Tensor,
    prediction: &Tensor,
    target: &Tensor,
    factor: f32,
    dx: &Tensor,
) {
    map(
        pool,
        [gradient, prediction, target],
        dx,
        #[inline(always)]
        move |[g, p, t]| factor * g * (p - t),
    );
}
