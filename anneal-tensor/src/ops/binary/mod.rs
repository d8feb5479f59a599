//! Element-wise functions of two tensors, with broadcasting. The formulas and their derivatives
//! are in `table.rs`.
//!
//! Trailing dimensions are aligned; a dimension that is missing or one is repeated. The gradient of
//! a repeated operand is summed over the repetitions, in f32 and in a fixed order.

mod cpu;
pub(super) mod cuda;
mod table;

use anneal_device::{Device, Purpose};

use self::table::Function;
use super::elementwise::check_float;
use super::gradient_target::GradientTarget;
use super::reduce::{self, Flags};
use super::{only, single};
use crate::shape::broadcast;
use crate::{BackwardPass, DType, Dims, Op, Outputs, Result, Saver, Tensor, TensorError, apply, dims};

/// `a + b`. As all functions here: of one float dtype, which the result keeps; an error that names the
/// shapes if they do not broadcast, or the dtypes if they differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    run(Function::Add, a, b)
}

/// `a - b`
pub fn sub(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    run(Function::Sub, a, b)
}

/// `a * b`
pub fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    run(Function::Mul, a, b)
}

/// `a / b`
pub fn div(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    run(Function::Div, a, b)
}

fn run(function: Function, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let name = function.name();
    check_float(name, a.dtype())?;
    if a.dtype() != b.dtype() {
        let message = format!("operands are {} and {}: cast one of them", a.dtype(), b.dtype());
        return Err(TensorError::DType { op: name, message });
    }
    let Some(sizes) = broadcast(a.dims(), b.dims()) else {
        let message = format!("shapes {:?} and {:?} do not broadcast", a.dims(), b.dims());
        return Err(TensorError::shape(name, message));
    };
    let op = Binary { function, operands: [dims(a.dims()), dims(b.dims())], sizes };
    Ok(only(apply(op, &[a, b])?))
}

struct Binary {
    function: Function,
    operands: [Dims; 2],
    sizes: Dims,
}

impl Binary {
    /// The dimensions of the result along which an operand was repeated; `None` if there are none.
    fn repeated(&self, operand: usize) -> Option<Flags> {
        let own = &self.operands[operand];
        let missing = self.sizes.len() - own.len();
        let flags: Flags = (0..self.sizes.len())
            .map(|axis| axis < missing || own[axis - missing] != self.sizes[axis])
            .collect();
        flags.contains(&true).then_some(flags)
    }

    /// `g * derivative` in the sizes of the result.
    fn local(
        &self,
        operand: usize,
        gradient: &Tensor,
        saved: Option<[&Tensor; 2]>,
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Tensor> {
        if self.function.passes_through(operand) {
            return Ok(gradient.clone());
        }
        let out = Tensor::empty_for(gradient.device(), &self.sizes, dtype, purpose)?;
        match gradient.device() {
            Device::Cpu(cpu) => cpu::backward(&cpu.pool, self.function, operand, gradient, saved, &out),
            Device::Cuda(cuda) => cuda::backward(cuda, self.function, operand, gradient, saved, &out)?,
        }
        Ok(out)
    }
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let y = Tensor::empty(inputs[0].device(), &self.sizes, inputs[0].dtype())?;
        match y.device() {
            Device::Cpu(cpu) => cpu::forward(&cpu.pool, self.function, [inputs[0], inputs[1]], &y),
            Device::Cuda(cuda) => cuda::forward(cuda, self.function, [inputs[0], inputs[1]], &y)?,
        }
        if self.function.saves() {
            saver.input(0, inputs[0]);
            saver.input(1, inputs[1]);
        }
        Ok(single(y))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let dtype = gradient.dtype();
        let operands =
            if self.function.saves() { Some([pass.take_saved(0)?, pass.take_saved(1)?]) } else { None };
        let saved = operands.as_ref().map(|[a, b]| [a, b]);
        for operand in (0..2).filter(|operand| pass.needs(*operand)).collect::<Vec<usize>>() {
            let Some(flags) = self.repeated(operand) else {
                let local = self.local(operand, &gradient, saved, dtype, Purpose::Activations)?;
                pass.give(operand, local)?;
                continue;
            };
            let local = self.local(operand, &gradient, saved, DType::F32, Purpose::Workspace)?;
            let sizes = &self.operands[operand];
            if let Some(mut target) = GradientTarget::new(pass, operand, gradient.device(), sizes)? {
                let accumulate = target.accumulate;
                match gradient.device() {
                    Device::Cpu(cpu) => {
                        reduce::cpu::sum(&cpu.pool, &local, &flags, 1.0, &mut target.gradient, accumulate)?
                    }
                    Device::Cuda(cuda) => {
                        reduce::cuda::sum(cuda, &local, &flags, 1.0, &target.gradient, accumulate)?
                    }
                }
                target.give(pass, dtype)?;
            }
        }
        Ok(())
    }
}
