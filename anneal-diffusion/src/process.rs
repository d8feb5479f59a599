//! The forward process: how much signal and noise a sample holds at a timestep, discrete or flow.
//!
//! Contract: x_t = alpha x_0 + sigma noise, for both kinds; a timestep is the number that the
//! model sees (0 to 999 for a chain of 1000 steps, 0 to 1000 for a flow).
//! Source: DDPM eq. 4 (arXiv 2006.11239); flow matching (2210.02747) in rectified flow's straight
//! form (2209.03003).

use crate::error::{DiffusionError, Result};
use crate::schedule::Schedule;

/// How much of each the sample at a timestep holds: x_t = alpha x_0 + sigma noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevel {
    pub timestep: f64,
    pub alpha: f64,
    pub sigma: f64,
}

impl NoiseLevel {
    /// The data itself.
    pub(crate) const CLEAN: Self = Self { timestep: 0.0, alpha: 1.0, sigma: 0.0 };

    /// The variance-preserving level with this ratio of noise to signal.
    pub(crate) fn variance_preserving(timestep: f64, noise_to_signal: f64) -> Self {
        let alpha = 1.0 / (1.0 + noise_to_signal * noise_to_signal).sqrt();
        Self { timestep, alpha, sigma: noise_to_signal * alpha }
    }

    /// sigma / alpha.
    pub fn noise_to_signal(self) -> f64 {
        self.sigma / self.alpha
    }

    /// alpha^2 / sigma^2.
    pub fn signal_to_noise(self) -> f64 {
        (self.alpha / self.sigma).powi(2)
    }

    /// Half the logarithm of the signal-to-noise ratio (DPM-Solver++'s lambda).
    pub(crate) fn half_log_ratio(self) -> f64 {
        (self.alpha / self.sigma).ln()
    }
}

/// A flow model sees time (0 to 1) times this, so that its time embedding works as a diffusion
/// model's does.
pub const FLOW_TIMESTEP_SCALE: f64 = 1000.0;

/// Either kind of forward process.
#[derive(Clone, Debug, PartialEq)]
pub enum Process {
    /// The chain that the model was trained on, not respaced.
    Diffusion(Schedule),
    /// The straight path from data (time 0) to noise (time 1): x_t = (1 - t) x_0 + t noise.
    Flow,
}

impl Process {
    /// The level at a timestep, whole or between two whole ones.
    ///
    /// # Errors
    /// If the timestep is outside the process.
    pub fn level(&self, timestep: f64) -> Result<NoiseLevel> {
        match self {
            Self::Diffusion(schedule) => schedule.level(timestep),
            Self::Flow => {
                let sigma = timestep / FLOW_TIMESTEP_SCALE;
                if !(0.0..=1.0).contains(&sigma) {
                    return Err(DiffusionError::Timestep { timestep, low: 0.0, high: FLOW_TIMESTEP_SCALE });
                }
                Ok(NoiseLevel { timestep, alpha: 1.0 - sigma, sigma })
            }
        }
    }

    /// The timestep as a fraction of the process: 0 at the data, 1 (or nearly) at pure noise.
    pub fn fraction(&self, timestep: f64) -> f64 {
        match self {
            Self::Diffusion(schedule) => timestep / schedule.training_steps as f64,
            Self::Flow => timestep / FLOW_TIMESTEP_SCALE,
        }
    }
}
