//! Linear layer with a fused activation: `y = act(x W^T + b)`.
//!
//! Gradients: with `g = dy * act'(x W^T + b)`, `dx = g W`, `dW = g^T x`, `db = sum of g over rows`.
//! They are written into a parameter's sink directly; on the CPU the last two come from one matrix product.

pub(super) mod cpu;
pub(super) mod cuda;
mod hopper;
pub(super) mod matrix;

use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};
use anneal_device::Device;

use super::gate_residual::reuse;
use super::gradient_target::GradientTarget;
use super::{only, single};

/// The activation fused into a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    /// GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
    /// `x * sigmoid(x)`.
    Silu,
}

/// `[.., d]` to `[.., o]` with a weight `[o, ..]` whose further dimensions multiply to `d`, and a bias `[o]`.
///
/// # Errors
/// If sizes or dtypes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    check("linear", x, weight, bias)?;
    let op = Linear { activation };
    Ok(only(match bias {
        Some(bias) => apply(op, &[x, weight, bias])?,
        None => apply(op, &[x, weight])?,
    }))
}

/// Whether input, weight and bias fit each other; errors name all shapes.
pub(super) fn check(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let inner = weight.dims().iter().skip(1).product::<usize>();
    let bias_fits = bias.is_none_or(|bias| bias.dims() == &weight.dims()[..1]);
    if x.rank() == 0 || weight.rank() < 2 || x.size(x.rank() - 1) != inner || !bias_fits {
        let bias = bias.map(|bias| format!(" and bias {:?}", bias.dims())).unwrap_or_default();
        let message = format!("input {:?} does not fit weight {:?}{bias}", x.dims(), weight.dims());
        return Err(TensorError::shape(op, message));
    }
    let same = weight.dtype() == x.dtype() && bias.is_none_or(|bias| bias.dtype() == x.dtype());
    if !same || !x.dtype().is_float() {
        let message =
            format!("input is {}, weight {}: both must be of one float dtype", x.dtype(), weight.dtype());
        return Err(TensorError::DType { op, message });
    }
    Ok(())
}

/// The sizes `[.., o]` of the output.
pub(super) fn output_sizes(x: &Tensor, weight: &Tensor) -> crate::Dims {
    let mut sizes = crate::dims(x.dims());
    *sizes.last_mut().expect("checked") = weight.size(0);
    sizes
}

struct Linear {
    activation: Activation,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let (x, weight, bias) = (inputs[0], inputs[1], inputs.get(2).copied());
        let sizes = output_sizes(x, weight);
        let y = Tensor::empty(x.device(), &sizes, x.dtype())?;
        let preactivation = (saver.recording() && self.activation != Activation::None)
            .then(|| Tensor::empty(x.device(), &sizes, x.dtype()))
            .transpose()?;
        match x.device() {
            Device::Cpu(cpu) => {
                cpu::affine(&cpu.pool, x, weight, bias, self.activation, preactivation.as_ref(), &y)?;
            }
            Device::Cuda(cuda) => {
                cuda::affine(cuda, x, weight, bias, self.activation, preactivation.as_ref(), &y)?;
            }
        }
        saver.input(0, x);
        saver.input(1, weight);
        if let Some(preactivation) = &preactivation {
            saver.tensor(preactivation);
        }
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let mut gradient = pass.only_gradient().contiguous()?;
        if self.activation != Activation::None {
            let preactivation = pass.take_saved(2)?;
            gradient = through_activation(self.activation, gradient, &preactivation)?;
        }
        let bias = (pass.inputs() == 3).then_some(2);
        let x = pass.saved(0)?;
        parameter_gradients(pass, &gradient, &x, Places { saved_weight: 1, weight: 1, bias })?;
        if pass.needs(0) {
            let weight = pass.saved(1)?;
            pass.give(0, input_gradient(&gradient, &weight, x.dims())?)?;
        }
        Ok(())
    }
}

/// `dy * act'(preactivation)`, in the gradient's own memory where nobody else holds it.
fn through_activation(activation: Activation, gradient: Tensor, preactivation: &Tensor) -> Result<Tensor> {
    let mut gradient = gradient;
    match gradient.device().clone() {
        Device::Cpu(cpu) => {
            if !gradient.is_unique() {
                let copy = Tensor::empty(gradient.device(), gradient.dims(), gradient.dtype())?;
                super::copy::strided(&gradient, &copy)?;
                gradient = copy;
            }
            cpu::activation_backward(&cpu.pool, activation, &mut gradient, preactivation)?;
            Ok(gradient)
        }
        Device::Cuda(cuda) => {
            let target = reuse(&gradient)?;
            cuda::activation_backward(&cuda, activation, &gradient, preactivation, &target)?;
            Ok(target)
        }
    }
}

/// `dx = g W` of these sizes.
pub(super) fn input_gradient(gradient: &Tensor, weight: &Tensor, sizes: &[usize]) -> Result<Tensor> {
    let dx = Tensor::empty(gradient.device(), sizes, gradient.dtype())?;
    match gradient.device() {
        Device::Cpu(cpu) => cpu::input_gradient(&cpu.pool, gradient, weight, None, &dx)?,
        Device::Cuda(cuda) => cuda::input_gradient(cuda, gradient, weight, &dx)?,
    }
    Ok(dx)
}

/// The places of a linear layer's tensors among what its op saved and got.
pub(super) struct Places {
    pub saved_weight: usize,
    pub weight: usize,
    pub bias: Option<usize>,
}

/// `dW = g^T x` and `db = sum of g`, where they are needed.
pub(super) fn parameter_gradients(
    pass: &mut BackwardPass,
    gradient: &Tensor,
    x: &Tensor,
    places: Places,
) -> Result<()> {
    let dims = pass.saved(places.saved_weight)?.dims().to_vec();
    let device = gradient.device();
    let weight = GradientTarget::new(pass, places.weight, device, &dims)?;
    let bias = match places.bias {
        Some(bias) => GradientTarget::new(pass, bias, device, &dims[..1])?,
        None => None,
    };
    match gradient.device() {
        Device::Cpu(cpu) => cpu::parameter_gradients(&cpu.pool, gradient, x, weight.as_ref(), bias.as_ref())?,
        Device::Cuda(cuda) => cuda::parameter_gradients(cuda, gradient, x, weight.as_ref(), bias.as_ref())?,
    }
    for target in [weight, bias].into_iter().flatten() {
        target.give(pass, gradient.dtype())?;
    }
    Ok(())
}
