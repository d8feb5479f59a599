//! Rows of f32 that a task needs for a moment, kept by each thread so that they stay in its cache.

use std::cell::RefCell;

thread_local! {
    static ROWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `N` rows of `width` numbers of unspecified contents.
pub(crate) fn rows<const N: usize, R>(width: usize, work: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    // Taken out of its cell, so that a nested call merely gets memory of its own.
    let mut memory = ROWS.take();
    if memory.len() < N * width {
        memory.resize(N * width, 0.0);
    }
    let mut rest = &mut memory[..];
    let rows = std::array::from_fn(|_| {
        let (row, after) = std::mem::take(&mut rest).split_at_mut(width);
        rest = after;
        row
    });
    let result = work(rows);
    ROWS.replace(memory);
    result
}
