//! The operations: one folder each, with formula, shapes, forward and backward in `mod.rs`,
//! the CPU kernel in `cpu.rs`, the GPU's in `cuda.rs` and `kernel.cu`, and checks in `tests.rs`.
//!
//! Letters in names of dimensions: `b` batch, `n` tokens, `d` features (`o` of an output),
//! `h` heads, `c` channels, `m` rows of a flattened tensor.

pub(crate) mod accumulate;
mod attention;
mod binary;
mod cast;
pub(crate) mod copy;
mod diffusion_loss;
mod elementwise;
mod feed_forward;
mod gate_residual;
mod gradient_target;
mod lanes;
mod linear;
mod linear_combination;
mod linear_stack;
mod mse;
mod normal;
mod patches;
mod reduce;
mod reshape;
mod row_blocks;
mod row_index;
mod row_norm;
mod scratch;
mod softmax;
mod unary;

pub use attention::{AttentionInput, attention};
pub use binary::{add, div, mul, sub};
pub use cast::cast;
pub use copy::overwrite;
pub use diffusion_loss::{DiffusionLoss, DiffusionLossRow, VariationalRow, diffusion_loss};
pub use feed_forward::feed_forward;
pub use gate_residual::gate_residual;
pub use linear::{Activation, linear};
pub use linear_combination::{linear_combination, linear_combination_per_sample};
pub use linear_stack::linear_stack;
pub use mse::mse;
pub use normal::{noised, normal_rows};
pub use patches::{patchify, unpatchify};
pub use reduce::{max, mean, sum};
pub use reshape::{concat, narrow, permute, reshape, split};
pub use row_index::{embedding, gather_rows, scatter_rows};
pub use row_norm::{gate_residual_layer_norm_modulate, layer_norm, layer_norm_modulate, rms_norm};
pub use softmax::softmax;
pub use unary::{Gelu, add_scalar, clamp, exp, gelu, log, neg, scale, sigmoid, silu, sqrt, square, tanh};

use anneal_device::cuda::Variant;

use crate::{Outputs, Tensor};

/// The kernels of every op; each `cuda.rs` names its own.
pub(crate) fn kernel_variants() -> Vec<Variant> {
    let all: &[fn() -> Vec<Variant>] = &[
        attention::cuda::variants,
        binary::cuda::variants,
        cast::cuda::variants,
        copy::cuda::variants,
        diffusion_loss::cuda::variants,
        gate_residual::cuda::variants,
        linear::cuda::variants,
        linear_combination::cuda::variants,
        mse::cuda::variants,
        normal::cuda::variants,
        reduce::cuda::variants,
        row_blocks::cuda::variants,
        row_index::cuda::variants,
        row_norm::cuda::variants,
        softmax::cuda::variants,
        unary::cuda::variants,
    ];
    all.iter().flat_map(|of_op| of_op()).collect()
}

/// The only output of an op that has one.
pub(crate) fn only(outputs: Outputs) -> Tensor {
    outputs.into_iter().next().expect("an op has at least one output")
}

/// A list of one output.
pub(crate) fn single(tensor: Tensor) -> Outputs {
    std::iter::once(tensor).collect()
}
