//! Mean squared error of each sample: `y[b] = 1/n sum (prediction - target)^2` over its n elements.
//!
//! Gradients, with `g` that of `y`: `dprediction = 2/n g[b] (prediction - target)`, `dtarget` its negative.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::elementwise::check_float;
use super::{only, single};
use crate::{BackwardPass, DType, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// The error of each sample, f32 `[b]`, for `prediction` and `target` `[b, ..]` of any float dtypes.
///
/// # Errors
/// If the shapes differ or have no elements, or a dtype is no float.
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    let op = MeanSquaredError { dtypes: [prediction.dtype(), target.dtype()] };
    Ok(only(apply(op, &[prediction, target])?))
}

struct MeanSquaredError {
    dtypes: [DType; 2],
}

impl Op for MeanSquaredError {
    fn name(&self) -> &'static str {
        "mse"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let (prediction, target) = (inputs[0], inputs[1]);
        if prediction.dims() != target.dims() || prediction.rank() == 0 || prediction.elements() == 0 {
            let message = format!("prediction {:?} and target {:?}", prediction.dims(), target.dims());
            return Err(TensorError::shape(self.name(), format!("{message} must have one shape [b, ..]")));
        }
        check_float(self.name(), prediction.dtype())?;
        check_float(self.name(), target.dtype())?;
        let mut output = Tensor::empty(prediction.device(), &prediction.dims()[..1], DType::F32)?;
        match prediction.device() {
            Device::Cpu(cpu) => {
                cpu::forward(&cpu.pool, &prediction.contiguous()?, &target.contiguous()?, &mut output)?
            }
            Device::Cuda(cuda) => {
                cuda::forward(cuda, &prediction.contiguous()?, &target.contiguous()?, &output)?
            }
        }
        saver.input(0, prediction);
        saver.input(1, target);
        Ok(single(output))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        let (prediction, target) = (pass.take_saved(0)?, pass.take_saved(1)?);
        let samples = prediction.size(0);
        let mut sizes = vec![1; prediction.rank()];
        let mut strides = sizes.clone();
        (sizes[0], strides[0]) = (samples, gradient.strides()[0]);
        let gradient = gradient.view(0, &sizes, &strides);
        for (input, sign) in [(0, 1.0), (1, -1.0)] {
            if !pass.needs(input) {
                continue;
            }
            let dx = Tensor::empty(prediction.device(), prediction.dims(), self.dtypes[input])?;
            let factor = sign * 2.0 * samples as f32 / prediction.elements() as f32;
            match gradient.device() {
                Device::Cpu(cpu) => cpu::backward(&cpu.pool, &gradient, &prediction, &target, factor, &dx),
                Device::Cuda(cuda) => cuda::backward(cuda, &gradient, &prediction, &target, factor, &dx)?,
            }
            pass.give(input, dx)?;
        }
        Ok(())
    }
}
