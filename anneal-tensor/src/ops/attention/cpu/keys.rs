//! The keys and values of one head, as rows of f32 padded to whole vectors.
//!
//! Masked keys are left out here, so that everything after sees dense rows and a masked key
//! costs nothing; `index` says which key of the tensor each row is.

use super::memory::HeadRows;
use super::simd::{Rows, Simd};
use super::{Mask, Problem};

/// Rows that are read where they lie rather than copied: few enough that strides which are
/// multiples of a page do not throw each other out of the cache.
pub(super) const DIRECT_ROWS: usize = 16;

/// Which keys take part.
#[derive(Clone, Copy)]
pub(super) struct KeyList {
    pub count: usize,
    /// Which key of the tensor each row is; `None` without a mask.
    pub index: Option<*const u32>,
}

#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub list: KeyList,
    pub key: Rows<*const f32>,
    pub value: Rows<*const f32>,
}

/// Scratch for the keys of one head.
#[derive(Clone, Copy)]
pub(super) struct KeyScratch {
    pub key: *mut f32,
    pub value: *mut f32,
    pub index: *mut f32,
}

impl KeyScratch {
    /// Elements that each of the three pieces needs.
    pub fn sizes<S: Simd>(problem: &Problem) -> [usize; 3] {
        let rows = problem.sizes.keys * problem.sizes.dim.next_multiple_of(S::LANES);
        [rows, rows, if problem.mask.is_some() { problem.sizes.keys } else { 0 }]
    }
}

impl KeyList {
    /// # Safety
    /// Scratch has room for a number per key if there is a mask.
    pub unsafe fn new(problem: &Problem, batch: usize, scratch: *mut f32) -> Self {
        match problem.mask {
            None => Self { count: problem.sizes.keys, index: None },
            Some(mask) => {
                let index = scratch.cast::<u32>();
                // SAFETY: the caller's promise.
                let count = unsafe { attended(mask, batch, problem.sizes.keys, index) };
                Self { count, index: Some(index) }
            }
        }
    }

    /// Which key of the tensor a row is.
    #[inline(always)]
    pub fn position(&self, row: usize) -> usize {
        // SAFETY: the list has an entry for each row.
        self.index.map_or(row, |index| unsafe { *index.add(row) as usize })
    }
}

impl Keys {
    /// # Safety
    /// The scratch has the sizes that [`KeyScratch::sizes`] asks for.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(
        simd: S,
        problem: &Problem,
        batch: usize,
        head: usize,
        scratch: KeyScratch,
    ) -> Self {
        let (key, value) = (problem.key.head(batch, head), problem.value.head(batch, head));
        // SAFETY: the sizes are those of the problem; scratch is the caller's promise.
        unsafe {
            let list = KeyList::new(problem, batch, scratch.index);
            let dim = problem.sizes.dim;
            let key = rows_of(simd, key, list, dim, scratch.key);
            let value = rows_of(simd, value, list, dim, scratch.value);
            Self { list, key, value }
        }
    }
}

/// Lists the keys that the mask leaves and returns their number.
unsafe fn attended(mask: Mask, batch: usize, keys: usize, index: *mut u32) -> usize {
    let mut count = 0;
    for key in 0..keys {
        // SAFETY: within the mask; the list has room for all keys.
        unsafe {
            if *mask.memory.pointer().add(batch * mask.stride + key) != 0 {
                *index.add(count) = key as u32;
                count += 1;
            }
        }
    }
    count
}

#[inline(always)]
unsafe fn rows_of<S: Simd>(
    simd: S,
    source: HeadRows,
    KeyList { count, index }: KeyList,
    dim: usize,
    scratch: *mut f32,
) -> Rows<*const f32> {
    let target = Rows::new(scratch, dim.next_multiple_of(S::LANES));
    // SAFETY: the caller's promise.
    unsafe {
        match (index, source.direct::<S>(0, dim)) {
            (None, Some(direct)) if count <= DIRECT_ROWS => return direct.read(),
            (None, _) => source.read(simd, 0, count, dim, target),
            (Some(index), _) => source.read_picked(simd, |row| *index.add(row) as usize, count, dim, target),
        }
    }
    target.read()
}

/// Rows `start..start + count` of a head: where they lie, or copied to scratch.
///
/// # Safety
/// The rows lie within the head; scratch has room for `count` rows padded to vectors.
#[inline(always)]
pub(super) unsafe fn few_rows<S: Simd>(
    simd: S,
    source: HeadRows,
    start: usize,
    count: usize,
    dim: usize,
    scratch: *mut f32,
) -> Rows<*const f32> {
    match source.direct::<S>(start, dim) {
        Some(direct) if count <= DIRECT_ROWS || !source.rows_collide() => direct.read(),
        _ => {
            let target = Rows::new(scratch, dim.next_multiple_of(S::LANES));
            // SAFETY: the caller's promise.
            unsafe { source.read(simd, start, count, dim, target) };
            target.read()
        }
    }
}
