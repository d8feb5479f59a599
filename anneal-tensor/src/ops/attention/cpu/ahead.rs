//! Brings the rows of the head that comes next into the second-level cache while this one is
//! computed.
//!
//! Rows of a head lie far apart in the tensors (all heads of a token follow each other), so that the
//! processor's own prefetching does not see them coming; reading them cold took a quarter of the
//! time of 256 tokens. Requests go out one at a time from within the products, because a burst of
//! them fills the processor's buffers and stalls.

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
}

/// What remains to be fetched: sets of rows, line by line of a row, each line of all rows.
pub(super) struct Ahead {
    sets: [RowSet; MOST_SETS],
    count: usize,
    set: Cell<usize>,
    row: Cell<usize>,
    offset: Cell<usize>,
}

/// Addresses to ask for, one at each [`Requests::next`].
#[derive(Clone, Copy)]
pub(super) struct Requests {
    address: usize,
    stride: usize,
}

impl Ahead {
    pub fn nothing() -> Self {
        Self {
            sets: Default::default(),
            count: 0,
            set: Cell::new(0),
            row: Cell::new(0),
            offset: Cell::new(0),
        }
    }

    /// Forgets what was asked for.
    pub fn restart(&mut self) {
        self.count = 0;
        self.set.set(0);
        self.row.set(0);
        self.offset.set(0);
    }

    /// Adds `rows` rows of `width` elements from row `start` on.
    pub fn add(&mut self, source: HeadRows, start: usize, rows: usize, width: usize) {
        let (first, stride, bytes) = source.extent(start, width);
        self.sets[self.count] = RowSet { first, stride, rows, bytes };
        self.count += usize::from(rows > 0);
    }

    /// About the next `count` requests.
    #[inline(always)]
    pub fn requests(&self, count: usize) -> Requests {
        if self.set.get() == self.count {
            // The stack is near anyway.
            return Requests { address: self as *const Self as usize, stride: 0 };
        }
        let set = &self.sets[self.set.get()];
        let (row, offset) = (self.row.get(), self.offset.get());
        if row + count < set.rows {
            self.row.set(row + count);
        } else {
            self.row.set(0);
            if offset + LINE < set.bytes {
                self.offset.set(offset + LINE);
            } else {
                self.offset.set(0);
                self.set.set(self.set.get() + 1);
            }
        }
        Requests { address: set.first + row * set.stride + offset, stride: set.stride }
    }
}

impl Requests {
    #[inline(always)]
    pub fn next(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a hint touches no memory, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.address as *const i8) };
        }
        self.address = self.address.wrapping_add(self.stride);
    }
}
