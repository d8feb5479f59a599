//! Linear layers of one size over the same input, each output cut into vectors: part `k` of `x W_i^T + b_i`.
//!
//! Gradients, with `g_i` the parts' gradients side by side: `dx = sum over i of g_i W_i`, `dW_i = g_i^T x`, `db_i = sum of
//! g_i over rows`. On a GPU the layers whose weights, biases or sinks lie at equal distances are one product
//! (`runs.rs`), as those of a transformer's modulations do (arXiv 2212.09748, section 3.2): with few rows a product does
//! little but read its weight, and a launch for each takes as long again. On the CPU each layer is a product.

mod cuda;
mod runs;

use anneal_device::Device;

use super::copy::{self, Piece};
use super::gradient_target::GradientTarget;
use super::linear::{self, Activation};
use super::{accumulate, linear::cpu};
use crate::{BackwardPass, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

const NAME: &str = "linear_stack";

/// `x` `[b, d]`, n weights `[o, d]` and n biases `[o]` to n times `parts` tensors `[b, o / parts]`, those of the first
/// layer first: views of one tensor `[n, b, o]`.
///
/// # Errors
/// If there is no layer, if sizes or dtypes do not fit or differ from layer to layer, or if `parts` does not divide `o`.
pub fn linear_stack(x: &Tensor, weights: &[&Tensor], biases: &[&Tensor], parts: usize) -> Result<Outputs> {
    let Some(first) = weights.first().filter(|_| weights.len() == biases.len()) else {
        let message = format!("{} weights and {} biases", weights.len(), biases.len());
        return Err(TensorError::shape(NAME, message));
    };
    let [rows, _] = x.shape(NAME)?;
    let [outputs, inner] = first.shape(NAME)?;
    for (weight, bias) in weights.iter().zip(biases) {
        linear::check(NAME, x, weight, Some(bias))?;
        if weight.dims() != first.dims() {
            let message = format!("weights {:?} and {:?} are not of one size", first.dims(), weight.dims());
            return Err(TensorError::shape(NAME, message));
        }
    }
    if parts == 0 || !outputs.is_multiple_of(parts) {
        return Err(TensorError::shape(NAME, format!("{outputs} outputs cannot be cut into {parts} parts")));
    }
    let inputs: Vec<&Tensor> =
        std::iter::once(x).chain(weights.iter().copied()).chain(biases.iter().copied()).collect();
    apply(LinearStack { layers: weights.len(), rows, outputs, inner, parts }, &inputs)
}

/// Inputs in order: x, the weights, the biases.
struct LinearStack {
    layers: usize,
    rows: usize,
    outputs: usize,
    inner: usize,
    parts: usize,
}

impl LinearStack {
    fn sizes(&self) -> [usize; 3] {
        [self.layers, self.rows, self.outputs]
    }

    /// A layer's `[b, o]` of the layers' `[n, b, o]`.
    fn layer(&self, all: &Tensor, layer: usize) -> Result<Tensor> {
        all.piece(layer * self.rows * self.outputs, &[self.rows, self.outputs])
    }

    /// Views of the parts of the layers' `[n, b, o]`.
    fn vectors<'a>(&'a self, all: &'a Tensor) -> impl Iterator<Item = Tensor> + 'a {
        let width = self.outputs / self.parts;
        let starts = (0..self.layers).flat_map(move |layer| {
            (0..self.parts).map(move |part| layer * self.rows * self.outputs + part * width)
        });
        starts.map(move |start| all.view(start, &[self.rows, width], &[self.outputs, 1]))
    }

    /// The gradients of the vectors in one tensor `[n, b, o]`.
    fn joined(&self, pass: &mut BackwardPass, x: &Tensor) -> Result<Tensor> {
        let all = Tensor::empty(x.device(), &self.sizes(), x.dtype())?;
        let targets = self.vectors(&all).enumerate();
        let pieces: Vec<Piece> =
            targets.map(|(index, target)| Piece { source: pass.take_gradient(index), target }).collect();
        copy::pieces(&pieces)?;
        Ok(all)
    }

    fn parameter_gradients(&self, pass: &mut BackwardPass, gradient: &Tensor, x: &Tensor) -> Result<()> {
        let device = gradient.device();
        let targets = |first: usize, sizes: &[usize]| -> Result<Vec<Option<GradientTarget>>> {
            let inputs = first..first + self.layers;
            inputs.map(|input| GradientTarget::new(pass, input, device, sizes)).collect()
        };
        let weights = targets(1, &[self.outputs, self.inner])?;
        let biases = targets(1 + self.layers, &[self.outputs])?;
        match device {
            Device::Cpu(cpu) => {
                for (layer, (weight, bias)) in weights.iter().zip(&biases).enumerate() {
                    let gradient = self.layer(gradient, layer)?;
                    cpu::parameter_gradients(&cpu.pool, &gradient, x, weight.as_ref(), bias.as_ref())?;
                }
            }
            Device::Cuda(cuda) => cuda::parameter_gradients(cuda, gradient, x, &weights, &biases)?,
        }
        let all = weights.into_iter().chain(biases);
        all.flatten().try_for_each(|target| target.give(pass, gradient.dtype()))
    }

    fn input_gradient(&self, gradient: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
        if let Device::Cuda(cuda) = gradient.device() {
            return cuda::input_gradient(cuda, gradient, weights);
        }
        let of_layer = |layer: usize| -> Result<Tensor> {
            linear::input_gradient(&self.layer(gradient, layer)?, &weights[layer], &[self.rows, self.inner])
        };
        let last = of_layer(self.layers - 1)?;
        (0..self.layers - 1).rev().try_fold(last, |sum, layer| accumulate::add_owned(sum, of_layer(layer)?))
    }
}

impl Op for LinearStack {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let x = inputs[0];
        let (weights, biases) = inputs[1..].split_at(self.layers);
        let y = Tensor::empty(x.device(), &self.sizes(), x.dtype())?;
        match x.device() {
            Device::Cpu(cpu) => {
                for (layer, (weight, bias)) in weights.iter().zip(biases).enumerate() {
                    let y = self.layer(&y, layer)?;
                    cpu::affine(&cpu.pool, x, weight, Some(bias), Activation::None, None, &y)?;
                }
            }
            Device::Cuda(cuda) => cuda::affine(cuda, x, weights, biases, &y)?,
        }
        saver.input(0, x);
        for (layer, weight) in weights.iter().enumerate() {
            saver.input(1 + layer, weight);
        }
        Ok(self.vectors(&y).collect())
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let x = pass.saved(0)?;
        let gradient = self.joined(pass, &x)?;
        self.parameter_gradients(pass, &gradient, &x)?;
        if pass.needs(0) {
            let weights = (1..=self.layers).map(|layer| pass.saved(layer)).collect::<Result<Vec<_>>>()?;
            pass.give(0, self.input_gradient(&gradient, &weights)?)?;
        }
        Ok(())
    }
}
