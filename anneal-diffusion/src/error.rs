//! The one error type of this crate.

/// What can be wrong with a schedule, an objective, a sampler or what is passed to them.
#[derive(Debug, thiserror::Error)]
pub enum DiffusionError {
    #[error("noise schedule: {0}")]
    Schedule(String),
    #[error("respacing '{specification}': {reason}")]
    Respacing { specification: String, reason: String },
    #[error("{name} '{given}' is unknown; it is one of {known}")]
    UnknownName { name: &'static str, given: String, known: String },
    #[error("sampler {method}: {reason}")]
    Sampler { method: &'static str, reason: String },
    #[error("timestep {timestep} is outside {low} to {high} of this process")]
    Timestep { timestep: f64, low: f64, high: f64 },
    #[error("objective: {0}")]
    Objective(String),
    #[error("guidance: {0}")]
    Guidance(String),
    #[error("{operation}: {what} has shape {got:?}; {expected} is expected")]
    Shape { operation: &'static str, what: &'static str, got: Vec<usize>, expected: String },
    #[error("sampling was stopped after {done} of {steps} model calls")]
    Stopped { done: usize, steps: usize },
    #[error(transparent)]
    Tensor(#[from] anneal_tensor::TensorError),
}

pub type Result<T, E = DiffusionError> = std::result::Result<T, E>;
