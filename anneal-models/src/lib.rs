//! The networks. A folder each: configuration, presets, the model, and its key maps.
//!
//! Every network that predicts a diffusion target is a [`Denoiser`]; the training loop and
//! the samplers know that trait alone.
//! Deliberately absent: diffusion, training, files.

pub mod dit;

use anneal_nn::Forward;
use anneal_tensor::{Result, Tensor};

/// What a sample is conditioned on, one entry a sample.
#[derive(Clone, Copy, Debug)]
pub struct Conditioning<'a> {
    /// Class labels; a model's null label stands for "none".
    pub labels: &'a [i64],
}

/// A network that predicts a diffusion target from a noisy image.
pub trait Denoiser: Send + Sync {
    /// `image [B, C, H, W]` in f32 and one timestep a sample, to `[B, C or 2C, H, W]` in f32.
    fn forward(
        &self,
        forward: &Forward,
        image: &Tensor,
        timesteps: &[f32],
        conditioning: &Conditioning,
    ) -> Result<Tensor>;

    /// `[channels, height, width]` of the images it was described for.
    fn image_shape(&self) -> [usize; 3];

    /// Number of classes; labels are `0..classes`.
    fn classes(&self) -> usize;

    /// The label that stands for "no label".
    fn null_label(&self) -> i64;

    /// Whether the output has a second half that interpolates the variance.
    fn learns_sigma(&self) -> bool;
}

/// What is wrong with a network's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("unknown preset '{name}': choose one of {known}")]
    UnknownPreset { name: String, known: String },
    #[error("model configuration: {message}")]
    Configuration { message: String },
}
