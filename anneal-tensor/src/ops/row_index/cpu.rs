use anneal_device::ThreadPool;
use anneal_device::cpu::vectorize;

use crate::parallel::{ELEMENTS_PER_TASK, Shared, parts_mut};
use crate::{Float, Result, Tensor, for_float};

/// Ranges of rows of a group are limited in number, because each task reads all of its group's indices.
const MOST_RANGES: usize = 64;

/// `output[g, k] = x[g, index[g, k]]`, with x of `[groups, rows, width]`.
pub(super) fn pick(
    pool: &ThreadPool,
    x: &Tensor,
    index: &Tensor,
    [groups, rows, width]: [usize; 3],
    output: &mut Tensor,
) -> Result<()> {
    for_float!("row index", x.dtype(), T => {
        let (x, index) = (x.data::<T>(), index.data::<i64>());
        let picks = index.len() / groups.max(1);
        let per_task = (ELEMENTS_PER_TASK / width.max(1)).max(1);
        parts_mut(pool, output.data_mut::<T>(), (per_task * width).max(1), |task, part| {
            for (place, row) in part.chunks_exact_mut(width).enumerate() {
                let position = task * per_task + place;
                let source = position / picks * rows + index[position] as usize;
                row.copy_from_slice(&x[source * width..(source + 1) * width]);
            }
        });
        Ok(())
    })
}

/// `target[g, index[g, k]] += x[g, k]`, starting from zero unless `accumulate`.
///
/// Each task owns a range of target rows and adds what falls into it in the order of `k`.
pub(super) fn place(
    pool: &ThreadPool,
    x: &Tensor,
    index: &Tensor,
    [groups, rows, width]: [usize; 3],
    target: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    for_float!("row index", x.dtype(), T => {
        let (x, index) = (x.data::<T>(), index.data::<i64>());
        let picks = index.len() / groups.max(1);
        let ranges = (rows * width).div_ceil(ELEMENTS_PER_TASK).clamp(1, MOST_RANGES);
        let range_rows = rows.div_ceil(ranges).max(1);
        let ranges = rows.div_ceil(range_rows);
        // SAFETY: fresh memory, or a parameter's sink, which backward alone writes.
        let target = Shared::new(unsafe { target.shared_data_mut::<f32>() }.as_mut_ptr());
        pool.run(groups * ranges, |task| {
            let (group, first) = (task / ranges, task % ranges * range_rows);
            let own = first..(first + range_rows).min(rows);
            // SAFETY: ranges of different tasks do not overlap.
            let part = unsafe { target.slice((group * rows + first) * width, own.len() * width) };
            if !accumulate {
                part.fill(0.0);
            }
            for (k, id) in index[group * picks..(group + 1) * picks].iter().enumerate() {
                if own.contains(&(*id as usize)) {
                    let row = &mut part[(*id as usize - first) * width..][..width];
                    add(row, &x[(group * picks + k) * width..][..width]);
                }
            }
        });
        Ok(())
    })
}

fn add<T: Float>(row: &mut [f32], values: &[T]) {
    vectorize(
        #[inline(always)]
        || row.iter_mut().zip(values).for_each(|(sum, value)| *sum += value.to_f32()),
    );
}
