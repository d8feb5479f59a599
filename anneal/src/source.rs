//! A model with weights from whatever a path names: a run, a checkpoint, a weights file, a diffusers folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anneal_diffusion::{BetaSchedule, Objective, Prediction, Process, Schedule};
use anneal_models::dit::{Dit, DitConfig, diffusers_keys, original_keys};
use anneal_nn::{KeyMap, ParamStore, Parameters, ResidentStore, StoreOptions};
use anneal_tensor::{DType, Device};
use anneal_train::checkpoint::{self, Checkpoint};
use anneal_train::{settings, state};
use anneal_weights::{DiffusersFolder, TensorFiles};
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cli::Precision;
use crate::sampling::SamplingSettings;
use crate::scheduler;

/// Metadata key of weights files written here: the model's configuration as JSON.
pub const CONFIG_KEY: &str = "anneal.model";
/// The same for what the model was trained to predict, as a scheduler's configuration: without it a file would be
/// sampled as the published weights are.
pub const SCHEDULER_KEY: &str = "anneal.scheduler";
/// The same for how its run draws samples, guidance above all, as JSON.
pub const SAMPLING_KEY: &str = "anneal.sampling";

/// What a path names.
pub enum Kind {
    /// The newest whole checkpoint of a run folder, or a checkpoint folder itself.
    Checkpoint(Box<Checkpoint>),
    /// Weights in the original layout.
    Weights(PathBuf),
    Diffusers(PathBuf),
}

/// A model with weights, ready to sample or to be written elsewhere.
pub struct Source {
    pub model: Arc<Dit>,
    pub store: Arc<dyn ParamStore>,
    pub objective: Objective,
    /// Of a run or checkpoint, or of weights that were written here from one.
    pub sampling: Option<SamplingSettings>,
    /// Of a diffusers folder, or a file written here: its scheduler's configuration.
    pub scheduler: Option<Value>,
    /// For people: what was opened.
    pub description: String,
    pub warnings: Vec<String>,
}

/// How to open a source.
pub struct Opening<'a> {
    /// A rate, `none`, or nothing for the recipe's choice.
    pub ema: Option<&'a str>,
    pub heads: Option<usize>,
    pub precision: Precision,
    pub device: Device,
}

/// Finds out what a path names.
///
/// # Errors
/// If it is none of the kinds, or the run has no whole checkpoint.
pub fn identify(path: &Path) -> Result<(Kind, Vec<String>)> {
    if !path.exists() {
        bail!("{} does not exist", path.display());
    }
    if path.is_file() {
        return Ok((Kind::Weights(path.to_owned()), Vec::new()));
    }
    if path.join("model_index.json").is_file() {
        return Ok((Kind::Diffusers(path.to_owned()), Vec::new()));
    }
    if path.join("manifest.json").is_file() {
        let checkpoint = Checkpoint::open(path)?;
        checkpoint.verify()?;
        return Ok((Kind::Checkpoint(Box::new(checkpoint)), Vec::new()));
    }
    if path.join("checkpoints").is_dir() || path.join("recipe.yaml").is_file() {
        let newest = checkpoint::open_newest_whole(path)?;
        let Some(checkpoint) = newest.checkpoint else {
            bail!("{} is a run without a checkpoint yet: let it train further", path.display());
        };
        return Ok((Kind::Checkpoint(Box::new(checkpoint)), newest.warnings));
    }
    bail!(
        "{} is neither a run, a checkpoint, a .safetensors file nor a diffusers folder (with model_index.json)",
        path.display()
    )
}

/// Opens whatever a path names.
pub fn open(path: &Path, opening: &Opening) -> Result<Source> {
    let (kind, warnings) = identify(path)?;
    if opening.ema.is_some() && !matches!(kind, Kind::Checkpoint(_)) {
        bail!(
            "--ema does not apply to {}: only runs and checkpoints keep averages beside their weights",
            path.display()
        );
    }
    let mut source = match kind {
        Kind::Checkpoint(checkpoint) => open_checkpoint(&checkpoint, opening)?,
        Kind::Weights(path) => open_weights(&path, opening)?,
        Kind::Diffusers(path) => open_diffusers(&path, opening)?,
    };
    source.warnings.splice(0..0, warnings);
    Ok(source)
}

fn open_checkpoint(checkpoint: &Checkpoint, opening: &Opening) -> Result<Source> {
    let saved = state::SavedState::of(checkpoint)?;
    let recipe = saved.recipe()?;
    let rate = match opening.ema {
        None => anneal_train::run::sampling_rate(&recipe),
        Some("none") => None,
        Some(text) => {
            let rate: f64 = text.parse().with_context(|| format!("--ema {text}: give a rate, or none"))?;
            if !recipe.ema.rates.contains(&rate) {
                bail!("--ema {text}: this run keeps the averages {:?}", recipe.ema.rates);
            }
            Some(rate)
        }
    };
    let group = rate.map_or_else(|| "weights".to_owned(), state::average_group);
    let files = checkpoint.tensors(&group)?;
    let (model, store, warnings) = load(&saved.model, opening, &files, original_keys)?;
    let what = rate.map_or_else(|| "raw weights".to_owned(), |rate| format!("average {rate}"));
    Ok(Source {
        model,
        store,
        objective: settings::objective(&recipe)?,
        description: format!("{} (step {}, {what})", checkpoint.path().display(), checkpoint.step()),
        sampling: Some(SamplingSettings::of(&recipe.sample)),
        scheduler: None,
        warnings,
    })
}

fn open_weights(path: &Path, opening: &Opening) -> Result<Source> {
    let files = TensorFiles::open(path)?;
    let config = weights_config(&files, opening.heads)
        .with_context(|| format!("{} cannot be opened as a DiT", path.display()))?;
    let (model, store, warnings) = load(&config, opening, &files, original_keys)?;
    let scheduler: Option<Value> = noted(&files, SCHEDULER_KEY, path)?;
    let objective = match &scheduler {
        Some(scheduler) => scheduler::objective(scheduler, &config)?,
        None => published_objective(&config)?,
    };
    let sampling = noted(&files, SAMPLING_KEY, path)?;
    let description = path.display().to_string();
    Ok(Source { model, store, objective, sampling, scheduler, description, warnings })
}

/// What was noted beside the weights under a key, if anything was.
fn noted<T: DeserializeOwned>(files: &TensorFiles, key: &str, path: &Path) -> Result<Option<T>> {
    let text = files.metadata().get(key);
    text.map(|text| serde_json::from_str(text))
        .transpose()
        .with_context(|| format!("{}: its metadata {key} cannot be read", path.display()))
}

/// The configuration written beside the weights, or what their shapes say.
pub fn weights_config(files: &TensorFiles, heads: Option<usize>) -> Result<DitConfig> {
    if let Some(text) = files.metadata().get(CONFIG_KEY) {
        return serde_json::from_str(text)
            .with_context(|| format!("its metadata {CONFIG_KEY} cannot be read"));
    }
    Ok(DitConfig::infer(|name| files.shape(name).map(<[usize]>::to_vec), heads)?)
}

fn open_diffusers(path: &Path, opening: &Opening) -> Result<Source> {
    let folder = DiffusersFolder::open(path)?;
    let files = folder.component_weights("transformer", None)?;
    let read = |name: &str| files.contains(name).then(|| files.read_f32(name)).transpose();
    let config =
        DitConfig::from_diffusers(&folder.component_config("transformer")?)?.with_embedders_of(read)?;
    let keys = |parameters: &Parameters| diffusers_keys(&config, parameters);
    let (model, store, warnings) = load(&config, opening, &files, keys)?;
    let scheduler = folder.component_config("scheduler")?;
    let objective = scheduler::objective(&scheduler, &config)?;
    let sampling = noted(&files, SAMPLING_KEY, path)?;
    let description = path.display().to_string();
    Ok(Source { model, store, objective, sampling, scheduler: Some(scheduler), description, warnings })
}

/// A model, its weights, and what was odd about them.
type Loaded = (Arc<Dit>, Arc<dyn ParamStore>, Vec<String>);

fn load(
    config: &DitConfig,
    opening: &Opening,
    files: &TensorFiles,
    keys: impl Fn(&Parameters) -> KeyMap,
) -> Result<Loaded> {
    if let Some(heads) = opening.heads.filter(|heads| *heads != config.heads) {
        bail!("--heads {heads}: this model says itself that it has {}; leave the flag out", config.heads);
    }
    let (model, parameters) = Dit::new(config)?;
    let map = keys(&parameters);
    let compute_dtype = match opening.precision {
        Precision::Fp32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let options = StoreOptions { compute_dtype, chunk_elements: 8 << 20, train: false };
    let store = ResidentStore::new(Arc::new(parameters), &opening.device, options)?;
    store.initialise(0)?;
    let report = anneal_weights::load(&store, &map, files)?;
    Ok((Arc::new(model), Arc::new(store), report.warnings))
}

/// The published DiT was trained to predict epsilon over 1000 linear steps.
fn published_objective(config: &DitConfig) -> Result<Objective> {
    let schedule = Schedule::new(BetaSchedule::linear(1000), 1000)?;
    Ok(Objective::new(Process::Diffusion(schedule), Prediction::Epsilon, config.learn_sigma, None)?)
}
