//! Tensors, the counter generator, the tape, and the operations.
//!
//! A [`Tensor`] is a strided view of device memory whose device and dtype are known at run
//! time. An operation is a folder under `ops/`: formula, shape rule, forward and backward
//! side by side, and one kernel file per kind of device. The [`Tape`] records operations on
//! tracked tensors and runs their backward in reverse, freeing what they saved as it goes.
//! Deliberately absent: parameters, files, ranks, a graph compiler.

mod dtype;
mod error;
pub mod kernels;
pub mod ops;
pub mod parallel;
pub mod rng;
mod shape;
mod tape;
mod tensor;

pub use anneal_device::{Device, DeviceError, Purpose};
pub use dtype::{DType, Element, Float};
pub use error::TensorError;
#[doc(hidden)]
pub use half;
pub use shape::{Dims, dims};
pub use tape::{
    BackwardPass, Leaf, Op, Outputs, Phase, Remake, Remaking, Saver, Scope, Sink, Tape, apply, checkpoint,
    refuse_tracked,
};
pub use tensor::{Pending, Tensor};

pub type Result<T, E = TensorError> = std::result::Result<T, E>;
