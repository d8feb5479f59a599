//! What a sampler does, worked out before it starts: numbers only.
//!
//! Contract: every update is a combination of a few tensors whose coefficients depend on the
//! schedule alone, so a plan is a list of coefficients, and one executor
//! ([`super::SamplerState`]) runs every sampler.
//! A sampler may keep its sample in coordinates of its own (Euler and Heun divide by alpha, as
//! Karras et al. do); `input_scale` leads back to what the model sees.

use crate::prediction::Prediction;
use crate::process::NoiseLevel;

/// A tensor that an update may combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// The sample at this step.
    Sample,
    /// The sample that was marked by the last step with `mark_anchor`.
    Anchor,
    /// The estimate of x_0: 0 is this step's, 1 the one before, 2 the one before that.
    Clean(usize),
}

/// `sum of coefficient * operand`.
pub(crate) type Combination = Vec<(Operand, f64)>;

/// The fresh noise of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum StepNoise {
    None,
    Fixed {
        deviation: f64,
    },
    /// The model's own variance, improved DDPM eq. 15: the logarithm is `low + (v + 1) / 2 * range`.
    Learned {
        log_variance_low: f64,
        log_variance_range: f64,
    },
}

/// One model call and the update that follows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StepPlan {
    /// What the model is told.
    pub timestep: f64,
    /// What the sample is multiplied by before the model sees it.
    pub input_scale: f64,
    /// x_0 as a combination of the sample (in the sampler's coordinates) and the model's output.
    pub clean_of_sample: f64,
    pub clean_of_output: f64,
    /// Replaces the sample before `advance`; empty if it stays.
    pub correct: Combination,
    /// Whether the (corrected) sample becomes the anchor.
    pub mark_anchor: bool,
    /// The sample of the next step.
    pub advance: Combination,
    pub noise: StepNoise,
}

impl StepPlan {
    /// A step without correction, anchor or noise.
    pub(crate) fn at(
        level: NoiseLevel,
        input_scale: f64,
        prediction: Prediction,
        advance: Combination,
    ) -> Self {
        let clean = prediction.clean(level);
        Self {
            timestep: level.timestep,
            input_scale,
            clean_of_sample: clean.first * input_scale,
            clean_of_output: clean.second,
            correct: Vec::new(),
            mark_anchor: false,
            advance,
            noise: StepNoise::None,
        }
    }

    /// Whether every coefficient is a number: a level without signal makes some infinite.
    fn is_finite(&self) -> bool {
        let terms = self.correct.iter().chain(&self.advance).map(|(_, coefficient)| *coefficient);
        let scalars = [self.input_scale, self.clean_of_sample, self.clean_of_output];
        terms.chain(scalars).all(f64::is_finite)
    }
}

/// A sampler's steps, and what standard normal noise is multiplied by to become its first sample.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub initial_scale: f64,
    pub steps: Vec<StepPlan>,
}

impl Plan {
    pub(crate) fn is_finite(&self) -> bool {
        self.initial_scale.is_finite() && self.steps.iter().all(StepPlan::is_finite)
    }
}
