//! Brings the rows of the head that comes next into the second-level cache while this one is
//! computed.
//!
//! Rows of a head lie far apart in the tensors (all heads of a token follow each other), so that the
//! processor's own prefetching does not see them coming, and reading them would cost a quarter of the
//! time. Requests are spread over the tiles of the products: a burst would stall.

use std::cell::Cell;

use super::memory::HeadRows;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Most row sets of a head: three gradients, five operands.
const MOST_SETS: usize = 8;

#[derive(Clone, Copy, Default)]
struct RowSet {
    first: usize,
    stride: usize,
    rows: usize,
    bytes: usize,
    write: bool,
}

/// What remains to be fetched.
pub(super) struct Ahead {
    sets: [RowSet; MOST_SETS],
    count: usize,
    lines_per_step: usize,
    set: Cell<usize>,
    row: Cell<usize>,
    offset: Cell<usize>,
}

impl Ahead {
    pub fn nothing() -> Self {
        Self {
            sets: Default::default(),
            count: 0,
            lines_per_step: 0,
            set: Cell::new(0),
            row: Cell::new(0),
            offset: Cell::new(0),
        }
    }

    /// Adds `rows` rows of `width` elements from row `start` on; `write` if they are going to be written.
    pub fn add(&mut self, source: HeadRows, start: usize, rows: usize, width: usize, write: bool) {
        let (first, stride, bytes) = source.extent(start, width);
        self.sets[self.count] = RowSet { first, stride, rows, bytes, write };
        self.count += 1;
    }

    /// Fixes the pace: everything is asked for within `steps` calls of [`Self::step`].
    pub fn within(mut self, steps: usize) -> Self {
        let lines = |set: &RowSet| set.rows * set.bytes.div_ceil(LINE);
        let total: usize = self.sets[..self.count].iter().map(lines).sum();
        self.lines_per_step = total.div_ceil(steps.max(1));
        self
    }

    #[inline(always)]
    pub fn step(&self) {
        if self.set.get() < self.count {
            self.request();
        }
    }

    #[inline(never)]
    fn request(&self) {
        let (mut row, mut offset) = (self.row.get(), self.offset.get());
        let mut set = &self.sets[self.set.get()];
        for _ in 0..self.lines_per_step {
            if row == set.rows {
                self.set.set(self.set.get() + 1);
                (row, offset) = (0, 0);
                if self.set.get() == self.count {
                    break;
                }
                set = &self.sets[self.set.get()];
            }
            prefetch(set.first + row * set.stride + offset, set.write);
            offset += LINE;
            if offset >= set.bytes {
                (row, offset) = (row + 1, 0);
            }
        }
        self.row.set(row);
        self.offset.set(offset);
    }
}

#[inline(always)]
fn prefetch(address: usize, write: bool) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint touches no memory, whatever the address.
        unsafe {
            if write {
                _mm_prefetch::<_MM_HINT_ET0>(address as *const i8);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(address as *const i8);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, write);
}
