//! Memory full of noise that stands in for an operand while products are measured.

use super::super::launch::{Arguments, Launch, start};
use super::super::{Source, Variant};
use super::{CudaDevice, Operand};
use crate::cpu::ElementType;
use crate::{Buffer, DeviceError, Purpose};

const SOURCE: Source = Source { name: "noise", code: include_str!("noise.cu") };

fn macros(element: ElementType) -> [(&'static str, String); 1] {
    let name = match element {
        ElementType::F32 => "float",
        ElementType::Bf16 => "bf16",
        ElementType::F16 => "f16",
    };
    [("ELEMENT", name.into())]
}

/// The kernels of this crate, to be compiled ahead.
pub fn variants() -> Vec<Variant> {
    let elements = [ElementType::F32, ElementType::Bf16, ElementType::F16];
    elements.map(|element| Variant { source: SOURCE, macros: macros(element).into() }).into()
}

impl CudaDevice {
    /// Noise laid out as an operand of `[rows, columns]`; none where memory lacks. It is no work of the step.
    pub(super) fn noise_like(
        &self,
        operand: &Operand,
        rows: usize,
        columns: usize,
    ) -> Result<Option<Buffer>, DeviceError> {
        let count = operand.leading * if operand.transposed { columns } else { rows };
        let Ok(buffer) = self.allocate(count * operand.element.size(), Purpose::Workspace) else {
            return Ok(None);
        };
        // SAFETY: the buffer holds so many elements.
        unsafe { self.fill_with_noise(buffer.as_ptr(), operand.element, count)? };
        Ok(Some(buffer))
    }

    /// Fills memory with noise, for [`Self::choose`] to measure on. It is no work of the step.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// `memory` is this device's, and holds `count` elements.
    pub unsafe fn fill_with_noise(
        &self,
        memory: *mut u8,
        element: ElementType,
        count: usize,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel(&SOURCE, "noise", &macros(element))?;
        let mut arguments = Arguments::new().with(memory).with(count as i64);
        let launch = Launch::over(count, 256, self.properties().multiprocessors * 16);
        // SAFETY: the caller's promise.
        unsafe { start(self.ordinal(), self.stream(), kernel, launch, &mut arguments) }
    }
}
