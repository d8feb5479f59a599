//! DPM-Solver++ 2M and UniPC: exponential integrators that reuse earlier estimates of x_0.
//!
//! With lambda = ln(alpha / sigma) and h the step in lambda, both solve exactly for an x_0 that is
//! constant over the step, x_t = sigma_t / sigma_s x_s - alpha_t (e^{-h} - 1) x_0, and differ in
//! how they correct for its change.
//! Source: DPM-Solver++ (arXiv 2211.01095) algorithm 2; UniPC (2302.04867) section 3, with UniP and
//! UniC of order 2 in the data-prediction form and B(h) = e^h - 1; Karras et al. (2206.00364) eq. 5.
//! Not done: orders above 2, stochastic variants.

use super::SamplerOptions;
use super::plan::{Combination, Operand, Plan, StepPlan};
use super::timesteps::timesteps;
use crate::error::Result;
use crate::process::NoiseLevel;
use crate::schedule::{Schedule, linspace};

/// The exponent that Karras et al. recommend.
const KARRAS_RHO: f64 = 7.0;

pub(super) fn dpm_solver(schedule: &Schedule, options: &SamplerOptions, karras: bool) -> Result<Plan> {
    let levels = if karras { karras_levels(schedule, options)? } else { visited_levels(schedule, options)? };
    let steps = (0..levels.len() - 1)
        .map(|index| {
            let advance = predictor(&levels, index, order(index, levels.len() - 1));
            StepPlan::at(levels[index], 1.0, options.prediction, advance)
        })
        .collect();
    Ok(Plan { initial_scale: 1.0, steps })
}

pub(super) fn unipc(schedule: &Schedule, options: &SamplerOptions) -> Result<Plan> {
    let levels = visited_levels(schedule, options)?;
    let count = levels.len() - 1;
    let steps = (0..count)
        .map(|index| {
            let advance = predictor(&levels, index, order(index, count));
            let step = StepPlan::at(levels[index], 1.0, options.prediction, advance);
            // The corrector looks back on the step that led here, at that step's order.
            let correct = match index {
                0 => Vec::new(),
                _ => corrector(&levels, index, order(index - 1, count)),
            };
            StepPlan { correct, mark_anchor: true, ..step }
        })
        .collect();
    Ok(Plan { initial_scale: 1.0, steps })
}

/// The first step has no history, and the step to the data is exact at first order.
fn order(index: usize, count: usize) -> usize {
    if index == 0 || index == count - 1 { 1 } else { 2 }
}

/// The visited levels, and the data behind them.
fn visited_levels(schedule: &Schedule, options: &SamplerOptions) -> Result<Vec<NoiseLevel>> {
    let timesteps = timesteps(&options.method, schedule.len(), &options.steps)?;
    let mut levels = Vec::with_capacity(timesteps.len() + 1);
    for timestep in timesteps {
        levels.push(schedule.level(timestep)?);
    }
    levels.push(NoiseLevel::CLEAN);
    Ok(levels)
}

/// Karras et al. eq. 5 between the chain's own noisiest and cleanest level, and the data behind
/// them. The model is told the nearest timestep.
fn karras_levels(schedule: &Schedule, options: &SamplerOptions) -> Result<Vec<NoiseLevel>> {
    let count = timesteps(&options.method, schedule.len(), &options.steps)?.len();
    let last = (schedule.len() - 1) as f64;
    let (most, least) = (schedule.noise_to_signal(last)?, schedule.noise_to_signal(0.0)?);
    let ratios = linspace(most.powf(1.0 / KARRAS_RHO), least.powf(1.0 / KARRAS_RHO), count);
    let mut levels = Vec::with_capacity(count + 1);
    for ratio in ratios {
        let ratio = ratio.powf(KARRAS_RHO);
        let timestep = nearest_timestep(schedule, ratio)?;
        levels.push(NoiseLevel::variance_preserving(timestep, ratio));
    }
    levels.push(NoiseLevel::CLEAN);
    Ok(levels)
}

/// The timestep whose ratio of noise to signal is nearest, interpolating the logarithm.
fn nearest_timestep(schedule: &Schedule, ratio: f64) -> Result<f64> {
    let (mut below, mut above) = (0, schedule.len() - 1);
    while above - below > 1 {
        let middle = (below + above) / 2;
        match schedule.noise_to_signal(middle as f64)? <= ratio {
            true => below = middle,
            false => above = middle,
        }
    }
    let low = schedule.noise_to_signal(below as f64)?.ln();
    let high = schedule.noise_to_signal(above as f64)?.ln();
    // A chain of one step has no interval to look into.
    let share = if above == below { 0.0 } else { ((ratio.ln() - low) / (high - low)).clamp(0.0, 1.0) };
    Ok((below as f64 + share).round_ties_even())
}

/// From level `index` to the next: DPM-Solver++ algorithm 2, with r = h before / h.
/// UniP of order 2 with B(h) = e^h - 1 and its only weight taken as 1/2 is the same formula.
fn predictor(levels: &[NoiseLevel], index: usize, order: usize) -> Combination {
    let (now, next) = (levels[index], levels[index + 1]);
    if next.sigma == 0.0 {
        return vec![(Operand::Clean(0), 1.0)];
    }
    let h = next.half_log_ratio() - now.half_log_ratio();
    let weight = -next.alpha * (-h).exp_m1();
    let mut terms = vec![(Operand::Sample, next.sigma / now.sigma)];
    if order == 1 {
        terms.push((Operand::Clean(0), weight));
    } else {
        let ratio = (now.half_log_ratio() - levels[index - 1].half_log_ratio()) / h;
        terms.push((Operand::Clean(0), weight * (1.0 + 0.5 / ratio)));
        terms.push((Operand::Clean(1), -weight * 0.5 / ratio));
    }
    terms
}

/// Repeats the step that led to level `index`, now knowing the estimate there (UniC). Its weights
/// solve sum_m r_m^(k-1) rho_m = b_k for k up to the order, with r = 1 for the new estimate.
fn corrector(levels: &[NoiseLevel], index: usize, order: usize) -> Combination {
    let (from, to) = (levels[index - 1], levels[index]);
    let h = to.half_log_ratio() - from.half_log_ratio();
    let weight = -to.alpha * (-h).exp_m1();
    // b_k = k! phi_{k+1} / B for the data prediction, whose argument is -h.
    let phi_1 = (-h).exp_m1() / -h;
    let phi_2 = (phi_1 - 1.0) / -h;
    let phi_3 = (phi_2 - 0.5) / -h;
    let (b_1, b_2) = (phi_2 / phi_1, 2.0 * phi_3 / phi_1);
    let (previous_weight, this_weight, ratio) = if order == 1 {
        // At order 1 the system is replaced by its limit for small h.
        (0.0, 0.5, 1.0)
    } else {
        let ratio = (levels[index - 2].half_log_ratio() - from.half_log_ratio()) / h;
        let previous_weight = (b_1 - b_2) / (1.0 - ratio);
        (previous_weight, b_1 - previous_weight, ratio)
    };
    let mut terms = vec![
        (Operand::Anchor, to.sigma / from.sigma),
        (Operand::Clean(0), weight * this_weight),
        (Operand::Clean(1), weight * (1.0 - this_weight - previous_weight / ratio)),
    ];
    if order == 2 {
        terms.push((Operand::Clean(2), weight * previous_weight / ratio));
    }
    terms
}
