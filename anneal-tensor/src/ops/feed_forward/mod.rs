//! Two linear layers with an activation between: `y = act(x W1^T + b1) W2^T`. The second bias is left to what comes after,
//! which passes over `y` anyway.
//!
//! One op, because the gradient of the first layer's output, `(dy W2) * act'(x W1^T + b1)`, then
//! comes out of a single matrix product whose epilogue applies the derivative. On a GPU the activation's
//! value, the widest tensor of a block, is not kept for backward: the pass that applies the derivative reads its
//! argument anyway, and makes the value again.

use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, apply};
use anneal_device::{CpuDevice, CudaDevice, Device};

use super::gate_residual::reuse;
use super::gradient_target::GradientTarget;
use super::linear::{
    Activation, Places, check, cpu, cuda, input_gradient, output_sizes, parameter_gradients,
};
use super::{only, single};

/// `[.., d]` to `[.., o]` with W1 `[f, d]`, b1 `[f]`, W2 `[o, f]`.
///
/// # Errors
/// If sizes or dtypes do not fit.
pub fn feed_forward(
    x: &Tensor,
    weight1: &Tensor,
    bias1: &Tensor,
    weight2: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    check("feed_forward", x, weight1, Some(bias1))?;
    check("feed_forward", bias1, weight2, None)?;
    Ok(only(apply(FeedForward { activation }, &[x, weight1, bias1, weight2])?))
}

struct FeedForward {
    activation: Activation,
}

impl Op for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let [x, weight1, bias1, weight2] = inputs.try_into().expect("four inputs");
        let hidden_sizes = output_sizes(x, weight1);
        let hidden = Tensor::empty(x.device(), &hidden_sizes, x.dtype())?;
        let preactivation = (saver.recording() && self.activation != Activation::None)
            .then(|| Tensor::empty(x.device(), &hidden_sizes, x.dtype()))
            .transpose()?;
        let y = Tensor::empty(x.device(), &output_sizes(&hidden, weight2), x.dtype())?;
        match x.device() {
            Device::Cpu(device) => {
                let kept = preactivation.as_ref();
                cpu::affine(&device.pool, x, weight1, Some(bias1), self.activation, kept, &hidden)?;
                cpu::affine(&device.pool, &hidden, weight2, None, Activation::None, None, &y)?;
            }
            Device::Cuda(device) => {
                let kept = preactivation.as_ref();
                cuda::affine(device, x, weight1, Some(bias1), self.activation, kept, &hidden)?;
                cuda::affine(device, &hidden, weight2, None, Activation::None, None, &y)?;
            }
        }
        saver.input(0, x);
        saver.input(1, weight1);
        saver.input(3, weight2);
        saver.tensor(preactivation.as_ref().unwrap_or(&hidden));
        if let Device::Cpu(_) = x.device() {
            saver.tensor(&hidden);
        }
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let (inner, bias1) = match gradient.device().clone() {
            Device::Cpu(device) => (self.inner_on_cpu(pass, &device, &gradient)?, Some(2)),
            Device::Cuda(device) => self.inner_on_cuda(pass, &device, &gradient)?,
        };
        drop(gradient);
        let x = pass.saved(0)?;
        parameter_gradients(pass, &inner, &x, Places { saved_weight: 1, weight: 1, bias: bias1 })?;
        if pass.needs(0) {
            pass.give(0, input_gradient(&inner, &pass.saved(1)?, x.dims())?)?;
        }
        Ok(())
    }
}

/// The second layer's places.
const SECOND: Places = Places { saved_weight: 2, weight: 3, bias: None };

/// The second layer's backward, and the gradient of the first layer's output before the activation.
impl FeedForward {
    fn inner_on_cpu(&self, pass: &mut BackwardPass, device: &CpuDevice, gradient: &Tensor) -> Result<Tensor> {
        let hidden = pass.take_saved(4)?;
        parameter_gradients(pass, gradient, &hidden, SECOND)?;
        let preactivation = pass.take_saved(3)?;
        // The activation's value is not needed any more: its memory takes the gradient.
        let inner = reuse(&hidden)?;
        let through = Some((self.activation, &preactivation));
        cpu::input_gradient(&device.pool, gradient, &pass.saved(2)?, through, &inner)?;
        Ok(inner)
    }

    /// Also where the first bias still waits for its gradient.
    fn inner_on_cuda(
        &self,
        pass: &mut BackwardPass,
        device: &CudaDevice,
        gradient: &Tensor,
    ) -> Result<(Tensor, Option<usize>)> {
        let preactivation = pass.take_saved(3)?;
        let weight = pass.saved(2)?;
        if self.activation == Activation::None {
            let inner = input_gradient(gradient, &weight, preactivation.dims())?;
            parameter_gradients(pass, gradient, &preactivation, SECOND)?;
            return Ok((inner, Some(2)));
        }
        let outputs = preactivation.size(preactivation.rank() - 1);
        let bias = GradientTarget::new(pass, 2, gradient.device(), &[outputs])?;
        let hidden = reuse(&preactivation)?;
        let inner = cuda::activation_input_gradient(
            device,
            self.activation,
            gradient,
            &weight,
            &preactivation,
            &hidden,
            bias.as_ref(),
        )?;
        drop(preactivation);
        if let Some(bias) = bias {
            bias.give(pass, inner.dtype())?;
        }
        parameter_gradients(pass, gradient, &hidden, SECOND)?;
        Ok((inner, None))
    }
}
