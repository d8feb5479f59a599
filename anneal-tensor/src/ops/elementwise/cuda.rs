use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use super::{Walk, broadcast_strides};
use crate::kernels::{blocks_to_fill, element};
use crate::{DType, Result, Tensor, TensorError};

const THREADS: usize = 256;
/// Bytes of the widest access.
pub(crate) const WIDEST: usize = 16;
/// The most dimensions, after merging, that a kernel walks (`MOST_AXES` in walk.cuh).
const MOST_AXES: usize = 6;

/// `Walk` of walk.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct WalkArgument<const N: usize> {
    axes: u64,
    sizes: [u64; MOST_AXES],
    strides: [[u64; MOST_AXES]; N],
}

impl<const N: usize> WalkArgument<N> {
    /// Dimensions with the strides of each operand, innermost first; `pack` neighbours of the
    /// innermost count as one.
    ///
    /// # Errors
    /// If there are more than kernels walk.
    pub fn new(
        op: &'static str,
        axes: impl Iterator<Item = (usize, [usize; N])>,
        pack: usize,
    ) -> Result<Self> {
        let mut argument = Self { axes: 0, sizes: [0; MOST_AXES], strides: [[0; MOST_AXES]; N] };
        for (axis, (size, steps)) in axes.enumerate() {
            if axis == MOST_AXES {
                let message = format!("more than {MOST_AXES} dimensions that do not merge");
                return Err(TensorError::shape(op, message));
            }
            let width = if axis == 0 { pack } else { 1 };
            argument.axes += 1;
            argument.sizes[axis] = (size / width) as u64;
            for (operand, step) in steps.into_iter().enumerate() {
                argument.strides[operand][axis] = (step * width) as u64;
            }
        }
        Ok(argument)
    }

    /// The narrowest type that holds all positions and offsets (INDEX of walk.cuh).
    pub fn index(&self, count: usize) -> String {
        let reach = |strides: &[u64; MOST_AXES]| -> u64 {
            self.sizes.iter().zip(strides).map(|(size, stride)| size * stride).sum()
        };
        let most = self.strides.iter().map(reach).fold(count as u64, u64::max);
        // Half of what 32 bits hold: a thread's position may pass the end by the width of the grid.
        if most < 1 << 31 { "u32".into() } else { "u64".into() }
    }
}

impl<const N: usize> Walk<N> {
    /// What a kernel walks, in packs of the inner dimension.
    pub fn argument(&self, op: &'static str, pack: usize) -> Result<WalkArgument<N>> {
        let axes = std::iter::once(&self.inner).chain(self.outer.iter().rev());
        WalkArgument::new(op, axes.copied(), pack)
    }

    /// Whether an operand with this address and element size can be read in packs of neighbours.
    pub fn packs(&self, operand: usize, address: *mut u8, pack: usize, size: usize) -> bool {
        self.inner.1[operand] == 1
            && (address as usize).is_multiple_of(pack * size)
            && self.outer.iter().all(|(_, steps)| steps[operand].is_multiple_of(pack))
    }
}

/// An element-wise function: `of::f` of a source for the kernel `map_f`, and two numbers for it. The
/// numbers are arguments of a kernel, so in a captured step they must be constants.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    pub source: Source,
    pub kernel: &'static str,
    pub numbers: [f32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Operands<const N: usize>([*mut u8; N]);

/// `out[i] = f(inputs[i])`, each input broadcast to the sizes of the contiguous `out`, which may be
/// the memory of an input of the same layout.
///
/// # Errors
/// If the kernel does not compile, or too many dimensions do not merge.
pub(crate) fn map<const N: usize>(
    cuda: &CudaDevice,
    function: Function,
    inputs: [&Tensor; N],
    out: &Tensor,
) -> Result<()> {
    assert!(out.is_contiguous(), "the result of an element-wise function must be contiguous");
    let count = out.elements();
    if count == 0 {
        return Ok(());
    }
    let strides = inputs.map(|input| broadcast_strides(input, out.dims()));
    let walk: Walk<N> = Walk::new(out.dims(), std::array::from_fn(|operand| &strides[operand][..]));
    let dtypes = inputs.map(|input| input.dtype());
    let most = widest_pack(&dtypes, out.dtype());
    let in_packs = (walk.outer.is_empty() || walk.inner.0.is_multiple_of(most))
        && (out.address() as usize).is_multiple_of(most * out.dtype().size())
        && (0..N).all(|operand| {
            let (address, size) = (inputs[operand].address(), dtypes[operand].size());
            walk.inner.1[operand] == 0 || walk.packs(operand, address, most, size)
        });
    let pack = if in_packs { most } else { 1 };
    let argument = walk.argument(function.kernel, pack)?;
    let macros = macros(function, &dtypes, out.dtype(), pack, argument.index(count));
    let kernel = cuda.kernel(&function.source, function.kernel, &macros)?;
    let [first, second] = function.numbers;
    let arguments = Arguments::new()
        .with(Operands(inputs.map(Tensor::address)))
        .with(out.address())
        .with(argument)
        .with(count as u64)
        .with(first)
        .with(second);
    let launch = Launch::over(count.div_ceil(pack), THREADS, blocks_to_fill(cuda));
    // SAFETY: the walk stays within the views, whose strides and types these are.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

/// How many elements the widest access of the widest type holds.
fn widest_pack(inputs: &[DType], out: DType) -> usize {
    let size = inputs.iter().map(|dtype| dtype.size()).fold(out.size(), usize::max);
    WIDEST / size
}

fn macros(
    function: Function,
    inputs: &[DType],
    out: DType,
    pack: usize,
    index: String,
) -> Vec<(&'static str, String)> {
    let name = function.kernel.strip_prefix("map_").expect("kernels of functions are named map_f");
    let mut macros = vec![
        ("NAME", function.kernel.to_string()),
        ("FUNCTION", format!("of::{name}")),
        ("INPUTS", inputs.len().to_string()),
        ("PACK", pack.to_string()),
        ("INDEX", index),
    ];
    macros.extend(element("OUT", out));
    for (name, dtype) in ["T0", "T1", "T2", "T3"].into_iter().zip(inputs) {
        macros.extend(element(name, *dtype));
    }
    macros
}

/// The kernel of a function for operands of these types.
pub(crate) fn variant(function: Function, inputs: &[DType], out: DType) -> Variant {
    let macros = macros(function, inputs, out, widest_pack(inputs, out), "u32".into());
    Variant { source: function.source, macros }
}

/// A function's kernel in its rarer forms: elements one by one, and memory beyond the reach of 32 bits.
pub(crate) fn rare_variant(function: Function, inputs: &[DType], out: DType) -> Variant {
    Variant { source: function.source, macros: macros(function, inputs, out, 1, "u64".into()) }
}
