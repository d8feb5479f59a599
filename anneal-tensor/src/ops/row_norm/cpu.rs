use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use super::{Again, Backward, Forward, RowNorm, Targets, Vectors};
use crate::ops::gate_residual::cpu::{add_gated, load};
use crate::ops::row_blocks::{Block, ColumnSums};
use crate::ops::{lanes, scratch};
use crate::parallel::Shared;
use crate::{Float, Result, Tensor, for_float};

/// Mean (zero if the rows are not centred) and reciprocal deviation.
#[inline(always)]
fn statistics(row: &[f32], op: &RowNorm) -> [f32; 2] {
    let count = row.len() as f32;
    let mean = if op.centered { lanes::sum(row) / count } else { 0.0 };
    let square = |sum: f32, value: f32| sum + (value - mean) * (value - mean);
    let variance = lanes::fold(row, 0.0, square, |a, b| a + b) / count;
    [mean, 1.0 / (variance + op.eps).sqrt()]
}

/// The multiplier of a group's rows.
fn load_multiplier(vectors: &Vectors, group: usize, into: &mut [f32]) {
    load(vectors.scale.as_ref(), group, into);
    if vectors.base != 0.0 {
        into.iter_mut().for_each(|value| *value += vectors.base);
    }
}

pub(super) fn forward(pool: &ThreadPool, op: &RowNorm, job: &Forward) -> Result<()> {
    for_float!(op.name, job.x.dtype(), T => {
        let (x, width) = (job.x.data::<T>(), job.blocks.width);
        let gated = job.gated.map(|(branch, sum)| (branch.data::<T>(), Shared::new(sum.pointer::<T>())));
        let output = Shared::new(job.output.pointer::<T>());
        let stored = job.statistics.map(|statistics| Shared::new(statistics.pointer::<f32>()));
        job.blocks.run(pool, |block| scratch::rows(width, |[multiplier, shift, gate, bias, wide]| {
            load_multiplier(job.vectors, block.group, multiplier);
            load(job.vectors.shift.as_ref(), block.group, shift);
            load(job.vectors.gate.as_ref(), block.group, gate);
            load(job.vectors.branch_bias.as_ref(), block.group, bias);
            vectorize(#[inline(always)] || {
                for row in block.first..block.first + block.rows {
                    let range = row * width..(row + 1) * width;
                    let mut z = &x[range.clone()];
                    if let Some((branch, sum)) = &gated {
                        // SAFETY: here and below: each row is in one block.
                        let sum = unsafe { sum.slice(range.start, width) };
                        add_gated(z, &branch[range.clone()], bias, gate, sum);
                        z = sum;
                    }
                    let z = lanes::in_f32(z, wide);
                    let [mean, rstd] = statistics(z, op);
                    let out = unsafe { output.slice(range.start, width) };
                    normalize([mean, rstd], z, multiplier, shift, out);
                    if let Some(stored) = stored {
                        unsafe { stored.slice(2 * row, 2) }.copy_from_slice(&[mean, rstd]);
                    }
                }
            });
        }));
        Ok(())
    })
}

/// `y` of a row.
#[inline(always)]
fn normalize<T: Float>([mean, rstd]: [f32; 2], z: &[f32], multiplier: &[f32], shift: &[f32], out: &mut [T]) {
    let terms = z.iter().zip(multiplier).zip(shift);
    for (out, ((z, multiplier), shift)) in out.iter_mut().zip(terms) {
        *out = T::from_f32((z - mean) * rstd * multiplier + shift);
    }
}

/// The `y` that [`forward`] computed, bit for bit.
pub(super) fn again(pool: &ThreadPool, name: &'static str, job: &Again) -> Result<()> {
    for_float!(name, job.z.dtype(), T => {
        let (z, width) = (job.z.data::<T>(), job.blocks.width);
        let statistics = job.statistics.data::<f32>();
        let output = Shared::new(job.output.pointer::<T>());
        job.blocks.run(pool, |block| scratch::rows(width, |[multiplier, shift, wide]| {
            load_multiplier(job.vectors, block.group, multiplier);
            load(job.vectors.shift.as_ref(), block.group, shift);
            vectorize(#[inline(always)] || {
                for row in block.first..block.first + block.rows {
                    let z = lanes::in_f32(&z[row * width..(row + 1) * width], wide);
                    // SAFETY: each row is in one block.
                    let out = unsafe { output.slice(row * width, width) };
                    normalize([statistics[2 * row], statistics[2 * row + 1]], z, multiplier, shift, out);
                }
            });
        }));
        Ok(())
    })
}

/// Writes the gradients of z and the branch, and those of the vectors into `targets`.
pub(super) fn backward(pool: &ThreadPool, op: &RowNorm, job: &Backward, targets: &mut Targets) -> Result<()> {
    let sums = ColumnSums::new(job.z.device(), job.blocks, 4)?;
    let ran: Result<()> = for_float!(op.name, job.z.dtype(), T => {
        job.blocks.run(pool, |block| backward_block::<T>(op, job, &sums, block));
        Ok(())
    });
    ran?;
    for (which, target) in targets.of_groups.iter_mut().enumerate() {
        if let Some(target) = target {
            sums.write(pool, job.blocks.per_group(), which, target);
        }
    }
    if let Some(target) = &mut targets.branch_bias {
        sums.write(pool, job.blocks.count(), 3, target);
    }
    Ok(())
}

/// Each row is read whole into f32 rows before anything is written, so that the results may
/// take the memory of the gradients.
fn backward_block<T: Float>(op: &RowNorm, job: &Backward, sums: &ColumnSums, block: Block) {
    let width = job.blocks.width;
    let z = job.z.data::<T>();
    let statistics = job.statistics.data::<f32>();
    let shared = |tensor: &Tensor| Shared::new(tensor.pointer::<T>());
    let (gradient, z_gradient) = (shared(job.gradient), shared(job.z_gradient));
    let sum_gradient = job.sum_gradient.map(shared);
    let branch = job.branch.map(|(branch, gradient)| (branch.data::<T>(), shared(gradient)));
    // SAFETY: each block is worked on once.
    let [scale_sum, shift_sum, gate_sum, z_sum] = unsafe { sums.zeroed(block) };
    scratch::rows(width, |[multiplier, gate, wide, p]| {
        load_multiplier(job.vectors, block.group, multiplier);
        load(job.vectors.gate.as_ref(), block.group, gate);
        vectorize(
            #[inline(always)]
            || {
                for row in block.first..block.first + block.rows {
                    let start = row * width;
                    let [mean, rstd] = [statistics[2 * row], statistics[2 * row + 1]];
                    // SAFETY: here and below: each row is in one block, and a slice of memory that
                    // two tensors may share is gone before the other's is made.
                    let incoming = unsafe { &*gradient.slice(start, width) };
                    let z = lanes::in_f32(&z[start..start + width], wide);
                    let inputs = Inputs { z, gradient: incoming, multiplier };
                    project(&inputs, mean, rstd, [scale_sum, shift_sum], p);
                    let mean_p = if op.centered { lanes::sum(p) / width as f32 } else { 0.0 };
                    let product = lanes::sum_pairs(p, z, |p, z| p * (z - mean)) / width as f32;
                    // n * mean(p * n) is (z - mean) times this.
                    let slope = rstd * rstd * product;
                    match sum_gradient {
                        Some(direct) => {
                            let direct = unsafe { &*direct.slice(start, width) };
                            for ((p, z), direct) in p.iter_mut().zip(z).zip(direct) {
                                *p = rstd * (*p - mean_p - (z - mean) * slope) + direct.to_f32();
                            }
                        }
                        None => {
                            for (p, z) in p.iter_mut().zip(z) {
                                *p = rstd * (*p - mean_p - (z - mean) * slope);
                            }
                        }
                    }
                    if let Some((branch, branch_gradient)) = branch {
                        let values = branch[start..start + width].iter().zip(&*p);
                        for (sum, (branch, dz)) in gate_sum.iter_mut().zip(values) {
                            *sum += branch.to_f32() * dz;
                        }
                        if job.vectors.branch_bias.is_some() {
                            z_sum.iter_mut().zip(&*p).for_each(|(sum, dz)| *sum += dz);
                        }
                        let out = unsafe { branch_gradient.slice(start, width) };
                        for (out, (gate, dz)) in out.iter_mut().zip(gate.iter().zip(&*p)) {
                            *out = T::from_f32(gate * dz);
                        }
                    }
                    let out = unsafe { z_gradient.slice(start, width) };
                    out.iter_mut().zip(&*p).for_each(|(out, dz)| *out = T::from_f32(*dz));
                }
            },
        );
        if let Some(bias) = &job.vectors.branch_bias {
            load(Some(bias), block.group, wide);
            apply_bias(wide, gate, gate_sum, z_sum);
        }
    });
}

/// Adds the bias' part to the sum for the gate, and turns the sum of z's gradient into that of the bias'.
fn apply_bias(bias: &[f32], gate: &[f32], gate_sum: &mut [f32], z_sum: &mut [f32]) {
    let sums = gate_sum.iter_mut().zip(z_sum);
    for ((gate_sum, z_sum), (bias, gate)) in sums.zip(bias.iter().zip(gate)) {
        *gate_sum += bias * *z_sum;
        *z_sum *= gate;
    }
}

/// One row of what backward reads.
struct Inputs<'a, T> {
    z: &'a [f32],
    gradient: &'a [T],
    multiplier: &'a [f32],
}

/// `p = g * multiplier` of a row, and its terms in the sums of scale and shift.
#[inline(always)]
fn project<T: Float>(
    inputs: &Inputs<T>,
    mean: f32,
    rstd: f32,
    [scale_sum, shift_sum]: [&mut [f32]; 2],
    p: &mut [f32],
) {
    let width = p.len();
    let (z, gradient, multiplier) =
        (&inputs.z[..width], &inputs.gradient[..width], &inputs.multiplier[..width]);
    let (scale_sum, shift_sum) = (&mut scale_sum[..width], &mut shift_sum[..width]);
    for column in 0..width {
        let g = gradient[column].to_f32();
        p[column] = g * multiplier[column];
        scale_sum[column] += g * ((z[column] - mean) * rstd);
        shift_sum[column] += g;
    }
}
