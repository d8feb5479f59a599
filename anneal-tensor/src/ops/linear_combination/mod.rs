//! `y = sum of coefficient_k * x_k` in one pass over memory, with a coefficient for each term or
//! for each term and sample: the update of every sampler, and the noising of a training batch.
//!
//! Terms are added in the order given, in f32. Gradient: `dx_k = coefficient_k * g`.

mod cpu;

use anneal_device::Device;

use super::elementwise::check_float;
use super::{only, single};
use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// The sum of `coefficient * tensor`; all tensors of one shape and float dtype, which the result has.
///
/// # Errors
/// If there are no terms, or shapes or dtypes differ.
pub fn linear_combination(terms: &[(f32, &Tensor)]) -> Result<Tensor> {
    let op = Combination {
        name: "linear_combination",
        coefficients: terms.iter().map(|term| vec![term.0]).collect(),
    };
    let tensors: Vec<&Tensor> = terms.iter().map(|term| term.1).collect();
    combined(op, &tensors)
}

/// The same with a coefficient for each sample: `y[b] = sum of coefficients_k[b] * x_k[b]`, tensors `[b, ..]`.
///
/// # Errors
/// If there are no terms, shapes or dtypes differ, or a list has not one coefficient a sample.
pub fn linear_combination_per_sample(terms: &[(&[f32], &Tensor)]) -> Result<Tensor> {
    let name = "linear_combination_per_sample";
    for (coefficients, tensor) in terms {
        if tensor.dims().first() != Some(&coefficients.len()) {
            let message =
                format!("{} coefficients for a tensor of shape {:?}", coefficients.len(), tensor.dims());
            return Err(TensorError::shape(name, message));
        }
    }
    let op = Combination { name, coefficients: terms.iter().map(|term| term.0.to_vec()).collect() };
    let tensors: Vec<&Tensor> = terms.iter().map(|term| term.1).collect();
    combined(op, &tensors)
}

fn combined(op: Combination, tensors: &[&Tensor]) -> Result<Tensor> {
    let Some(first) = tensors.first() else {
        return Err(TensorError::shape(op.name, "there are no terms"));
    };
    check_float(op.name, first.dtype())?;
    if let Some(other) = tensors.iter().find(|t| t.dims() != first.dims() || t.dtype() != first.dtype()) {
        let message = format!("the terms {first:?} and {other:?} differ in shape or dtype");
        return Err(TensorError::shape(op.name, message));
    }
    Ok(only(apply(op, tensors)?))
}

struct Combination {
    name: &'static str,
    /// For each term: one number, or one a sample.
    coefficients: Vec<Vec<f32>>,
}

fn sum(coefficients: &[&[f32]], tensors: &[Tensor]) -> Result<Tensor> {
    let first = &tensors[0];
    let mut output = Tensor::empty(first.device(), first.dims(), first.dtype())?;
    match first.device() {
        Device::Cpu(cpu) => cpu::sum(&cpu.pool, coefficients, tensors, &mut output)?,
        Device::Cuda(_) => return Err(TensorError::unsupported_device("linear_combination")),
    }
    Ok(output)
}

impl Op for Combination {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        let dense = inputs.iter().map(|input| input.contiguous()).collect::<Result<Vec<Tensor>>>()?;
        let coefficients: Vec<&[f32]> = self.coefficients.iter().map(|list| &list[..]).collect();
        sum(&coefficients, &dense).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = [pass.only_gradient().contiguous()?];
        for (input, coefficients) in self.coefficients.iter().enumerate() {
            if pass.needs(input) {
                pass.give(input, sum(&[coefficients], &gradient)?)?;
            }
        }
        Ok(())
    }
}
