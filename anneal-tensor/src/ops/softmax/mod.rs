//! Softmax over the last dimension: `y = e^(x - max) / sum of e^(x - max)`, in f32 inside.
//!
//! Gradient, with `g` that of `y`: `dx = y * (g - sum of g * y)`. A row that is -infinity throughout is NaN.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::elementwise::check_float;
use super::gate_residual::reuse;
use super::row_blocks::RowBlocks;
use super::{only, single};
use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// The softmax of each row of `x` `[.., d]`, in its shape and dtype.
///
/// # Errors
/// If `x` is a scalar or its dtype is no float.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(only(apply(Softmax, &[x])?))
}

struct Softmax;

fn blocks(x: &Tensor) -> Result<RowBlocks> {
    let Some((width, rows)) = x.dims().split_last() else {
        return Err(TensorError::shape("softmax", "expected x of shape [.., d], found a scalar"));
    };
    Ok(RowBlocks::new(1, rows.iter().product(), *width))
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let x = inputs[0].contiguous()?;
        check_float(self.name(), x.dtype())?;
        let blocks = blocks(&x)?;
        let mut y = Tensor::empty(x.device(), x.dims(), x.dtype())?;
        match x.device() {
            Device::Cpu(cpu) => cpu::forward(&cpu.pool, &blocks, &x, &mut y)?,
            Device::Cuda(cuda) => cuda::forward(cuda, &x, &y)?,
        }
        saver.tensor(&y);
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let y = pass.take_saved(0)?;
        let dx = reuse(&gradient)?;
        match gradient.device() {
            Device::Cpu(cpu) => cpu::backward(&cpu.pool, &blocks(&y)?, &gradient, &y, &dx)?,
            Device::Cuda(cuda) => cuda::backward(cuda, &gradient, &y, &dx)?,
        }
        drop(gradient);
        pass.give(0, dx)
    }
}
