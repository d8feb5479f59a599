//! Our own products on Hopper, whose epilogue is the activation or its gradient.
//!
//! The library's epilogue holds its matrix units up; ours runs beside the next tile. Forward it saves nothing but the
//! library's delay; backward it saves writing the gradient before the derivative, and reading it back.

use std::sync::OnceLock;

use anneal_device::cuda::{Arguments, Boxes, Launch, Source, Variant, revision as revision_of};
use anneal_device::{CudaDevice, Purpose};

use super::super::gradient_target::GradientTarget;
use super::Activation;
use super::cuda::{SumTargets, add_partials, macros};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source {
    name: "product_wgmma",
    code: concat!(
        include_str!("../hopper.cuh"),
        include_str!("activation.cuh"),
        include_str!("product_wgmma.cu")
    ),
};
/// As in the kernel.
const TILE_ROWS: usize = 128;
const TILE_COLUMNS: usize = 256;
const TILE_DEPTH: usize = 64;
const PANEL_COLUMNS: usize = 64;
const THREADS: usize = 640;
/// Warps of the epilogue.
const FINISHING_WARPS: usize = 8;

fn kernel_macros(dtype: DType, activation: Activation, backward: bool) -> Vec<(&'static str, String)> {
    let mut macros = macros(dtype, activation);
    macros.push(("ELEMENT_IS_BF16", u8::from(dtype == DType::BF16).to_string()));
    macros.push(("BACKWARD", u8::from(backward).to_string()));
    macros
}

pub(super) fn variants() -> Vec<Variant> {
    let kinds = [DType::BF16, DType::F16].map(|dtype| [false, true].map(|backward| (dtype, backward)));
    let all = kinds.into_iter().flatten();
    let all = all.flat_map(|(dtype, backward)| {
        [Activation::GeluTanh, Activation::Silu].map(|activation| kernel_macros(dtype, activation, backward))
    });
    all.map(|macros| Variant { source: SOURCE, macros }).collect()
}

/// Bytes of shared memory of a block, as the kernel lays it out.
fn shared_bytes(backward: bool) -> usize {
    let stages = 3 * (TILE_ROWS + TILE_COLUMNS) * TILE_DEPTH * 2;
    let results = TILE_ROWS * TILE_COLUMNS * 2;
    let extra = if backward { 2 * FINISHING_WARPS * TILE_COLUMNS * 4 } else { 4 * TILE_COLUMNS * 2 };
    stages + results + extra + (2 * 3 + 4) * 8
}

/// Part of the names of choices between these kernels and the library's.
pub(super) fn revision() -> u64 {
    static REVISION: OnceLock<u64> = OnceLock::new();
    *REVISION.get_or_init(|| revision_of(&[SOURCE]))
}

/// Whether the kernels take such matrices: all of one 16-bit type, contiguous, in rows of whole 16 bytes.
pub(super) fn takes(cuda: &CudaDevice, activation: Activation, matrices: &[&Tensor]) -> bool {
    // The instructions are of this generation alone.
    cuda.properties().compute == (9, 0)
        && cuda.properties().shared_memory_per_block >= shared_bytes(true)
        && activation != Activation::None
        && matrices.iter().all(|matrix| {
            let width = if matrix.rank() == 0 { 1 } else { matrix.size(matrix.rank() - 1) };
            let places = matrix.elements() / width.max(1);
            matches!(matrix.dtype(), DType::BF16 | DType::F16)
                && matrix.dtype() == matrices[0].dtype()
                && matrix.is_contiguous()
                && width.is_multiple_of(8)
                && (1..1 << 31).contains(&places)
                && (matrix.address() as usize).is_multiple_of(16)
        })
}

/// `p = x W^T + b` into `preactivation` if given, and `y = act(p)`; [`takes`] said yes to all.
pub(super) fn activated(
    cuda: &CudaDevice,
    activation: Activation,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    preactivation: Option<&Tensor>,
    y: &Tensor,
) -> Result<()> {
    let address = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), Tensor::address);
    let b = Matrix { memory: weight, box_rows: TILE_COLUMNS / 2 };
    let written = [y.address(), address(preactivation), std::ptr::null_mut(), std::ptr::null_mut()];
    launch(cuda, kernel_macros(x.dtype(), activation, false), x, b, address(bias), written)
}

/// `y = (g W) act'(p)`, `hidden = act(p)`, and the sums of y over rows into `bias`; hidden may be p. [`takes`] said
/// yes to all.
pub(super) fn activation_gradient(
    cuda: &CudaDevice,
    activation: Activation,
    gradient: &Tensor,
    weight: &Tensor,
    preactivation: &Tensor,
    hidden: &Tensor,
    y: &Tensor,
    bias: Option<&GradientTarget>,
) -> Result<()> {
    let columns = y.size(y.rank() - 1);
    let parts = (y.elements() / columns).div_ceil(TILE_ROWS);
    let partials = Tensor::empty_for(y.device(), &[1, parts, columns], DType::F32, Purpose::Workspace)?;
    let b = Matrix { memory: weight, box_rows: TILE_DEPTH / 2 };
    let written = [y.address(), preactivation.address(), hidden.address(), partials.address()];
    let macros = kernel_macros(gradient.dtype(), activation, true);
    launch(cuda, macros, gradient, b, std::ptr::null_mut(), written)?;
    bias.map_or(Ok(()), |bias| add_partials(cuda, &partials, y.dtype(), SumTargets::one(bias)))
}

/// The second factor as it lies in memory, and the rows of its boxes.
struct Matrix<'a> {
    memory: &'a Tensor,
    box_rows: usize,
}

/// The product of `a` and `b`; `written` are y, p, h and the partial sums.
fn launch(
    cuda: &CudaDevice,
    macros: Vec<(&'static str, String)>,
    a: &Tensor,
    b: Matrix,
    bias: *mut u8,
    written: [*mut u8; 4],
) -> Result<()> {
    let backward = macros.contains(&("BACKWARD", "1".into()));
    let kernel = cuda.kernel(&SOURCE, "product_wgmma", &macros)?;
    let depth = a.size(a.rank() - 1);
    let rows = a.elements() / depth;
    // A weight may have more dimensions, which are columns.
    let b_rows = b.memory.size(0);
    let b_columns = b.memory.elements() / b_rows;
    let columns = if backward { b_columns } else { b_rows };
    let element = a.dtype().element_type("linear")?;
    let map = |matrix: &Tensor, sizes: [usize; 2], box_rows| {
        let (strides, sides) = ([sizes[1], 1], [box_rows, PANEL_COLUMNS]);
        cuda.tensor_map(&Boxes { address: matrix.address(), element, sizes, strides, sides })
    };
    let mut arguments = Arguments::new()
        .with(map(a, [rows, depth], TILE_ROWS)?)
        .with(map(b.memory, [b_rows, b_columns], b.box_rows)?)
        .with(bias);
    written.iter().for_each(|address| arguments.push(*address));
    let arguments = arguments.with(rows as i32).with(columns as i32).with(depth as i32);
    let clusters = rows.div_ceil(2 * TILE_ROWS) * columns.div_ceil(TILE_COLUMNS);
    let blocks = 2 * clusters.min(cuda.properties().multiprocessors / 2);
    let launch = Launch::new(blocks, THREADS).shared(shared_bytes(backward));
    // SAFETY: the matrices have the sizes that the kernel is told, and what is written was checked by the callers.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}
