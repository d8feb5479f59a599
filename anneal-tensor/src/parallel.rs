//! Ways to hand disjoint parts of an output to the threads of the pool.

use anneal_device::ThreadPool;

/// A pointer that may cross threads; whoever uses it keeps the parts disjoint.
#[derive(Clone, Copy)]
pub struct Shared<T>(*mut T);
// SAFETY: only a carrier; each use states why its accesses are disjoint.
unsafe impl<T> Send for Shared<T> {}
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(pointer: *mut T) -> Self {
        Self(pointer)
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// The range is valid, and no other thread touches it while the slice lives.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    #[inline(always)]
    pub fn pointer(&self) -> *mut T {
        self.0
    }
}

/// Calls `task(index, part)` for each part of `part_len` elements (the last may be shorter).
pub fn parts_mut<T: Send>(
    pool: &ThreadPool,
    data: &mut [T],
    part_len: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    let total = data.len();
    let shared = Shared::new(data.as_mut_ptr());
    pool.run(total.div_ceil(part_len), |index| {
        let start = index * part_len;
        // SAFETY: parts of different indices do not overlap.
        task(index, unsafe { shared.slice(start, part_len.min(total - start)) });
    });
}

/// Elements per task for element-wise work: large enough to hide the fork, small enough to
/// balance, and independent of the number of threads.
pub const ELEMENTS_PER_TASK: usize = 1 << 15;
