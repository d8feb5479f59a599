//! Normalisation of rows, alone or fused with what a transformer block does around it.
//!
//! One op with options, because all of these are `y = n * multiplier + shift` with
//! `n = (z - mean) * rstd` over the last dimension:
//! - `layer_norm` (arXiv 1607.06450): `z = x`, multiplier and shift are a weight and bias of `[d]`;
//! - `rms_norm` (arXiv 1910.07467): the same with `mean = 0` and no shift;
//! - `layer_norm_modulate` (adaLN of DiT, arXiv 2212.09748, section 3.2): multiplier is `1 + scale`,
//!   and `scale` and `shift` are one row per sample;
//! - `gate_residual_layer_norm_modulate`: `z = x + gate * (branch + branch_bias)` first, in the same pass over memory; the
//!   bias is that of the projection that made the branch, so that its gradient needs no pass of its own.
//!
//! `rstd = 1 / sqrt(variance + eps)` with the biased variance, taken in two passes over the row
//! while it is at hand. Statistics and sums are in f32. Saved are the rows `z`, mean and rstd of
//! each, and the vectors; `y` can be made again from these.
//!
//! Gradients, with `g` that of `y`, `p = g * multiplier` and means over the row:
//! `dz = rstd * (p - mean(p) - n * mean(p * n))` (without `mean(p)` for `rms_norm`) plus the gradient of
//! `z` itself where it is an output; `dshift = sum of g`, `dscale = sum of g * n` over the rows of a
//! sample; `dx = dz`, `dbranch = gate * dz`, `dgate = sum of branch * dz + branch_bias * sum of dz`, and over all samples
//! `dbranch_bias = sum of gate * sum of dz`.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;
use smallvec::SmallVec;

use super::gate_residual::{blocks_per_sample, check_branch, reuse, sum_dtype, vector};
use super::gradient_target::GradientTarget;
use super::only;
use super::row_blocks::RowBlocks;
use crate::{
    BackwardPass, DType, Dims, Op, Outputs, Remake, Result, Saver, Tensor, TensorError, apply, dims,
};

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension of `x` `[.., d]`,
/// `weight` and `bias` `[d]`.
///
/// # Errors
/// If a shape does not fit or a dtype is not a float.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let op = RowNorm::new("layer_norm", Form::Affine, weight, bias, eps);
    let inputs: Vec<&Tensor> = [Some(x), weight, bias].into_iter().flatten().collect();
    Ok(only(apply(op, &inputs)?))
}

/// `x / sqrt(mean of squares + eps) * weight` over the last dimension of `x` `[.., d]`, `weight` `[d]`.
///
/// # Errors
/// If a shape does not fit or a dtype is not a float.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let op = RowNorm { centered: false, ..RowNorm::new("rms_norm", Form::Affine, weight, None, eps) };
    let inputs: Vec<&Tensor> = [Some(x), weight].into_iter().flatten().collect();
    Ok(only(apply(op, &inputs)?))
}

/// `LN(x) * (1 + scale) + shift` for `x` `[b, .., d]`, `shift` and `scale` `[b, d]` (rows of any stride).
///
/// # Errors
/// If a shape does not fit or a dtype is not a float.
pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f32) -> Result<Tensor> {
    let op = RowNorm::new("layer_norm_modulate", Form::Modulated, Some(scale), Some(shift), eps);
    Ok(only(apply(op, &[x, scale, shift])?))
}

/// `z = x + gate * (branch + branch_bias)` and `LN(z) * (1 + scale) + shift`, in one pass: returns both.
///
/// `x`, `branch` `[b, .., d]`; `branch_bias` `[d]`; `gate`, `shift`, `scale` `[b, d]` (rows of any stride).
///
/// # Errors
/// If a shape does not fit, `x` and `branch` differ in dtype, or a dtype is not a float.
pub fn gate_residual_layer_norm_modulate(
    x: &Tensor,
    branch: &Tensor,
    branch_bias: Option<&Tensor>,
    gate: &Tensor,
    shift: &Tensor,
    scale: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let name = "gate_residual_layer_norm_modulate";
    let new = RowNorm::new(name, Form::Gated, Some(scale), Some(shift), eps);
    let op = RowNorm { gate: Some(gate.dtype()), branch_bias: branch_bias.map(Tensor::dtype), ..new };
    let inputs: SmallVec<[&Tensor; 6]> =
        [x, branch, scale, shift, gate].into_iter().chain(branch_bias).collect();
    let mut outputs = apply(op, &inputs)?.into_iter();
    let (sum, normal) = (outputs.next(), outputs.next());
    Ok((sum.expect("the sum"), normal.expect("the normalised rows")))
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Multiplier and shift of `[d]`.
    Affine,
    /// `1 + scale` and shift of `[b, d]`.
    Modulated,
    /// The same after a gated residual.
    Gated,
}

/// Inputs in order: x, the branch if gated, then the vectors that are there: scale, shift, gate, the branch's bias.
struct RowNorm {
    name: &'static str,
    centered: bool,
    form: Form,
    scale: Option<DType>,
    shift: Option<DType>,
    gate: Option<DType>,
    branch_bias: Option<DType>,
    eps: f32,
}

/// What the forward kernels work on; all but the vectors contiguous.
struct Forward<'a> {
    blocks: &'a RowBlocks,
    x: &'a Tensor,
    vectors: &'a Vectors,
    /// The branch, and where `x + gate * (branch + branch_bias)` goes.
    gated: Option<(&'a Tensor, &'a Tensor)>,
    output: &'a Tensor,
    /// Mean and rstd of each row, `[rows, 2]`.
    statistics: Option<&'a Tensor>,
}

/// What makes the normalised rows again.
struct Again<'a> {
    blocks: &'a RowBlocks,
    z: &'a Tensor,
    statistics: &'a Tensor,
    vectors: &'a Vectors,
    output: &'a Tensor,
}

/// What the backward kernels work on; all but the vectors contiguous.
struct Backward<'a> {
    blocks: &'a RowBlocks,
    /// The rows that were normalised.
    z: &'a Tensor,
    statistics: &'a Tensor,
    vectors: &'a Vectors,
    /// The gradient of the normalised rows, and that of `z` as an output.
    gradient: &'a Tensor,
    sum_gradient: Option<&'a Tensor>,
    /// May lie in the memory of either gradient.
    z_gradient: &'a Tensor,
    /// The branch and its gradient, which may lie in the memory of `gradient`.
    branch: Option<(&'a Tensor, &'a Tensor)>,
}

/// The normalised rows, to be made again in backward.
struct Normal {
    name: &'static str,
    z: Tensor,
    statistics: Tensor,
    vectors: Vectors,
    groups: usize,
}

impl Remake for Normal {
    fn remake(&self) -> Result<Tensor> {
        let (z, width) = (&self.z, self.z.size(self.z.rank() - 1));
        let rows = self.statistics.size(0) / self.groups;
        let blocks = RowBlocks::new(self.groups, rows, width);
        let output = Tensor::empty(z.device(), z.dims(), z.dtype())?;
        let (statistics, vectors) = (&self.statistics, &self.vectors);
        let job = Again { blocks: &blocks, z, statistics, vectors, output: &output };
        match z.device() {
            Device::Cpu(cpu) => cpu::again(&cpu.pool, self.name, &job)?,
            Device::Cuda(cuda) => cuda::again(cuda, &job)?,
        }
        Ok(output)
    }
}

/// Where the gradients of the vectors go.
struct Targets {
    /// Those of scale, shift and gate.
    of_groups: [Option<GradientTarget>; 3],
    /// In f32.
    branch_bias: Option<GradientTarget>,
}

/// The vectors of a call, each `[d]` or one row per group.
struct Vectors {
    scale: Option<Tensor>,
    shift: Option<Tensor>,
    gate: Option<Tensor>,
    /// `[d]`
    branch_bias: Option<Tensor>,
    /// Added to the scale (or standing alone) to give the multiplier.
    base: f32,
}

impl Vectors {
    /// The dtype of those that are there, if it is one.
    fn common_dtype(&self) -> Option<DType> {
        let all = [&self.scale, &self.shift, &self.gate, &self.branch_bias];
        let mut dtypes = all.into_iter().flatten().map(Tensor::dtype);
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)
    }
}

impl RowNorm {
    fn new(name: &'static str, form: Form, scale: Option<&Tensor>, shift: Option<&Tensor>, eps: f32) -> Self {
        let (scale, shift) = (scale.map(Tensor::dtype), shift.map(Tensor::dtype));
        Self { name, centered: true, form, scale, shift, gate: None, branch_bias: None, eps }
    }

    fn gated(&self) -> bool {
        self.form == Form::Gated
    }

    /// Position of the first vector among the inputs.
    fn first_vector(&self) -> usize {
        1 + usize::from(self.gated())
    }

    /// Positions of scale, shift, gate and the branch's bias among the inputs.
    fn vector_inputs(&self) -> [Option<usize>; 4] {
        let mut next = self.first_vector();
        [self.scale, self.shift, self.gate, self.branch_bias].map(|dtype| {
            dtype?;
            next += 1;
            Some(next - 1)
        })
    }

    fn blocks(&self, x: &Tensor) -> Result<RowBlocks> {
        if self.form != Form::Affine {
            return blocks_per_sample(self.name, x);
        }
        let Some((width, rows)) = x.dims().split_last() else {
            return Err(TensorError::shape(self.name, "expected x of shape [.., d], found a scalar"));
        };
        Ok(RowBlocks::new(1, rows.iter().product(), *width))
    }

    fn vector_sizes(&self, blocks: &RowBlocks) -> Dims {
        if self.form == Form::Affine { dims(&[blocks.width]) } else { dims(&[blocks.groups, blocks.width]) }
    }

    fn vectors(
        &self,
        x: &Tensor,
        blocks: &RowBlocks,
        [scale, shift, gate, branch_bias]: [Option<&Tensor>; 4],
    ) -> Result<Vectors> {
        let sizes = self.vector_sizes(blocks);
        let affine = self.form == Form::Affine;
        let check = |name, given: Option<&Tensor>, sizes: &[usize]| {
            given.map(|given| vector(self.name, name, given, sizes, x)).transpose()
        };
        Ok(Vectors {
            scale: check(if affine { "weight" } else { "scale" }, scale, &sizes)?,
            shift: check(if affine { "bias" } else { "shift" }, shift, &sizes)?,
            gate: check("gate", gate, &sizes)?,
            branch_bias: check("branch_bias", branch_bias, &[blocks.width])?,
            base: if affine && scale.is_some() { 0.0 } else { 1.0 },
        })
    }
}

impl RowNorm {
    /// The dtype of all vectors of groups, f32 if theirs differ.
    fn sum_dtype(&self) -> DType {
        let mut dtypes = [self.scale, self.shift, self.gate].into_iter().flatten();
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    fn targets(&self, pass: &BackwardPass, blocks: &RowBlocks, device: &Device) -> Result<Targets> {
        let sizes = self.vector_sizes(blocks);
        let dtype = sum_dtype(device, self.sum_dtype());
        let [scale, shift, gate, branch_bias] = self.vector_inputs();
        let target = |input: Option<usize>, sizes: &[usize], dtype| match input {
            Some(input) => GradientTarget::of_dtype(pass, input, device, sizes, dtype),
            None => Ok(None),
        };
        Ok(Targets {
            of_groups: [
                target(scale, &sizes, dtype)?,
                target(shift, &sizes, dtype)?,
                target(gate, &sizes, dtype)?,
            ],
            branch_bias: target(branch_bias, &[blocks.width], DType::F32)?,
        })
    }

    fn give(&self, pass: &mut BackwardPass, targets: Targets) -> Result<()> {
        let dtypes = [self.scale, self.shift, self.gate, self.branch_bias];
        for (target, dtype) in targets.of_groups.into_iter().chain([targets.branch_bias]).zip(dtypes) {
            if let Some((target, dtype)) = target.zip(dtype) {
                target.give(pass, dtype)?;
            }
        }
        Ok(())
    }
}

impl Op for RowNorm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let x = inputs[0];
        let blocks = self.blocks(x)?;
        let positions = self.vector_inputs();
        let vectors = self.vectors(x, &blocks, positions.map(|position| Some(inputs[position?])))?;
        let like_x = || Tensor::empty(x.device(), x.dims(), x.dtype());
        let (mut branch, mut sum, mut statistics) = (None, None, None);
        if self.gated() {
            check_branch(self.name, x, inputs[1])?;
            (branch, sum) = (Some(inputs[1].contiguous()?), Some(like_x()?));
        }
        if saver.recording() {
            statistics = Some(Tensor::empty(x.device(), &[blocks.groups * blocks.rows, 2], DType::F32)?);
        }
        let output = like_x()?;
        let dense = x.contiguous()?;
        let job = Forward {
            blocks: &blocks,
            x: &dense,
            vectors: &vectors,
            gated: branch.as_ref().zip(sum.as_ref()),
            output: &output,
            statistics: statistics.as_ref(),
        };
        match x.device() {
            Device::Cpu(cpu) => cpu::forward(&cpu.pool, self, &job)?,
            Device::Cuda(cuda) => cuda::forward(cuda, self, &job)?,
        }
        match &sum {
            Some(sum) => saver.tensor(sum),
            None => saver.input(0, x),
        }
        if let Some(statistics) = &statistics {
            saver.tensor(statistics);
        }
        // The shift's values are not needed for gradients.
        for index in (1..inputs.len()).filter(|index| Some(*index) != positions[1]) {
            saver.input(index, inputs[index]);
        }
        let [scale, shift, ..] = positions;
        let takes = [(!self.gated()).then_some(0), scale, shift];
        if let Some(statistics) = statistics.filter(|_| saver.remakes(takes.into_iter().flatten())) {
            let z = sum.as_ref().unwrap_or(&dense).detach();
            let vectors = Vectors { gate: None, branch_bias: None, ..vectors };
            let normal = Normal { name: self.name, z, statistics, vectors, groups: blocks.groups };
            saver.remake(usize::from(self.gated()), normal);
        }
        Ok(sum.into_iter().chain([output]).collect())
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let z = pass.take_saved(0)?.contiguous()?;
        let statistics = pass.take_saved(1)?;
        let branch = if self.gated() { Some(pass.take_saved(2)?.contiguous()?) } else { None };
        let blocks = self.blocks(&z)?;
        let saved = 1 + self.first_vector();
        let scale = self.scale.map(|_| pass.saved(saved)).transpose()?;
        let gate = self.gate.map(|_| pass.saved(saved + 1)).transpose()?;
        let branch_bias = self.branch_bias.map(|_| pass.saved(saved + 2)).transpose()?;
        let vectors =
            self.vectors(&z, &blocks, [scale.as_ref(), None, gate.as_ref(), branch_bias.as_ref()])?;
        let normal_output = usize::from(self.gated());
        let gradient = match pass.take_gradient(normal_output) {
            Some(gradient) => gradient.contiguous()?,
            None => Tensor::zeros(z.device(), z.dims(), z.dtype())?,
        };
        let sum_gradient = if self.gated() { pass.take_gradient(0) } else { None };
        let sum_gradient = sum_gradient.map(|gradient| gradient.contiguous()).transpose()?;
        let (z_gradient, branch_gradient) = match (&branch, &sum_gradient) {
            (None, _) => (reuse(&gradient)?, None),
            (Some(_), Some(sum)) => (reuse(sum)?, Some(reuse(&gradient)?)),
            (Some(_), None) => (Tensor::empty(z.device(), z.dims(), z.dtype())?, Some(reuse(&gradient)?)),
        };
        let mut targets = self.targets(pass, &blocks, z.device())?;
        let job = Backward {
            blocks: &blocks,
            z: &z,
            statistics: &statistics,
            vectors: &vectors,
            gradient: &gradient,
            sum_gradient: sum_gradient.as_ref(),
            z_gradient: &z_gradient,
            branch: branch.as_ref().zip(branch_gradient.as_ref()),
        };
        match z.device() {
            Device::Cpu(cpu) => cpu::backward(&cpu.pool, self, &job, &mut targets)?,
            Device::Cuda(cuda) => cuda::backward(cuda, self, &job, &targets)?,
        }
        drop((gradient, sum_gradient));
        pass.give(0, z_gradient)?;
        branch_gradient.map_or(Ok(()), |gradient| pass.give(1, gradient))?;
        self.give(pass, targets)
    }
}
