//! The operations: one folder each, with formula, shapes, forward and backward in `mod.rs`,
//! the CPU kernel in `cpu.rs` and checks in `tests.rs`.
//!
//! Letters in names of dimensions: `b` batch, `n` tokens, `d` features (`o` of an output),
//! `h` heads, `c` channels, `m` rows of a flattened tensor.

pub(crate) mod accumulate;
mod attention;
mod cast;
pub(crate) mod copy;
mod diffusion_loss;
mod feed_forward;
mod gate_residual;
mod linear;
mod reshape;
mod row_blocks;
mod row_norm;
mod scratch;

pub use attention::{AttentionInput, attention};
pub use cast::cast;
pub use copy::overwrite;
pub use diffusion_loss::{DiffusionLoss, DiffusionLossRow, VariationalRow, diffusion_loss};
pub use feed_forward::feed_forward;
pub use gate_residual::gate_residual;
pub use linear::{Activation, linear};
pub use reshape::{concat, narrow, permute, reshape, split};
pub use row_norm::{gate_residual_layer_norm_modulate, layer_norm, layer_norm_modulate, rms_norm};

use crate::{Outputs, Tensor};

/// The only output of an op that has one.
pub(crate) fn only(outputs: Outputs) -> Tensor {
    outputs.into_iter().next().expect("an op has at least one output")
}

/// A list of one output.
pub(crate) fn single(tensor: Tensor) -> Outputs {
    std::iter::once(tensor).collect()
}
