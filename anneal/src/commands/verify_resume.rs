//! `verify-resume`: the bits of a stopped run against those of an uninterrupted one.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anneal_models::dit::Dit;
use anneal_recipe::Recipe;
use anneal_train::TrainError;
use anneal_train::report::summary::{self, Align, Table};
use anneal_train::run::DrawingProgress;
use anneal_train::settings;
use anneal_train::verify::{VerifyOptions, cost_of_determinism, verify_resume as verify};
use anyhow::{Context, Result, bail};

use crate::cli::VerifyResume;
use crate::sampling;
use crate::scratch::ScratchFolder;
use crate::signals::Signals;

/// Samples compared; a few show a difference as well as many.
const SAMPLES: usize = 8;

pub fn verify_resume(arguments: &VerifyResume) -> Result<ExitCode> {
    let mut recipe = Recipe::load(&arguments.recipe, &arguments.overrides)?;
    recipe.sample.num = recipe.sample.num.min(SAMPLES);
    recipe.sample.steps = recipe.sample.steps.min(10);
    if arguments.steps < 2 {
        bail!("--steps must be at least 2, so that there is a middle to stop in");
    }
    let options =
        VerifyOptions { steps: arguments.steps, stop_at: arguments.stop_at.unwrap_or(arguments.steps / 2) };
    let signals = Signals::catch()?;
    match compare(arguments, &recipe, options, &signals.stop) {
        Ok(code) => Ok(code),
        // The folder is removed by now.
        Err(error) if matches!(error.downcast_ref(), Some(TrainError::Stopped)) => Ok(signals.exit_code()),
        Err(error) => Err(error),
    }
}

fn compare(
    arguments: &VerifyResume,
    recipe: &Recipe,
    options: VerifyOptions,
    stop: &AtomicBool,
) -> Result<ExitCode> {
    let scratch = ScratchFolder::temporary("anneal-verify-");
    let scratch = scratch.context("no temporary folder for the checkpoint")?;
    let (model, _) = Dit::new(&settings::model_config(recipe)?)?;
    let model = Arc::new(model);
    let preview = |store, progress: &mut DrawingProgress| {
        sampling::preview(recipe, model.clone(), store, progress).map_err(|error| format!("{error:#}"))
    };
    let changed = match settings::on_gpu(recipe) {
        true => "with another number of workers and without captured steps",
        false => "with other numbers of workers and threads",
    };
    println!(
        "{}: {} steps without a stop, against a stop after step {} {changed}",
        recipe.name, options.steps, options.stop_at
    );
    let comparisons = verify(recipe, options, scratch.path(), &preview, stop)?;
    let mut table =
        Table::new([("compared", Align::Left), ("numbers", Align::Right), ("different bits", Align::Right)]);
    for comparison in &comparisons {
        let different = match &comparison.first {
            None => "none".to_owned(),
            Some(first) => format!("{} (first: {first})", comparison.different),
        };
        table.row([comparison.what.clone(), summary::count(comparison.numbers as u64), different]);
    }
    print!("{table}");
    if comparisons.iter().any(|comparison| comparison.different > 0) {
        bail!("the continued run differs from the uninterrupted one");
    }
    println!("bit-identical");
    if settings::on_gpu(recipe) {
        let [free, deterministic] = cost_of_determinism(recipe, arguments.steps, stop)?;
        println!(
            "deterministic kernels: {:.2} ms a step; chosen freely: {:.2} ms ({:+.1} %)",
            deterministic * 1e3,
            free * 1e3,
            (deterministic / free - 1.0) * 100.0
        );
    }
    Ok(ExitCode::SUCCESS)
}
