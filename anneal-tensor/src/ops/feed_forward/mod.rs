//! Two linear layers with an activation between: `y = act(x W1^T + b1) W2^T + b2`.
//!
//! One op, because the gradient of the first layer's output, `(dy W2) * act'(x W1^T + b1)`, then
//! comes out of a single matrix product whose epilogue applies the derivative.

use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};
use anneal_device::Device;

use super::linear::{Activation, Places, check, cpu, output_sizes, parameter_gradients};
use super::{only, single};

/// `[.., d]` to `[.., o]` with W1 `[f, d]`, b1 `[f]`, W2 `[o, f]`, b2 `[o]`.
///
/// # Errors
/// If sizes or dtypes do not fit.
pub fn feed_forward(
    x: &Tensor,
    weight1: &Tensor,
    bias1: &Tensor,
    weight2: &Tensor,
    bias2: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    check("feed_forward", x, weight1, Some(bias1))?;
    check("feed_forward", bias1, weight2, Some(bias2))?;
    Ok(only(apply(FeedForward { activation }, &[x, weight1, bias1, weight2, bias2])?))
}

struct FeedForward {
    activation: Activation,
}

impl Op for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let [x, weight1, bias1, weight2, bias2] = inputs.try_into().expect("five inputs");
        let hidden_sizes = output_sizes(x, weight1);
        let hidden = Tensor::empty(x.device(), &hidden_sizes, x.dtype())?;
        let preactivation =
            saver.recording().then(|| Tensor::empty(x.device(), &hidden_sizes, x.dtype())).transpose()?;
        let y = Tensor::empty(x.device(), &output_sizes(&hidden, weight2), x.dtype())?;
        match x.device() {
            Device::Cpu(device) => {
                let kept = preactivation.as_ref();
                cpu::affine(&device.pool, x, weight1, Some(bias1), self.activation, kept, &hidden)?;
                cpu::affine(&device.pool, &hidden, weight2, Some(bias2), Activation::None, None, &y)?;
            }
            Device::Cuda(_) => return Err(TensorError::unsupported_device("feed_forward")),
        }
        saver.input(0, x);
        saver.input(1, weight1);
        saver.input(3, weight2);
        if let Some(preactivation) = &preactivation {
            saver.tensor(preactivation);
            saver.tensor(&hidden);
        }
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let second = Places { saved_x: 4, saved_weight: 2, weight: 3, bias: Some(4) };
        parameter_gradients(pass, &gradient, second)?;
        let preactivation = pass.take_saved(3)?;
        // The activation's value is not needed any more: its memory takes the gradient.
        let hidden = pass.take_saved(4)?;
        let inner = match hidden.is_unique() {
            true => hidden,
            false => Tensor::empty(hidden.device(), hidden.dims(), hidden.dtype())?,
        };
        let weight2 = pass.saved(2)?;
        match gradient.device() {
            Device::Cpu(device) => {
                let through = Some((self.activation, &preactivation));
                cpu::input_gradient(&device.pool, &gradient, &weight2, through, &inner)?;
            }
            Device::Cuda(_) => return Err(TensorError::unsupported_device("feed_forward")),
        }
        drop((gradient, preactivation));
        let first = Places { saved_x: 0, saved_weight: 1, weight: 1, bias: Some(2) };
        parameter_gradients(pass, &inner, first)?;
        if pass.needs(0) {
            let dx = Tensor::empty(inner.device(), pass.saved(0)?.dims(), inner.dtype())?;
            match inner.device() {
                Device::Cpu(device) => {
                    cpu::input_gradient(&device.pool, &inner, &pass.saved(1)?, None, &dx)?;
                }
                Device::Cuda(_) => return Err(TensorError::unsupported_device("feed_forward")),
            }
            pass.give(0, dx)?;
        }
        Ok(())
    }
}
