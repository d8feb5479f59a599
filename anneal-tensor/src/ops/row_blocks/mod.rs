//! Rows of a `[groups, rows, width]` tensor cut into blocks for the threads, and sums over the
//! rows of each group.
//!
//! Contract: the cut depends on the shape alone, and a group's sum is taken block by block in
//! order, so bits do not depend on the number of threads. Blocks never cross groups; small
//! blocks share a task, so that small work is one task and pays no fork.

pub(super) mod cuda;

use anneal_device::cpu::vectorize;
use anneal_device::{Device, Purpose, ThreadPool};

use super::gradient_target::GradientTarget;
use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::{DType, Result, Tensor};

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

    /// Number of blocks of one group, which follow each other.
    pub fn per_group(&self) -> usize {
        self.per_group
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
    #[allow(clippy::mut_from_ref)]
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

    /// Writes sum number `which` of every `per_row` blocks into a row of the target: of each group if they are a group's,
    /// of the whole tensor if they are all.
    pub fn write(&self, pool: &ThreadPool, per_row: usize, which: usize, target: &mut GradientTarget) {
        let partial = self.partial.data::<f32>();
        let width = self.width;
        let rows_per_task = (ELEMENTS_PER_TASK / (width * per_row).max(1)).max(1);
        let accumulate = target.accumulate;
        // SAFETY: a gradient's memory is written by backward alone, one op at a time.
        let sums = unsafe { target.gradient.shared_data_mut::<f32>() };
        parts_mut(pool, sums, (rows_per_task * width).max(1), |task, sums| {
            for (index, sum) in sums.chunks_mut(width).enumerate() {
                let first = (task * rows_per_task + index) * per_row;
                let parts = (first..first + per_row)
                    .map(|block| &partial[(block * self.count + which) * width..][..width]);
                add_up(parts, sum, accumulate);
            }
        });
    }
}

fn add_up<'a>(parts: impl Iterator<Item = &'a [f32]>, sum: &mut [f32], accumulate: bool) {
    vectorize(
        #[inline(always)]
        || {
            if !accumulate {
                sum.fill(0.0);
            }
            for part in parts {
                sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            }
        },
    );
}
