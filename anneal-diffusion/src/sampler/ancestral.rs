//! DDPM on respaced steps, and DDIM.
//!
//! Source: DDPM (arXiv 2006.11239) algorithm 2 and eq. 7, improved DDPM (2102.09672) eq. 15 and
//! section 4, DDIM (2010.02502) eq. 12 and 16.

use super::plan::{Operand, Plan, StepNoise, StepPlan};
use super::timesteps::{Spacing, Steps, timesteps};
use super::{SamplerOptions, StepVariance};
use crate::error::Result;
use crate::process::NoiseLevel;
use crate::schedule::Schedule;

pub(super) fn ddpm(schedule: &Schedule, options: &SamplerOptions, variance: StepVariance) -> Result<Plan> {
    let timesteps = timesteps(&options.method, schedule.len(), &options.steps)?;
    let visited: Vec<usize> = timesteps.iter().rev().map(|timestep| *timestep as usize).collect();
    let chain = schedule.respaced(&visited)?;
    let steps = (0..chain.len())
        .rev()
        .map(|index| {
            let level = schedule.level(chain.timesteps[index] as f64)?;
            let advance = vec![
                (Operand::Clean(0), chain.posterior_mean_clean[index]),
                (Operand::Sample, chain.posterior_mean_sample[index]),
            ];
            let step = StepPlan::at(level, 1.0, options.prediction, advance);
            Ok(StepPlan { noise: ddpm_noise(&chain, index, variance), ..step })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Plan { initial_scale: 1.0, steps })
}

/// The step to the data (index 0) returns the mean.
fn ddpm_noise(chain: &Schedule, index: usize, variance: StepVariance) -> StepNoise {
    let low = chain.posterior_log_variance_clipped[index];
    match variance {
        _ if index == 0 => StepNoise::None,
        StepVariance::Posterior => StepNoise::Fixed { deviation: (0.5 * low).exp() },
        StepVariance::Beta => StepNoise::Fixed { deviation: chain.betas[index].sqrt() },
        StepVariance::LearnedRange => {
            StepNoise::Learned { log_variance_low: low, log_variance_range: chain.betas[index].ln() - low }
        }
    }
}

pub(super) fn ddim(schedule: &Schedule, options: &SamplerOptions, eta: f64) -> Result<Plan> {
    let timesteps = timesteps(&options.method, schedule.len(), &options.steps)?;
    let stride = whole_stride(schedule.len(), options);
    let steps = timesteps
        .iter()
        .enumerate()
        .map(|(index, timestep)| {
            let next = match stride {
                Some(stride) => Some(timestep - stride).filter(|next| *next >= 0.0),
                None => timesteps.get(index + 1).copied(),
            };
            let next = next.map_or(Ok(NoiseLevel::CLEAN), |next| schedule.level(next))?;
            Ok(ddim_step(schedule.level(*timestep)?, next, options, eta))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Plan { initial_scale: 1.0, steps })
}

/// With leading and trailing spacing each step goes down by the whole stride T / count, also where
/// rounding puts the next visited timestep one beside it: that is how the published numbers of
/// those spacings are made.
fn whole_stride(chain: usize, options: &SamplerOptions) -> Option<f64> {
    match (&options.steps, options.method.usual_spacing()) {
        (Steps::Spaced(count, Spacing::Leading | Spacing::Trailing), _) => Some((chain / count) as f64),
        (Steps::Count(count), Some(Spacing::Leading)) => Some((chain / count) as f64),
        _ => None,
    }
}

/// DDIM eq. 12: x_next = alpha_next x_0 + sqrt(sigma_next^2 - deviation^2) noise_predicted + deviation z,
/// with the predicted noise (x - alpha x_0) / sigma.
fn ddim_step(now: NoiseLevel, next: NoiseLevel, options: &SamplerOptions, eta: f64) -> StepPlan {
    // Eq. 16; eta 1 is the posterior's deviation.
    let deviation = eta * next.sigma / now.sigma * (1.0 - (now.alpha / next.alpha).powi(2)).sqrt();
    let direction = (next.sigma.powi(2) - deviation.powi(2)).max(0.0).sqrt() / now.sigma;
    let advance = vec![(Operand::Clean(0), next.alpha - now.alpha * direction), (Operand::Sample, direction)];
    let step = StepPlan::at(now, 1.0, options.prediction, advance);
    let noise = if deviation == 0.0 { StepNoise::None } else { StepNoise::Fixed { deviation } };
    StepPlan { noise, ..step }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::Method;
    use crate::prediction::Prediction;
    use crate::schedule::BetaSchedule;

    /// DDIM's section 4.1: with eta 1 it is DDPM with the posterior's variance.
    #[test]
    fn ddim_with_eta_one_is_ddpm() {
        let schedule = Schedule::new(BetaSchedule::linear(1000), 1000).unwrap();
        let options = |method| SamplerOptions {
            method,
            steps: Steps::Respaced("10".into()),
            prediction: Prediction::Epsilon,
            clip: None,
        };
        let variance = StepVariance::Posterior;
        let ancestral = ddpm(&schedule, &options(Method::Ddpm { variance }), variance).unwrap();
        let implicit = ddim(&schedule, &options(Method::Ddim { eta: 1.0 }), 1.0).unwrap();
        assert_eq!(ancestral.steps.len(), 10);
        for (index, (a, b)) in ancestral.steps.iter().zip(&implicit.steps).enumerate() {
            assert_eq!(a.timestep, b.timestep);
            for (a, b) in a.advance.iter().zip(&b.advance) {
                assert_eq!(a.0, b.0);
                assert!((a.1 - b.1).abs() < 1e-12, "step {index}: {} and {}", a.1, b.1);
            }
            let deviation = |step: &StepPlan| match step.noise {
                StepNoise::Fixed { deviation } => deviation,
                _ => 0.0,
            };
            assert!((deviation(a) - deviation(b)).abs() < 1e-12, "step {index}");
        }
    }
}
