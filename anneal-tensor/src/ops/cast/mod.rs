//! Conversion between float dtypes: `y = x` rounded to nearest even.

mod cpu;
pub(super) mod cuda;

use crate::{BackwardPass, DType, Op, Outputs, Result, Saver, Tensor, TensorError, apply};
use anneal_device::Device;

use super::{only, single};

/// The values in another float dtype; itself if it has it already.
///
/// # Errors
/// If either dtype is not a float.
pub fn cast(input: &Tensor, dtype: DType) -> Result<Tensor> {
    if input.dtype() == dtype {
        return Ok(input.clone());
    }
    Ok(only(apply(Cast { from: input.dtype(), to: dtype }, &[input])?))
}

struct Cast {
    from: DType,
    to: DType,
}

fn converted(input: &Tensor, dtype: DType) -> Result<Tensor> {
    if let Some(other) = [input.dtype(), dtype].into_iter().find(|dtype| !dtype.is_float()) {
        return Err(TensorError::unsupported_dtype("cast", other));
    }
    let input = input.contiguous()?;
    let mut output = Tensor::empty(input.device(), input.dims(), dtype)?;
    match input.device() {
        Device::Cpu(cpu) => cpu::convert(&cpu.pool, &input, &mut output)?,
        Device::Cuda(cuda) => cuda::convert(cuda, &input, &output)?,
    }
    Ok(output)
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        converted(inputs[0], self.to).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        pass.give(0, converted(&gradient, self.from)?)
    }
}
