//! Attention on CUDA by our own kernels (`cuda/`) or by cuDNN's (`dnn.rs`).
//!
//! Our own serve everything: any float dtype and head dim, bias with its gradient, masks. cuDNN
//! serves bf16 and f16 without bias and mask where its rules allow; the faster of both is
//! measured for each shape, layout and pass where it is met for the first time, and remembered.
//! Both keep natural logarithms `[B, H, N]`, so that one's forward goes with the other's backward.
//! In the deterministic mode nothing is measured: up to [`OWN_TOKENS`] tokens our own kernels
//! run, beyond them cuDNN's, backward in its deterministic form.

use anneal_device::CudaDevice;
use anneal_device::cuda::{AttentionBackend, AttentionPass};

use super::dnn::{self, DnnPass};
use super::{Attention, Gradients, Operands, Saved, Sizes, cuda as own};
use crate::{Result, Tensor, TensorError};

/// Longest sequences that are left to our own kernels without measuring.
const OWN_TOKENS: usize = 1024;
/// Widest heads of our own kernels for tensor cores; cuDNN has such for wider ones.
const OWN_DIM: usize = 128;
/// Scores from which on a choice is worth the second that cuDNN takes to compile.
const SCORES_WORTH_MEASURING: usize = 1 << 20;

/// Writes `output` and, where wanted, `log_sums` `[B, H, N]`.
pub(super) fn forward(
    cuda: &CudaDevice,
    op: &Attention,
    operands: &Operands,
    output: &Tensor,
    log_sums: Option<&Tensor>,
) -> Result<()> {
    let own = || own::forward(cuda, op, operands, output, log_sums);
    let pass = || dnn::forward_pass(cuda, &op.sizes, operands, output);
    by_backend(cuda, &op.sizes, own, pass, |pass| pass.forward(cuda, op.scale, log_sums))
}

/// Writes those gradients that are wanted.
pub(super) fn backward(
    cuda: &CudaDevice,
    op: &Attention,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Result<()> {
    let own = || own::backward(cuda, op, operands, saved, gradients);
    let form = match cuda.is_deterministic() {
        true => AttentionPass::BackwardDeterministic,
        false => AttentionPass::Backward,
    };
    let pass = || dnn::backward_pass(cuda, &op.sizes, form, operands, saved, gradients);
    by_backend(cuda, &op.sizes, own, pass, |pass| pass.run(cuda, op.scale, &saved.log_sums))
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
    if !worth_asking(sizes, bound, cuda.is_deterministic()) {
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

/// Whether cuDNN may serve these sizes, before it is asked: a deterministic run asks only where it will take it.
fn worth_asking(sizes: &Sizes, bound: Option<AttentionBackend>, deterministic: bool) -> bool {
    let Sizes { batch, queries, keys, heads, dim } = *sizes;
    let scores = batch * heads * queries * keys;
    match bound {
        Some(backend) => backend == AttentionBackend::Dnn && scores > 0,
        None if deterministic => queries.max(keys) > OWN_TOKENS || dim > OWN_DIM,
        None => scores >= SCORES_WORTH_MEASURING,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deterministic_runs_choose_by_sizes_alone() {
        let sizes = |tokens, dim| Sizes { batch: 64, queries: tokens, keys: tokens, heads: 16, dim };
        assert!(!worth_asking(&sizes(1024, 72), None, true));
        assert!(worth_asking(&sizes(1032, 72), None, true));
        assert!(worth_asking(&sizes(256, 160), None, true));
        assert!(worth_asking(&sizes(256, 72), None, false));
        assert!(!worth_asking(&sizes(8, 72), None, false));
        assert!(worth_asking(&sizes(8, 72), Some(AttentionBackend::Dnn), true));
        assert!(!worth_asking(&sizes(4096, 72), Some(AttentionBackend::Own), false));
    }
}
