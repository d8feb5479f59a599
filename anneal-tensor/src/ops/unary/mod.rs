//! Element-wise functions of one tensor. The formulas and their derivatives are in `table.rs`.

mod cpu;
pub(super) mod cuda;
mod gelu;
mod table;

use anneal_device::Device;

use self::table::{Function, Of};
use super::elementwise::check_float;
use super::gate_residual::reuse;
use super::{only, single};
use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// Which GELU (arXiv 1606.08415).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    Tanh,
    /// `x * Phi(x)`, with the normal distribution's own function
    Exact,
}

fn run(function: Function, x: &Tensor) -> Result<Tensor> {
    Ok(only(apply(Unary { function }, &[x])?))
}

/// `x + number`. As all functions here: any shape, any float dtype, which the result keeps; an error
/// if the dtype is no float.
pub fn add_scalar(x: &Tensor, number: f32) -> Result<Tensor> {
    run(Function::Affine { factor: 1.0, offset: number }, x)
}

/// `factor * x`
pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    run(Function::Affine { factor, offset: 0.0 }, x)
}

/// `-x`
pub fn neg(x: &Tensor) -> Result<Tensor> {
    scale(x, -1.0)
}

/// `x` limited to `low..=high`; no gradient flows where the limit holds. A NaN stays a NaN.
///
/// # Errors
/// If `low` is not at most `high`, or the dtype is no float.
pub fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    if low.is_nan() || high.is_nan() || low > high {
        return Err(TensorError::shape("clamp", format!("the limits {low} and {high} are no range")));
    }
    run(Function::Clamp { low, high }, x)
}

/// `e^x`
pub fn exp(x: &Tensor) -> Result<Tensor> {
    run(Function::Exp, x)
}

/// The GELU activation.
pub fn gelu(x: &Tensor, form: Gelu) -> Result<Tensor> {
    let function = match form {
        Gelu::Tanh => Function::GeluTanh,
        Gelu::Exact => Function::GeluExact,
    };
    run(function, x)
}

/// Natural logarithm.
pub fn log(x: &Tensor) -> Result<Tensor> {
    run(Function::Log, x)
}

/// `1 / (1 + e^-x)`
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    run(Function::Sigmoid, x)
}

/// `x * sigmoid(x)`
pub fn silu(x: &Tensor) -> Result<Tensor> {
    run(Function::Silu, x)
}

/// Square root.
pub fn sqrt(x: &Tensor) -> Result<Tensor> {
    run(Function::Sqrt, x)
}

/// `x * x`
pub fn square(x: &Tensor) -> Result<Tensor> {
    run(Function::Square, x)
}

/// Hyperbolic tangent.
pub fn tanh(x: &Tensor) -> Result<Tensor> {
    run(Function::Tanh, x)
}

struct Unary {
    function: Function,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let x = inputs[0];
        check_float(self.name(), x.dtype())?;
        let y = Tensor::empty(x.device(), x.dims(), x.dtype())?;
        match x.device() {
            Device::Cpu(cpu) => cpu::forward(&cpu.pool, self.function, x, &y),
            Device::Cuda(cuda) => cuda::forward(cuda, self.function, x, &y)?,
        }
        match self.function.saves() {
            Of::Nothing => {}
            Of::Input => saver.input(0, x),
            Of::Output => saver.tensor(&y),
        }
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let saved = match self.function.saves() {
            Of::Nothing => None,
            Of::Input | Of::Output => Some(pass.take_saved(0)?),
        };
        let dx = reuse(&gradient)?;
        match gradient.device() {
            Device::Cpu(cpu) => cpu::backward(&cpu.pool, self.function, saved.as_ref(), &gradient, &dx),
            Device::Cuda(cuda) => cuda::backward(cuda, self.function, saved.as_ref(), &gradient, &dx)?,
        }
        drop(gradient);
        pass.give(0, dx)
    }
}
