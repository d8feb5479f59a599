//! The one error type of this crate. Every message names the file or sample and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong with data: each message is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{}: no such file or folder; check the path (it is taken from the current folder)", path.display())]
    NotFound { path: PathBuf },
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: cannot be written: {source}; what was there before is unchanged", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    /// The bytes contradict their format: truncated, overwritten, bit-flipped.
    #[error("{file}: damaged: {detail}; write or download it again")]
    Damaged { file: String, detail: String },
    /// The file is whole, but holds something that is not understood here.
    #[error("{file}: {detail}")]
    Unsupported { file: String, detail: String },
    #[error("{file}: has no array `{array}`; it has {present}")]
    MissingArray { file: String, array: String, present: String },
    #[error("{source_name}: holds no samples: {expected}")]
    Empty { source_name: String, expected: String },
    #[error(
        "{sample}: label {label} is out of range 0 to {} (classes: {classes}); correct the label or raise the \
         number of classes", classes.saturating_sub(1)
    )]
    LabelOutOfRange { sample: String, label: i64, classes: usize },
    /// One sample that cannot be used; the loader skips, counts and names it.
    #[error("{sample}: {reason}")]
    BadSample { sample: String, reason: String },
    #[error(
        "unusable samples: {count}, more than the limit of {limit} (max_bad); the last is {last}; repair or remove \
         them, or raise the limit"
    )]
    TooManyBad { count: usize, limit: usize, last: String },
    #[error("none of the {count} samples can be used; the last tried: {last}")]
    AllBad { count: usize, last: String },
    #[error("data settings: {detail}")]
    Settings { detail: String },
    #[error("the data cursor does not fit: {detail}")]
    Cursor { detail: String },
    #[error("a data worker ended by a defect of its own (its message is above); please report it")]
    WorkerDied,
}

impl DataError {
    /// An error of opening or reading `path`: a missing file has its own message.
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            Self::NotFound { path: path.to_owned() }
        } else {
            Self::Read { path: path.to_owned(), source }
        }
    }

    pub(crate) fn damaged(file: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Damaged { file: file.into(), detail: detail.into() }
    }

    pub(crate) fn unsupported(file: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Unsupported { file: file.into(), detail: detail.into() }
    }

    pub(crate) fn bad(sample: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::BadSample { sample: sample.into(), reason: reason.into() }
    }

    pub(crate) fn settings(detail: impl Into<String>) -> Self {
        Self::Settings { detail: detail.into() }
    }
}
