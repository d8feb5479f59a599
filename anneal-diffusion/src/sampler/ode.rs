//! Euler and Heun on noise levels, and Euler along a flow.
//!
//! Both follow dx / d sigma = (x - x_0) / sigma: for a diffusion in the coordinates x / alpha,
//! where sigma is the ratio of noise to signal (Karras et al., arXiv 2206.00364, eq. 1 and 3); for a flow in its own coordinates, where sigma is time and the
//! right side is the velocity (rectified flow, 2209.03003, eq. 1).
//! Source of the shift: SD3 (2403.03206) eq. 23.

use super::SamplerOptions;
use super::plan::{Combination, Operand, Plan, StepPlan};
use super::timesteps::{Spacing, Steps, timesteps};
use crate::error::{DiffusionError, Result};
use crate::process::{FLOW_TIMESTEP_SCALE, NoiseLevel};
use crate::schedule::{Schedule, linspace};

/// The levels of a diffusion with the sigma of this module's head.
struct Levels {
    levels: Vec<NoiseLevel>,
    initial_scale: f64,
}

fn diffusion_levels(schedule: &Schedule, options: &SamplerOptions) -> Result<Levels> {
    let timesteps = timesteps(&options.method, schedule.len(), &options.steps)?;
    let mut levels = Vec::with_capacity(timesteps.len());
    for timestep in timesteps {
        levels.push(NoiseLevel::variance_preserving(timestep, schedule.noise_to_signal(timestep)?));
    }
    let noisiest = levels[0].noise_to_signal();
    // A leading spacing starts below pure noise, so its first sample has signal's share too.
    let leading = matches!(options.steps, Steps::Spaced(_, Spacing::Leading));
    let initial_scale = if leading { (noisiest * noisiest + 1.0).sqrt() } else { noisiest };
    Ok(Levels { levels, initial_scale })
}

/// x + (sigma_next - sigma) (x - x_0) / sigma.
fn euler_update(sigma: f64, next: f64) -> Combination {
    vec![(Operand::Sample, next / sigma), (Operand::Clean(0), 1.0 - next / sigma)]
}

pub(super) fn euler(schedule: &Schedule, options: &SamplerOptions) -> Result<Plan> {
    let Levels { levels, initial_scale } = diffusion_levels(schedule, options)?;
    let steps = levels
        .iter()
        .enumerate()
        .map(|(index, level)| {
            let next = levels.get(index + 1).map_or(0.0, |next| next.noise_to_signal());
            let advance = euler_update(level.noise_to_signal(), next);
            StepPlan::at(*level, level.alpha, options.prediction, advance)
        })
        .collect();
    Ok(Plan { initial_scale, steps })
}

/// Two model calls a step, one for the last (Karras et al., algorithm 1).
pub(super) fn heun(schedule: &Schedule, options: &SamplerOptions) -> Result<Plan> {
    let Levels { levels, initial_scale } = diffusion_levels(schedule, options)?;
    let mut steps = Vec::with_capacity(2 * levels.len() - 1);
    for (index, level) in levels.iter().enumerate() {
        let sigma = level.noise_to_signal();
        let next = levels.get(index + 1);
        let next_sigma = next.map_or(0.0, |next| next.noise_to_signal());
        let first = StepPlan::at(*level, level.alpha, options.prediction, euler_update(sigma, next_sigma));
        steps.push(StepPlan { mark_anchor: true, ..first });
        if let Some(next) = next {
            // The anchor's slope is (anchor - x_0 before) / sigma, the sample's (x - x_0) / next sigma.
            let half = (next_sigma - sigma) / 2.0;
            let advance = vec![
                (Operand::Anchor, 1.0 + half / sigma),
                (Operand::Clean(1), -half / sigma),
                (Operand::Sample, half / next_sigma),
                (Operand::Clean(0), -half / next_sigma),
            ];
            steps.push(StepPlan::at(*next, next.alpha, options.prediction, advance));
        }
    }
    Ok(Plan { initial_scale, steps })
}

pub(super) fn flow_euler(options: &SamplerOptions, shift: f64) -> Result<Plan> {
    let error = |reason: String| DiffusionError::Sampler { method: options.method.name(), reason };
    if !crate::is_positive(shift) {
        return Err(error(format!("the shift must be a positive number, not {shift}")));
    }
    let Steps::Count(count @ 1..) = options.steps else {
        return Err(error("a flow takes a plain number of steps, at least 1".into()));
    };
    let shifted = |time: f64| shift * time / (1.0 + (shift - 1.0) * time);
    // Evenly from 1 to the shifted first thousandth, all shifted (again): the published numbers.
    let times = linspace(1.0, shifted(1.0 / FLOW_TIMESTEP_SCALE), count);
    let sigmas: Vec<f64> = times.into_iter().map(shifted).chain([0.0]).collect();
    let steps = sigmas
        .windows(2)
        .map(|pair| {
            let (sigma, next) = (pair[0], pair[1]);
            let level = NoiseLevel { timestep: sigma * FLOW_TIMESTEP_SCALE, alpha: 1.0 - sigma, sigma };
            StepPlan::at(level, 1.0, options.prediction, euler_update(sigma, next))
        })
        .collect();
    Ok(Plan { initial_scale: 1.0, steps })
}
