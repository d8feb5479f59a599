//! Operands that the library cannot read where they lie, copied to where it can.

use std::hash::Hash;

use cudarc::driver::sys;

use super::super::driver::check;
use super::{CudaDevice, Operand, Output, Product};
use crate::cpu::ElementType;
use crate::{Buffer, DeviceError, Purpose};

/// A matrix of stored rows: bytes of a row, number of rows, bytes between their starts.
#[derive(Clone, Copy, Hash)]
struct Rows {
    width: usize,
    count: usize,
    pitch: usize,
}

impl Rows {
    fn new(width: usize, count: usize, leading: usize, element: ElementType) -> Self {
        Self { width: width * element.size(), count, pitch: leading * element.size() }
    }

    /// The same with rows that start on multiples of 16 bytes.
    fn aligned(self) -> Self {
        Self { pitch: self.width.next_multiple_of(16), ..self }
    }
}

impl CudaDevice {
    /// The product of aligned copies, with C copied back; whether the library takes those.
    ///
    /// # Safety
    /// As [`CudaDevice::matmul`].
    pub(super) unsafe fn matmul_of_copies(&self, product: &Product) -> Result<bool, DeviceError> {
        let c = &product.c;
        let rows = Rows::new(product.columns, product.rows, c.leading, c.element);
        let output = self.allocate(rows.aligned().pitch * rows.count, Purpose::Workspace)?;
        // SAFETY: the buffers have the sizes of what is copied; the rest is the caller's promise.
        unsafe {
            if product.accumulate {
                self.copy_rows(c.pointer, rows, output.as_ptr(), rows.aligned())?;
            }
            let (a, _a) = self.aligned_copy(&product.a, product.rows, product.depth)?;
            let (b, _b) = self.aligned_copy(&product.b, product.depth, product.columns)?;
            let leading = rows.aligned().pitch / c.element.size();
            let c_copy = Output::new(output.as_ptr(), c.element, leading);
            let bias_bytes = product.columns * c.element.size();
            let bias_copy =
                product.bias.map(|_| self.allocate(bias_bytes, Purpose::Workspace)).transpose()?;
            if let (Some(bias), Some(copy)) = (product.bias, &bias_copy) {
                self.copy(bias, copy.as_ptr(), bias_bytes)?;
            }
            let bias = bias_copy.as_ref().map(|copy| copy.as_ptr().cast_const());
            let copies = Product { a, b, c: c_copy, bias, ..*product };
            let taken = self.matmul_where_it_lies(&copies)?;
            if taken {
                self.copy_rows(output.as_ptr(), rows.aligned(), c.pointer, rows)?;
            }
            Ok(taken)
        }
    }

    unsafe fn aligned_copy(
        &self,
        operand: &Operand,
        rows: usize,
        columns: usize,
    ) -> Result<(Operand, Buffer), DeviceError> {
        let (count, width) = if operand.transposed { (columns, rows) } else { (rows, columns) };
        let stored = Rows::new(width, count, operand.leading, operand.element);
        let buffer = self.allocate(stored.aligned().pitch * count, Purpose::Workspace)?;
        // SAFETY: the buffer has this size, and the operand is readable.
        unsafe { self.copy_rows(operand.pointer, stored, buffer.as_ptr(), stored.aligned())? };
        let leading = stored.aligned().pitch / operand.element.size();
        Ok((Operand { pointer: buffer.as_ptr(), leading, ..*operand }, buffer))
    }

    unsafe fn copy_rows(
        &self,
        source: *const u8,
        from: Rows,
        target: *mut u8,
        to: Rows,
    ) -> Result<(), DeviceError> {
        let hash = |hasher: &mut std::hash::DefaultHasher| {
            (source as usize, from, target as usize, to).hash(hasher);
        };
        if !self.admit("copy", hash)? {
            return Ok(());
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: source as u64,
            srcArray: std::ptr::null_mut(),
            srcPitch: from.pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: target as u64,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.pitch,
            WidthInBytes: from.width,
            Height: from.count,
        };
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream()) };
        check("cuMemcpy2DAsync", self.ordinal(), result)
    }
}
