//! Linear layers, the feed-forward pair, and how a part of a block ends.

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

    /// `[.., in]` to a branch `[.., out]`.
    ///
    /// # Errors
    /// As [`ops::linear`], and if a parameter is used outside its scope.
    pub fn branch(&self, forward: &Forward, input: &Tensor) -> Result<Branch> {
        let product = ops::linear(input, &forward.param(self.weight)?, None, Activation::None)?;
        Ok(Branch { product, bias: forward.param(self.bias)? })
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

/// What a part of a block hands to the residual sum: `product + bias`, which is left to that sum, since it passes over the
/// product anyway and backward over its gradient ([`ops::gate_residual_layer_norm_modulate`]).
pub struct Branch {
    /// `[.., out]`
    pub product: Tensor,
    /// `[out]`
    pub bias: Tensor,
}

/// Two linear layers with an activation between, the first and the second's product as one op:
/// `y = act(x W1^T + b1) W2^T + b2`.
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

    /// `[.., size]` to a branch `[.., size]`.
    pub fn forward(&self, forward: &Forward, input: &Tensor) -> Result<Branch> {
        let (first, second) = (&self.first, &self.second);
        let product = ops::feed_forward(
            input,
            &forward.param(first.weight)?,
            &forward.param(first.bias)?,
            &forward.param(second.weight)?,
            self.activation,
        )?;
        Ok(Branch { product, bias: forward.param(second.bias)? })
    }
}
