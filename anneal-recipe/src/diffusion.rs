//! The section `diffusion`: the noising process and what the network learns to predict.

use serde::{Deserialize, Serialize};

use crate::tagged_by_kind;

tagged_by_kind! {
    /// The objective, told apart by `diffusion.kind` (default `gaussian`).
    pub enum Diffusion {
        /// Gaussian diffusion over discrete steps (DDPM, arXiv 2006.11239; improved, 2102.09672).
        "gaussian" => Gaussian(Gaussian),
        /// Rectified flow / flow matching over continuous time (arXiv 2210.02747).
        "flow" => Flow(Flow),
    }
}

impl Default for Diffusion {
    fn default() -> Self {
        Diffusion::Gaussian(Gaussian::default())
    }
}

/// `kind: gaussian`. The loss is the mean squared error of the target; a model with `learn_sigma` adds the
/// variational term for its learned-range variance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gaussian {
    /// How the noise grows with the step.
    pub schedule: NoiseSchedule,
    /// Number of noising steps in training.
    pub steps: usize,
    /// What the network predicts.
    pub target: Target,
    /// Weighs each step's loss by min(SNR, gamma) / SNR (for epsilon; arXiv 2303.09556); 5 is usual, null weighs all alike.
    pub min_snr_gamma: Option<f64>,
}

impl Default for Gaussian {
    fn default() -> Self {
        Gaussian {
            schedule: NoiseSchedule::Linear,
            steps: 1000,
            target: Target::Epsilon,
            min_snr_gamma: None,
        }
    }
}

/// The beta schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseSchedule {
    /// Betas from 1e-4 to 0.02, scaled to the number of steps.
    Linear,
    /// Cumulative signal follows a squared cosine (arXiv 2102.09672, equation 17).
    SquaredCosine,
}

/// What the network's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The noise.
    Epsilon,
    /// The velocity alpha * noise - sigma * image (arXiv 2202.00512).
    V,
    /// The clean image.
    X0,
}

/// `kind: flow`. The network predicts the velocity from image to noise; the loss is its mean squared error.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flow {
    /// How training draws the time in 0 to 1.
    pub time: TimeDensity,
}

/// The density of training times.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum TimeDensity {
    /// Every time alike.
    #[default]
    Uniform,
    /// The logistic function of a normal draw: more of the middle (arXiv 2403.03206).
    LogitNormal {
        /// Mean of the normal draw; above 0 leans to the noisy end.
        #[serde(default)]
        mean: f64,
        /// Standard deviation of the normal draw.
        #[serde(default = "default_logit_std")]
        std: f64,
    },
}

fn default_logit_std() -> f64 {
    1.0
}
