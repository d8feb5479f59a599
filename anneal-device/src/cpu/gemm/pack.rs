//! Packing: panels of an operand, converted to f32, in the order in which a kernel reads them.

use half::{bf16, f16};

use super::super::element::{Element, ElementType};
use super::super::vectorize;
use super::kernel::{Kernel, Panel};

/// Packs one panel.
///
/// # Safety
/// The source covers `lanes` by `depth`, the target `width` by `depth`.
pub(super) unsafe fn pack(kernel: &Kernel, panel: &Panel) {
    // SAFETY: passed on.
    unsafe {
        if panel.lane_stride == 1 {
            match panel.element {
                ElementType::F32 => contiguous::<f32>(panel),
                ElementType::Bf16 => contiguous::<bf16>(panel),
                ElementType::F16 => contiguous::<f16>(panel),
            }
        } else if panel.depth_stride == 1 {
            (kernel.pack_transposed)(panel);
        } else {
            transposed(panel);
        }
    }
}

/// Any strides, lane by lane.
///
/// # Safety
/// As [`pack`].
pub(super) unsafe fn transposed(panel: &Panel) {
    // SAFETY: passed on.
    unsafe {
        match panel.element {
            ElementType::F32 => strided::<f32>(panel),
            ElementType::Bf16 => strided::<bf16>(panel),
            ElementType::F16 => strided::<f16>(panel),
        }
    }
}

unsafe fn strided<T: Element>(panel: &Panel) {
    let source = panel.source.cast::<T>();
    for k in 0..panel.depth {
        for lane in 0..panel.width {
            // SAFETY: within the panel.
            unsafe {
                let value = if lane < panel.lanes {
                    (*source.add(lane * panel.lane_stride + k * panel.depth_stride)).to_f32()
                } else {
                    0.0
                };
                *panel.target.add(k * panel.width + lane) = value;
            }
        }
    }
}

unsafe fn contiguous<T: Element>(panel: &Panel) {
    // Known widths become straight vector moves.
    // SAFETY: passed on.
    unsafe {
        match (panel.width, panel.lanes == panel.width) {
            (32, true) => whole::<T, 32>(panel),
            (16, true) => whole::<T, 16>(panel),
            (12, true) => whole::<T, 12>(panel),
            _ => partial::<T>(panel),
        }
    }
}

unsafe fn whole<T: Element, const WIDTH: usize>(panel: &Panel) {
    let source = panel.source.cast::<T>();
    vectorize(
        #[inline(always)]
        || {
            for k in 0..panel.depth {
                // SAFETY: within the panel.
                let (from, to) = unsafe {
                    (
                        &*source.add(k * panel.depth_stride).cast::<[T; WIDTH]>(),
                        &mut *panel.target.add(k * WIDTH).cast::<[f32; WIDTH]>(),
                    )
                };
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.to_f32();
                }
            }
        },
    )
}

unsafe fn partial<T: Element>(panel: &Panel) {
    let source = panel.source.cast::<T>();
    for k in 0..panel.depth {
        // SAFETY: within the panel.
        unsafe {
            let (from, to) = (source.add(k * panel.depth_stride), panel.target.add(k * panel.width));
            for lane in 0..panel.lanes {
                *to.add(lane) = (*from.add(lane)).to_f32();
            }
            for lane in panel.lanes..panel.width {
                *to.add(lane) = 0.0;
            }
        }
    }
}
