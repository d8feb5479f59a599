//! Attention's tensors in cuDNN's terms.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use anneal_device::cuda::{
    AttentionElement, AttentionKey, AttentionPass, AttentionPlan, AttentionStrides, AttentionTensors,
    dnn_version,
};
use anneal_device::{CudaDevice, Purpose};

use super::{Gradients, Operands, Saved, Sizes};
use crate::{DType, Result, Tensor};

/// A pass with its plan and its tensors' addresses, ready to run.
pub(super) struct DnnPass {
    key: AttentionKey,
    plan: Arc<AttentionPlan>,
    addresses: AttentionTensors<usize>,
    /// Gives the device to what is allocated beside it.
    output: Tensor,
}

/// `None` where cuDNN is out of the question; an error where it cannot be had.
pub(super) fn forward_pass(
    cuda: &CudaDevice,
    sizes: &Sizes,
    operands: &Operands,
    output: &Tensor,
) -> Option<Result<DnnPass>> {
    let tensors = AttentionTensors {
        query: Some(&operands.query),
        key: Some(&operands.key),
        value: Some(&operands.value),
        output: Some(output),
        ..AttentionTensors::default()
    };
    prepare(cuda, sizes, AttentionPass::Forward, operands, tensors)
}

/// As [`forward_pass`]; cuDNN computes all gradients or none.
pub(super) fn backward_pass(
    cuda: &CudaDevice,
    sizes: &Sizes,
    pass: AttentionPass,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Option<Result<DnnPass>> {
    let tensors = AttentionTensors {
        query: Some(&operands.query),
        key: Some(&operands.key),
        value: Some(&operands.value),
        output: Some(&saved.output),
        output_gradient: Some(&saved.upstream),
        query_gradient: Some(gradients.query.as_ref()?),
        key_gradient: Some(gradients.key.as_ref()?),
        value_gradient: Some(gradients.value.as_ref()?),
    };
    prepare(cuda, sizes, pass, operands, tensors)
}

fn prepare(
    cuda: &CudaDevice,
    sizes: &Sizes,
    pass: AttentionPass,
    operands: &Operands,
    tensors: AttentionTensors<Option<&Tensor>>,
) -> Option<Result<DnnPass>> {
    let output = tensors.output?;
    let element = match output.dtype() {
        DType::BF16 => AttentionElement::Bf16,
        DType::F16 => AttentionElement::F16,
        _ => return None,
    };
    let addresses = tensors.map(|tensor| tensor.map_or(0, |tensor| tensor.address() as usize));
    let misaligned = addresses.of_pass(pass).iter().any(|address| address % 16 != 0);
    if operands.bias.is_some() || operands.mask.is_some() || misaligned {
        return None;
    }
    let strides = tensors.map(|tensor| tensor.map(strides).unwrap_or_default());
    let Sizes { batch, queries, keys, heads, dim } = *sizes;
    let key = AttentionKey { pass, element, batch, heads, queries, keys, dim, strides };
    let plan = cuda.dnn_attention_plan(&key);
    let ready = |plan| DnnPass { key, plan, addresses, output: output.detach() };
    Some(plan.map(ready).map_err(Into::into))
}

/// Those of `[B, N, H, D]`.
fn strides(tensor: &Tensor) -> AttentionStrides {
    let strides = tensor.strides();
    AttentionStrides { batch: strides[0], token: strides[1], head: strides[2] }
}

impl DnnPass {
    /// Names a measurement: the sizes, and all that may change who is faster.
    pub(super) fn name(&self, revision: u64) -> String {
        let AttentionKey { pass, element, batch, heads, queries, keys, dim, .. } = self.key;
        let mut hasher = DefaultHasher::new();
        (self.key, revision, dnn_version()).hash(&mut hasher);
        let hash = hasher.finish();
        format!("attention-{pass:?}-{element:?}-{batch}x{heads}x{queries}x{keys}x{dim}-{hash:016x}")
            .to_lowercase()
    }

    pub(super) fn forward(&self, cuda: &CudaDevice, scale: f32, log_sums: Option<&Tensor>) -> Result<()> {
        let AttentionKey { batch, heads, queries, .. } = self.key;
        let log_sums = match log_sums {
            Some(log_sums) => log_sums.detach(),
            // The library writes them in any case.
            None => {
                let sizes = [batch, heads, queries];
                Tensor::empty_for(self.output.device(), &sizes, DType::F32, Purpose::Workspace)?
            }
        };
        self.run(cuda, scale, &log_sums)
    }

    /// `log_sums` are read by backward and written by forward.
    pub(super) fn run(&self, cuda: &CudaDevice, scale: f32, log_sums: &Tensor) -> Result<()> {
        let log_sums = log_sums.address() as usize;
        // SAFETY: the key was made of these tensors' sizes and strides, and they are aligned.
        unsafe { cuda.dnn_attention(&self.plan, &self.addresses, log_sums, scale)? };
        Ok(())
    }
}
