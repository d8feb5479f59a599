use anneal_device::ThreadPool;
use anneal_device::cpu::{math, vectorize};

use crate::ops::row_blocks::RowBlocks;
use crate::ops::{lanes, scratch};
use crate::parallel::Shared;
use crate::{Float, Result, Tensor, for_float};

/// Passes over NaN, which appears again in the exponentials.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

pub(super) fn forward(pool: &ThreadPool, blocks: &RowBlocks, x: &Tensor, y: &mut Tensor) -> Result<()> {
    for_float!("softmax", x.dtype(), T => {
        let (x, width) = (x.data::<T>(), blocks.width);
        let output = Shared::new(y.data_mut::<T>().as_mut_ptr());
        blocks.run(pool, |block| scratch::rows(width, |[values]| vectorize(#[inline(always)] || {
            for row in block.first..block.first + block.rows {
                let input = &x[row * width..(row + 1) * width];
                values.iter_mut().zip(input).for_each(|(to, from)| *to = from.to_f32());
                let largest = lanes::fold(values, f32::NEG_INFINITY, larger, larger);
                values.iter_mut().for_each(|value| *value = math::exp(*value - largest));
                let factor = 1.0 / lanes::sum(values);
                // SAFETY: each row is in one block.
                let out = unsafe { output.slice(row * width, width) };
                out.iter_mut().zip(&*values).for_each(|(to, from)| *to = T::from_f32(from * factor));
            }
        })));
        Ok(())
    })
}

/// `dx` may be the memory of the gradient.
pub(super) fn backward(
    pool: &ThreadPool,
    blocks: &RowBlocks,
    gradient: &Tensor,
    y: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    for_float!("softmax", y.dtype(), T => {
        let (y, width) = (y.data::<T>(), blocks.width);
        let gradient = Shared::new(gradient.pointer::<T>());
        let dx = Shared::new(dx.pointer::<T>());
        blocks.run(pool, |block| scratch::rows(width, |[products]| vectorize(#[inline(always)] || {
            for row in block.first..block.first + block.rows {
                let y = &y[row * width..(row + 1) * width];
                // SAFETY: each row is in one block, and the gradient's is read before its
                // memory may be written.
                let incoming = unsafe { &*gradient.slice(row * width, width) };
                for (product, (g, y)) in products.iter_mut().zip(incoming.iter().zip(y)) {
                    *product = g.to_f32() * y.to_f32();
                }
                let total = lanes::sum(products);
                let out = unsafe { dx.slice(row * width, width) };
                for (out, (product, y)) in out.iter_mut().zip(products.iter().zip(y)) {
                    *out = T::from_f32(product - total * y.to_f32());
                }
            }
        })));
        Ok(())
    })
}
