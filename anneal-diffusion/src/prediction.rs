//! What a model's output means, and how the clean sample follows from it.
//!
//! Contract: with x = alpha x_0 + sigma noise, each target is a combination of x_0 and noise, and
//! x_0 is a combination of x and the target. Both hold for any alpha and sigma, so one table
//! serves diffusion and flow.
//! Source: epsilon, DDPM eq. 15 (2006.11239); v, progressive distillation section 4 and
//! appendix D (2202.00512); velocity, rectified flow eq. 1 (2209.03003).

use std::str::FromStr;

use crate::error::{DiffusionError, Result};
use crate::process::NoiseLevel;

/// The target that a model was trained to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// v = alpha noise - sigma x_0.
    V,
    /// The clean sample x_0.
    Clean,
    /// The velocity of the straight path, noise - x_0.
    Flow,
}

/// Coefficients of a combination of two tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    pub first: f64,
    pub second: f64,
}

impl Prediction {
    const NAMES: [(&'static str, Self); 4] =
        [("epsilon", Self::Epsilon), ("v", Self::V), ("x0", Self::Clean), ("flow", Self::Flow)];

    /// The name that recipes use: `epsilon`, `v`, `x0` or `flow`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, value)| *value == self).expect("every prediction has a name").0
    }

    /// The target as a combination of (x_0, noise).
    pub fn target(self, level: NoiseLevel) -> Pair {
        let (first, second) = match self {
            Self::Epsilon => (0.0, 1.0),
            Self::V => (-level.sigma, level.alpha),
            Self::Clean => (1.0, 0.0),
            Self::Flow => (-1.0, 1.0),
        };
        Pair { first, second }
    }

    /// The clean sample as a combination of (x, output).
    pub fn clean(self, level: NoiseLevel) -> Pair {
        let NoiseLevel { alpha, sigma, .. } = level;
        let (first, second) = match self {
            Self::Epsilon => (1.0 / alpha, -sigma / alpha),
            Self::V => {
                let power = alpha * alpha + sigma * sigma;
                (alpha / power, -sigma / power)
            }
            Self::Clean => (0.0, 1.0),
            Self::Flow => (1.0 / (alpha + sigma), -sigma / (alpha + sigma)),
        };
        Pair { first, second }
    }
}

impl FromStr for Prediction {
    type Err = DiffusionError;

    fn from_str(text: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
            let known: Vec<&str> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            DiffusionError::UnknownName { name: "prediction", given: text.into(), known: known.join(", ") }
        })
    }
}
