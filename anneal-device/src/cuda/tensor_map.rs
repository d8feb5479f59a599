//! Matrices described to the engine that copies boxes of them (Hopper on).

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::check;
use crate::DeviceError;
use crate::cpu::ElementType;

/// What a kernel gets to copy boxes of a matrix by: 128 bytes that mean something to the device alone, an argument like
/// any number.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TensorMap([u64; 16]);

/// What the driver wants a map to be aligned to while it writes it.
#[repr(C, align(64))]
struct Aligned(TensorMap);

impl CudaDevice {
    /// A map of `[rows, columns]` in memory, row after row, for boxes of `box_rows` rows by 128 bytes, whose chunks of
    /// 16 bytes lie in shared memory exchanged by the row (swizzled). What lies outside of the matrix is copied
    /// as zeros.
    ///
    /// # Errors
    /// If the driver refuses: the address and the rows' bytes are multiples of 16, and 1 to 256 rows make a box.
    pub fn tensor_map(
        &self,
        address: *const u8,
        element: ElementType,
        [rows, columns]: [usize; 2],
        box_rows: usize,
    ) -> Result<TensorMap, DeviceError> {
        let kind = match element {
            ElementType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            ElementType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            ElementType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let mut map = Aligned(TensorMap([0; 16]));
        let sizes = [columns as u64, rows as u64];
        let pitch = [(columns * element.size()) as u64];
        let boxes = [(128 / element.size()) as u32, box_rows as u32];
        let steps = [1u32; 2];
        // SAFETY: a map of two dimensions has two sizes, one pitch, two sides of a box and two steps.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map.0).cast(),
                kind,
                2,
                address.cast_mut().cast(),
                sizes.as_ptr(),
                pitch.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", self.ordinal(), result)?;
        Ok(map.0)
    }
}
