//! What the CUDA sides of the ops share: names of element types, and the list of all kernels.

use anneal_device::CudaDevice;
use anneal_device::cuda::Variant;

use crate::DType;

/// The macros `NAME` (an element type of the prelude) and, where it is f32, `PRECISE`.
pub fn element(name: &'static str, dtype: DType) -> Vec<(&'static str, String)> {
    let kind = match dtype {
        DType::F32 => "float",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::I64 => "i64",
        DType::U8 => "u8",
    };
    let mut macros = vec![(name, kind.to_string())];
    if dtype == DType::F32 {
        macros.push(("PRECISE", "1".into()));
    }
    macros
}

/// Blocks enough to keep every multiprocessor busy, for kernels that stride over the rest.
pub(crate) fn blocks_to_fill(cuda: &CudaDevice) -> usize {
    cuda.properties().multiprocessors * 16
}

/// Every kernel source with macros that reach all of its code, to be compiled where no GPU is.
pub fn catalogue() -> Vec<Variant> {
    crate::ops::kernel_variants()
}
