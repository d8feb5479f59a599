//! The gated residual of an adaptive transformer block (DiT, arXiv 2212.09748, section 3.2,
//! adaLN-Zero): `y = x + gate * branch`, with one gate row per sample.
//!
//! Gradients, with `g` that of `y`: `dx = g`, `dbranch = gate * g`, `dgate = sum over rows of branch * g`.

pub(super) mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::gradient_target::GradientTarget;
use super::row_blocks::{ColumnSums, RowBlocks};
use super::{only, single};
use crate::{BackwardPass, DType, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// `x + gate * branch` for `x`, `branch` `[b, .., d]` and `gate` `[b, d]` (rows of any stride).
///
/// # Errors
/// If the shapes do not fit, or `x` and `branch` differ in dtype.
pub fn gate_residual(x: &Tensor, branch: &Tensor, gate: &Tensor) -> Result<Tensor> {
    Ok(only(apply(GateResidual { gate_dtype: gate.dtype() }, &[x, branch, gate])?))
}

struct GateResidual {
    gate_dtype: DType,
}

/// The blocks of rows that share a vector per sample.
pub(super) fn blocks_per_sample(op: &'static str, x: &Tensor) -> Result<RowBlocks> {
    let [samples, rows @ .., width] = x.dims() else {
        let message = format!("expected x of shape [b, .., d], found {:?}", x.dims());
        return Err(TensorError::shape(op, message));
    };
    Ok(RowBlocks::new(*samples, rows.iter().product(), *width))
}

/// Checks a row per group, and makes its elements neighbours; the stride of rows may be any.
pub(super) fn vector(
    op: &'static str,
    name: &str,
    vector: &Tensor,
    expected: &[usize],
    x: &Tensor,
) -> Result<Tensor> {
    if vector.dims() != expected {
        let message = format!(
            "{name} has shape {:?}; for x of shape {:?} it must be {expected:?}",
            vector.dims(),
            x.dims()
        );
        return Err(TensorError::shape(op, message));
    }
    if !vector.dtype().is_float() {
        return Err(TensorError::unsupported_dtype(op, vector.dtype()));
    }
    let neighbours = vector.strides().last() == Some(&1) || vector.dims().last() == Some(&1);
    if neighbours { Ok(vector.detach()) } else { vector.contiguous() }
}

/// Checks that `branch` has the shape and dtype of `x`.
pub(super) fn check_branch(op: &'static str, x: &Tensor, branch: &Tensor) -> Result<()> {
    if x.dims() != branch.dims() || x.dtype() != branch.dtype() {
        let message = format!(
            "branch is {} {:?}, but x is {} {:?}: shape and dtype must agree",
            branch.dtype(),
            branch.dims(),
            x.dtype(),
            x.dims()
        );
        return Err(TensorError::shape(op, message));
    }
    Ok(())
}

/// The tensor itself, to be overwritten, if nobody else holds its memory; else a new one like it.
pub(super) fn reuse(tensor: &Tensor) -> Result<Tensor> {
    if tensor.is_unique() {
        return Ok(tensor.clone());
    }
    Tensor::empty(tensor.device(), tensor.dims(), tensor.dtype())
}

/// The dtype in which sums over rows are written: a GPU's kernels round them as they do.
pub(super) fn sum_dtype(device: &Device, vector: DType) -> DType {
    match device {
        Device::Cpu(_) => DType::F32,
        Device::Cuda(_) => vector,
    }
}

impl Op for GateResidual {
    fn name(&self) -> &'static str {
        "gate_residual"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let [x, branch, gate] = inputs else { unreachable!("three inputs") };
        let blocks = blocks_per_sample(self.name(), x)?;
        check_branch(self.name(), x, branch)?;
        let rows = vector(self.name(), "gate", gate, &[blocks.groups, blocks.width], x)?;
        let mut output = Tensor::empty(x.device(), x.dims(), x.dtype())?;
        let (dense_x, dense_branch) = (x.contiguous()?, branch.contiguous()?);
        match x.device() {
            Device::Cpu(cpu) => {
                cpu::forward(&cpu.pool, &blocks, &dense_x, &dense_branch, &rows, &mut output)?
            }
            Device::Cuda(cuda) => cuda::forward(cuda, &blocks, [&dense_x, &dense_branch, &output], &rows)?,
        }
        saver.input(1, branch);
        saver.input(2, gate);
        Ok(single(output))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        let branch = pass.take_saved(0)?.contiguous()?;
        let gate = pass.saved(1)?;
        let device = gradient.device().clone();
        let blocks = blocks_per_sample(self.name(), &gradient)?;
        let gate = vector(self.name(), "gate", &gate, &[blocks.groups, blocks.width], &gradient)?;
        let dense = gradient.contiguous()?;
        let branch_gradient = reuse(&branch)?;
        let dtype = sum_dtype(&device, self.gate_dtype);
        let mut gate_gradient = GradientTarget::of_dtype(pass, 2, &device, gate.dims(), dtype)?;
        match &device {
            Device::Cpu(cpu) => {
                let sums = ColumnSums::new(&device, &blocks, 1)?;
                cpu::backward(&cpu.pool, &blocks, &dense, &branch, &gate, &branch_gradient, &sums)?;
                if let Some(target) = &mut gate_gradient {
                    sums.write(&cpu.pool, blocks.per_group(), 0, target);
                }
            }
            Device::Cuda(cuda) => {
                let tensors = [&dense, &branch, &branch_gradient];
                cuda::backward(cuda, &blocks, tensors, &gate, gate_gradient.as_ref())?;
            }
        }
        pass.give(0, gradient)?;
        drop(branch);
        pass.give(1, branch_gradient)?;
        gate_gradient.map_or(Ok(()), |target| target.give(pass, self.gate_dtype))
    }
}
