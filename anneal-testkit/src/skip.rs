//! Tests that need hardware which is not there: said aloud and counted, never silent.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Says that `test` is skipped because this machine has no `hardware`; the caller then returns.
/// The line goes past the test harness's capture, so that a green run still shows it.
pub fn skip_without(hardware: &str, test: &str) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let line = format!("skipped ({count}): {test}: this machine has no {hardware}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// How many tests of this process were skipped so far.
pub fn skipped() -> usize {
    SKIPPED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_skip_is_counted() {
        let before = super::skipped();
        super::skip_without("imaginary device", "the skip helper's own test");
        assert_eq!(super::skipped(), before + 1);
    }
}
