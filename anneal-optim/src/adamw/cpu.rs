use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;
use anneal_nn::Chunk;
use anneal_tensor::parallel::parts_mut;
use anneal_tensor::{Float, Result, Tensor, for_float};

use super::{ChunkState, Constants, Task};

/// Independent partial sums within a task, so that the loop vectorises; their order is fixed.
const LANES: usize = 16;

/// Sum of squares of all gradients; task by task, then over tasks in order.
pub(super) fn squared_norm(pool: &ThreadPool, tasks: &[Task], chunks: &[Chunk]) -> f64 {
    let mut sums = vec![0f64; tasks.len()];
    parts_mut(pool, &mut sums, 1, |index, sum| {
        let task = &tasks[index];
        let gradients = chunks[task.state].gradients.as_ref().expect("a trained chunk has gradients");
        let values = &gradients.data::<f32>()[task.start..][..task.elements];
        sum[0] = vectorize(
            #[inline(always)]
            || {
                let mut lanes = [0f64; LANES];
                for group in values.chunks(LANES) {
                    for (lane, value) in lanes.iter_mut().zip(group) {
                        *lane += f64::from(*value) * f64::from(*value);
                    }
                }
                lanes.iter().sum()
            },
        );
    });
    sums.iter().sum()
}

/// Weights, moments and averages of all tasks.
pub(super) fn update(
    pool: &ThreadPool,
    tasks: &[Task],
    states: &[ChunkState],
    chunks: &[Chunk],
    constants: &Constants,
) -> Result<()> {
    let Some(first) = chunks.first() else { return Ok(()) };
    for_float!("adamw", first.weights.dtype(), T => {
        pool.run(tasks.len(), |index| {
            let task = &tasks[index];
            let (state, chunk) = (&states[task.state], &chunks[task.state]);
            let gradients = chunk.gradients.as_ref().expect("a trained chunk has gradients");
            let gradients = &gradients.data::<f32>()[task.start..][..task.elements];
            // SAFETY: tasks are disjoint ranges, and nobody else touches the state during a step.
            unsafe {
                let moments = [&state.moments[0], &state.moments[1]].map(|moment| range::<f32>(moment, task));
                match &state.master {
                    Some(master) => {
                        let master = range::<f32>(master, task);
                        update_weights(master, gradients, moments, constants, task.decays);
                        round_to(range::<T>(&chunk.weights, task), master);
                        average(master, state, task, constants);
                    }
                    None => {
                        let weights = range::<f32>(&chunk.weights, task);
                        update_weights(weights, gradients, moments, constants, task.decays);
                        average(weights, state, task, constants);
                    }
                }
            }
        });
        Ok(())
    })
}

/// # Safety
/// Nobody else touches the task's range while the slice lives.
#[allow(clippy::mut_from_ref)]
unsafe fn range<'a, T: Float>(tensor: &'a Tensor, task: &Task) -> &'a mut [T] {
    // SAFETY: the range lies within the chunk; sole use is the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(tensor.pointer::<T>().add(task.start), task.elements) }
}

fn update_weights(
    weights: &mut [f32],
    gradients: &[f32],
    [first, second]: [&mut [f32]; 2],
    constants: &Constants,
    decays: bool,
) {
    let Constants { gradient_scale, beta, rest, step_size, root_correction, epsilon, .. } = *constants;
    let keep = if decays { constants.keep } else { 1.0 };
    let (first, second) = (&mut first[..weights.len()], &mut second[..weights.len()]);
    let gradients = &gradients[..weights.len()];
    vectorize(
        #[inline(always)]
        || {
            for index in 0..weights.len() {
                let gradient = gradients[index] * gradient_scale;
                first[index] = beta[0] * first[index] + rest[0] * gradient;
                second[index] = beta[1] * second[index] + rest[1] * gradient * gradient;
                let denominator = second[index].sqrt() * root_correction + epsilon;
                weights[index] = weights[index] * keep - step_size * first[index] / denominator;
            }
        },
    );
}

fn round_to<T: Float>(weights: &mut [T], master: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (weight, value) in weights.iter_mut().zip(master) {
                *weight = T::from_f32(*value);
            }
        },
    );
}

/// # Safety
/// As [`range`].
unsafe fn average(weights: &[f32], state: &ChunkState, task: &Task, constants: &Constants) {
    for (average, &[rate, rest]) in state.averages.iter().zip(&constants.ema) {
        // SAFETY: the caller's promise.
        let average = unsafe { range::<f32>(average, task) };
        vectorize(
            #[inline(always)]
            || {
                for (average, weight) in average.iter_mut().zip(weights) {
                    *average = rate * *average + rest * weight;
                }
            },
        );
    }
}
