//! Attention on CUDA: the choice of kernels, their geometry and arguments. The kernels' files say how they work.
//!
//! Three families: warpgroups (sm_90a) and warps (from sm_80 on) of tensor cores for bf16 and f16
//! with a head dim that is a multiple of 8 up to 128 (gradients by warpgroups up to 80), and plain loops for
//! everything else. All of them are deterministic and save the log-sum as a natural logarithm.

use std::sync::OnceLock;

use anneal_device::cuda::{Arguments, Launch, Source, Variant, revision as revision_of};
use anneal_device::{CudaDevice, Purpose};

use super::{Attention, Gradients, Operands, Saved, Sizes};
use crate::kernels::element;
use crate::{DType, Result, Tensor};

mod geometry;
mod hopper;

use geometry::{Family, Geometry};

macro_rules! source {
    ($name:literal, $($file:literal),+; $code:expr) => {
        Source { name: concat!("attention/", $name), code: concat!($(include_str!($file)),+, $code) }
    };
}

const FORWARD_MMA: Source = source!("forward_mma", "common.cuh", "rows.cuh", "mma.cuh", "softmax.cuh"; include_str!("forward_mma.cu"));
const FORWARD_WGMMA: Source = source!("forward_wgmma", "common.cuh", "rows.cuh", "../../hopper.cuh", "wgmma.cuh", "boxes.cuh", "softmax.cuh"; include_str!("forward_wgmma.cu"));
const BACKWARD_MMA: Source = source!(
    "backward_mma",
    "common.cuh",
    "rows.cuh",
    "mma.cuh",
    "partial.cuh",
    "gradient.cuh"; include_str!("backward_mma.cu"));
const BACKWARD_WGMMA: Source = source!(
    "backward_wgmma",
    "common.cuh",
    "rows.cuh",
    "../../hopper.cuh",
    "wgmma.cuh",
    "boxes.cuh",
    "partial.cuh"; include_str!("backward_wgmma.cu"));
const REDUCE: Source = source!("reduce", "common.cuh"; include_str!("reduce.cu"));
const GENERIC: Source = source!("generic", "common.cuh"; include_str!("generic.cu"));

/// `Rows` of common.cuh: strides in elements.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rows {
    data: *mut u8,
    batch: i64,
    token: i64,
    head: i64,
}

impl Rows {
    const NONE: Self = Self { data: std::ptr::null_mut(), batch: 0, token: 0, head: 0 };

    /// Of a tensor `[B, N, H, D]`.
    fn of(tensor: &Tensor) -> Self {
        let strides = tensor.strides();
        let [batch, token, head] = [0, 1, 2].map(|axis| strides[axis] as i64);
        Self { data: tensor.address(), batch, token, head }
    }

    fn of_wanted(tensor: Option<&Tensor>) -> Self {
        tensor.map_or(Self::NONE, Self::of)
    }
}

/// `Arguments` of common.cuh; a pointer may be null where there is nothing.
#[derive(Clone, Copy)]
#[repr(C)]
struct Parameters {
    query: Rows,
    key: Rows,
    value: Rows,
    output: Rows,
    output_gradient: Rows,
    query_gradient: Rows,
    key_gradient: Rows,
    value_gradient: Rows,
    bias: *mut u8,
    bias_strides: [i64; 3],
    mask: *mut u8,
    mask_batch: i64,
    log_sums: *mut u8,
    partial: *mut u8,
    bias_partial: *mut u8,
    sizes: [i32; 4],
    scale: f32,
    parts: i32,
}

impl Parameters {
    fn new(op: &Attention, operands: &Operands, output: &Tensor, log_sums: Option<&Tensor>) -> Self {
        let Sizes { batch, queries, keys, heads, .. } = op.sizes;
        let null = std::ptr::null_mut();
        let bias = operands.bias.as_ref();
        // The stride of a dimension of size 1 stands for no step at all.
        let stride = |bias: &Tensor, axis: usize| match bias.size(axis) {
            1 => 0,
            _ => bias.strides()[axis] as i64,
        };
        Self {
            query: Rows::of(&operands.query),
            key: Rows::of(&operands.key),
            value: Rows::of(&operands.value),
            output: Rows::of(output),
            output_gradient: Rows::NONE,
            query_gradient: Rows::NONE,
            key_gradient: Rows::NONE,
            value_gradient: Rows::NONE,
            bias: bias.map_or(null, Tensor::address),
            bias_strides: bias.map_or([0; 3], |bias| [0, 1, 2].map(|axis| stride(bias, axis))),
            mask: operands.mask.as_ref().map_or(null, Tensor::address),
            mask_batch: operands.mask.as_ref().map_or(0, |mask| mask.strides()[0] as i64),
            log_sums: log_sums.map_or(null, Tensor::address),
            partial: null,
            bias_partial: null,
            sizes: [batch, heads, queries, keys].map(|size| size as i32),
            scale: op.scale,
            parts: 1,
        }
    }
}

/// What each kernel is compiled for.
fn macros(dim: usize, dtype: DType, bias: Option<DType>) -> Vec<(&'static str, String)> {
    let mut macros = element("ELEMENT", dtype);
    macros.push(("ELEMENT_IS_BF16", u8::from(dtype == DType::BF16).to_string()));
    // Of both types, only the names matter here.
    macros.extend(element("BIAS", bias.unwrap_or(DType::F32)).into_iter().take(1));
    macros.push(("HAS_BIAS", u8::from(bias.is_some()).to_string()));
    macros.push(("HEAD_DIM", dim.to_string()));
    macros
}

fn of_operands(dim: usize, operands: &Operands) -> Vec<(&'static str, String)> {
    macros(dim, operands.query.dtype(), operands.bias.as_ref().map(Tensor::dtype))
}

/// Starts a kernel on the parameters, and more arguments if it has them.
fn start(
    cuda: &CudaDevice,
    (source, name): (&Source, &'static str),
    macros: &[(&'static str, String)],
    launch: Launch,
    arguments: Arguments,
) -> Result<()> {
    let kernel = cuda.kernel(source, name, macros)?;
    // SAFETY: callers fill in the parameters from tensors whose shapes the op checked, rows are contiguous.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

/// Tensors of the shapes that the op checked, rows of heads contiguous.
pub(super) fn forward(
    cuda: &CudaDevice,
    op: &Attention,
    operands: &Operands,
    output: &Tensor,
    log_sums: Option<&Tensor>,
) -> Result<()> {
    let Sizes { batch, queries, keys, heads, dim } = op.sizes;
    if batch * queries * heads * dim == 0 {
        return Ok(());
    }
    if keys == 0 {
        return clear(cuda, output);
    }
    let family = Family::of(cuda.properties(), &[&operands.query, &operands.key, &operands.value, output]);
    let geometry = Geometry::forward(family, dim, queries, batch * heads, cuda.properties());
    let macros = [of_operands(dim, operands), geometry.macros()].concat();
    let parameters = Parameters::new(op, operands, output, log_sums);
    let blocks = queries.div_ceil(geometry.rows);
    let (kernel, launch) = match family {
        Family::Warpgroups => return hopper::forward(cuda, operands, output, &macros, &geometry, parameters),
        Family::Warps => ((&FORWARD_MMA, "attention_forward_mma"), geometry.launch([blocks, heads, batch])),
        Family::Plain => ((&GENERIC, "attention_forward_generic"), geometry.launch([blocks, heads, batch])),
    };
    start(cuda, kernel, &macros, launch, Arguments::new().with(parameters))
}

pub(super) fn backward(
    cuda: &CudaDevice,
    op: &Attention,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Result<()> {
    let Sizes { batch, queries, keys, heads, dim } = op.sizes;
    let wanted = [&gradients.query, &gradients.key, &gradients.value];
    if batch * queries * keys * heads * dim == 0 {
        // No query sees a key: what gradients there are, are zero.
        let all = wanted.into_iter().chain([&gradients.bias]);
        return all.flatten().try_for_each(|gradient| clear(cuda, gradient));
    }
    let device = saved.output.device();
    let workspace = |sizes: &[usize]| Tensor::empty_for(device, sizes, DType::F32, Purpose::Workspace);
    let mut parameters = Parameters::new(op, operands, &saved.output, Some(&saved.log_sums));
    parameters.output_gradient = Rows::of(&saved.upstream);
    parameters.query_gradient = Rows::of_wanted(gradients.query.as_ref());
    parameters.key_gradient = Rows::of_wanted(gradients.key.as_ref());
    parameters.value_gradient = Rows::of_wanted(gradients.value.as_ref());
    let bias_partial =
        gradients.bias.as_ref().map(|_| workspace(&[batch, heads, queries, keys])).transpose()?;
    parameters.bias_partial = bias_partial.as_ref().map_or(std::ptr::null_mut(), Tensor::address);

    let inputs = [&operands.query, &operands.key, &operands.value, &saved.output, &saved.upstream];
    let tensors: Vec<&Tensor> = inputs.into_iter().chain(wanted.into_iter().flatten()).collect();
    let macros = of_operands(dim, operands);
    match Family::of(cuda.properties(), &tensors).backward(dim) {
        Family::Plain => backward_plain(cuda, &op.sizes, &macros, parameters)?,
        Family::Warps => {
            backward_by_warps(cuda, &op.sizes, &macros, parameters, gradients.query.as_ref())?;
        }
        Family::Warpgroups => hopper::backward(cuda, op, operands, saved, gradients, &macros, parameters)?,
    }
    match &gradients.bias {
        Some(bias) => reduce_bias(cuda, &op.sizes, &macros, parameters, bias),
        None => Ok(()),
    }
}

fn backward_plain(
    cuda: &CudaDevice,
    sizes: &Sizes,
    macros: &[(&'static str, String)],
    parameters: Parameters,
) -> Result<()> {
    let geometry = Geometry::backward(Family::Plain, sizes.dim, sizes.queries, cuda.properties());
    let macros = [macros.to_vec(), geometry.macros()].concat();
    let over_queries = ("attention_backward_queries_generic", sizes.queries);
    let over_keys = ("attention_backward_keys_generic", sizes.keys);
    for (name, rows) in [over_queries, over_keys] {
        let launch = geometry.launch([rows.div_ceil(geometry.rows), sizes.heads, sizes.batch]);
        start(cuda, (&GENERIC, name), &macros, launch, Arguments::new().with(parameters))?;
    }
    Ok(())
}

/// One kernel makes all gradients; where it deals the keys to several parts, another adds their `dq`.
fn backward_by_warps(
    cuda: &CudaDevice,
    sizes: &Sizes,
    macros: &[(&'static str, String)],
    mut parameters: Parameters,
    query: Option<&Tensor>,
) -> Result<()> {
    let Sizes { batch, queries, keys, heads, dim } = *sizes;
    let geometry = Geometry::backward(Family::Warps, dim, queries, cuda.properties());
    let own = [macros.to_vec(), geometry.macros()].concat();
    let blocks = keys.div_ceil(geometry.rows);
    let parts = geometry::parts_of_keys(blocks, batch * heads, cuda.properties().multiprocessors);
    let sums = [parts, batch, heads, queries, dim];
    let partial = query
        .filter(|_| blocks > 1)
        .map(|query| Tensor::empty_for(query.device(), &sums, DType::F32, Purpose::Workspace))
        .transpose()?;
    parameters.partial = partial.as_ref().map_or(std::ptr::null_mut(), Tensor::address);
    let launch = geometry.launch([parts, heads, batch]);
    start(cuda, (&BACKWARD_MMA, "attention_backward_mma"), &own, launch, Arguments::new().with(parameters))?;
    match (query, partial) {
        (Some(query), Some(partial)) if parts > 1 => {
            reduce_rows(cuda, macros, query, partial.address(), parts, parameters.scale)
        }
        _ => Ok(()),
    }
}

/// `gradient [B, N, H, D] = factor` times the sum of `partial [parts, B, H, N, D]` over the parts.
fn reduce_rows(
    cuda: &CudaDevice,
    macros: &[(&'static str, String)],
    gradient: &Tensor,
    partial: *mut u8,
    parts: usize,
    factor: f32,
) -> Result<()> {
    let [batch, rows, heads, dim] = [0, 1, 2, 3].map(|axis| gradient.size(axis));
    let arguments = Arguments::new().with(Rows::of(gradient)).with(partial);
    let arguments = arguments.with(rows as i32).with(parts as i32).with(factor);
    let launch = Launch::new([(rows * dim).div_ceil(256), heads, batch], 256);
    start(cuda, (&REDUCE, "attention_reduce_rows"), macros, launch, arguments)
}

/// Zeros in a contiguous tensor.
fn clear(cuda: &CudaDevice, tensor: &Tensor) -> Result<()> {
    // SAFETY: the tensor has these bytes, and zero bits are a zero of every float.
    unsafe { cuda.fill_bytes(tensor.address(), 0, tensor.elements() * tensor.dtype().size())? };
    Ok(())
}

fn reduce_bias(
    cuda: &CudaDevice,
    sizes: &Sizes,
    macros: &[(&'static str, String)],
    parameters: Parameters,
    gradient: &Tensor,
) -> Result<()> {
    let (b, h) = (gradient.size(0), gradient.size(1));
    let arguments = Arguments::new().with(parameters).with(gradient.address()).with(b as i32).with(h as i32);
    let launch = Launch::new([(sizes.queries * sizes.keys).div_ceil(256).min(1 << 20), h, b], 256);
    start(cuda, (&REDUCE, "attention_reduce_bias"), macros, launch, arguments)
}

/// Changes with the text of any kernel, so that what was measured with another text is measured again.
pub(super) fn revision() -> u64 {
    static REVISION: OnceLock<u64> = OnceLock::new();
    *REVISION.get_or_init(|| {
        revision_of(&[FORWARD_MMA, FORWARD_WGMMA, BACKWARD_MMA, BACKWARD_WGMMA, REDUCE, GENERIC])
    })
}

/// Every family at head dims that reach all of its code.
pub(in crate::ops) fn variants() -> Vec<Variant> {
    let variant = |source: Source, common: &[_], geometry: Geometry| Variant {
        source,
        macros: [common.to_vec(), geometry.macros()].concat(),
    };
    let mut all = Vec::new();
    for (dtype, bias, dim) in [
        (DType::BF16, None, 72),
        (DType::BF16, None, 64),
        (DType::F16, None, 80),
        (DType::F16, Some(DType::F32), 40),
    ] {
        // One block of threads, two and four in a cluster, several visits.
        for (queries, clusters) in [(64, true), (256, true), (512, true), (1024, true), (512, false)] {
            let geometry = Geometry::backward_of_warpgroups(dim, queries, clusters);
            all.push(variant(BACKWARD_WGMMA, &macros(dim, dtype, bias), geometry));
        }
    }
    for (dtype, bias, dim) in [(DType::BF16, None, 72), (DType::F16, Some(DType::F32), 128)] {
        let common = macros(dim, dtype, bias);
        all.push(variant(FORWARD_MMA, &common, Geometry::forward_of_warps(dim)));
        for geometry in Geometry::all_backward_of_warps(dim) {
            all.push(variant(BACKWARD_MMA, &common, geometry));
        }
    }
    // Four groups and two, with and without a bias and chunks beyond the panels; wide heads have two in any case. A mask
    // is an argument.
    for (dtype, bias, dim, few) in [
        (DType::BF16, None, 72, false),
        (DType::BF16, None, 72, true),
        (DType::BF16, None, 64, false),
        (DType::F16, None, 80, false),
        (DType::BF16, Some(DType::BF16), 72, false),
        (DType::BF16, Some(DType::BF16), 72, true),
        (DType::F16, Some(DType::F32), 40, false),
        (DType::F16, Some(DType::F32), 80, false),
        (DType::F16, Some(DType::F32), 128, false),
    ] {
        let geometry = Geometry::forward_of_warpgroups(dim, few);
        all.push(variant(FORWARD_WGMMA, &macros(dim, dtype, bias), geometry));
    }
    for (dtype, bias) in [(DType::F32, None), (DType::BF16, Some(DType::F16))] {
        let common = macros(36, dtype, bias);
        for geometry in Geometry::all_plain(36) {
            all.push(variant(GENERIC, &common, geometry));
        }
        all.push(Variant { source: REDUCE, macros: common });
    }
    all
}
