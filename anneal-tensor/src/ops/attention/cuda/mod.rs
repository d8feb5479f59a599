//! Attention on CUDA: our own kernels (`own.rs`) or cuDNN's (`dnn.rs`).
//!
//! Our own serve everything: any float dtype and head dim, bias with its gradient, masks. cuDNN
//! serves bf16 and f16 without bias and mask where its rules allow; the faster of both is
//! measured for each shape, layout and pass where it is met for the first time, and remembered.
//! Both keep natural logarithms `[B, H, N]`, so that one's forward goes with the other's backward.
//! In the deterministic mode nothing is measured: up to [`OWN_TOKENS`] tokens our own kernels
//! run, beyond them cuDNN's deterministic form.

mod dnn;
mod own;
mod tiling;

use anneal_device::CudaDevice;
use anneal_device::cuda::{AttentionBackend, AttentionPass, Variant};

use super::{Gradients, Operands, Saved, Sizes};
use crate::{Result, Tensor, TensorError};
use dnn::DnnPass;

/// Longest sequences that are left to our own kernels without measuring.
const OWN_TOKENS: usize = 1024;
/// Scores from which on a choice is worth the second that cuDNN takes to compile.
const SCORES_WORTH_MEASURING: usize = 1 << 20;

/// Writes `output` and, where wanted, `log_sums` `[B, H, N]`.
pub(super) fn forward(
    cuda: &CudaDevice,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    output: &Tensor,
    log_sums: Option<&Tensor>,
) -> Result<()> {
    if output.elements() == 0 {
        return Ok(());
    }
    let own = || own::forward(cuda, sizes, scale, operands, output, log_sums);
    let pass = || dnn::forward_pass(cuda, sizes, operands, output);
    by_backend(cuda, sizes, own, pass, |pass| pass.forward(cuda, scale, log_sums))
}

/// Writes those gradients that are wanted.
pub(super) fn backward(
    cuda: &CudaDevice,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Result<()> {
    let own = || own::backward(cuda, sizes, scale, operands, saved, gradients);
    let deterministic = match cuda.is_deterministic() {
        true => AttentionPass::BackwardDeterministic,
        false => AttentionPass::Backward,
    };
    let pass = || dnn::backward_pass(cuda, sizes, deterministic, operands, saved, gradients);
    by_backend(cuda, sizes, own, pass, |pass| pass.run(cuda, scale, &saved.log_sums))
}

/// Runs `own`, or `dnn` with what `pass` prepares: `None` where cuDNN is out of the question, an error
/// where it cannot be had.
fn by_backend(
    cuda: &CudaDevice,
    sizes: &Sizes,
    own: impl Fn() -> Result<()>,
    pass: impl Fn() -> Option<Result<DnnPass>>,
    dnn: impl Fn(&DnnPass) -> Result<()>,
) -> Result<()> {
    let bound = cuda.attention_backend();
    if !worth_asking(cuda, sizes, bound) {
        return own();
    }
    match (bound, pass()) {
        (_, None) => own(),
        (Some(_), Some(pass)) => dnn(&pass?),
        (None, Some(Err(_))) => own(),
        (None, Some(Ok(pass))) if cuda.is_deterministic() => dnn(&pass),
        (None, Some(Ok(pass))) => {
            let run = &mut |way| if way == 0 { own() } else { dnn(&pass) };
            let way = cuda.choose::<TensorError>(&pass.name(own::revision()), 2, run)?;
            run(way)
        }
    }
}

/// Whether cuDNN may serve these sizes, before it is asked. Deterministic runs ask only where they will take it.
fn worth_asking(cuda: &CudaDevice, sizes: &Sizes, bound: Option<AttentionBackend>) -> bool {
    let Sizes { batch, queries, keys, heads, dim } = *sizes;
    match bound {
        Some(backend) => backend == AttentionBackend::Dnn,
        None if cuda.is_deterministic() => queries.max(keys) > OWN_TOKENS || dim > own::MATRIX_UNIT_DIM,
        None => batch * heads * queries * keys >= SCORES_WORTH_MEASURING,
    }
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    own::variants()
}
