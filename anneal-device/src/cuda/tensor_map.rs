//! Arrays described to the engine that copies boxes of them (Hopper on).

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::check;
use crate::DeviceError;
use crate::cpu::ElementType;

/// What a kernel gets to copy boxes of an array by: 128 bytes that mean something to the device alone, an argument like
/// any number.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TensorMap([u64; 16]);

/// What the driver wants a map to be aligned to while it writes it.
#[repr(C, align(64))]
struct Aligned(TensorMap);

/// An array in memory and the boxes of it that a map is for: sizes, strides in elements and a box's sides, the last of
/// each being that of neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Boxes<const RANK: usize> {
    pub address: *const u8,
    pub element: ElementType,
    pub sizes: [usize; RANK],
    pub strides: [usize; RANK],
    pub sides: [usize; RANK],
}

/// Bytes of a row of a box whose chunks of 16 bytes lie in shared memory exchanged by the row (swizzled).
const SWIZZLED: usize = 128;

impl CudaDevice {
    /// A map for boxes, which lie in shared memory row after row, swizzled where a row has 128 bytes. What lies outside
    /// of the array is read as zeros and not written.
    ///
    /// # Errors
    /// If the driver refuses: the address and the strides' bytes are multiples of 16, the last stride is 1, and a side is
    /// 1 to 256.
    pub fn tensor_map<const RANK: usize>(&self, boxes: &Boxes<RANK>) -> Result<TensorMap, DeviceError> {
        let kind = match boxes.element {
            ElementType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            ElementType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            ElementType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let bytes = boxes.element.size();
        let swizzle = match boxes.sides[RANK - 1] * bytes {
            SWIZZLED => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        // The driver begins with neighbours, whose stride it knows.
        let sizes: [u64; RANK] = std::array::from_fn(|axis| boxes.sizes[RANK - 1 - axis] as u64);
        let sides: [u32; RANK] = std::array::from_fn(|axis| boxes.sides[RANK - 1 - axis] as u32);
        let pitches: [u64; RANK] = std::array::from_fn(|axis| match (RANK - 1).checked_sub(axis + 1) {
            // A stride that stands for no step may be anything, here what the driver takes.
            Some(outer) if boxes.sizes[outer] > 1 => (boxes.strides[outer] * bytes) as u64,
            _ => 16,
        });
        let steps = [1u32; RANK];
        let mut map = Aligned(TensorMap([0; 16]));
        // SAFETY: a map has RANK sizes, sides of a box and steps, and RANK - 1 pitches.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map.0).cast(),
                kind,
                RANK as u32,
                boxes.address.cast_mut().cast(),
                sizes.as_ptr(),
                pitches.as_ptr(),
                sides.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", self.ordinal(), result)?;
        Ok(map.0)
    }
}
