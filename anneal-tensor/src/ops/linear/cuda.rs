use anneal_device::cuda::{Arguments, Epilogue, Launch, Operand, Output, Product, Source, Variant};
use anneal_device::{CudaDevice, Purpose};

use super::super::gradient_target::GradientTarget;
use super::Activation;
use super::hopper;
use super::matrix::MatrixView;
use crate::kernels::{blocks_to_fill, element};
use crate::{DType, Result, Tensor};

const SOURCE: Source =
    Source { name: "linear", code: concat!(include_str!("activation.cuh"), include_str!("kernel.cu")) };
/// As in the kernels: threads of a block, and columns that a block sums.
const THREADS: usize = 256;
const COLUMNS: usize = 128;
/// Rows that a block sums are a multiple of what its threads load together, and at least these; parts of
/// a column are at most so many, so that adding them up stays small beside reading the rows.
const ROW_STEP: usize = 64;
const LEAST_ROWS: usize = 128;
const MOST_PARTS: usize = 256;

pub(super) fn macros(dtype: DType, activation: Activation) -> Vec<(&'static str, String)> {
    let number = match activation {
        Activation::None => 0,
        Activation::GeluTanh => 1,
        Activation::Silu => 2,
    };
    let mut macros = element("ELEMENT", dtype);
    macros.push(("ACTIVATION", number.to_string()));
    macros
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let floats = [DType::F32, DType::BF16, DType::F16];
    let all = [Activation::None, Activation::GeluTanh, Activation::Silu];
    let pairs = floats.into_iter().flat_map(|dtype| all.map(|activation| (dtype, activation)));
    let plain =
        pairs.map(|(dtype, activation)| Variant { source: SOURCE, macros: macros(dtype, activation) });
    plain.chain(hopper::variants()).collect()
}

/// `y = act(x W^T + b)`, and `x W^T + b` itself into `preactivation` if given and there is an activation.
pub(in crate::ops) fn affine(
    cuda: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    preactivation: Option<&Tensor>,
    y: &Tensor,
) -> Result<()> {
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let matrices = [x, weight, y].into_iter().chain(bias.as_ref()).chain(preactivation).collect::<Vec<_>>();
    let ours = hopper::takes(cuda, activation, &matrices);
    let own = || hopper::activated(cuda, activation, x, weight, bias.as_ref(), preactivation, y);
    let (x, weight) = (MatrixView::of_rows(x)?, MatrixView::of_weight(weight)?);
    let shape @ (rows, outputs, inner) = (x.rows, weight.rows, x.columns);
    let ((a, _x), (b, _weight)) = (operand(x)?, operand(weight)?);
    let multiply = |target: &Tensor, epilogue: Epilogue| -> Result<()> {
        let plain = Product::new("matmul", shape, a, b.transposed(), output(target)?);
        let bias = bias.as_ref().map(|bias| bias.address().cast_const());
        // SAFETY: the shapes were checked by the op, and what is written is fresh memory.
        unsafe { cuda.matmul(&Product { bias, epilogue, ..plain })? };
        Ok(())
    };
    if activation == Activation::None {
        return multiply(y, Epilogue::None);
    }
    let kept = preactivation.map(Tensor::address);
    let fused = || multiply(y, Epilogue::Gelu { preactivation: kept });
    let in_two = || {
        let argument = preactivation.unwrap_or(y);
        multiply(argument, Epilogue::None)?;
        activate(cuda, activation, argument, y)
    };
    // The library's GELU is only as good as 16 bits can hold, and writes rows of whole packs.
    if activation != Activation::GeluTanh || y.dtype() == DType::F32 || !outputs.is_multiple_of(8) {
        return in_two();
    }
    let words = ["", "-bias", "-kept", "-bias-kept"];
    let word = words[usize::from(bias.is_some()) + 2 * usize::from(kept.is_some())];
    let revision = hopper::revision();
    let name = format!("gelu-{}-{rows}x{outputs}x{inner}{word}-{revision:x}", y.dtype());
    let mut run = |way| match way {
        0 => fused(),
        1 => in_two(),
        _ => own(),
    };
    match cuda.choose(&name, if ours { 3 } else { 2 }, &mut run)? {
        // A view that starts elsewhere may be more than the fused form takes.
        0 => fused().or_else(|_| in_two()),
        1 => in_two(),
        _ => own(),
    }
}

/// `dx = g W`
pub(in crate::ops) fn input_gradient(
    cuda: &CudaDevice,
    gradient: &Tensor,
    weight: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    let (gradient, weight) = (MatrixView::of_rows(gradient)?, MatrixView::of_weight(weight)?);
    let shape = (gradient.rows, weight.columns, gradient.columns);
    let ((a, _gradient), (b, _weight)) = (operand(gradient)?, operand(weight)?);
    // SAFETY: the shapes were checked in forward, and dx is fresh memory.
    unsafe { cuda.matmul(&Product::new("matmul input gradient", shape, a, b, output(dx)?))? };
    Ok(())
}

/// `dW (+)= g^T x` and `db (+)= sum of g over rows`, in f32.
pub(super) fn parameter_gradients(
    cuda: &CudaDevice,
    gradient: &Tensor,
    x: &Tensor,
    weight: Option<&GradientTarget>,
    bias: Option<&GradientTarget>,
) -> Result<()> {
    let (Some(weight), Some(bias)) = (weight, bias) else {
        if let Some(bias) = bias {
            column_sums(cuda, gradient, SumTargets::one(bias))?;
        }
        return weight.map_or(Ok(()), |weight| weight_gradient(cuda, gradient, x, weight, Epilogue::None));
    };
    let in_two = || {
        column_sums(cuda, gradient, SumTargets::one(bias))?;
        weight_gradient(cuda, gradient, x, weight, Epilogue::None)
    };
    // The library's sums overwrite; and only what overwrites may be run again to measure it.
    if weight.accumulate || bias.accumulate || gradient.dtype() == DType::F32 {
        return in_two();
    }
    let sums = bias.gradient.address();
    let fused = || weight_gradient(cuda, gradient, x, weight, Epilogue::RowSums { sums });
    let (outputs, inner) = (gradient.size(gradient.rank() - 1), x.size(x.rank() - 1));
    let rows = gradient.elements() / outputs.max(1);
    let name = format!("sums-{}-{rows}x{outputs}x{inner}", gradient.dtype());
    let mut run = |way| if way == 0 { in_two() } else { fused() };
    let way = cuda.choose(&name, 2, &mut run)?;
    if way == 1 { fused().or_else(|_| in_two()) } else { in_two() }
}

fn weight_gradient(
    cuda: &CudaDevice,
    gradient: &Tensor,
    x: &Tensor,
    target: &GradientTarget,
    epilogue: Epilogue,
) -> Result<()> {
    let (gradient, x) = (MatrixView::of_rows(gradient)?, MatrixView::of_rows(x)?);
    let shape = (gradient.columns, x.columns, gradient.rows);
    // Its rows are outputs, however many dimensions the weight has.
    let c = Output::new(target.gradient.address(), DType::F32.element_type("linear")?, x.columns);
    let ((a, _gradient), (b, _x)) = (operand(gradient)?, operand(x)?);
    let plain = Product::new("matmul weight gradient", shape, a.transposed(), b, c);
    // SAFETY: a sink or fresh memory of [outputs, inner], written here alone.
    unsafe { cuda.matmul(&Product { accumulate: target.accumulate, epilogue, ..plain })? };
    Ok(())
}

/// `y = act(x)`, both contiguous; y may be x.
fn activate(cuda: &CudaDevice, activation: Activation, x: &Tensor, y: &Tensor) -> Result<()> {
    let kernel = cuda.kernel(&SOURCE, "activate", &macros(x.dtype(), activation))?;
    let arguments = Arguments::new().with(x.address()).with(y.address()).with(x.elements() as i64);
    // SAFETY: both tensors hold as many elements of the type that the kernel was compiled for.
    unsafe { cuda.launch(kernel, over(cuda, x), arguments)? };
    Ok(())
}

/// `target = g * act'(preactivation)`, all contiguous; the target may be the gradient.
pub(super) fn activation_backward(
    cuda: &CudaDevice,
    activation: Activation,
    gradient: &Tensor,
    preactivation: &Tensor,
    target: &Tensor,
) -> Result<()> {
    let kernel = cuda.kernel(&SOURCE, "activation_backward", &macros(gradient.dtype(), activation))?;
    let addresses = Arguments::new().with(gradient.address()).with(preactivation.address());
    let arguments = addresses.with(target.address()).with(gradient.elements() as i64);
    // SAFETY: as in `activate`.
    unsafe { cuda.launch(kernel, over(cuda, gradient), arguments)? };
    Ok(())
}

/// `g *= act'(preactivation)` in place, `hidden = act(preactivation)`, and the sum of the new g over rows
/// into `bias`; all contiguous, and hidden may be the pre-activation.
fn recompute_backward(
    cuda: &CudaDevice,
    activation: Activation,
    gradient: &Tensor,
    preactivation: &Tensor,
    hidden: &Tensor,
    bias: Option<&GradientTarget>,
) -> Result<()> {
    let kernel = cuda.kernel(&SOURCE, "recompute_backward", &macros(gradient.dtype(), activation))?;
    let operands =
        Arguments::new().with(gradient.address()).with(preactivation.address()).with(hidden.address());
    sum_by_parts(cuda, gradient, bias.map(SumTargets::one), |launch, sums| {
        // SAFETY: three matrices of one shape, and room for the sums.
        unsafe { cuda.launch(kernel, launch, sums.after(operands))? };
        Ok(())
    })
}

/// `(g W) act'(preactivation)`, `hidden = act(preactivation)`, and the sums of the result over rows into `bias`. All
/// contiguous but the weight; hidden may be the pre-activation.
pub(in crate::ops) fn activation_input_gradient(
    cuda: &CudaDevice,
    activation: Activation,
    gradient: &Tensor,
    weight: &Tensor,
    preactivation: &Tensor,
    hidden: &Tensor,
    bias: Option<&GradientTarget>,
) -> Result<Tensor> {
    let inner = Tensor::empty(gradient.device(), preactivation.dims(), gradient.dtype())?;
    let in_two = |gradient: &Tensor, hidden: &Tensor, bias: Option<&GradientTarget>| {
        input_gradient(cuda, gradient, weight, &inner)?;
        recompute_backward(cuda, activation, &inner, preactivation, hidden, bias)
    };
    if !hopper::takes(cuda, activation, &[gradient, weight, preactivation, hidden, &inner]) {
        in_two(gradient, hidden, bias)?;
        return Ok(inner);
    }
    let own = |gradient: &Tensor, hidden: &Tensor, bias: Option<&GradientTarget>| {
        hopper::activation_gradient(cuda, activation, gradient, weight, preactivation, hidden, &inner, bias)
    };
    let (depth, columns) = (gradient.size(gradient.rank() - 1), inner.size(inner.rank() - 1));
    let (rows, revision) = (inner.elements() / columns, hopper::revision());
    let name = format!("{activation:?}-gradient-{}-{rows}x{columns}x{depth}-{revision:x}", inner.dtype());
    let mut standing_in = None;
    let mut run = |way| {
        let noise = match &standing_in {
            Some(noise) => noise,
            // Where memory lacks, the gradient itself.
            None => standing_in.insert(noise_instead(cuda, gradient).unwrap_or_else(|_| gradient.clone())),
        };
        // To be measured, the work must leave the pre-activation as it is.
        let elsewhere = Tensor::empty(inner.device(), inner.dims(), inner.dtype())?;
        if way == 0 { own(noise, &elsewhere, None) } else { in_two(noise, &elsewhere, None) }
    };
    let way = cuda.choose(&name.to_lowercase(), 2, &mut run)?;
    drop(standing_in);
    match way {
        0 => own(gradient, hidden, bias)?,
        _ => in_two(gradient, hidden, bias)?,
    }
    Ok(inner)
}

/// Noise in a tensor's shape, to measure on: gradients of a first step may be zeros, for which a GPU needs less power.
fn noise_instead(cuda: &CudaDevice, tensor: &Tensor) -> Result<Tensor> {
    let noise = Tensor::empty_for(tensor.device(), tensor.dims(), tensor.dtype(), Purpose::Workspace)?;
    let element = tensor.dtype().element_type("linear")?;
    // SAFETY: the tensor is new, and contiguous.
    unsafe { cuda.fill_with_noise(noise.address(), element, noise.elements())? };
    Ok(noise)
}

/// `bias (+)= sum of g over rows`, for each of as many matrices, one after the other, as there are targets.
pub(in crate::ops) fn column_sums(cuda: &CudaDevice, gradient: &Tensor, biases: SumTargets) -> Result<()> {
    let gradient = gradient.contiguous()?;
    let kernel = cuda.kernel(&SOURCE, "column_sums", &macros(gradient.dtype(), Activation::None))?;
    let operands = Arguments::new().with(gradient.address());
    sum_by_parts(cuda, &gradient, Some(biases), |launch, sums| {
        // SAFETY: the matrices, and room for the sums.
        unsafe { cuda.launch(kernel, launch, sums.after(operands))? };
        Ok(())
    })
}

/// Where the sums of several matrices go: into f32 vectors `distance` elements apart.
#[derive(Clone, Copy)]
pub(in crate::ops) struct SumTargets<'a> {
    pub first: &'a GradientTarget,
    pub count: usize,
    pub distance: usize,
}

impl<'a> SumTargets<'a> {
    pub fn one(target: &'a GradientTarget) -> Self {
        Self { first: target, count: 1, distance: 0 }
    }
}

/// The last arguments of a kernel that sums columns.
struct Sums {
    partials: *mut u8,
    rows: usize,
    columns: usize,
    part_rows: usize,
    distance: usize,
    accumulate: bool,
}

impl Sums {
    fn after(&self, arguments: Arguments) -> Arguments {
        let arguments = arguments.with(self.partials).with(self.rows as i64).with(self.columns as i64);
        arguments.with(self.part_rows as i64).with(self.distance as i64).with(i32::from(self.accumulate))
    }
}

/// Sums over the rows of a matrix of `like`'s shape, or of as many as there are targets: `launch` sums parts of them,
/// and the parts are added up into the targets. Without a target the sums are dropped.
fn sum_by_parts(
    cuda: &CudaDevice,
    like: &Tensor,
    targets: Option<SumTargets>,
    launch: impl FnOnce(Launch, Sums) -> Result<()>,
) -> Result<()> {
    let columns = like.size(like.rank() - 1);
    let count = targets.map_or(1, |targets| targets.count);
    let rows = like.elements() / (count * columns).max(1);
    let part_rows = rows.div_ceil(MOST_PARTS).max(LEAST_ROWS).next_multiple_of(ROW_STEP);
    let parts = rows.div_ceil(part_rows).max(1);
    let grid = Launch::new([columns.div_ceil(COLUMNS).max(1), parts, count], THREADS);
    let sums =
        |partials, distance, accumulate| Sums { partials, rows, columns, part_rows, distance, accumulate };
    if let Some(SumTargets { first, distance, .. }) = targets.filter(|_| parts == 1) {
        return launch(grid, sums(first.gradient.address(), distance, first.accumulate));
    }
    let sizes = [count, parts, columns];
    let partials = Tensor::empty_for(like.device(), &sizes, DType::F32, Purpose::Workspace)?;
    launch(grid, sums(partials.address(), parts * columns, false))?;
    targets.map_or(Ok(()), |targets| add_partials(cuda, &partials, like.dtype(), targets))
}

/// Each target `(+)=` the sum of its partial sums; f32 `[targets, parts, columns]`. The dtype is that of what was
/// summed: its kernels are compiled already.
pub(in crate::ops) fn add_partials(
    cuda: &CudaDevice,
    partials: &Tensor,
    dtype: DType,
    targets: SumTargets,
) -> Result<()> {
    let [count, parts, columns] = partials.shape("linear")?;
    let kernel = cuda.kernel(&SOURCE, "add_partials", &macros(dtype, Activation::None))?;
    let arguments = Arguments::new()
        .with(partials.address())
        .with(targets.first.gradient.address())
        .with(parts as i32)
        .with(columns as i64)
        .with(targets.distance as i64)
        .with(i32::from(targets.first.accumulate));
    let launch = Launch::new([columns.div_ceil(32).max(1), count], [32, 16]);
    // SAFETY: [targets, parts, columns], and for each target [columns], of f32.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

/// One thread for each pack of 16 bytes.
fn over(cuda: &CudaDevice, tensor: &Tensor) -> Launch {
    let packs = (tensor.elements() * tensor.dtype().size()).div_ceil(16);
    Launch::over(packs, THREADS, blocks_to_fill(cuda))
}

/// A view as an operand, with the tensor that keeps its memory.
pub(in crate::ops) fn operand(view: MatrixView) -> Result<(Operand, Tensor)> {
    let element = view.memory.dtype().element_type("linear")?;
    let (rows, columns, [row, column]) = (view.rows, view.columns, view.strides);
    // Of a single row or column the stride is not used, and may be anything.
    let leading = if rows == 1 { columns } else { row };
    if (column == 1 || columns == 1) && leading >= columns {
        return Ok((Operand::new(view.memory.address(), element, leading), view.memory));
    }
    let leading = if columns == 1 { rows } else { column };
    if (row == 1 || rows == 1) && leading >= rows {
        return Ok((Operand::new(view.memory.address(), element, leading).transposed(), view.memory));
    }
    let memory = view.dense()?.memory;
    Ok((Operand::new(memory.address(), element, columns), memory))
}

pub(in crate::ops) fn output(tensor: &Tensor) -> Result<Output> {
    assert!(tensor.is_contiguous(), "products are written to contiguous memory");
    Ok(Output::new(tensor.address(), tensor.dtype().element_type("linear")?, tensor.size(tensor.rank() - 1)))
}
