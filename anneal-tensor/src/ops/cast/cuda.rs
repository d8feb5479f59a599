use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::{blocks_to_fill, element};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "cast", code: include_str!("kernel.cu") };
const THREADS: usize = 256;

fn macros(from: DType, to: DType) -> Vec<(&'static str, String)> {
    [element("FROM", from), element("TO", to)].concat()
}

/// `output = input`, both contiguous.
pub(in crate::ops) fn convert(cuda: &CudaDevice, input: &Tensor, output: &Tensor) -> Result<()> {
    let kernel = cuda.kernel(&SOURCE, "cast", &macros(input.dtype(), output.dtype()))?;
    let count = input.elements();
    let arguments = Arguments::new().with(input.address()).with(output.address()).with(count as i64);
    let launch = Launch::over(count.div_ceil(4), THREADS, blocks_to_fill(cuda));
    // SAFETY: both tensors hold `count` elements of the types that the kernel was compiled for.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let floats = [DType::F32, DType::BF16, DType::F16];
    let pairs = floats.iter().flat_map(|from| floats.iter().map(move |to| (*from, *to)));
    pairs
        .filter(|(from, to)| from != to)
        .map(|(from, to)| Variant { source: SOURCE, macros: macros(from, to) })
        .collect()
}
