//! Self-attention, and the contract by which it meets tokens on other devices.
//!
//! A model knows one device: it projects its own tokens and asks an [`AttentionExchange`]
//! what to attend over. Sequence-parallel exchanges implement the trait elsewhere.

use anneal_tensor::ops::{self, Activation, AttentionInput};
use anneal_tensor::{Result, Tensor};

use crate::{Branch, Builder, Forward, Init, Linear};

/// What attention runs on after an exchange.
// It lives on the stack of one call: an allocation would cost more than its size.
#[allow(clippy::large_enum_variant)]
pub enum Exchanged {
    /// `[B, N, 3, H, D]`.
    Packed(Tensor),
    /// Queries `[B, N, H, D]`, keys and values `[B, M, H, D]`.
    Separate { query: Tensor, key: Tensor, value: Tensor },
}

/// Moves queries, keys and values, and the result back. Both ways are differentiable.
pub trait AttentionExchange: Send + Sync {
    /// From this device's tokens of all heads, packed `[B, N, 3, H, D]`, to what it attends over.
    fn exchange(&self, qkv: Tensor) -> Result<Exchanged>;
    /// From the attention's output to this device's tokens of all heads, `[B, N, H, D]`.
    fn restore(&self, output: Tensor) -> Result<Tensor>;
}

/// All tokens and heads are here.
pub struct LocalAttention;

impl AttentionExchange for LocalAttention {
    fn exchange(&self, qkv: Tensor) -> Result<Exchanged> {
        Ok(Exchanged::Packed(qkv))
    }

    fn restore(&self, output: Tensor) -> Result<Tensor> {
        Ok(output)
    }
}

/// Multi-head self-attention with one projection for queries, keys and values
/// (Vaswani et al. 2017, section 3.2).
#[derive(Clone, Debug)]
pub struct SelfAttention {
    qkv: Linear,
    output: Linear,
    heads: usize,
}

impl SelfAttention {
    /// Adds `qkv` and `proj` under the builder's path. `heads` divides `size`.
    pub fn new(builder: &mut Builder, size: usize, heads: usize) -> Self {
        let qkv = builder.at("qkv", |builder| Linear::new(builder, size, 3 * size, Init::XavierUniform));
        let output = builder.at("proj", |builder| Linear::new(builder, size, size, Init::XavierUniform));
        Self { qkv, output, heads }
    }

    /// `[B, N, size]` to a branch `[B, N, size]`.
    pub fn forward(&self, forward: &Forward, input: &Tensor) -> Result<Branch> {
        let [b, n, d] = input.shape("self-attention")?;
        let head = d / self.heads;
        let qkv = self.qkv.forward(forward, input, Activation::None)?;
        let qkv = ops::reshape(&qkv, &[b, n, 3, self.heads, head])?;
        let scale = 1.0 / (head as f32).sqrt();
        let attended = match forward.attention().exchange(qkv)? {
            Exchanged::Packed(qkv) => ops::attention(AttentionInput::Packed(&qkv), None, None, scale)?,
            Exchanged::Separate { query, key, value } => {
                let input = AttentionInput::Separate { query: &query, key: &key, value: &value };
                ops::attention(input, None, None, scale)?
            }
        };
        let attended = forward.attention().restore(attended)?;
        self.output.branch(forward, &ops::reshape(&attended, &[b, n, d])?)
    }
}
