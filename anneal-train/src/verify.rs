//! The proof that a stopped run continues bit for bit.
//!
//! One run goes through without a stop. Another, with another number of data workers, stops in the
//! middle, writes a checkpoint, and is continued from it by a new process's worth of fresh objects on
//! another number of threads. On a GPU both choose deterministic kernels, and the second run does not capture its
//! steps, so that a replayed step is compared with a plain one too.
//! Losses, weights, moments, averages and samples must have the same bits.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anneal_nn::ParamStore;
use anneal_optim::State;
use anneal_recipe::{Recipe, Train};

use crate::checkpoint::RunLock;
use crate::error::{Result, TrainError};
use crate::run::{Preview, sampling_rate};
use crate::settings;
use crate::state;
use crate::trainer::Trainer;

/// What was compared and what differed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// For example `losses of 12 steps`.
    pub what: String,
    pub numbers: usize,
    /// Numbers whose bits differ, and the first of them.
    pub different: usize,
    pub first: Option<String>,
}

/// The runs to compare.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    pub steps: u64,
    /// Between 1 and `steps - 1`.
    pub stop_at: u64,
}

/// Bits of everything that a run leaves.
struct Trace {
    losses: Vec<f64>,
    state: Vec<(String, Vec<f32>)>,
    samples: Vec<f32>,
}

/// Runs the recipe both ways in `scratch`, a folder without a run.
///
/// # Errors
/// Those of training; `stop_at` outside the run; [`TrainError::Stopped`] soon after `stop` is set.
pub fn verify_resume(
    recipe: &Recipe,
    options: VerifyOptions,
    scratch: &Path,
    preview: &Preview,
    stop: &AtomicBool,
) -> Result<Vec<Comparison>> {
    if options.stop_at == 0 || options.stop_at >= options.steps {
        let message = format!("the stop must lie within the run: between 1 and {}", options.steps - 1);
        return Err(TrainError::Settings { message });
    }
    let on_gpu = settings::on_gpu(recipe);
    let recipe = &with_determinism(recipe, on_gpu || recipe.train.deterministic);
    let mut whole = Trainer::new(recipe)?;
    let mut losses = Vec::new();
    advance(&mut whole, options.steps, &mut losses, stop)?;
    let uninterrupted = trace(&whole, losses, preview, stop)?;
    drop(whole);

    let mut other = recipe.clone();
    other.data.workers = if recipe.data.workers == 1 { 4 } else { 1 };
    other.train.capture_steps = false;
    let mut losses = Vec::new();
    {
        let lock = RunLock::acquire(scratch)?;
        let mut stopped = Trainer::new(&other)?;
        advance(&mut stopped, options.stop_at, &mut losses, stop)?;
        state::save(&stopped, &lock)?;
    }
    if !on_gpu {
        other.device = if recipe.device == "cpu:1" { "cpu:3".into() } else { "cpu:1".into() };
    }
    let mut continued = Trainer::new(&other)?;
    state::resume(&mut continued, scratch, false)?;
    if continued.steps_done() != options.stop_at {
        let message = format!("the checkpoint of step {} was not found again", options.stop_at);
        return Err(TrainError::Settings { message });
    }
    advance(&mut continued, options.steps, &mut losses, stop)?;
    Ok(compare(&uninterrupted, &trace(&continued, losses, preview, stop)?))
}

/// Median seconds of a captured step on a GPU: with kernels chosen freely, and with deterministic ones.
///
/// # Errors
/// Those of training; [`TrainError::Stopped`] soon after `stop` is set.
pub fn cost_of_determinism(recipe: &Recipe, steps: u64, stop: &AtomicBool) -> Result<[f64; 2]> {
    /// In which kernels are measured, the step is captured, and the queue fills.
    const WARMUP: u64 = 6;
    let median = |deterministic| -> Result<f64> {
        let mut trainer = Trainer::new(&with_determinism(recipe, deterministic))?;
        let mut outcomes = Vec::new();
        while trainer.steps_done() < WARMUP + steps.max(1) {
            go_on(stop)?;
            trainer.step(&mut outcomes)?;
        }
        trainer.finish_steps(&mut outcomes)?;
        let mut seconds: Vec<f64> =
            outcomes[WARMUP as usize..].iter().map(|outcome| outcome.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    };
    Ok([median(false)?, median(true)?])
}

fn with_determinism(recipe: &Recipe, deterministic: bool) -> Recipe {
    Recipe { train: Train { deterministic, ..recipe.train.clone() }, ..recipe.clone() }
}

fn go_on(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(TrainError::Stopped) } else { Ok(()) }
}

fn advance(trainer: &mut Trainer, steps: u64, losses: &mut Vec<f64>, stop: &AtomicBool) -> Result<()> {
    let mut outcomes = Vec::new();
    while trainer.steps_done() < steps {
        go_on(stop)?;
        trainer.step(&mut outcomes)?;
    }
    trainer.finish_steps(&mut outcomes)?;
    losses.extend(outcomes.iter().map(|outcome| outcome.loss));
    Ok(())
}

fn trace(trainer: &Trainer, losses: Vec<f64>, preview: &Preview, stop: &AtomicBool) -> Result<Trace> {
    let store: &dyn ParamStore = &**trainer.store();
    let rates = trainer.recipe().ema.rates.clone();
    let mut kinds = vec![("master", State::Master), ("first moment", State::FirstMoment)];
    kinds.push(("second moment", State::SecondMoment));
    let averages: Vec<String> = rates.iter().map(|rate| format!("average {rate}")).collect();
    kinds.extend(averages.iter().enumerate().map(|(index, name)| (name.as_str(), State::Average(index))));
    let mut state = Vec::new();
    for (id, spec) in store.parameters().iter() {
        state.push((format!("weights {}", spec.name), store.read(id)?));
        for (name, kind) in &kinds {
            if let Some(values) = trainer.optimizer().read(store, *kind, id)? {
                state.push((format!("{name} {}", spec.name), values));
            }
        }
    }
    let weights = trainer.sampling_store(sampling_rate(trainer.recipe()))?;
    let images = preview(Arc::clone(&weights), &mut |_, _| match go_on(stop) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    });
    let samples = images.map_err(TrainError::Preview)?.ok_or(TrainError::Stopped)?.values;
    Ok(Trace { losses, state, samples })
}

fn compare(expected: &Trace, got: &Trace) -> Vec<Comparison> {
    let losses = expected.losses.iter().zip(&got.losses).enumerate();
    let losses = losses.map(|(step, (a, b))| (format!("step {}", step + 1), a.to_bits() == b.to_bits()));
    let samples = expected.samples.iter().zip(&got.samples).enumerate();
    let samples = samples.map(|(index, (a, b))| (format!("number {index}"), a.to_bits() == b.to_bits()));
    let mut all = vec![count(format!("losses of {} steps", expected.losses.len()), losses)];
    assert!(expected.state.len() == got.state.len() && expected.losses.len() == got.losses.len());
    for group in ["weights", "master", "first moment", "second moment", "average"] {
        let tensors = expected.state.iter().zip(&got.state).filter(|((name, _), _)| name.starts_with(group));
        let numbers = tensors.flat_map(|((name, a), (_, b))| {
            a.iter().zip(b).map(move |(a, b)| (name.clone(), a.to_bits() == b.to_bits()))
        });
        let comparison = count(group.into(), numbers);
        if comparison.numbers > 0 {
            all.push(comparison);
        }
    }
    all.push(count("samples".into(), samples));
    all
}

fn count(what: String, pairs: impl Iterator<Item = (String, bool)>) -> Comparison {
    let mut comparison = Comparison { what, numbers: 0, different: 0, first: None };
    for (name, same) in pairs {
        comparison.numbers += 1;
        if !same {
            comparison.different += 1;
            comparison.first.get_or_insert(name);
        }
    }
    comparison
}
