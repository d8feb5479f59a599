//! Where the gradient of an input that many rows share is summed: straight into a parameter's
//! sink, or into f32 memory that is given afterwards.

use anneal_device::Device;

use crate::{BackwardPass, DType, Result, Tensor};

pub(crate) struct GradientTarget {
    input: usize,
    /// Contiguous, of the input's sizes; f32 unless made by [`Self::of_dtype`].
    pub gradient: Tensor,
    /// Whether to add to what is there; otherwise contents are unspecified and overwritten.
    pub accumulate: bool,
    is_sink: bool,
}

impl GradientTarget {
    /// For an input of these sizes; `None` if its gradient is not wanted.
    pub fn new(pass: &BackwardPass, input: usize, device: &Device, sizes: &[usize]) -> Result<Option<Self>> {
        Self::of_dtype(pass, input, device, sizes, DType::F32)
    }

    /// The same, in this dtype if it is no sink (those are f32): for kernels that round each sum as they
    /// write it, which spares a pass over the gradient.
    pub fn of_dtype(
        pass: &BackwardPass,
        input: usize,
        device: &Device,
        sizes: &[usize],
        dtype: DType,
    ) -> Result<Option<Self>> {
        if !pass.needs(input) {
            return Ok(None);
        }
        Ok(Some(match pass.sink(input)? {
            Some(sink) => Self { input, gradient: sink.gradient, accumulate: sink.accumulate, is_sink: true },
            None => {
                let gradient = Tensor::empty(device, sizes, dtype)?;
                Self { input, gradient, accumulate: false, is_sink: false }
            }
        }))
    }

    /// After writing: hands the gradient over in the input's dtype, unless it lies in its sink already.
    pub fn give(self, pass: &mut BackwardPass, dtype: DType) -> Result<()> {
        if self.is_sink { Ok(()) } else { pass.give(self.input, super::cast(&self.gradient, dtype)?) }
    }
}
