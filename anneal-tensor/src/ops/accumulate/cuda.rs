use anneal_device::CudaDevice;

use crate::ops::{binary, cast, copy};
use crate::{DType, Result, Tensor};

/// `sink (+)= gradient`, both contiguous with as many elements.
pub(super) fn into_f32(cuda: &CudaDevice, sink: &Tensor, gradient: &Tensor, accumulate: bool) -> Result<()> {
    let gradient = gradient.piece(0, sink.dims())?;
    match (accumulate, gradient.dtype()) {
        (true, _) => binary::cuda::sum(cuda, sink, &gradient, sink),
        (false, DType::F32) => copy::strided(&gradient, sink),
        (false, _) => cast::cuda::convert(cuda, &gradient, sink),
    }
}
