use anneal_device::cuda::{Batch, Operand, Product};
use anneal_device::{CudaDevice, Purpose};

use super::super::gradient_target::GradientTarget;
use super::super::linear::cuda::{SumTargets, column_sums, operand, output};
use super::super::linear::matrix::MatrixView;
use super::super::{cast, reduce};
use super::NAME;
use super::runs::{Run, runs};
use crate::{DType, Result, Tensor};

/// `y_i = x W_i^T + b_i`, with all y in `[n, b, o]`.
pub(super) fn affine(
    cuda: &CudaDevice,
    x: &Tensor,
    weights: &[&Tensor],
    biases: &[&Tensor],
    y: &Tensor,
) -> Result<()> {
    let [_, rows, outputs] = y.shape(NAME)?;
    let (a, _x) = operand(MatrixView::of_rows(x)?)?;
    let (factors, weights) = operands(weights.iter().copied())?;
    let biases = biases.iter().map(|bias| bias.contiguous()).collect::<Result<Vec<_>>>()?;
    for Run { start, count, distances: [weight, bias] } in runs([&weights[..], &biases[..]]) {
        let c = output(&y.piece(start * rows * outputs, &[rows, outputs])?)?;
        let shape = (rows, outputs, x.size(1));
        let plain = Product::new("matmul", shape, a, factors[start].transposed(), c);
        let batch = Batch { count, a: 0, b: weight, c: rows * outputs, bias };
        let bias = Some(biases[start].address().cast_const());
        // SAFETY: the shapes were checked by the op, the run lies as the batch says, and y is fresh memory.
        unsafe { cuda.matmul(&Product { bias, batch, ..plain })? };
    }
    Ok(())
}

/// `dW_i (+)= g_i^T x` and `db_i (+)= sum of g_i over rows` in f32, where there are targets; all g in `[n, b, o]`.
pub(super) fn parameter_gradients(
    cuda: &CudaDevice,
    gradient: &Tensor,
    x: &Tensor,
    weights: &[Option<GradientTarget>],
    biases: &[Option<GradientTarget>],
) -> Result<()> {
    let [_, rows, outputs] = gradient.shape(NAME)?;
    let inner = x.size(1);
    let (b, _x) = operand(MatrixView::of_rows(x)?)?;
    for (first, Run { start, count, distances: [c] }) in runs_of_targets(weights) {
        let gradient = gradient.piece(start * rows * outputs, &[rows, outputs])?;
        let (a, _gradient) = operand(MatrixView::of_rows(&gradient)?)?;
        let shape = (outputs, inner, rows);
        let plain =
            Product::new("matmul weight gradient", shape, a.transposed(), b, output(&first.gradient)?);
        let batch = Batch { count, a: rows * outputs, b: 0, c, bias: 0 };
        // SAFETY: sinks or fresh memory of [o, d], which lie as the batch says and are written here alone.
        unsafe { cuda.matmul(&Product { accumulate: first.accumulate, batch, ..plain })? };
    }
    for (first, Run { start, count, distances: [distance] }) in runs_of_targets(biases) {
        let gradient = gradient.piece(start * rows * outputs, &[count, rows, outputs])?;
        column_sums(cuda, &gradient, SumTargets { first, count, distance })?;
    }
    Ok(())
}

/// `dx = sum over i of g_i W_i`, with all g in `[n, b, o]`: of several layers by way of the products in f32.
pub(super) fn input_gradient(cuda: &CudaDevice, gradient: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
    let [layers, rows, outputs] = gradient.shape(NAME)?;
    let (inner, dtype, device) = (weights[0].size(1), gradient.dtype(), gradient.device());
    let products = match layers {
        1 => Tensor::empty(device, &[1, rows, inner], dtype)?,
        _ => Tensor::empty_for(device, &[layers, rows, inner], DType::F32, Purpose::Workspace)?,
    };
    let (factors, weights) = operands(weights)?;
    for Run { start, count, distances: [weight] } in runs([&weights[..]]) {
        let gradient = gradient.piece(start * rows * outputs, &[rows, outputs])?;
        let (a, _gradient) = operand(MatrixView::of_rows(&gradient)?)?;
        let c = output(&products.piece(start * rows * inner, &[rows, inner])?)?;
        let plain = Product::new("matmul input gradient", (rows, inner, outputs), a, factors[start], c);
        let batch = Batch { count, a: rows * outputs, b: weight, c: rows * inner, bias: 0 };
        // SAFETY: the shapes were checked in forward, and what is written is fresh memory.
        unsafe { cuda.matmul(&Product { batch, ..plain })? };
    }
    if layers == 1 {
        return products.piece(0, &[rows, inner]);
    }
    let sum = Tensor::empty(device, &[rows, inner], DType::F32)?;
    reduce::cuda::sum(cuda, &products, &[true, false, false], 1.0, &sum, false)?;
    cast(&sum, dtype)
}

/// Weights as operands, with the tensors that keep their memory.
fn operands<'a>(weights: impl IntoIterator<Item = &'a Tensor>) -> Result<(Vec<Operand>, Vec<Tensor>)> {
    let of = |weight: &Tensor| operand(MatrixView::of_weight(weight)?);
    Ok(weights.into_iter().map(of).collect::<Result<Vec<_>>>()?.into_iter().unzip())
}

/// Runs of targets that are all written or all added to, each with the first of them.
fn runs_of_targets(targets: &[Option<GradientTarget>]) -> Vec<(&GradientTarget, Run<1>)> {
    let alike = |a: &Option<GradientTarget>, b: &Option<GradientTarget>| match (a, b) {
        (Some(a), Some(b)) => a.accumulate == b.accumulate,
        _ => false,
    };
    let mut start = 0;
    let mut all = Vec::new();
    for group in targets.chunk_by(alike) {
        let present: Vec<&GradientTarget> = group.iter().flatten().collect();
        let tensors: Vec<Tensor> = present.iter().map(|target| target.gradient.clone()).collect();
        let inside = runs([&tensors[..]]).into_iter();
        all.extend(inside.map(|run| (present[run.start], Run { start: start + run.start, ..run })));
        start += group.len();
    }
    all
}
