//! The table of op tests: each op's own file beside its code.

#[path = "../src/ops/attention/tests.rs"]
mod attention;
#[path = "../src/ops/cast/tests.rs"]
mod cast;
#[path = "../src/ops/diffusion_loss/tests.rs"]
mod diffusion_loss;
#[path = "../src/ops/feed_forward/tests.rs"]
mod feed_forward;
#[path = "../src/ops/gate_residual/tests.rs"]
mod gate_residual;
#[path = "../src/ops/linear/tests.rs"]
mod linear;
#[path = "../src/ops/reshape/tests.rs"]
mod reshape;
#[path = "../src/ops/row_norm/tests.rs"]
mod row_norm;
