//! What the tests of every crate share: the golden reader, the comparison of tensors
//! with one table of tolerances, the op checker, and the count of tests skipped for missing hardware.
//!
//! Contract: everything here panics with a message that names the file, the tensor and
//! the figure, because its only callers are tests.
//! Not done: random inputs (tests draw them from `anneal-tensor`'s counter generator).

mod compare;
mod golden;
mod op_check;
mod skip;
mod tolerances;

pub use compare::{assert_close, relative_error};
pub use golden::Golden;
pub use op_check::{Array, CudaTurn, check_op, on_every_device, poisoned_cpu, poisoned_cuda};
pub use skip::{skip_without, skipped};
pub use tolerances::Tolerance;
