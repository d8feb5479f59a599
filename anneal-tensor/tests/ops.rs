//! The table of op tests: each op's own file beside its code.

#[path = "../src/ops/attention/tests.rs"]
mod attention;
#[path = "../src/ops/attention/backend_tests.rs"]
mod attention_backends;
#[path = "../src/ops/binary/tests.rs"]
mod binary;
#[path = "../src/ops/cast/tests.rs"]
mod cast;
#[path = "../src/ops/diffusion_loss/tests.rs"]
mod diffusion_loss;
#[path = "../src/ops/feed_forward/tests.rs"]
mod feed_forward;
#[path = "../src/ops/gate_residual/tests.rs"]
mod gate_residual;
#[path = "../src/ops/gradient_target/tests.rs"]
mod gradient_target;
#[path = "../src/ops/linear/tests.rs"]
mod linear;
#[path = "../src/ops/linear_combination/tests.rs"]
mod linear_combination;
#[path = "../src/ops/linear_stack/tests.rs"]
mod linear_stack;
#[path = "../src/ops/mse/tests.rs"]
mod mse;
#[path = "../src/ops/normal/tests.rs"]
mod normal;
#[path = "../src/ops/patches/tests.rs"]
mod patches;
#[path = "../src/ops/reduce/tests.rs"]
mod reduce;
#[path = "../src/ops/reshape/tests.rs"]
mod reshape;
#[path = "../src/ops/row_index/tests.rs"]
mod row_index;
#[path = "../src/ops/row_norm/tests.rs"]
mod row_norm;
#[path = "../src/ops/softmax/tests.rs"]
mod softmax;
#[path = "../src/ops/unary/tests.rs"]
mod unary;
