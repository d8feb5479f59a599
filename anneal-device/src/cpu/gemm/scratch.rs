//! Packing buffers that outlive the calls: one set a thread, grown and never shrunk.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::ptr::NonNull;

const HUGE_PAGE: usize = 1 << 21;

/// Uninitialised f32 storage, aligned to cache lines (to huge pages from 2 MiB on).
pub(super) struct Storage {
    pointer: NonNull<f32>,
    bytes: usize,
}

impl Storage {
    const fn empty() -> Self {
        Self { pointer: NonNull::dangling(), bytes: 0 }
    }

    fn layout(bytes: usize) -> Layout {
        let alignment = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        Layout::from_size_align(bytes, alignment).expect("a packing buffer's size overflows")
    }

    /// At least `length` values; contents are lost when it grows.
    pub(super) fn reserve(&mut self, length: usize) -> *mut f32 {
        let wanted = length * size_of::<f32>();
        if wanted > self.bytes {
            let step = if wanted >= HUGE_PAGE { HUGE_PAGE } else { 1 << 12 };
            let bytes = wanted.next_multiple_of(step);
            *self = Self::empty();
            // SAFETY: the size is not zero, since it exceeds the old one.
            let pointer = unsafe { alloc(Self::layout(bytes)) };
            let Some(pointer) = NonNull::new(pointer) else { handle_alloc_error(Self::layout(bytes)) };
            #[cfg(target_os = "linux")]
            if bytes >= HUGE_PAGE {
                // SAFETY: the range was just allocated; the advice changes no contents.
                unsafe { libc::madvise(pointer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
            }
            *self = Self { pointer: pointer.cast(), bytes };
        }
        self.pointer.as_ptr()
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `reserve` with this layout.
            unsafe { dealloc(self.pointer.as_ptr().cast(), Self::layout(self.bytes)) };
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self::empty()
    }
}

thread_local! {
    static PANELS: Cell<Storage> = const { Cell::new(Storage::empty()) };
    static BLOCKS: Cell<[Storage; 2]> = const { Cell::new([Storage::empty(), Storage::empty()]) };
}

/// Lends this thread's buffer for packed panels of B. Taken out while it is lent: a product that
/// starts meanwhile on the same thread (a task run inline) works with a fresh one.
pub(super) fn with_panels<R>(body: impl FnOnce(&mut Storage) -> R) -> R {
    let mut storage = PANELS.take();
    let result = body(&mut storage);
    PANELS.set(storage);
    result
}

/// Lends this thread's buffers for a packed block of A, and for a block of C in f32.
pub(super) fn with_blocks<R>(body: impl FnOnce(&mut Storage, &mut Storage) -> R) -> R {
    let mut storage = BLOCKS.take();
    let [a, c] = &mut storage;
    let result = body(a, c);
    BLOCKS.set(storage);
    result
}
