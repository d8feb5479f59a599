use anneal_device::ThreadPool;
use smallvec::SmallVec;

use crate::parallel::{ELEMENTS_PER_TASK, Shared};
use crate::{DType, Tensor};

/// One dimension of a copy: its size, and its strides in the source and in the target.
#[derive(Clone, Copy)]
struct Axis {
    size: usize,
    source: usize,
    target: usize,
}

/// Copies run by run where the inner dimension is dense on both sides, else element by element.
pub(super) fn strided<T: Copy + Send>(pool: &ThreadPool, source: &Tensor, target: &Tensor) {
    let axes = merged(source, target);
    let (inner, outer) = match axes.split_last() {
        Some((inner, outer)) => (*inner, outer),
        None => (Axis { size: 1, source: 1, target: 1 }, &axes[..]),
    };
    let runs: usize = outer.iter().map(|axis| axis.size).product();
    if inner.size * runs == 0 {
        return;
    }
    let (from, to) = (Shared::new(address::<T>(source)), Shared::new(address::<T>(target)));
    let runs_per_task = (ELEMENTS_PER_TASK / inner.size).max(1);
    pool.run(runs.div_ceil(runs_per_task), |task| {
        for run in task * runs_per_task..((task + 1) * runs_per_task).min(runs) {
            let (mut rest, mut start_source, mut start_target) = (run, 0, 0);
            for axis in outer.iter().rev() {
                start_source += rest % axis.size * axis.source;
                start_target += rest % axis.size * axis.target;
                rest /= axis.size;
            }
            // SAFETY: both views lie within their buffers, and runs of the target are disjoint.
            unsafe {
                let from = from.pointer().add(start_source);
                let to = to.pointer().add(start_target);
                if inner.source == 1 && inner.target == 1 {
                    std::ptr::copy_nonoverlapping(from, to, inner.size);
                } else {
                    for index in 0..inner.size {
                        *to.add(index * inner.target) = *from.add(index * inner.source);
                    }
                }
            }
        }
    });
}

/// Dimensions larger than one, neighbours merged where both memories allow it.
fn merged(source: &Tensor, target: &Tensor) -> SmallVec<[Axis; 6]> {
    let mut axes: SmallVec<[Axis; 6]> = SmallVec::new();
    for ((&size, &from), &to) in source.dims().iter().zip(source.strides()).zip(target.strides()) {
        if size == 1 {
            continue;
        }
        match axes.last_mut() {
            Some(last) if last.source == size * from && last.target == size * to => {
                *last = Axis { size: last.size * size, source: from, target: to };
            }
            _ => axes.push(Axis { size, source: from, target: to }),
        }
    }
    axes
}

fn address<T>(tensor: &Tensor) -> *mut T {
    match tensor.dtype() {
        DType::F32 => tensor.pointer::<f32>().cast(),
        DType::BF16 => tensor.pointer::<half::bf16>().cast(),
        DType::F16 => tensor.pointer::<half::f16>().cast(),
        DType::I64 => tensor.pointer::<i64>().cast(),
        DType::U8 => tensor.pointer::<u8>().cast(),
    }
}
