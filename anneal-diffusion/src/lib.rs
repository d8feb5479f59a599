//! Diffusion without a network: schedules, objectives, guidance and samplers.
//!
//! Contract: a model is a callable from (x, timesteps) to its output; noise is injected. A
//! [`Process`] says how signal and noise mix at a timestep, an [`Objective`] what training
//! minimises, [`Guidance`] turns a conditional model into a guided one, and a [`Sampler`] turns
//! noise into samples. Scalar coefficients are f64 throughout and become tensors' combinations at
//! the very end.
//! Letters in shapes: `B` samples, `C` channels of the sample.
//! Not done: any concrete network, latents' encoders, learned schedules.

mod draws;
mod error;
mod guidance;
mod objective;
mod prediction;
mod process;
mod sampler;
mod schedule;

pub use draws::{SeededNoise, TimeDensity, draw_label_drops, draw_latents, draw_noise, draw_timesteps};
pub use error::{DiffusionError, Result};
pub use guidance::{Branch, Guidance, GuidanceShape};
pub use objective::Objective;
pub use prediction::{Pair, Prediction};
pub use process::{FLOW_TIMESTEP_SCALE, NoiseLevel, Process};
pub use sampler::{
    Method, Model, NoiseSource, Sampler, SamplerOptions, SamplerState, Spacing, StepVariance, Steps,
};
pub use schedule::{BetaSchedule, Schedule, respaced_steps};

/// Positive and finite; a NaN is neither.
fn is_positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}
