use std::path::PathBuf;

use anneal_tensor::TensorError;

use crate::FileError;

/// What can go wrong with weight files; every message names the path or the tensor and what to do.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("{path} is not a safetensors file: {reason}", path = path.display())]
    NotSafetensors { path: PathBuf, reason: String },
    #[error("{path} is a damaged safetensors file: {reason}; copy or download it again", path = path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{path}: {reason}", path = path.display())]
    Json { path: PathBuf, reason: String },
    #[error("{index} names shards that are not there: {missing}; download them into the same folder", index = index.display())]
    MissingShards { index: PathBuf, missing: String },
    #[error("{message}")]
    NoWeights { message: String },
    #[error("'{name}' is both in {path} and in {other}; give only one of them", path = path.display(), other = other.display())]
    Twice { name: String, path: PathBuf, other: PathBuf },
    #[error("{path} holds no tensor '{name}'", path = path.display())]
    NoTensor { path: PathBuf, name: String },
    #[error("'{name}' in {path} is {dtype}; it cannot be read as {wanted}", path = path.display())]
    ElementType { path: PathBuf, name: String, dtype: &'static str, wanted: &'static str },
    #[error("weights cannot be stored as {dtype}; choose F32, BF16, F16 or F64")]
    StorageType { dtype: &'static str },
    #[error("{path}: '{name}' {reason}", path = path.display())]
    Writing { path: PathBuf, name: String, reason: String },
    /// Every tensor that does not fit, one a line.
    #[error("{path} does not fit the model:\n{list}", path = path.display())]
    Mismatch { path: PathBuf, list: String },
    #[error("the key map does not fit the model: {message}")]
    KeyMap { message: String },
    #[error("{path} exists and is not empty; choose another folder or remove it first", path = path.display())]
    Exists { path: PathBuf },
    #[error("{path} is not a diffusers folder: {reason}", path = path.display())]
    NotDiffusers { path: PathBuf, reason: String },
}
