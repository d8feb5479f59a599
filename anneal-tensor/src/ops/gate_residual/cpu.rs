use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::ops::row_blocks::{ColumnSums, RowBlocks};
use crate::ops::scratch;
use crate::parallel::Shared;
use crate::{Float, Result, Tensor, for_float};

/// Row `group` of a vector per group, or the one row of `[d]`, in f32; `None` is all zeros.
pub(in crate::ops) fn load(vector: Option<&Tensor>, group: usize, into: &mut [f32]) {
    let Some(vector) = vector else { return into.fill(0.0) };
    let start = if vector.rank() == 1 { 0 } else { group * vector.strides()[0] };
    let loaded: Result<()> = for_float!("row vector", vector.dtype(), T => {
        // SAFETY: row `group` of the view starts there and its elements are neighbours.
        let row = unsafe { std::slice::from_raw_parts(vector.pointer::<T>().add(start), into.len()) };
        vectorize(#[inline(always)] || {
            into.iter_mut().zip(row).for_each(|(to, from)| *to = from.to_f32());
        });
        Ok(())
    });
    loaded.expect("the dtype was checked with the shape");
}

/// `out = x + gate * (branch + bias)` of one row.
#[inline(always)]
pub(in crate::ops) fn add_gated<T: Float>(x: &[T], branch: &[T], bias: &[f32], gate: &[f32], out: &mut [T]) {
    let terms = x.iter().zip(branch).zip(bias.iter().zip(gate));
    for (out, ((x, branch), (bias, gate))) in out.iter_mut().zip(terms) {
        *out = T::from_f32(x.to_f32() + gate * (branch.to_f32() + bias));
    }
}

pub(super) fn forward(
    pool: &ThreadPool,
    blocks: &RowBlocks,
    x: &Tensor,
    branch: &Tensor,
    gate: &Tensor,
    output: &mut Tensor,
) -> Result<()> {
    for_float!("gate_residual", x.dtype(), T => {
        let (x, branch, width) = (x.data::<T>(), branch.data::<T>(), blocks.width);
        let output = Shared::new(output.data_mut::<T>().as_mut_ptr());
        blocks.run(pool, |block| scratch::rows(width, |[gate_row, no_bias]| {
            load(Some(gate), block.group, gate_row);
            load(None, block.group, no_bias);
            vectorize(#[inline(always)] || {
                for row in block.first..block.first + block.rows {
                    let range = row * width..(row + 1) * width;
                    // SAFETY: each row is in one block.
                    let out = unsafe { output.slice(range.start, width) };
                    add_gated(&x[range.clone()], &branch[range], no_bias, gate_row, out);
                }
            });
        }));
        Ok(())
    })
}

/// Writes the gradient of `branch`, which may lie in the memory of `branch` itself, and the
/// blocks' sums for that of `gate`.
pub(super) fn backward(
    pool: &ThreadPool,
    blocks: &RowBlocks,
    gradient: &Tensor,
    branch: &Tensor,
    gate: &Tensor,
    branch_gradient: &Tensor,
    sums: &ColumnSums,
) -> Result<()> {
    for_float!("gate_residual", gradient.dtype(), T => {
        let (gradient, width) = (gradient.data::<T>(), blocks.width);
        let branch = Shared::new(branch.pointer::<T>());
        let branch_gradient = Shared::new(branch_gradient.pointer::<T>());
        blocks.run(pool, |block| scratch::rows(width, |[gate_row]| {
            load(Some(gate), block.group, gate_row);
            // SAFETY: each block is worked on once.
            let [gate_sum] = unsafe { sums.zeroed(block) };
            vectorize(#[inline(always)] || {
                for row in block.first..block.first + block.rows {
                    let gradient = &gradient[row * width..(row + 1) * width];
                    // SAFETY: each row is in one block, and the branch's is read before its
                    // memory may be written.
                    let values = unsafe { &*branch.slice(row * width, width) };
                    for ((sum, gradient), value) in gate_sum.iter_mut().zip(gradient).zip(values) {
                        *sum += gradient.to_f32() * value.to_f32();
                    }
                    let out = unsafe { branch_gradient.slice(row * width, width) };
                    for ((out, gradient), gate) in out.iter_mut().zip(gradient).zip(&*gate_row) {
                        *out = T::from_f32(gradient.to_f32() * gate);
                    }
                }
            });
        }));
        Ok(())
    })
}
