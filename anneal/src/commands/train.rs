//! `quickstart`, `train` and `resume`: three ways to name the same run.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anneal_data::DataError;
use anneal_models::dit::Dit;
use anneal_recipe::Recipe;
use anneal_tensor::DeviceError;
use anneal_train::TrainError;
use anneal_train::data::DataSummary;
use anneal_train::plan::Plan;
use anneal_train::report::progress::Show;
use anneal_train::report::summary;
use anneal_train::run::{self, DrawingProgress, RunOptions, RunReport, SamplesReport};
use anneal_train::settings;
use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cli::{Precision, Quickstart, Resume, RunArguments, Train};
use crate::commands::sample::{self, Drawing};
use crate::output::Target;
use crate::sampling::{self, SamplingSettings};
use crate::source::{self, Opening};

/// The recipe of the quick start, inside the binary.
const DIGITS: &str = include_str!("../../../recipes/digits.yaml");
/// Samples of the quick start's picture: ten of each class.
const QUICKSTART_SAMPLES: usize = 100;

pub fn train(arguments: &Train) -> Result<ExitCode> {
    let mut recipe = Recipe::load(&arguments.recipe, &changes(&arguments.run))?;
    recipe.memory_limit = arguments.run.memory_limit.or(recipe.memory_limit);
    if arguments.plan {
        return plan(&recipe);
    }
    let (report, code) = run_recipe(&recipe, arguments.run.quiet, false)?;
    print_report(&recipe, &report);
    Ok(code)
}

/// The changes of a recipe: those given as keys, then those that flags stand for.
fn changes(arguments: &RunArguments) -> Vec<String> {
    let mut changes = arguments.overrides.clone();
    changes.extend(arguments.device.as_deref().map(on_device));
    changes.extend(arguments.steps.map(|steps| format!("train.steps={steps}")));
    changes
}

/// The change of a recipe that a flag `--device` stands for.
fn on_device(device: &str) -> String {
    format!("device={}", serde_json::Value::from(device))
}

/// Says what would be trained; fails where training would, except that data and GPU may be those of another machine.
fn plan(recipe: &Recipe) -> Result<ExitCode> {
    let plan = Plan::new(recipe)?;
    let (plan, result) = match DataSummary::open(recipe) {
        Ok((data, warnings)) => (plan.with_data(data), Ok(warnings)),
        Err(TrainError::Data(missing @ DataError::NotFound { .. })) => (plan, Ok(vec![missing.to_string()])),
        Err(error) => (plan, Err(error)),
    };
    print!("{plan}");
    let warnings = [check_device(recipe)?, plan.check_limit()?].into_iter().flatten();
    for warning in warnings.chain(result?) {
        eprintln!("warning: {warning}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A warning if the recipe's device is a GPU that cannot be used here; an error if it is no device anywhere.
fn check_device(recipe: &Recipe) -> Result<Option<String>> {
    match settings::device(recipe) {
        Ok(_) => Ok(None),
        Err(TrainError::Device(error @ (DeviceError::NoCuda { .. } | DeviceError::NoLibrary { .. }))) => {
            Ok(Some(format!("{} cannot be used on this machine: {error}", recipe.device)))
        }
        Err(error) => Err(error.into()),
    }
}

pub fn resume(arguments: &Resume) -> Result<ExitCode> {
    let path = run::recipe_path(&arguments.folder);
    if !path.is_file() {
        bail!("{} is no run folder: it has no recipe.yaml", arguments.folder.display());
    }
    let mut overrides = changes(&arguments.run);
    let changed_recipe = !overrides.is_empty();
    overrides.push(format!("output={}", serde_json::to_string(&arguments.folder)?));
    let mut recipe = Recipe::load(&path, &overrides)?;
    recipe.memory_limit = arguments.run.memory_limit.or(recipe.memory_limit);
    let (report, code) = run_recipe(&recipe, arguments.run.quiet, changed_recipe)?;
    print_report(&recipe, &report);
    Ok(code)
}

pub fn quickstart(arguments: &Quickstart) -> Result<ExitCode> {
    let mut overrides =
        vec![format!("output={}", serde_json::to_string(&arguments.output)?), on_device(&arguments.device)];
    overrides.extend(arguments.overrides.iter().cloned());
    let mut recipe = Recipe::from_yaml(DIGITS, "recipes/digits.yaml", &overrides)?;
    recipe.memory_limit = arguments.memory_limit.or(recipe.memory_limit);
    let (report, code) = run_recipe(&recipe, false, false)?;
    print_report(&recipe, &report);
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    let out = arguments.output.join("samples.png");
    let opening =
        Opening { ema: None, heads: None, precision: Precision::Fp32, device: settings::device(&recipe)? };
    let source = source::open(&arguments.output, &opening)?;
    let drawing = Drawing {
        settings: SamplingSettings::of(&recipe.sample),
        labels: sampling::labels("all", QUICKSTART_SAMPLES, recipe.model.classes())?,
        first_seed: 0,
        latents: None,
        batch: QUICKSTART_SAMPLES,
    };
    sample::draw(&source, &drawing, &Target::new(&out, true)?)?;
    println!("\nSamples: {}   (ten of each digit, a row each)", out.display());
    println!("Next:    anneal sample {} --class 3 --num 16 --out threes.png", arguments.output.display());
    println!("         anneal train recipes/image_folder.yaml data.path=FOLDER   (your own images)");
    Ok(code)
}

fn run_recipe(recipe: &Recipe, quiet: bool, changed_recipe: bool) -> Result<(RunReport, ExitCode)> {
    let (stop, signal) = catch_signals()?;
    let (model, _) = Dit::new(&settings::model_config(recipe)?)?;
    let model = Arc::new(model);
    let preview = |store, progress: &mut DrawingProgress| {
        sampling::preview(recipe, model.clone(), store, progress).map_err(|error| format!("{error:#}"))
    };
    let show = if quiet { Show::Nothing } else { Show::Auto };
    let report =
        run::run(recipe, &RunOptions { show, stop: stop.clone(), preview: &preview, changed_recipe })?;
    // Nothing is left to be saved: the next signal ends the process at once.
    stop.store(true, Ordering::Relaxed);
    let code = match signal.load(Ordering::Relaxed) {
        0 => ExitCode::SUCCESS,
        signal => ExitCode::from(128 + signal as u8),
    };
    Ok((report, code))
}

/// A flag that the first Ctrl-C or SIGTERM sets, and which of them it was. A second one ends the process.
fn catch_signals() -> Result<(Arc<AtomicBool>, Arc<AtomicUsize>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let which = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM] {
        // The order matters: a signal that finds the flag already set ends the process.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())
            .and_then(|_| signal_hook::flag::register_usize(signal, which.clone(), signal as usize))
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .context("the operating system refused a signal handler")?;
    }
    Ok((stop, which))
}

/// The command that this process was started with, ready to be pasted: it also names the changes to the recipe.
fn this_command() -> String {
    let is_plain = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(&byte))
    };
    let quoted =
        |text: String| if is_plain(&text) { text } else { format!("'{}'", text.replace('\'', r"'\''")) };
    let arguments =
        std::env::args_os().skip(1).map(|argument| quoted(argument.to_string_lossy().into_owned()));
    std::iter::once("anneal".to_owned()).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn print_report(recipe: &Recipe, report: &RunReport) {
    let folder = report.folder.display();
    if report.stopped {
        let (step, steps) = (report.steps, recipe.train.steps);
        if step == 0 {
            println!("stopped before the first step: nothing is trained or saved");
            println!("start again with: {}", this_command());
            return;
        }
        let when = match report.samples {
            SamplesReport::Left => format!("before the samples of step {step} of {steps} were drawn"),
            _ => format!("after step {step} of {steps}"),
        };
        println!("stopped {when}; a checkpoint is saved in {folder}");
        println!("continue with: {}", this_command());
        return;
    }
    let Some(loss) = report.last_loss else {
        let done = match report.samples {
            SamplesReport::MadeUp => "its samples are drawn now",
            _ => "nothing to do",
        };
        println!("{folder} was already complete at step {}; {done}", report.steps);
        println!("train it longer with: anneal resume {folder} train.steps={}", 2 * recipe.train.steps);
        return;
    };
    // The time is that of this start, and so are the steps before it.
    let steps = match report.steps_before {
        0 => summary::plural(report.steps, "step"),
        before => {
            let more = summary::plural(report.steps - before, "more step");
            format!("{more}, {} in all,", summary::count(report.steps))
        }
    };
    println!(
        "trained {steps} in {} ({:.0} images/s, peak memory {}), last loss {loss:.4}",
        summary::duration(report.training),
        report.images_per_second,
        summary::bytes(report.peak_memory as u64)
    );
    println!("run folder: {folder}   (checkpoints, metrics.jsonl, loss.png, samples)");
}
