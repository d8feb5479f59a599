//! Copies between layouts: `target[i] = source[i]` for any strides on either side.
//!
//! Not an op of the tape: layouts change in `reshape` and `concat`, whose backward is another copy.

mod cpu;
pub(super) mod cuda;

use crate::{Result, Tensor, TensorError};
use anneal_device::Device;

/// Copies a view into another of the same sizes and dtype. The caller alone writes the target's memory.
///
/// # Panics
/// If sizes or dtypes differ.
pub(crate) fn strided(source: &Tensor, target: &Tensor) -> Result<()> {
    assert_eq!(source.dims(), target.dims());
    assert_eq!(source.dtype(), target.dtype());
    match source.device() {
        Device::Cpu(cpu) => match source.dtype().size() {
            1 => cpu::strided::<u8>(&cpu.pool, source, target),
            2 => cpu::strided::<u16>(&cpu.pool, source, target),
            4 => cpu::strided::<u32>(&cpu.pool, source, target),
            _ => cpu::strided::<u64>(&cpu.pool, source, target),
        },
        Device::Cuda(cuda) => cuda::strided(cuda, source, target)?,
    }
    Ok(())
}

/// A view to fill with the values of another of the same sizes and dtype, or with zeros.
pub(crate) struct Piece {
    pub source: Option<Tensor>,
    pub target: Tensor,
}

/// Fills views of one tensor, on a GPU in one launch for up to 8 of them, or for up to 192 that lie alike. They do not
/// overlap; the caller alone writes their memory.
///
/// # Panics
/// If sizes or dtypes of a pair differ.
pub(crate) fn pieces(pieces: &[Piece]) -> Result<()> {
    let Some(first) = pieces.first() else { return Ok(()) };
    for Piece { source, target } in pieces {
        assert!(source.as_ref().is_none_or(|source| source.dims() == target.dims()));
        assert!(source.as_ref().unwrap_or(target).dtype() == first.target.dtype());
    }
    let Device::Cuda(cuda) = first.target.device() else {
        return pieces.iter().try_for_each(|Piece { source, target }| match source {
            Some(source) => strided(source, target),
            None => {
                let zero = Tensor::zeros(target.device(), &[1], target.dtype())?;
                strided(&zero.view(0, target.dims(), &vec![0; target.rank()]), target)
            }
        });
    };
    cuda::pieces(cuda, pieces)
}

/// Writes `values` into the memory of `target`, which belongs to a store.
///
/// # Errors
/// If sizes or dtypes differ.
pub fn overwrite(target: &Tensor, values: &Tensor) -> Result<()> {
    if target.dims() != values.dims() || target.dtype() != values.dtype() {
        return Err(TensorError::shape("overwrite", format!("{values:?} does not fill {target:?}")));
    }
    strided(values, target)
}
