//! A diffusers scheduler's configuration: what a model was trained to predict, and how its folder means to sample.
//!
//! What a folder asks for is done, or said not to be done: no setting is passed over in silence.
//! Not done: `steps_offset`, `set_alpha_to_one: false`, thresholding and rescaled betas.

use anneal_diffusion::{BetaSchedule, Objective, Prediction, Process, Schedule, Spacing};
use anneal_models::dit::DitConfig;
use anneal_recipe::Sampler;
use anyhow::{Result, bail};
use serde_json::Value;

use crate::sampling::SamplingSettings;

const FLOW_SCHEDULER: &str = "FlowMatchEulerDiscreteScheduler";
/// The schedulers that clip unless they are told not to.
const CLIPPING: [&str; 2] = ["DDIMScheduler", "DDPMScheduler"];

/// Settings that change the samples and are not followed, each with the value that asks for nothing.
const NOT_FOLLOWED: [(&str, Value); 4] = [
    ("steps_offset", Value::Null),
    ("set_alpha_to_one", Value::Bool(true)),
    ("thresholding", Value::Bool(false)),
    ("rescale_betas_zero_snr", Value::Bool(false)),
];

/// Takes over how the scheduler samples: whether it clips, its shift.
pub fn apply(scheduler: &Value, settings: &mut SamplingSettings) {
    let class = scheduler["_class_name"].as_str().unwrap_or_default();
    if class == FLOW_SCHEDULER {
        settings.shift = scheduler["shift"].as_f64().unwrap_or(settings.shift);
        return;
    }
    if scheduler["clip_sample"].as_bool().unwrap_or(CLIPPING.contains(&class)) {
        settings.clip = Some(scheduler["clip_sample_range"].as_f64().unwrap_or(1.0));
    }
    settings.spacing = scheduler["timestep_spacing"].as_str().and_then(|name| name.parse().ok());
}

/// What the scheduler asks for and the settings do not do, for people.
pub fn not_followed(scheduler: &Value, settings: &SamplingSettings) -> Vec<String> {
    let mut lines = Vec::new();
    for (key, neutral) in &NOT_FOLLOWED {
        let value = &scheduler[*key];
        // The offset's neutral value is 0, in whichever form it is written.
        if !value.is_null() && value != neutral && value.as_f64() != Some(0.0) {
            lines.push(format!(
                "the scheduler's {key} is {value}, which is not followed here: its own library draws other images"
            ));
        }
    }
    let spacing = scheduler["timestep_spacing"].as_str();
    let followed = match spacing {
        None => true,
        Some(name) if settings.sampler == Sampler::Ddim => name.parse::<Spacing>().is_ok(),
        // The usual one of these files says nothing about another sampler than their own.
        Some(name) => name == "leading",
    };
    if let (false, Some(name)) = (followed, spacing) {
        lines.push(format!(
            "the scheduler's timestep_spacing '{name}' is not followed here by this sampler: its own library draws other images"
        ));
    }
    lines
}

/// The objective that a diffusers scheduler configuration stands for.
pub fn objective(scheduler: &Value, config: &DitConfig) -> Result<Objective> {
    let text = |key: &str, default: &str| scheduler[key].as_str().unwrap_or(default).to_owned();
    let steps = scheduler["num_train_timesteps"].as_u64().unwrap_or(1000) as usize;
    if text("_class_name", "") == FLOW_SCHEDULER {
        return Ok(Objective::new(Process::Flow, Prediction::Flow, false, None)?);
    }
    if !scheduler["trained_betas"].is_null() {
        bail!("the scheduler's trained_betas are not known here: give it a beta_schedule");
    }
    let end = |key: &str, default: f64| scheduler[key].as_f64().unwrap_or(default);
    let betas = match text("beta_schedule", "linear").as_str() {
        "linear" => BetaSchedule::Linear { start: end("beta_start", 1e-4), end: end("beta_end", 0.02) },
        "squaredcos_cap_v2" => BetaSchedule::SquaredCosine,
        other => bail!(
            "the scheduler's beta_schedule '{other}' is not known here: linear and squaredcos_cap_v2 are"
        ),
    };
    let prediction = match text("prediction_type", "epsilon").as_str() {
        "epsilon" => Prediction::Epsilon,
        "v_prediction" => Prediction::V,
        "sample" => Prediction::Clean,
        other => bail!("the scheduler's prediction_type '{other}' is not known here"),
    };
    let schedule = Schedule::new(betas, steps)?;
    Ok(Objective::new(Process::Diffusion(schedule), prediction, config.learn_sigma, None)?)
}

/// The scheduler configuration that stands for an objective, in diffusers' words. `DiTPipeline` can sample
/// the gaussian ones of them. `shift` is of the times of flow matching.
pub fn config(objective: &Objective, shift: f64) -> Result<Value> {
    let Process::Diffusion(schedule) = objective.process() else {
        return Ok(serde_json::json!({
            "_class_name": FLOW_SCHEDULER,
            "_diffusers_version": "0.30.0",
            "num_train_timesteps": 1000,
            "shift": shift,
        }));
    };
    let steps = schedule.training_steps;
    let linear = BetaSchedule::linear(steps);
    let is = |kind: BetaSchedule| schedule.betas == kind.betas(steps);
    let name = match () {
        () if is(linear) => "linear",
        () if is(BetaSchedule::SquaredCosine) => "squaredcos_cap_v2",
        () => bail!("this noise schedule has no name in diffusers' DDIMScheduler"),
    };
    let BetaSchedule::Linear { start, end } = linear else { unreachable!("the linear schedule is linear") };
    let prediction = match objective.prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v_prediction",
        Prediction::Clean => "sample",
        Prediction::Flow => bail!("a velocity prediction has no name in diffusers' DDIMScheduler"),
    };
    Ok(serde_json::json!({
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.30.0",
        "beta_end": end,
        "beta_schedule": name,
        "beta_start": start,
        "clip_sample": false,
        "num_train_timesteps": steps,
        "prediction_type": prediction,
        "set_alpha_to_one": true,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "trained_betas": null,
    }))
}
