use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::element;
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "softmax", code: include_str!("kernel.cu") };
/// Threads of a block (`THREADS` in the kernel), and of a warp.
const THREADS: usize = 256;
const WARP: usize = 32;
/// Rows of at most this many elements are a warp's work.
const SHORT: usize = 1024;

fn macros(dtype: DType, lanes: usize) -> Vec<(&'static str, String)> {
    let mut macros = element("ELEMENT", dtype);
    macros.push(("LANES", lanes.to_string()));
    macros
}

/// Rows, width, and the threads of a row.
fn rows(x: &Tensor) -> (usize, usize, usize) {
    let width = *x.dims().last().expect("a scalar was refused");
    (x.elements() / width.max(1), width, if width <= SHORT { WARP } else { THREADS })
}

/// `y` of a contiguous `x` of its shape and dtype.
pub(super) fn forward(cuda: &CudaDevice, x: &Tensor, y: &Tensor) -> Result<()> {
    launch(cuda, "softmax", &[x], y)
}

/// `dx` may be the memory of the gradient.
pub(super) fn backward(cuda: &CudaDevice, gradient: &Tensor, y: &Tensor, dx: &Tensor) -> Result<()> {
    launch(cuda, "softmax_gradient", &[gradient, y], dx)
}

fn launch(cuda: &CudaDevice, name: &'static str, inputs: &[&Tensor], out: &Tensor) -> Result<()> {
    let (rows, width, lanes) = rows(out);
    if rows == 0 {
        return Ok(());
    }
    let kernel = cuda.kernel(&SOURCE, name, &macros(out.dtype(), lanes))?;
    let mut arguments = Arguments::new();
    inputs.iter().for_each(|input| arguments.push(input.address()));
    let arguments = arguments.with(out.address()).with(rows as i64).with(width as i64);
    let launch = Launch::new(rows.div_ceil(THREADS / lanes), THREADS);
    // SAFETY: all tensors are contiguous, of one shape and of the dtype that the kernel was compiled for.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let pairs = dtypes.iter().flat_map(|dtype| [WARP, THREADS].map(|lanes| (*dtype, lanes)));
    pairs.map(|(dtype, lanes)| Variant { source: SOURCE, macros: macros(dtype, lanes) }).collect()
}
