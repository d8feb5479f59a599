use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::blocks_to_fill;
use crate::ops::elementwise::Walk;
use crate::ops::elementwise::cuda::WIDEST;
use crate::{Result, Tensor};

const SOURCE: Source = Source {
    name: "copy",
    code: concat!(include_str!("../elementwise/walk.cuh"), include_str!("kernel.cu")),
};
const THREADS: usize = 256;
/// Words that a thread copies at a time (`AHEAD` in the kernel).
const AHEAD: usize = 4;

fn macros(bytes: usize, size: usize, index: String) -> Vec<(&'static str, String)> {
    vec![("BYTES", bytes.to_string()), ("SIZE", size.to_string()), ("INDEX", index)]
}

/// Copies a view into another of the same sizes and dtype.
pub(super) fn strided(cuda: &CudaDevice, source: &Tensor, target: &Tensor) -> Result<()> {
    let (count, size) = (source.elements(), source.dtype().size());
    if count == 0 {
        return Ok(());
    }
    if source.is_contiguous() && target.is_contiguous() {
        // SAFETY: both have as many bytes, and a target is not the memory of its source.
        unsafe { cuda.copy(source.address(), target.address(), count * size)? };
        return Ok(());
    }
    let walk = Walk::new(source.dims(), [source.strides(), target.strides()]);
    let fits = |pack: usize| {
        walk.inner.0.is_multiple_of(pack)
            && walk.packs(0, source.address(), pack, size)
            && walk.packs(1, target.address(), pack, size)
    };
    let pack = [16, 8, 4, 2].into_iter().find(|pack| pack * size <= WIDEST && fits(*pack)).unwrap_or(1);
    let (argument, words) = (walk.argument("copy", pack)?, count / pack);
    let kernel = cuda.kernel(&SOURCE, "copy_strided", &macros(pack * size, size, argument.index(words)))?;
    let arguments =
        Arguments::new().with(source.address()).with(target.address()).with(argument).with(words as u64);
    let launch = Launch::over(words.div_ceil(AHEAD), THREADS, blocks_to_fill(cuda));
    // SAFETY: the walk stays within the views, whose strides and element size these are.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let sizes = [1, 2, 4, 8];
    let words = [1, 2, 4, 8, 16];
    let pairs = sizes.iter().flat_map(|size| words.iter().map(move |bytes| (*bytes, *size)));
    let mut all: Vec<Variant> = pairs
        .filter(|(bytes, size)| bytes >= size)
        .map(|(bytes, size)| Variant { source: SOURCE, macros: macros(bytes, size, "u32".into()) })
        .collect();
    all.push(Variant { source: SOURCE, macros: macros(4, 4, "u64".into()) });
    all
}
