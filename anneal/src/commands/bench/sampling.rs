//! Whole sampling runs, as `sample` makes them.

use std::ops::ControlFlow;
use std::path::Path;

use anneal_infer::{Pipeline, Request};
use anneal_recipe::GuidanceMode;
use anneal_train::report::summary;
use anneal_train::settings;
use anyhow::{Result, ensure};
use serde_json::Map;

use super::Measured;
use super::clock;
use super::model::{Evaluated, config, forward_operations, name, recipe, refuse_training_flags};
use crate::cli::BenchSample;
use crate::sampling::{SamplingSettings, sampler_named};

/// Denoising steps of a run that warms up: enough to compile, capture and replay all that a run needs.
const WARMING_STEPS: usize = 4;

pub fn sample(arguments: &BenchSample) -> Result<()> {
    let BenchSample { model, sampling_steps, guidance, sampler } = arguments;
    ensure!(
        !model.profile,
        "sampling replays captured model calls: profile one with `bench forward --profile`"
    );
    refuse_training_flags(model)?;
    let config = config(model)?;
    let evaluated = Evaluated::new(model, &config, false)?;
    let objective = settings::objective(&recipe(model, &config, Path::new("none"))?)?;
    let request = |steps: usize| {
        let settings = SamplingSettings {
            sampler: sampler_named(sampler)?,
            steps,
            eta: 0.0,
            shift: 1.0,
            guidance: *guidance,
            guidance_mode: GuidanceMode::All,
            clip: None,
            spacing: None,
        };
        settings.check()?;
        let (sampler, guidance) = settings.options(&objective)?;
        let labels = (0..model.batch).map(|row| (row % config.classes) as i64).collect();
        let seeds = (0..model.batch as u64).collect();
        anyhow::Ok(Request { labels, seeds, latents: None, sampler, guidance, batch: model.batch })
    };
    let (warming, whole) = (request(WARMING_STEPS.min(*sampling_steps))?, request(*sampling_steps)?);
    let device = evaluated.device().clone();
    let pipeline = Pipeline {
        model: evaluated.model.clone(),
        store: evaluated.store.clone(),
        objective: objective.clone(),
    };
    let run = |request: &Request| {
        let samples = pipeline.sample(request, &mut |_, _| ControlFlow::Continue(()))?;
        for warning in &samples.warnings {
            eprintln!("warning: {warning}");
        }
        anyhow::Ok(())
    };
    // A short run warms up as well as a whole one.
    for _ in 0..model.warmup.max(1) {
        run(&warming)?;
    }
    let guided = if *guidance == 1.0 { "without guidance".into() } else { format!("guidance {guidance}") };
    let steps = summary::plural(*sampling_steps as u64, "step");
    let what = format!("sampling, {sampler}, {steps}, {guided}, {}", name(&config, model));
    let timed = clock::time(&device, 0, model.steps, || run(&whole))?;
    let rows = if *guidance == 1.0 { 1.0 } else { 2.0 };
    let operations = rows * forward_operations(&config) * (model.batch * sampling_steps) as f64;
    let mut extra = Map::new();
    extra.insert("sampling_steps".into(), (*sampling_steps).into());
    Measured { what, device, timed, images: model.batch, operations, extra }.print(model.json);
    Ok(())
}
