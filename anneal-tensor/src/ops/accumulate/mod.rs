//! Sums of gradients: `a + b`, and `sink (+)= g`.
//!
//! Not an op of the tape: backward itself uses it where a value has several consumers.

mod cpu;
mod cuda;

use super::binary;
use crate::{DType, Result, Sink, Tensor, TensorError};
use anneal_device::Device;

/// `a + b` in the dtype of `a`, in the memory of either where nobody else holds it.
pub(crate) fn add_owned(a: Tensor, b: Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() || a.dtype() != b.dtype() {
        let message = format!("gradients of one value differ: {a:?} and {b:?}");
        return Err(TensorError::Backward { message });
    }
    let (mut a, mut b) = (a.contiguous()?, b.contiguous()?);
    if !a.is_unique() && b.is_unique() {
        std::mem::swap(&mut a, &mut b);
    }
    if !a.is_unique() {
        let copy = Tensor::empty(a.device(), a.dims(), a.dtype())?;
        super::copy::strided(&a, &copy)?;
        a = copy;
    }
    match a.device().clone() {
        Device::Cpu(cpu) => cpu::add_assign(&cpu.pool, &mut a, &b)?,
        Device::Cuda(cuda) => binary::cuda::sum(&cuda, &a, &b, &a)?,
    }
    Ok(a)
}

/// Writes or adds `gradient` (any float dtype, any strides) into an f32 sink.
pub(crate) fn into_sink(op: &'static str, mut sink: Sink, gradient: &Tensor) -> Result<()> {
    if sink.gradient.elements() != gradient.elements() || sink.gradient.dtype() != DType::F32 {
        let message = format!("{op} gave {gradient:?} for a parameter whose sink is {:?}", sink.gradient);
        return Err(TensorError::Backward { message });
    }
    let gradient = gradient.contiguous()?;
    match gradient.device().clone() {
        Device::Cpu(cpu) => cpu::into_f32(&cpu.pool, &mut sink.gradient, &gradient, sink.accumulate),
        Device::Cuda(cuda) => cuda::into_f32(&cuda, &sink.gradient, &gradient, sink.accumulate),
    }
}
