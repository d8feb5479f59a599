//! Scaled dot-product attention: `softmax(scale * q k^T + bias) v` for each head.
//!
//! Vaswani et al. 2017, equation 1, computed block by block with a running maximum and sum, so
//! that scores exist for one block at a time (FlashAttention, arXiv 2205.14135, algorithm 1;
//! the order of loops and the saved log-sum-exp are those of FlashAttention-2, 2307.08691).
//! Backward computes the probabilities again (2205.14135, appendix B.2):
//! `dv = p^T do`, `dp = do v^T`, `ds = p * (dp - rowsum(do * o))`, `dq = scale ds k`,
//! `dk = scale ds^T q`, `dbias = ds` summed over the dimensions in which the bias is broadcast.
//! Not done: dropout, causal masks (a bias of minus infinity serves).

mod choice;
mod cpu;
pub(super) mod cuda;
mod dnn;

use anneal_device::Device;

use crate::{BackwardPass, DType, Op, Outputs, Result, Saver, Tensor, TensorError, apply};

use super::only;

const NAME: &str = "attention";

/// Where queries, keys and values lie.
#[derive(Clone, Copy, Debug)]
pub enum AttentionInput<'a> {
    /// `[B, N, 3, H, D]`: queries, keys and values of the same tokens; the gradient comes back
    /// in one tensor as well.
    Packed(&'a Tensor),
    /// Queries `[B, N, H, D]`; keys and values `[B, M, H, D]`.
    Separate { query: &'a Tensor, key: &'a Tensor, value: &'a Tensor },
}

/// `softmax(scale * q k^T + bias) v`: `[B, N, H, D]` in the dtype of the queries.
///
/// `bias` is `[1 or B, 1 or H, N, M]` of any float dtype and has a gradient. `key_mask` is u8
/// `[B, M]`; keys where it is 0 are left out, and a query with no key gives zeros and zero
/// gradients (as does one whose bias is minus infinity everywhere). Softmax and sums are f32.
/// Outer dimensions may be strided.
///
/// # Errors
/// If shapes do not fit together, queries, keys and values differ in dtype or are not floats,
/// or the mask is not u8.
pub fn attention(
    input: AttentionInput,
    bias: Option<&Tensor>,
    key_mask: Option<&Tensor>,
    scale: f32,
) -> Result<Tensor> {
    let mut inputs = match input {
        AttentionInput::Packed(qkv) => vec![qkv],
        AttentionInput::Separate { query, key, value } => vec![query, key, value],
    };
    let op = Attention {
        sizes: Sizes::of(input, bias, key_mask)?,
        packed: matches!(input, AttentionInput::Packed(_)),
        has_bias: bias.is_some(),
        has_mask: key_mask.is_some(),
        scale,
    };
    inputs.extend(bias);
    inputs.extend(key_mask);
    Ok(only(apply(op, &inputs)?))
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
}

impl Sizes {
    fn of(input: AttentionInput, bias: Option<&Tensor>, key_mask: Option<&Tensor>) -> Result<Self> {
        let sizes = match input {
            AttentionInput::Packed(qkv) => Self::of_packed(qkv)?,
            AttentionInput::Separate { query, key, value } => Self::of_separate(query, key, value)?,
        };
        let Self { batch, queries, keys, heads, .. } = sizes;
        if let Some(bias) = bias {
            let [b, h, n, m] = bias.shape(NAME)?;
            if ![1, batch].contains(&b) || ![1, heads].contains(&h) || [n, m] != [queries, keys] {
                return Err(TensorError::shape(
                    NAME,
                    format!(
                        "a bias of shape {:?} does not fit; expected [1 or {batch}, 1 or {heads}, {queries}, {keys}]",
                        bias.dims()
                    ),
                ));
            }
            if !bias.dtype().is_float() {
                return Err(TensorError::unsupported_dtype("attention's bias", bias.dtype()));
            }
        }
        if let Some(mask) = key_mask {
            if mask.dims() != [batch, keys] {
                let message =
                    format!("a key mask of shape {:?} does not fit; expected [{batch}, {keys}]", mask.dims());
                return Err(TensorError::shape(NAME, message));
            }
            if mask.dtype() != DType::U8 {
                let message = format!("the key mask must be u8, not {}", mask.dtype());
                return Err(TensorError::DType { op: NAME, message });
            }
        }
        Ok(sizes)
    }

    fn of_packed(qkv: &Tensor) -> Result<Self> {
        let [batch, queries, three, heads, dim] = qkv.shape(NAME)?;
        if three != 3 {
            let message =
                format!("packed queries, keys and values are [B, N, 3, H, D], not {:?}", qkv.dims());
            return Err(TensorError::shape(NAME, message));
        }
        check_dtypes(&[qkv])?;
        Ok(Self { batch, queries, keys: queries, heads, dim })
    }

    fn of_separate(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Self> {
        let [batch, queries, heads, dim] = query.shape(NAME)?;
        let [_, keys, _, _] = key.shape::<4>(NAME)?;
        if key.dims() != [batch, keys, heads, dim] || value.dims() != key.dims() {
            let message = format!(
                "queries {:?}, keys {:?} and values {:?} do not fit; expected [B, N, H, D] and twice [B, M, H, D]",
                query.dims(),
                key.dims(),
                value.dims()
            );
            return Err(TensorError::shape(NAME, message));
        }
        check_dtypes(&[query, key, value])?;
        Ok(Self { batch, queries, keys, heads, dim })
    }
}

fn check_dtypes(tensors: &[&Tensor]) -> Result<()> {
    let dtype = tensors[0].dtype();
    if !dtype.is_float() {
        return Err(TensorError::unsupported_dtype(NAME, dtype));
    }
    match tensors.iter().find(|tensor| tensor.dtype() != dtype) {
        None => Ok(()),
        Some(other) => {
            let message = format!("queries are {dtype}, but keys or values are {}", other.dtype());
            Err(TensorError::DType { op: NAME, message })
        }
    }
}

struct Attention {
    sizes: Sizes,
    packed: bool,
    has_bias: bool,
    has_mask: bool,
    scale: f32,
}

/// The inputs of a kernel: rows of heads are contiguous.
struct Operands {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
}

/// Which gradients are wanted, in memory of the inputs' shapes.
struct Gradients {
    query: Option<Tensor>,
    key: Option<Tensor>,
    value: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Attention {
    fn parts(&self) -> usize {
        if self.packed { 1 } else { 3 }
    }

    fn operands(&self, inputs: &[Tensor]) -> Operands {
        let rest = &inputs[self.parts()..];
        let [query, key, value] = match self.packed {
            true => [0, 1, 2].map(|part| part_of_packed(&inputs[0], part)),
            false => [0, 1, 2].map(|part: usize| inputs[part].clone()),
        };
        let bias = self.has_bias.then(|| rest[0].clone());
        let mask = self.has_mask.then(|| rest[usize::from(self.has_bias)].clone());
        Operands { query, key, value, bias, mask }
    }

    fn bias_index(&self) -> usize {
        self.parts()
    }
}

/// Queries (0), keys (1) or values (2) as a view `[B, N, H, D]`.
fn part_of_packed(qkv: &Tensor, part: usize) -> Tensor {
    let [b, n, _, h, d] = [0, 1, 2, 3, 4].map(|axis| qkv.size(axis));
    let s = qkv.strides();
    qkv.view(part * s[2], &[b, n, h, d], &[s[0], s[1], s[3], s[4]])
}

/// The tensor itself if the elements of its last dimension follow each other, else a copy.
fn with_unit_stride(tensor: &Tensor) -> Result<Tensor> {
    match tensor.strides().last() {
        Some(1) => Ok(tensor.detach()),
        _ => tensor.contiguous(),
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let prepared = inputs.iter().map(|input| with_unit_stride(input)).collect::<Result<Vec<_>>>()?;
        let operands = self.operands(&prepared);
        let Sizes { batch, queries, heads, dim, .. } = self.sizes;
        let device = inputs[0].device();
        let output = Tensor::empty(device, &[batch, queries, heads, dim], operands.query.dtype())?;
        let log_sums = match saver.recording() {
            true => Some(Tensor::empty(device, &[batch, heads, queries], DType::F32)?),
            false => None,
        };
        match device {
            Device::Cpu(cpu) => {
                cpu::forward(&cpu.pool, &self.sizes, self.scale, &operands, &output, log_sums.as_ref());
            }
            Device::Cuda(cuda) => choice::forward(cuda, self, &operands, &output, log_sums.as_ref())?,
        }
        if let Some(log_sums) = &log_sums {
            for (index, input) in prepared.iter().enumerate() {
                saver.input(index, input);
            }
            saver.tensor(&output);
            saver.tensor(log_sums);
        }
        Ok(super::single(output))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let upstream = with_unit_stride(&pass.only_gradient())?;
        let count = self.parts() + usize::from(self.has_bias) + usize::from(self.has_mask);
        let mut inputs = (0..count).map(|index| pass.saved(index)).collect::<Result<Vec<_>>>()?;
        for input in &mut inputs {
            *input = with_unit_stride(input)?;
        }
        let operands = self.operands(&inputs);
        let saved = Saved { upstream, output: pass.saved(count)?, log_sums: pass.saved(count + 1)? };
        let like = |index: usize| -> Result<Option<Tensor>> {
            let input = &inputs[index];
            let empty = || Tensor::empty(input.device(), input.dims(), input.dtype());
            pass.needs(index).then(empty).transpose()
        };
        let bias = if self.has_bias { like(self.bias_index())? } else { None };
        let (given, gradients) = if self.packed {
            let whole = like(0)?;
            let part = |part| whole.as_ref().map(|whole| part_of_packed(whole, part));
            let gradients = Gradients { query: part(0), key: part(1), value: part(2), bias: bias.clone() };
            (vec![whole], gradients)
        } else {
            let [query, key, value] = [like(0)?, like(1)?, like(2)?];
            let given = vec![query.clone(), key.clone(), value.clone()];
            (given, Gradients { query, key, value, bias: bias.clone() })
        };
        match saved.output.device() {
            Device::Cpu(cpu) => {
                cpu::backward(&cpu.pool, &self.sizes, self.scale, &operands, &saved, &gradients)?;
            }
            Device::Cuda(cuda) => choice::backward(cuda, self, &operands, &saved, &gradients)?,
        }
        drop(gradients);
        for (index, gradient) in given.into_iter().chain(self.has_bias.then_some(bias)).enumerate() {
            if let Some(gradient) = gradient {
                pass.give(index, gradient)?;
            }
        }
        Ok(())
    }
}

/// What backward has beside the inputs.
struct Saved {
    upstream: Tensor,
    output: Tensor,
    /// `[B, H, N]`: the logarithm of each softmax's denominator, to the base that the device's kernels use.
    log_sums: Tensor,
}
