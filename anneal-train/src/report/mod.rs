//! What a training run shows and writes for people: metrics, TensorBoard events, pictures and progress.
//!
//! Contract: nothing here knows a tensor, a model or a device. Numbers and pixels come in as plain slices, and
//! every file is left whole whenever the process is killed: pictures are renamed into place, the metrics file
//! is repaired when it is opened, and event files may end in half a record, which their readers skip.
//! Failing to draw a bar is never an error; failing to write a file always is, and the message names the file.

pub mod grid;
pub mod metrics;
pub mod picture;
pub mod plot;
pub mod progress;
pub mod summary;
pub mod tensorboard;

mod canvas;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

pub use anneal_weights::FileError;

/// The time to write beside figures: seconds since 1970-01-01 UTC, in whole milliseconds.
pub fn unix_seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as f64 / 1000.0
}

/// Everything that can go wrong while reporting.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "{path}: cannot record step {step} after step {last}: each step is written once, in order; open the \
         file again at the step that training resumes from"
    )]
    StepOrder { path: PathBuf, step: u64, last: u64 },
    #[error("metric `{key}` has the name of a built-in field; choose another name")]
    ReservedKey { key: String },
    #[error(
        "{what}: expected {expected} values (count {count}, height {height}, width {width}, channels {channels}), \
         got {actual}"
    )]
    PixelCount {
        what: &'static str,
        count: usize,
        height: usize,
        width: usize,
        channels: usize,
        expected: usize,
        actual: usize,
    },
    #[error("{what}: {reason}")]
    Picture { what: &'static str, reason: String },
}
