//! Rows of a `[groups, rows, width]` tensor cut into blocks for the threads, and sums over the
//! rows of each group.
//!
//! Contract: the cut depends on the shape alone, and a group's sum is taken block by block in
//! order, so bits do not depend on the number of threads. Blocks never cross groups; small
//! blocks share a task, so that small work is one task and pays no fork.

use anneal_device::cpu::vectorize;
use anneal_device::{Device, Purpose, ThreadPool};

use crate::parallel::{ELEMENTS_PER_TASK, Shared};
use crate::{BackwardPass, DType, Float, Result, Tensor, for_float};

/// Blocks of all groups together are limited to about this many (at least one a group), so
/// that adding up their sums stays small beside the work.
const MOST_BLOCKS: usize = 64;

/// How the rows are cut.
pub(crate) struct RowBlocks {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    pub width: usize,
    /// Blocks of a group.
    per_group: usize,
    block_rows: usize,
}

/// Consecutive rows of one group.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub index: usize,
    pub group: usize,
    /// First row, counted over all groups.
    pub first: usize,
    pub rows: usize,
}

impl RowBlocks {
    pub fn new(groups: usize, rows: usize, width: usize) -> Self {
        let wanted = (rows * width).div_ceil(ELEMENTS_PER_TASK);
        let per_group = wanted.min(MOST_BLOCKS.div_ceil(groups.max(1))).max(1);
        let block_rows = rows.div_ceil(per_group);
        Self { groups, rows, width, per_group, block_rows }
    }

    /// Number of blocks.
    pub fn count(&self) -> usize {
        self.groups * self.per_group
    }

    /// Calls `work` once for each block.
    pub fn run(&self, pool: &ThreadPool, work: impl Fn(Block) + Sync) {
        let per_task = (ELEMENTS_PER_TASK / (self.block_rows * self.width).max(1)).max(1);
        pool.run(self.count().div_ceil(per_task), |task| {
            for index in task * per_task..((task + 1) * per_task).min(self.count()) {
                let group = index / self.per_group;
                let start = (index % self.per_group * self.block_rows).min(self.rows);
                let rows = self.block_rows.min(self.rows - start);
                work(Block { index, group, first: group * self.rows + start, rows });
            }
        });
    }
}

/// `count` sums over the rows of each group, held as one partial sum a block.
pub(crate) struct ColumnSums {
    partial: Tensor,
    count: usize,
    width: usize,
}

impl ColumnSums {
    pub fn new(device: &Device, blocks: &RowBlocks, count: usize) -> Result<Self> {
        let sizes = [blocks.count(), count, blocks.width];
        let partial = Tensor::empty_for(device, &sizes, DType::F32, Purpose::Workspace)?;
        Ok(Self { partial, count, width: blocks.width })
    }

    /// The `N` partial sums of a block, set to zero.
    ///
    /// # Safety
    /// Nobody else holds those of the same block.
    pub unsafe fn zeroed<const N: usize>(&self, block: Block) -> [&mut [f32]; N] {
        assert_eq!(N, self.count);
        // SAFETY: the block's part of the memory is the caller's alone, as promised.
        let sums = unsafe {
            let start = self.partial.pointer::<f32>().add(block.index * N * self.width);
            std::slice::from_raw_parts_mut(start, N * self.width)
        };
        sums.fill(0.0);
        let mut rest = sums;
        std::array::from_fn(|_| {
            let (sum, after) = std::mem::take(&mut rest).split_at_mut(self.width);
            rest = after;
            sum
        })
    }

    /// Writes sum number `which` of every group.
    pub fn write(
        &self,
        pool: &ThreadPool,
        blocks: &RowBlocks,
        which: usize,
        target: &mut SumTarget,
    ) -> Result<()> {
        let partial = self.partial.data::<f32>();
        let (width, per_group) = (self.width, blocks.per_group);
        let groups_per_task = (ELEMENTS_PER_TASK / (width * per_group).max(1)).max(1);
        for_float!("sum over rows", target.tensor.dtype(), T => {
            let memory = Shared::new(target.tensor.pointer::<T>());
            let accumulate = target.accumulate;
            pool.run(blocks.groups.div_ceil(groups_per_task), |task| {
                for group in task * groups_per_task..((task + 1) * groups_per_task).min(blocks.groups) {
                    // SAFETY: rows of different groups do not overlap, and the target is written here alone.
                    let out = unsafe { memory.slice(group * width, width) };
                    let sums = &partial[group * per_group * self.count * width..];
                    add_up(&sums[which * width..], self.count * width, per_group, out, accumulate);
                }
            });
            Ok(())
        })
    }
}

fn add_up<T: Float>(partial: &[f32], stride: usize, parts: usize, out: &mut [T], accumulate: bool) {
    const COLUMNS: usize = 32;
    vectorize(
        #[inline(always)]
        || {
            for (chunk, out) in out.chunks_mut(COLUMNS).enumerate() {
                let mut sums = [0.0; COLUMNS];
                if accumulate {
                    sums.iter_mut().zip(&*out).for_each(|(sum, value)| *sum = value.to_f32());
                }
                for part in 0..parts {
                    let part = &partial[part * stride + chunk * COLUMNS..][..out.len()];
                    sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
                }
                out.iter_mut().zip(&sums).for_each(|(value, sum)| *value = T::from_f32(*sum));
            }
        },
    );
}

/// Where the gradient of an input that all rows share goes: straight into a parameter's sink,
/// or into a new tensor.
pub(crate) struct SumTarget {
    input: usize,
    tensor: Tensor,
    accumulate: bool,
    is_sink: bool,
}

impl SumTarget {
    /// For an input of these sizes; `None` if its gradient is not wanted.
    pub fn new(
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
            Some(sink) => Self { input, tensor: sink.gradient, accumulate: sink.accumulate, is_sink: true },
            None => {
                let tensor = Tensor::empty(device, sizes, dtype)?;
                Self { input, tensor, accumulate: false, is_sink: false }
            }
        }))
    }

    /// After writing: hands the gradient over, unless it lies in its sink already.
    pub fn give(self, pass: &mut BackwardPass) -> Result<()> {
        if self.is_sink { Ok(()) } else { pass.give(self.input, self.tensor) }
    }
}
