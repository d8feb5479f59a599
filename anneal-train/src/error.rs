/// What can go wrong in training; every message names the thing and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Recipe(#[from] anneal_recipe::RecipeError),
    #[error(transparent)]
    Model(#[from] anneal_models::ModelError),
    #[error(transparent)]
    Diffusion(#[from] anneal_diffusion::DiffusionError),
    #[error(transparent)]
    Data(#[from] anneal_data::DataError),
    #[error(transparent)]
    Tensor(#[from] anneal_tensor::TensorError),
    #[error(transparent)]
    Device(#[from] anneal_tensor::DeviceError),
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    #[error(transparent)]
    Report(#[from] crate::report::ReportError),
    #[error(transparent)]
    Weights(#[from] anneal_weights::WeightsError),
    #[error(transparent)]
    File(#[from] anneal_weights::FileError),
    #[error("{message}")]
    Settings { message: String },
    #[error(
        "{} in a row had a gradient that is not finite (step {step}): training has diverged; lower optim.lr, set optim.clip, or look for bad values in the data. Checkpoints written before are untouched",
        crate::report::summary::plural(*in_a_row, "step")
    )]
    Diverged { in_a_row: u64, step: u64 },
    #[error(
        "the run {run} was made by another recipe, so it cannot be continued by this one:\n  {differences}\n{advice}"
    )]
    OtherRecipe { run: String, differences: String, advice: String },
    #[error(
        "{run} is at step {step} already, and train.steps is {steps}: ask for at least {step}, or choose another output folder to train anew"
    )]
    FewerSteps { run: String, step: u64, steps: u64 },
    #[error("stopped by a signal")]
    Stopped,
    #[error("drawing samples failed: {0}")]
    Preview(String),
}

impl TrainError {
    /// Whether a newer start of the same run has taken over, so that this one must end.
    pub fn is_stale_writer(&self) -> bool {
        matches!(self, Self::Checkpoint(crate::checkpoint::CheckpointError::Stale { .. }))
    }
}

pub type Result<T, E = TrainError> = std::result::Result<T, E>;
