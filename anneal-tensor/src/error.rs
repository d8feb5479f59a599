use crate::{DType, DeviceError};

/// What can go wrong in tensors and operations.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    #[error("{op}: {message}")]
    Shape { op: &'static str, message: String },
    #[error("{op}: {message}")]
    DType { op: &'static str, message: String },
    #[error("{op} has no gradient, but a tracked tensor reached it")]
    NotDifferentiable { op: &'static str },
    #[error("{op}: inputs are on different devices")]
    MixedDevices { op: &'static str },
    #[error("backward: {message}")]
    Backward { message: String },
    #[error("parameter store: {message}")]
    Store { message: String },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl TensorError {
    pub fn shape(op: &'static str, message: impl Into<String>) -> Self {
        Self::Shape { op, message: message.into() }
    }

    pub fn unsupported_dtype(op: &'static str, dtype: DType) -> Self {
        Self::DType { op, message: format!("dtype {dtype} is not supported here") }
    }
}
