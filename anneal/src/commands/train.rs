//! `quickstart`, `train` and `resume`: three ways to name the same run.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anneal_data::DataError;
use anneal_models::dit::Dit;
use anneal_recipe::{ByteSize, Recipe};
use anneal_tensor::DeviceError;
use anneal_train::data::DataSummary;
use anneal_train::plan::Plan;
use anneal_train::report::progress::Show;
use anneal_train::report::summary;
use anneal_train::run::{self, DrawingProgress, RunOptions, RunReport, SamplesReport};
use anneal_train::settings;
use anneal_train::{TrainError, check_run_folder};
use anyhow::{Error, Result, anyhow, bail};

use crate::cli::{MemoryLimit, Precision, Quickstart, Resume, RunArguments, Train};
use crate::commands::sample::{self, Drawing};
use crate::machine;
use crate::output::Target;
use crate::sampling::{self, SamplingSettings};
use crate::signals::Signals;
use crate::source::{self, Opening};

/// The recipe of the quick start, inside the binary.
const DIGITS: &str = include_str!("../../../recipes/digits.yaml");
/// Samples of the quick start's picture: ten of each class.
const QUICKSTART_SAMPLES: usize = 100;

/// Keys of a recipe that flags stand for, or that a run's folder decides.
const DEVICE: &str = "device";
const STEPS: &str = "train.steps";
const LIMIT: &str = "memory_limit";
const OUTPUT: &str = "output";
/// The word for no limit.
const NO_LIMIT: &str = "none";
/// In the error of every device.
const LIMIT_REACHED: &str = "the memory limit is reached";

pub fn train(arguments: &Train) -> Result<ExitCode> {
    let path = &arguments.recipe;
    if path.is_dir() {
        let path = path.display();
        match run::recipe_path(&arguments.recipe).is_file() {
            true => bail!("{path} is a run folder, not a recipe; to continue it: anneal resume {path}"),
            false => bail!("{path} is a folder, not a recipe file"),
        }
    }
    let recipe = Recipe::load(path, &changes(&arguments.run)?)?;
    if arguments.plan {
        return plan(&recipe);
    }
    run_recipe(&recipe, arguments.run.quiet, false)
        .map(|(report, code)| tell(&recipe, &report, code))
        .map_err(|error| with_limit(error, &recipe, &arguments.run, path))
}

/// The changes of a recipe: those given as keys, then those that flags stand for.
fn changes(arguments: &RunArguments) -> Result<Vec<String>> {
    let steps = arguments.steps.map(|steps| steps.to_string());
    let limit = arguments.memory_limit.map(|MemoryLimit(limit)| limit.map(|limit| limit.to_string()));
    let limit = limit.map(|limit| limit.unwrap_or_else(|| NO_LIMIT.to_owned()));
    let flags = [
        ("--device", DEVICE, &arguments.device),
        ("--steps", STEPS, &steps),
        ("--memory-limit", LIMIT, &limit),
    ];
    let mut changes = arguments.overrides.clone();
    for (flag, key, value) in flags {
        let Some(value) = value else { continue };
        let change = match (key, value.as_str()) {
            (DEVICE, device) => on_device(device),
            (LIMIT, NO_LIMIT) => format!("{LIMIT}=null"),
            (key, value) => format!("{key}={value}"),
        };
        // As a size, so that 1024MiB is 1GiB; other values as they stand.
        let same_size = |other: &str| {
            let [own, other] = [value, other].map(|text| text.parse::<ByteSize>().ok());
            key == LIMIT && own.is_some() && own == other
        };
        let is_same = |other: &str| change == format!("{key}={other}") || value == other || same_size(other);
        let other =
            arguments.overrides.iter().find(|text| value_of(text, key).is_some_and(|other| !is_same(other)));
        if let Some(other) = other {
            bail!("{flag} {value} and {other} say different things of one setting: give one of them");
        }
        changes.push(change);
    }
    Ok(changes)
}

/// The value that a change `KEY=VALUE` gives to this key.
fn value_of<'a>(change: &'a str, key: &str) -> Option<&'a str> {
    let (changed, value) = change.split_once('=')?;
    (changed.trim() == key).then_some(value.trim())
}

/// The change of a recipe that a flag `--device` stands for.
fn on_device(device: &str) -> String {
    format!("{DEVICE}={}", serde_json::Value::from(device))
}

/// Adds to the error of a limit that is reached where the limit comes from: often an earlier start, which it was kept of.
fn with_limit(error: Error, recipe: &Recipe, arguments: &RunArguments, file: &Path) -> Error {
    // Errors of samples, and those of other crates' enums, carry the device's as text.
    let Some(limit) = recipe.memory_limit.filter(|_| format!("{error:#}").contains(LIMIT_REACHED)) else {
        return error;
    };
    let change = arguments.overrides.iter().rfind(|text| value_of(text, LIMIT).is_some());
    let origin = match (arguments.memory_limit, change) {
        (Some(_), _) => format!("--memory-limit {limit}"),
        (None, Some(change)) => change.clone(),
        (None, None) => format!("{LIMIT}: {limit} in {}", file.display()),
    };
    anyhow!("{error:#}\nThe limit is that of {origin}; --memory-limit {NO_LIMIT} takes it away")
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
    let (folder, damaged) = match check_run_folder(recipe) {
        Ok((step, warnings)) => (Ok(step), warnings),
        Err(error) => (Err(error), Vec::new()),
    };
    if let Ok(Some(step)) = &folder {
        match *step == recipe.train.steps as u64 {
            true => println!("the run folder holds this run, complete at step {step}"),
            false => println!("the run folder holds this run: training would go on after step {step}"),
        }
    }
    let warnings = [check_device(recipe)?, plan.check_limit()?, check_memory(recipe, &plan)?];
    let warnings = warnings.into_iter().flatten().chain(recipe.without_effect());
    for warning in warnings.chain(damaged).chain(result?) {
        eprintln!("warning: {warning}");
    }
    folder?;
    Ok(ExitCode::SUCCESS)
}

/// A warning if the device at hand has less memory than is predicted; an error if that is sure not to be enough.
fn check_memory(recipe: &Recipe, plan: &Plan) -> Result<Option<String>> {
    let there = machine::memory_of(&recipe.device);
    Ok(there.map(|there| plan.check_memory(there)).transpose()?.flatten())
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
    let folder = arguments.folder.display();
    let path = run::recipe_path(&arguments.folder);
    if arguments.folder.is_file() {
        bail!("{folder} is a file, not a run folder; to train by a recipe: anneal train {folder}");
    }
    if !arguments.folder.exists() {
        bail!("there is no run folder {folder}");
    }
    if !path.is_file() {
        bail!("{folder} is no run folder: it has no recipe.yaml");
    }
    if let Some(change) = arguments.run.overrides.iter().find(|text| value_of(text, OUTPUT).is_some()) {
        bail!(
            "{change}: a run is continued in its own folder; to go on elsewhere, copy {folder} and resume the copy"
        );
    }
    let mut overrides = changes(&arguments.run)?;
    overrides.push(format!("{OUTPUT}={}", serde_json::to_string(&arguments.folder)?));
    let recipe = Recipe::load(&path, &overrides)?;
    run_recipe(&recipe, arguments.run.quiet, true)
        .map(|(report, code)| tell(&recipe, &report, code))
        .map_err(|error| with_limit(error, &recipe, &arguments.run, &path))
}

pub fn quickstart(arguments: &Quickstart) -> Result<ExitCode> {
    let mut overrides =
        vec![format!("output={}", serde_json::to_string(&arguments.output)?), on_device(&arguments.device)];
    overrides.extend(arguments.overrides.iter().cloned());
    let mut recipe = Recipe::from_yaml(DIGITS, "recipes/digits.yaml", &overrides)?;
    if let Some(MemoryLimit(limit)) = arguments.memory_limit {
        recipe.memory_limit = limit;
    }
    let (report, code) = run_recipe(&recipe, false, false)?;
    let code = tell(&recipe, &report, code);
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

fn run_recipe(recipe: &Recipe, quiet: bool, own_recipe: bool) -> Result<(RunReport, ExitCode)> {
    for warning in check_memory(recipe, &Plan::new(recipe)?)?.into_iter().chain(recipe.without_effect()) {
        eprintln!("warning: {warning}");
    }
    let signals = Signals::catch()?;
    let (model, _) = Dit::new(&settings::model_config(recipe)?)?;
    let model = Arc::new(model);
    let preview = |store, progress: &mut DrawingProgress| {
        sampling::preview(recipe, model.clone(), store, progress).map_err(|error| format!("{error:#}"))
    };
    let show = if quiet { Show::Nothing } else { Show::Auto };
    let stop = signals.stop.clone();
    let report = run::run(recipe, &RunOptions { show, stop, preview: &preview, own_recipe })?;
    // Nothing is left to be saved: the next signal ends the process at once.
    signals.stop.store(true, Ordering::Relaxed);
    Ok((report, signals.exit_code()))
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

/// Says how a run ended. A terminal that was closed takes nothing more, which is no error: what matters is saved.
fn tell(recipe: &Recipe, report: &RunReport, code: ExitCode) -> ExitCode {
    println!("{}", ending(recipe, report));
    code
}

fn ending(recipe: &Recipe, report: &RunReport) -> String {
    let folder = report.folder.display();
    if report.stopped {
        let (step, steps) = (report.steps, recipe.train.steps);
        if step == 0 {
            return format!(
                "stopped before the first step: nothing is trained or saved\nstart again with: {}",
                this_command()
            );
        }
        let when = match report.samples {
            SamplesReport::Left => format!("before the samples of step {step} of {steps} were drawn"),
            _ => format!("after step {step} of {steps}"),
        };
        return format!(
            "stopped {when}; a checkpoint is saved in {folder}\ncontinue with: {}",
            this_command()
        );
    }
    let Some(loss) = report.last_loss else {
        let done = match report.samples {
            SamplesReport::MadeUp => "its samples are drawn now",
            _ => "nothing to do",
        };
        return format!(
            "{folder} was already complete at step {}; {done}\ntrain it longer with: anneal resume {folder} train.steps={}",
            report.steps,
            2 * recipe.train.steps
        );
    };
    // The time is that of this start, and so are the steps before it.
    let steps = match report.steps_before {
        0 => summary::plural(report.steps, "step"),
        before => {
            let more = summary::plural(report.steps - before, "more step");
            format!("{more}, {} in all,", summary::count(report.steps))
        }
    };
    let kept = ["checkpoints", "metrics.jsonl", "loss.png", "samples"];
    let kept: Vec<&str> = kept.into_iter().filter(|name| report.folder.join(name).exists()).collect();
    format!(
        "trained {steps} in {} ({:.0} images/s, peak memory {}), last loss {loss:.4}\nrun folder: {folder}   ({})",
        summary::duration(report.training),
        report.images_per_second,
        summary::bytes(report.peak_memory as u64),
        kept.join(", ")
    )
}
