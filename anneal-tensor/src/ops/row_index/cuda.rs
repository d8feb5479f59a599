use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::element;
use crate::ops::elementwise::cuda::WIDEST;
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "row_index", code: include_str!("kernel.cu") };
const WARP: usize = 32;
const MOST_THREADS: usize = 256;
/// Elements of an access of `place`, whose sums are f32.
const PLACED: usize = 4;

fn macros(dtype: DType, pack: usize) -> Vec<(&'static str, String)> {
    let mut macros = element("ELEMENT", dtype);
    macros.push(("PACK", pack.to_string()));
    macros
}

/// `pack` if rows of this width can be accessed in packs of so many elements, else one.
fn pack(pack: usize, width: usize, tensors: [&Tensor; 2]) -> usize {
    let aligned = |tensor: &Tensor| (tensor.address() as usize).is_multiple_of(pack * tensor.dtype().size());
    if width.is_multiple_of(pack) && tensors.into_iter().all(aligned) { pack } else { 1 }
}

/// Enough threads for a row of so many packs, in whole warps.
fn threads(packs: usize) -> usize {
    packs.next_multiple_of(WARP).min(MOST_THREADS)
}

/// `output[g, k] = x[g, index[g, k]]`, with x of `[groups, rows, width]`; NaN where an index is outside.
pub(super) fn pick(
    cuda: &CudaDevice,
    x: &Tensor,
    index: &Tensor,
    [groups, rows, width]: [usize; 3],
    output: &Tensor,
) -> Result<()> {
    if output.elements() == 0 {
        return Ok(());
    }
    let pack = pack(WIDEST / x.dtype().size(), width, [x, output]);
    let kernel = cuda.kernel(&SOURCE, "pick", &macros(x.dtype(), pack))?;
    let arguments = Arguments::new()
        .with(x.address())
        .with(index.address())
        .with(output.address())
        .with(rows as u64)
        .with((index.elements() / groups) as u64)
        .with(width as u64);
    let launch = Launch::new(index.elements(), threads(width / pack));
    // SAFETY: the output has a row for each index, and rows outside of x are not read.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

/// `target[g, index[g, k]] += x[g, k]`, starting from zero unless `accumulate`; an index outside is ignored.
pub(super) fn place(
    cuda: &CudaDevice,
    x: &Tensor,
    index: &Tensor,
    [groups, rows, width]: [usize; 3],
    target: &Tensor,
    accumulate: bool,
) -> Result<()> {
    if target.elements() == 0 {
        return Ok(());
    }
    let pack = pack(PLACED, width, [x, target]);
    let kernel = cuda.kernel(&SOURCE, "place", &macros(x.dtype(), pack))?;
    let arguments = Arguments::new()
        .with(x.address())
        .with(index.address())
        .with(target.address())
        .with(rows as u64)
        .with((index.elements() / groups) as u64)
        .with(width as u64)
        .with(u32::from(accumulate));
    let threads = threads(width / pack);
    let launch = Launch::new([groups * rows, (width / pack).div_ceil(threads)], threads);
    // SAFETY: x has a row for each index, and each row of the target belongs to one block.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let variant = |dtype: DType, pack| Variant { source: SOURCE, macros: macros(dtype, pack) };
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    dtypes
        .into_iter()
        .flat_map(|dtype| [1, PLACED, WIDEST / dtype.size()].map(|pack| variant(dtype, pack)))
        .collect()
}
