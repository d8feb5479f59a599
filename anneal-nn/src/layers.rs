//! Linear layers and the feed-forward pair.

use anneal_tensor::ops::{self, Activation};
use anneal_tensor::{Outputs, Result, Tensor};

use crate::{Builder, Forward, Init, ParamId};

/// `y = act(x W^T + b)`, with W of shape [out, in].
#[derive(Clone, Debug)]
pub struct Linear {
    weight: ParamId,
    bias: ParamId,
}

impl Linear {
    /// Adds `weight` and `bias` (starting at zero) under the builder's path.
    pub fn new(builder: &mut Builder, inputs: usize, outputs: usize, init: Init) -> Self {
        let weight = builder.add("weight", &[outputs, inputs], init);
        let bias = builder.add("bias", &[outputs], Init::Zeros);
        Self { weight, bias }
    }

    /// A linear layer over existing parameters; the weight [out, ...] is read as [out, product of the rest].
    pub(crate) fn of(weight: ParamId, bias: ParamId) -> Self {
        Self { weight, bias }
    }

    /// `[.., in]` to `[.., out]`.
    pub fn forward(&self, forward: &Forward, input: &Tensor, activation: Activation) -> Result<Tensor> {
        let weight = forward.param(self.weight)?;
        ops::linear(input, &weight, Some(&forward.param(self.bias)?), activation)
    }

    /// Layers of one size over the same `[b, in]`, as one op: of each layer its output in `parts` tensors
    /// `[b, out / parts]`, those of the first layer first.
    ///
    /// # Errors
    /// As [`ops::linear_stack`], and if a parameter is used outside its scope.
    pub fn forward_all(layers: &[Self], forward: &Forward, input: &Tensor, parts: usize) -> Result<Outputs> {
        let params = |id: fn(&Self) -> ParamId| -> Result<Vec<Tensor>> {
            layers.iter().map(|layer| forward.param(id(layer))).collect()
        };
        let (weights, biases) = (params(|layer| layer.weight)?, params(|layer| layer.bias)?);
        let (weights, biases): (Vec<_>, Vec<_>) = (weights.iter().collect(), biases.iter().collect());
        ops::linear_stack(input, &weights, &biases, parts)
    }
}

/// Two linear layers with an activation between, as one op: `y = act(x W1^T + b1) W2^T + b2`.
#[derive(Clone, Debug)]
pub struct FeedForward {
    first: Linear,
    second: Linear,
    activation: Activation,
}

impl FeedForward {
    /// Adds `fc1` and `fc2` under the builder's path.
    pub fn new(builder: &mut Builder, size: usize, hidden: usize, activation: Activation) -> Self {
        let first = builder.at("fc1", |builder| Linear::new(builder, size, hidden, Init::XavierUniform));
        let second = builder.at("fc2", |builder| Linear::new(builder, hidden, size, Init::XavierUniform));
        Self { first, second, activation }
    }

    /// `[.., size]` to `[.., size]`.
    pub fn forward(&self, forward: &Forward, input: &Tensor) -> Result<Tensor> {
        let (first, second) = (&self.first, &self.second);
        ops::feed_forward(
            input,
            &forward.param(first.weight)?,
            &forward.param(first.bias)?,
            &forward.param(second.weight)?,
            &forward.param(second.bias)?,
            self.activation,
        )
    }
}
