//! Packing: panels of an operand, converted to f32, in the order in which a kernel reads them.

use half::{bf16, f16};

use super::super::element::{Element, ElementType};
use super::super::vectorize;
use super::kernel::{Kernel, Panels};

/// # Safety
/// The source covers `lanes` by `depth`, the target the whole panels.
pub(super) unsafe fn pack(kernel: &Kernel, panels: &Panels) {
    // SAFETY: passed on.
    unsafe {
        if panels.lane_stride == 1 {
            return match panels.element {
                ElementType::F32 => adjacent::<f32>(kernel, panels),
                ElementType::Bf16 => adjacent::<bf16>(kernel, panels),
                ElementType::F16 => adjacent::<f16>(kernel, panels),
            };
        }
        for first in (0..panels.lanes).step_by(panels.width) {
            let panel = panels.part(first, panels.width.min(panels.lanes - first));
            if panels.depth_stride == 1 {
                (kernel.pack_transposed)(&panel);
            } else {
                transposed(&panel);
            }
        }
    }
}

impl Panels {
    /// The panels that hold `lanes` lanes from `first` on, which begins a panel.
    fn part(&self, first: usize, lanes: usize) -> Self {
        let source = self.source.wrapping_add(first * self.lane_stride * self.element.size());
        let target = self.target.wrapping_add(first / self.width * self.panel_stride);
        Self { source, target, lanes, ..*self }
    }
}

/// One panel of any strides, lane by lane.
///
/// # Safety
/// As [`pack`].
pub(super) unsafe fn transposed(panel: &Panels) {
    // SAFETY: passed on.
    unsafe {
        match panel.element {
            ElementType::F32 => strided::<f32>(panel),
            ElementType::Bf16 => strided::<bf16>(panel),
            ElementType::F16 => strided::<f16>(panel),
        }
    }
}

unsafe fn strided<T: Element>(panel: &Panels) {
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

/// Adjacent lanes: reads the source line by line and deals it out to the panels.
unsafe fn adjacent<T: Element>(kernel: &Kernel, panels: &Panels) {
    let whole = panels.lanes / panels.width * panels.width;
    // SAFETY: passed on.
    unsafe {
        if whole > 0 {
            // Known widths become straight vector moves.
            let panels = panels.part(0, whole);
            let own = kernel.pack_adjacent.filter(|_| panels.width == kernel.rows);
            match (own, panels.width) {
                (Some(pack), _) if T::TYPE == ElementType::F32 => pack(&panels),
                (_, 32) => deal::<T, 32>(&panels),
                (_, 16) => deal::<T, 16>(&panels),
                (_, 12) => deal::<T, 12>(&panels),
                (_, 6) => deal::<T, 6>(&panels),
                (_, 4) => deal::<T, 4>(&panels),
                (_, width) => unreachable!("no kernel has panels of {width} lanes"),
            }
        }
        if whole < panels.lanes {
            strided::<T>(&panels.part(whole, panels.lanes - whole));
        }
    }
}

unsafe fn deal<T: Element, const WIDTH: usize>(panels: &Panels) {
    let source = panels.source.cast::<T>();
    let count = panels.lanes / WIDTH;
    vectorize(
        #[inline(always)]
        || {
            for k in 0..panels.depth {
                for panel in 0..count {
                    // SAFETY: within the panels. The values pass through a copy because the compiler
                    // cannot see that source and target are apart.
                    unsafe {
                        let from = source.add(k * panels.depth_stride + panel * WIDTH);
                        let values = T::widen(*from.cast::<[T; WIDTH]>());
                        let to = panels.target.add(panel * panels.panel_stride + k * WIDTH);
                        *to.cast::<[f32; WIDTH]>() = values;
                    }
                }
            }
        },
    )
}
