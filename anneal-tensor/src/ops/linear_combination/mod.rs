//! `y = sum of coefficient_k * x_k` in one pass over memory, with a coefficient for each term or
//! for each term and sample: the update of every sampler, and the noising of a training batch.
//!
//! Terms are added in the order given, in f32. Gradient: `dx_k = coefficient_k * g`.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::elementwise::check_float;
use super::{only, single};
use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

/// The sum of `coefficient * tensor`; all tensors of one shape and float dtype, which the result has.
/// In a captured step of a GPU the coefficients must be constants.
///
/// # Errors
/// If there are no terms (on a GPU: or more than 16), or shapes or dtypes differ.
pub fn linear_combination(terms: &[(f32, &Tensor)]) -> Result<Tensor> {
    let op = Combination {
        name: "linear_combination",
        coefficients: terms.iter().map(|term| vec![term.0]).collect(),
        by_sample: false,
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
    let coefficients = terms.iter().map(|term| term.0.to_vec()).collect();
    let op = Combination { name, coefficients, by_sample: true };
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
    by_sample: bool,
}

impl Combination {
    /// The coefficients of samples where a GPU reads them, [terms, b]: they change from step to step.
    fn table(&self, device: &Device) -> Result<Option<Tensor>> {
        match device {
            Device::Cuda(_) if self.by_sample => {
                let sizes = [self.coefficients.len(), self.coefficients[0].len()];
                Tensor::from_slice(device, &self.coefficients.concat(), &sizes).map(Some)
            }
            _ => Ok(None),
        }
    }
}

fn sum(coefficients: &[&[f32]], table: Option<&Tensor>, tensors: &[&Tensor]) -> Result<Tensor> {
    let first = &tensors[0];
    let mut output = Tensor::empty(first.device(), first.dims(), first.dtype())?;
    match first.device() {
        Device::Cpu(cpu) => cpu::sum(&cpu.pool, coefficients, tensors, &mut output)?,
        Device::Cuda(cuda) => {
            let numbers: Vec<f32> = coefficients.iter().filter_map(|list| list.first().copied()).collect();
            let coefficients = match table {
                Some(table) => cuda::Coefficients::Table(table),
                None => cuda::Coefficients::Numbers(&numbers),
            };
            cuda::sum(cuda, coefficients, tensors, &output)?;
        }
    }
    Ok(output)
}

impl Op for Combination {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let dense = inputs.iter().map(|input| input.contiguous()).collect::<Result<Vec<Tensor>>>()?;
        let coefficients: Vec<&[f32]> = self.coefficients.iter().map(|list| &list[..]).collect();
        let table = self.table(dense[0].device())?;
        table.iter().for_each(|table| saver.tensor(table));
        sum(&coefficients, table.as_ref(), &dense.iter().collect::<Vec<&Tensor>>()).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let on_device = self.by_sample && matches!(gradient.device(), Device::Cuda(_));
        let table = if on_device { Some(pass.take_saved(0)?) } else { None };
        for (input, coefficients) in self.coefficients.iter().enumerate() {
            if pass.needs(input) {
                let samples = coefficients.len();
                let row =
                    table.as_ref().map(|table| table.piece(input * samples, &[1, samples])).transpose()?;
                pass.give(input, sum(&[coefficients], row.as_ref(), &[&gradient])?)?;
            }
        }
        Ok(())
    }
}
