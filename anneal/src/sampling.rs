//! From a recipe's words, or the command line's, to a request to draw samples.

use std::ops::ControlFlow;
use std::sync::Arc;

use anneal_diffusion::{
    DiffusionError, Guidance, GuidanceShape, Method, Objective, SamplerOptions, Spacing, StepVariance, Steps,
};
use anneal_infer::{InferError, Pipeline, Request, Samples};
use anneal_models::Denoiser;
use anneal_nn::ParamStore;
use anneal_recipe::{GuidanceMode, Recipe, Sample, Sampler, sampling_problems};
use anneal_train::report::summary;
use anneal_train::run::{DrawingProgress, PreviewImages};
use anneal_train::settings;
use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

/// How samples are drawn, whatever asked for them. Files of weights carry the parts that no scheduler's configuration has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    pub sampler: Sampler,
    pub steps: usize,
    pub eta: f64,
    pub shift: f64,
    pub guidance: f64,
    pub guidance_mode: GuidanceMode,
    /// Keeps estimates of the clean image within plus or minus this: for pixels, not for latents.
    #[serde(skip)]
    pub clip: Option<f64>,
    /// How DDIM spreads its steps, if not in its usual way.
    #[serde(skip)]
    pub spacing: Option<Spacing>,
}

impl SamplingSettings {
    /// The settings of a recipe's section `sample`.
    pub fn of(sample: &Sample) -> Self {
        Self {
            sampler: sample.sampler,
            steps: sample.steps,
            eta: sample.eta,
            shift: sample.shift,
            guidance: sample.guidance,
            guidance_mode: sample.guidance_mode,
            clip: None,
            spacing: None,
        }
    }

    /// Checks the ranges that a recipe's section `sample` has; flags are named.
    pub fn check(&self) -> Result<()> {
        // A mode is followed by its numbers, which have no names here.
        let named = |key: &str| {
            let mut parts = key.split('.');
            let flag = parts.next().unwrap_or_default().replace('_', "-");
            parts.next().map_or(format!("--{flag}"), |mode| format!("--{flag} {mode}"))
        };
        let problems = sampling_problems(self.eta, self.shift, self.guidance, self.guidance_mode, named);
        problems.into_iter().next().map_or(Ok(()), |problem| Err(anyhow!(problem)))
    }

    /// The request's numbers for a model.
    pub fn options(&self, objective: &Objective) -> Result<(SamplerOptions, Guidance)> {
        let variance = match objective.learned_variance() {
            true => StepVariance::LearnedRange,
            false => StepVariance::Beta,
        };
        let method = match self.sampler {
            Sampler::Ddpm => Method::Ddpm { variance },
            Sampler::Ddim => Method::Ddim { eta: self.eta },
            Sampler::DpmSolver2m => Method::DpmSolver2m { karras: false },
            Sampler::DpmSolver2mKarras => Method::DpmSolver2m { karras: true },
            Sampler::Unipc => Method::UniPc,
            Sampler::Euler => Method::Euler,
            Sampler::Heun => Method::Heun,
            Sampler::FlowEuler => Method::FlowEuler { shift: self.shift },
        };
        let (shape, channels) = match self.guidance_mode {
            GuidanceMode::All => (GuidanceShape::Constant, None),
            GuidanceMode::FirstThree => (GuidanceShape::Constant, Some(3)),
            GuidanceMode::Interval { low, high } => (GuidanceShape::Interval { low, high }, None),
            GuidanceMode::PowerCosine { power } => (GuidanceShape::PowerCosine { power }, None),
        };
        let options = SamplerOptions {
            method,
            steps: match self.spacing.filter(|_| self.sampler == Sampler::Ddim) {
                Some(spacing) => Steps::Spaced(self.steps, spacing),
                None => Steps::Count(self.steps),
            },
            prediction: objective.prediction(),
            clip: self.clip,
        };
        Ok((options, Guidance::new(self.guidance, shape, channels)?))
    }

    /// The words of a picture's record.
    pub fn caption(&self) -> String {
        let steps = summary::plural(self.steps as u64, "step");
        format!("sampler {}, {steps}, guidance {}", self.sampler, self.guidance)
    }
}

/// A sampler by its name in recipes.
pub fn sampler_named(name: &str) -> Result<Sampler> {
    serde_json::from_value(name.into()).ok().with_context(|| {
        format!(
            "unknown sampler '{name}': choose ddpm, ddim, dpm_solver_2m, dpm_solver_2m_karras, unipc, euler, heun or flow_euler"
        )
    })
}

/// Labels for `count` samples from `all`, `none`, one class or a list; `all` and lists in equal shares,
/// sorted by class, the first classes taking what is left over.
pub fn labels(text: &str, count: usize, classes: usize) -> Result<Vec<i64>> {
    let chosen: Vec<i64> = match text {
        "all" => (0..classes as i64).collect(),
        "none" => return Ok(vec![classes as i64; count]),
        list => list
            .split(',')
            .map(|part| match part.trim().parse::<i64>() {
                Ok(class) if (0..classes as i64).contains(&class) => Ok(class),
                Ok(class) => bail!("class {class} does not exist: this model knows 0 to {}", classes - 1),
                Err(_) => bail!("'{part}' is no class: give a number, a list such as 1,4,7, `all` or `none`"),
            })
            .collect::<Result<_>>()?,
    };
    Ok(in_shares(&chosen, count))
}

fn in_shares(chosen: &[i64], count: usize) -> Vec<i64> {
    let mut labels: Vec<usize> = (0..count).map(|index| index % chosen.len()).collect();
    labels.sort_unstable();
    labels.into_iter().map(|place| chosen[place]).collect()
}

/// Draws a recipe's periodic samples from a store: the trainer's preview. None if `progress` stopped it.
pub fn preview(
    recipe: &Recipe,
    model: Arc<dyn Denoiser>,
    store: Arc<dyn ParamStore>,
    progress: &mut DrawingProgress,
) -> Result<Option<PreviewImages>> {
    let sample = &recipe.sample;
    let settings = SamplingSettings::of(sample);
    let objective = settings::objective(recipe)?;
    let (sampler, guidance) = settings.options(&objective)?;
    let all: Vec<i64> = match sample.classes.is_empty() {
        true => (0..model.classes() as i64).collect(),
        false => sample.classes.iter().map(|class| *class as i64).collect(),
    };
    let labels = in_shares(&all, sample.num);
    let request = Request {
        seeds: (0..sample.num as u64).collect(),
        labels,
        latents: None,
        sampler,
        guidance,
        batch: sample.num,
    };
    let pipeline = Pipeline { model, store, objective };
    let mut waited = Ok(());
    let samples = pipeline.sample(&request, &mut |done, all| {
        // A GPU is sent work ahead: all calls could be under way, and a stop would wait for them.
        waited = pipeline.store.device().synchronize();
        if waited.is_ok() { progress(done, all) } else { ControlFlow::Break(()) }
    });
    waited?;
    let Samples { values, shape, warnings, .. } = match samples {
        Err(InferError::Diffusion(DiffusionError::Stopped { .. })) => return Ok(None),
        samples => samples?,
    };
    Ok(Some(PreviewImages { values, count: sample.num, shape, caption: settings.caption(), warnings }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_come_in_equal_shares() {
        assert_eq!(labels("all", 6, 3).unwrap(), [0, 0, 1, 1, 2, 2]);
        assert_eq!(labels("2,0", 3, 3).unwrap(), [2, 2, 0]);
        assert_eq!(labels("none", 2, 3).unwrap(), [3, 3]);
        let message = labels("7", 1, 3).unwrap_err().to_string();
        assert_eq!(message, "class 7 does not exist: this model knows 0 to 2");
        assert!(labels("two", 1, 3).is_err());
    }

    #[test]
    fn samplers_are_read() {
        assert_eq!(sampler_named("heun").unwrap(), Sampler::Heun);
        assert!(sampler_named("hoin").unwrap_err().to_string().contains("dpm_solver_2m"));
    }
}
