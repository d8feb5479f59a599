//! The operations: one folder each, with formula, shapes, forward and backward in `mod.rs`,
//! the CPU kernel in `cpu.rs` and checks in `tests.rs`.
//!
//! Letters in names of dimensions: `b` batch, `n` tokens, `d` features (`o` of an output),
//! `h` heads, `c` channels, `m` rows of a flattened tensor.

pub(crate) mod accumulate;
mod cast;
pub(crate) mod copy;
mod diffusion_loss;
mod feed_forward;
mod linear;
mod reshape;

pub use cast::cast;
pub use copy::overwrite;
pub use diffusion_loss::{DiffusionLoss, DiffusionLossRow, VariationalRow, diffusion_loss};
pub use feed_forward::feed_forward;
pub use linear::{Activation, linear};
pub use reshape::{concat, narrow, permute, reshape, split};

use crate::{Outputs, Tensor};

/// The only output of an op that has one.
pub(crate) fn only(outputs: Outputs) -> Tensor {
    outputs.into_iter().next().expect("an op has at least one output")
}

/// A list of one output.
pub(crate) fn single(tensor: Tensor) -> Outputs {
    std::iter::once(tensor).collect()
}
