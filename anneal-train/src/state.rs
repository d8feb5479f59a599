//! A trainer's state to and from checkpoints.
//!
//! Groups: `weights` (fp32, every parameter under its own name), `optimizer` (`first.NAME` and
//! `second.NAME`), `ema-RATE`. All are whole tensors under names, so a checkpoint knows nothing of
//! chunks: it loads under any chunk size or precision.

use std::path::Path;

use anneal_data::Cursor;
use anneal_models::dit::DitConfig;
use anneal_nn::{ParamId, ParamStore};
use anneal_optim::{LossScale, Progress, State};
use anneal_recipe::{Recipe, differences};
use anneal_weights::{StoredDType, TensorSpec};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Checkpoint, RunLock};
use crate::data::open_loader;
use crate::error::{Result, TrainError};
use crate::outcomes::Skipped;
use crate::run::recipe_path;
use crate::settings;
use crate::trainer::Trainer;

/// The part of a checkpoint that is not tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedState {
    pub step: u64,
    pub optimizer_steps: u64,
    /// Where the loss is scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<SavedLossScale>,
    pub skipped: u64,
    pub skipped_in_a_row: u64,
    pub cursor: Cursor,
    pub model: DitConfig,
    /// The resolved recipe as YAML.
    pub recipe: String,
}

/// See [`LossScale`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SavedLossScale {
    pub scale: f32,
    pub good_steps: u32,
}

impl SavedState {
    /// # Errors
    /// If the checkpoint was not written by a trainer.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        serde_json::from_value(checkpoint.state().clone()).map_err(|error| TrainError::Settings {
            message: format!(
                "{}: the state in its manifest cannot be read: {error}",
                checkpoint.path().display()
            ),
        })
    }

    /// The recipe that the checkpoint was made by.
    pub fn recipe(&self) -> Result<Recipe> {
        Ok(Recipe::from_yaml(&self.recipe, "the checkpoint's recipe", &[])?)
    }
}

/// The name of an average's group.
pub fn average_group(rate: f64) -> String {
    format!("ema-{rate}")
}

/// Writes a checkpoint, then removes those beyond the recipe's `keep_last`.
///
/// # Panics
/// If steps are under way: their outcomes belong into the checkpoint (see [`Trainer::finish_steps`]).
pub fn save(trainer: &Trainer, lock: &RunLock) -> Result<()> {
    assert!(trainer.outcomes.is_empty(), "a checkpoint was asked for while steps are under way");
    let store: &dyn ParamStore = &*trainer.store;
    let optimizer = &trainer.optimizer;
    let read = |state: State, id: ParamId| match optimizer.read(store, state, id)? {
        Some(values) => Ok(values),
        // A frozen parameter is its own average.
        None => store.read(id),
    };
    let mut writer = lock.checkpoint(trainer.step)?;
    let all: Vec<ParamId> = store.parameters().iter().map(|(id, _)| id).collect();
    let trained: Vec<ParamId> =
        all.iter().copied().filter(|id| store.parameters().spec(*id).trainable).collect();
    let specs = |ids: &[ParamId], prefix: &str| -> Vec<TensorSpec> {
        let spec = |id: &ParamId| {
            let spec = store.parameters().spec(*id);
            TensorSpec::new(format!("{prefix}{}", spec.name), StoredDType::F32, &spec.shape)
        };
        ids.iter().map(spec).collect()
    };
    let mut group = |name: &str, ids: &[ParamId], specs: &[TensorSpec], states: &[State]| {
        writer.group::<TrainError>(name, specs, |index, sink| {
            let values = read(states[index / ids.len()], ids[index % ids.len()])?;
            Ok(sink.f32(&values)?)
        })
    };
    group("weights", &all, &specs(&all, ""), &[State::Master])?;
    let moments = [specs(&trained, "first."), specs(&trained, "second.")].concat();
    group("optimizer", &trained, &moments, &[State::FirstMoment, State::SecondMoment])?;
    for (index, rate) in trainer.recipe.ema.rates.iter().enumerate() {
        group(&average_group(*rate), &all, &specs(&all, ""), &[State::Average(index)])?;
    }
    let Progress { steps, loss_scale: LossScale { scale, good_steps } } = optimizer.progress()?;
    let skipped = trainer.outcomes.skipped;
    let state = SavedState {
        step: trainer.step,
        optimizer_steps: steps,
        loss_scale: optimizer.options().scale_loss.then_some(SavedLossScale { scale, good_steps }),
        skipped: skipped.in_all,
        skipped_in_a_row: skipped.in_a_row,
        cursor: trainer.loader.cursor(),
        model: trainer.model().config().clone(),
        recipe: trainer.recipe.to_yaml(),
    };
    writer.commit(serde_json::to_value(state).expect("the state is plain data"))?;
    lock.prune(trainer.recipe.train.checkpoint.keep_last)?;
    Ok(())
}

/// What a user should know of a run that is continued.
#[derive(Debug, Default)]
pub struct Resumed {
    /// About damaged checkpoints, and a learning rate that rises again.
    pub warnings: Vec<String>,
    /// Where what is trained differs from the checkpoint's recipe: `train.steps=1600 (the checkpoint: 800)`.
    pub changes: Option<String>,
}

/// Continues a trainer from the newest whole checkpoint of a run, if there is one.
///
/// # Errors
/// If the recipe differs from that in the run's folder in what it trains, unless it is the run's own (`own_recipe`), with
/// changes that are meant; if it differs from the checkpoint's in what may never change, or has fewer steps than are done.
pub fn resume(trainer: &mut Trainer, run: &Path, own_recipe: bool) -> Result<Resumed> {
    let newest = checkpoint::open_newest_whole(run)?;
    let warnings = newest.warnings;
    let Some(checkpoint) = newest.checkpoint else { return Ok(Resumed { warnings, changes: None }) };
    let saved = SavedState::of(&checkpoint)?;
    let old_recipe = saved.recipe()?;
    check_steps(&trainer.recipe, saved.step, run)?;
    check_same_recipe(&old_recipe, &trainer.recipe, run, own_recipe)?;
    let store: &dyn ParamStore = &*trainer.store;
    let read = |group: &str, name: &str| checkpoint.read(group, name);
    for (id, spec) in store.parameters().iter() {
        let weights = read("weights", &spec.name)?;
        store.write(id, &weights)?;
        if !spec.trainable {
            continue;
        }
        let write = |state, values: &[f32]| trainer.optimizer.write(store, state, id, values);
        write(State::Master, &weights)?;
        write(State::FirstMoment, &read("optimizer", &format!("first.{}", spec.name))?)?;
        write(State::SecondMoment, &read("optimizer", &format!("second.{}", spec.name))?)?;
        for (index, rate) in trainer.recipe.ema.rates.iter().enumerate() {
            write(State::Average(index), &read(&average_group(*rate), &spec.name)?)?;
        }
    }
    let loss_scale = saved
        .loss_scale
        .map_or(LossScale::START, |SavedLossScale { scale, good_steps }| LossScale { scale, good_steps });
    trainer.optimizer.set_progress(Progress { steps: saved.optimizer_steps, loss_scale })?;
    trainer.step = saved.step;
    trainer.outcomes.skipped = Skipped { in_all: saved.skipped, in_a_row: saved.skipped_in_a_row };
    trainer.loader = open_loader(&trainer.recipe, saved.cursor)?;
    let rising = rising_rate(&old_recipe, &trainer.recipe, saved.step);
    Ok(Resumed {
        warnings: warnings.into_iter().chain(rising).collect(),
        changes: changes(&old_recipe, &trainer.recipe),
    })
}

/// A warning if more steps stretch a schedule that has fallen, so that its rate rises again.
fn rising_rate(old: &Recipe, new: &Recipe, step: u64) -> Option<String> {
    if old.train.steps == new.train.steps || old.optim != new.optim {
        return None;
    }
    let last = settings::learning_rate(old).at(step.saturating_sub(1));
    let next = settings::learning_rate(new).at(step);
    (step > old.optim.warmup as u64 && next > last).then(|| {
        format!(
            "train.steps={} stretches the cosine: the learning rate, {last:.1e} at step {step}, rises to {next:.1e} again; to go on with a low one, give optim.schedule=constant optim.lr={:.1e} too",
            new.train.steps,
            new.optim.lr / 10.0
        )
    })
}

/// Keys that say where and how it is trained, not what.
const FREE: [&str; 18] = [
    "name",
    "device",
    "memory_limit",
    "output",
    "sample",
    "train.log_every",
    "train.checkpoint",
    "train.chunk_size",
    "train.nonfinite_limit",
    "train.deterministic",
    "train.capture_steps",
    "model.checkpoint_activations",
    "model.recompute_norms",
    "data.path",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.max_bad",
];

/// Keys that may never change within a run: the shapes in its checkpoints.
const FIXED: [&str; 2] = ["model", "ema"];

/// What was trained cannot be taken back, and a recipe that says so would no longer fit its checkpoints.
pub(crate) fn check_steps(recipe: &Recipe, step: u64, run: &Path) -> Result<()> {
    let steps = recipe.train.steps as u64;
    if steps < step {
        return Err(TrainError::FewerSteps { run: run.display().to_string(), step, steps });
    }
    Ok(())
}

/// A start that ended before its first checkpoint may have changed the run's recipe since the last one: that is the run's
/// word on what it trains, and the checkpoint's on what fits its tensors.
pub(crate) fn check_same_recipe(saved: &Recipe, new: &Recipe, run: &Path, own: bool) -> Result<()> {
    let mut refused = trained_differences(saved, new);
    refused.retain(|line| is_under(line, &FIXED));
    let fixed = !refused.is_empty();
    let path = recipe_path(run);
    if !own {
        let of_run = path.is_file().then(|| Recipe::load(&path, &[])).transpose()?;
        let others = trained_differences(of_run.as_ref().unwrap_or(saved), new);
        refused.extend(others.into_iter().filter(|line| !is_under(line, &FIXED)));
    }
    if refused.is_empty() {
        return Ok(());
    }
    let run = run.display().to_string();
    let advice = match fixed {
        true => "Run it with the old values, or choose another output folder".into(),
        false => format!(
            "To go on with the new values: anneal resume {run} {}\nOtherwise run it with the old values, or choose another output folder",
            refused.iter().filter_map(|line| change(line)).collect::<Vec<_>>().join(" ")
        ),
    };
    Err(TrainError::OtherRecipe { run, differences: refused.join("\n  "), advice })
}

/// Whether a line of differences is about one of these keys, or about one in their sections.
fn is_under(line: &str, keys: &[&str]) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    keys.iter().any(|key| path == *key || path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// The differences in what is trained.
fn trained_differences(old: &Recipe, new: &Recipe) -> Vec<String> {
    differences(old, new).into_iter().filter(|line| !is_under(line, &FREE)).collect()
}

/// The key of a difference `optim.lr: 0.0001 -> 0.0002`, its old and its new value.
fn parts(difference: &str) -> Option<(&str, &str, &str)> {
    let (key, values) = difference.split_once(": ")?;
    let (old, new) = values.split_once(" -> ")?;
    Some((key, old, new))
}

/// What differs from the checkpoint's recipe, in one line.
fn changes(saved: &Recipe, new: &Recipe) -> Option<String> {
    let differences = trained_differences(saved, new);
    let told = differences.iter().filter_map(|line| {
        let (key, old, new) = parts(line)?;
        Some(format!("{key}={new} (the checkpoint: {old})"))
    });
    let told: Vec<String> = told.collect();
    (!told.is_empty()).then(|| told.join(", "))
}

/// `optim.lr: 0.0001 -> 0.0002` as the change of a command line, `optim.lr=0.0002`.
fn change(difference: &str) -> Option<String> {
    let (key, _, value) = parts(difference)?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+/".contains(&byte);
    match value {
        "absent" => None,
        value if value.bytes().all(is_plain) => Some(format!("{key}={value}")),
        value => Some(format!("'{key}={value}'")),
    }
}
