//! Training steps, one block, and model evaluations.

use std::path::Path;
use std::sync::Arc;

use anneal_data::npz::{self, Array, Values};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_recipe::Recipe;
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{Device, Tape, Tensor, ops};
use anneal_train::settings;
use anneal_train::trainer::Trainer;
use anyhow::{Result, bail};
use clap::ValueEnum;
use serde_json::{Map, json};

use super::clock::{self, Repeated};
use super::{LAST_LOSS, Measured, print_profile, scratch};
use crate::cli::BenchModel;
use crate::machine;

/// Multiply-adds of a matrix product count as two operations.
const OPERATIONS: f64 = 2.0;

/// Random images for each of a batch, so that two steps in a row see others.
const IMAGES_OF_BATCH: usize = 2;

pub fn config(arguments: &BenchModel) -> Result<DitConfig> {
    let preset = DitConfig::preset(&arguments.model)?;
    let size = arguments.image_size.unwrap_or(preset.image_size[0]);
    let config = DitConfig {
        image_size: [size, size],
        channels: arguments.channels.unwrap_or(preset.channels),
        patch_size: arguments.patch.unwrap_or(preset.patch_size),
        hidden_size: arguments.hidden.unwrap_or(preset.hidden_size),
        depth: arguments.depth.unwrap_or(preset.depth),
        heads: arguments.heads.unwrap_or(preset.heads),
        classes: arguments.classes.unwrap_or(preset.classes),
        learn_sigma: !arguments.no_learn_sigma,
        ..preset
    };
    config.check()?;
    let (batch, [height, width]) = (arguments.batch, config.image_size);
    let what = format!("--batch {batch} of images of {}x{height}x{width}", config.channels);
    machine::check_fits(&what, [&[IMAGES_OF_BATCH, batch, config.channels, height, width][..]])?;
    Ok(config)
}

/// What is measured, in words: the model, the batch and the precision.
pub fn name(config: &DitConfig, arguments: &BenchModel) -> String {
    let DitConfig { hidden_size, depth, heads, patch_size, channels, image_size: [height, width], .. } =
        config;
    let (batch, precision) = (arguments.batch, precision(arguments));
    format!(
        "DiT {hidden_size}x{depth}, {heads} heads, patch {patch_size}, {channels}x{height}x{width}, batch {batch}, {precision}"
    )
}

fn precision(arguments: &BenchModel) -> String {
    let value = arguments.precision.to_possible_value().expect("no precision is hidden");
    value.get_name().to_owned()
}

/// Operations of one forward pass of one image: every linear layer, and attention.
pub fn forward_operations(config: &DitConfig) -> f64 {
    let [rows, columns] = config.grid();
    let (tokens, size) = ((rows * columns) as f64, config.hidden_size as f64);
    let block = tokens * size * (4.0 * size + 2.0 * config.mlp_hidden_size() as f64)
        + 2.0 * tokens * tokens * size
        + 6.0 * size * size;
    let patch = (config.patch_size * config.patch_size) as f64;
    let ends = tokens * size * patch * (config.channels + config.output_channels()) as f64;
    OPERATIONS * (block * config.depth as f64 + ends)
}

pub fn normals(seed: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Stream::new(seed, Purpose::Test, 0, 0).fill_normal(&mut values);
    values
}

/// Random images and labels as an npz.
fn write_images(path: &Path, arguments: &BenchModel, config: &DitConfig) -> Result<()> {
    let [height, width] = config.image_size;
    let count = IMAGES_OF_BATCH * arguments.batch;
    let images = normals(1, count * height * width * config.channels);
    let labels = (0..count as i64).map(|index| index % config.classes as i64).collect();
    let images = Array::new([count, height, width, config.channels], Values::F32(images));
    npz::write_npz(path, &[("images", &images), ("labels", &Array::new([count], Values::I64(labels)))])?;
    Ok(())
}

/// A recipe of this model over the images at `data`.
pub fn recipe(arguments: &BenchModel, config: &DitConfig, data: &Path) -> Result<Recipe> {
    let [height, width] = config.image_size;
    let recipe = json!({
        "name": "bench",
        "device": arguments.device,
        "memory_limit": arguments.memory_limit.map(|limit| limit.bytes()),
        "model": {
            "hidden_size": config.hidden_size,
            "depth": config.depth,
            "heads": config.heads,
            "patch_size": config.patch_size,
            "image_size": [height, width],
            "channels": config.channels,
            "classes": config.classes,
            "learn_sigma": config.learn_sigma,
            "checkpoint_activations": arguments.checkpoint_activations,
            "recompute_norms": !arguments.keep_norms,
        },
        "data": {"kind": "npz", "path": data, "workers": 1},
        "ema": {"rates": [0.9999]},
        "train": {
            "steps": 1_000_000,
            "batch": arguments.batch,
            "precision": precision(arguments),
            "deterministic": arguments.deterministic,
            "capture_steps": !(arguments.eager || arguments.profile),
        },
        "sample": {"every": 0},
    });
    // JSON is YAML.
    Ok(Recipe::from_yaml(&recipe.to_string(), "the benchmark's recipe", &[])?)
}

pub fn step(arguments: &BenchModel) -> Result<()> {
    let config = config(arguments)?;
    let folder = scratch()?;
    let data = folder.path().join("random.npz");
    write_images(&data, arguments, &config)?;
    let mut trainer = Trainer::new(&recipe(arguments, &config, &data)?)?;
    let device = trainer.device().clone();
    let what = format!("training step, {}", name(&config, arguments));
    let mut outcomes = Vec::new();
    let mut run = || Ok(trainer.step(&mut outcomes)?);
    if arguments.profile {
        let rows = clock::profile(&device, arguments.warmup.max(1), arguments.steps, run)?;
        print_profile(&what, &device, &rows, arguments.steps, arguments.json);
        return Ok(());
    }
    let warmup = clock::capturing_warmup(&device, arguments.warmup);
    let timed = clock::time(&device, warmup, arguments.steps, &mut run)?;
    trainer.finish_steps(&mut outcomes)?;
    for warning in trainer.take_warnings() {
        eprintln!("warning: {warning}");
    }
    let mut extra = Map::new();
    if let Some(last) = outcomes.last() {
        extra.insert(LAST_LOSS.into(), last.loss.into());
    }
    let operations = 3.0 * forward_operations(&config) * arguments.batch as f64;
    Measured { what, device, timed, images: arguments.batch, operations, extra }.print(arguments.json);
    Ok(())
}

/// A model with weights of its own and one batch for it.
pub struct Evaluated {
    pub model: Arc<Dit>,
    pub store: Arc<ResidentStore>,
    image: Tensor,
    timesteps: Vec<f32>,
    labels: Vec<i64>,
}

impl Evaluated {
    pub fn new(arguments: &BenchModel, config: &DitConfig, train: bool) -> Result<Self> {
        let recipe = recipe(arguments, config, Path::new("none"))?;
        let device = settings::device(&recipe)?;
        let (model, parameters) = Dit::new(config)?;
        let options =
            StoreOptions { compute_dtype: settings::compute_dtype(&recipe), chunk_elements: 8 << 20, train };
        let store = Arc::new(ResidentStore::new(Arc::new(parameters), &device, options)?);
        store.initialise(0)?;
        let [channels, height, width] = model.image_shape();
        let sizes = [arguments.batch, channels, height, width];
        let image = Tensor::from_slice(&device, &normals(2, sizes.iter().product()), &sizes)?;
        let timesteps = (0..arguments.batch).map(|row| (row * 997 % 1000) as f32).collect();
        let labels = (0..arguments.batch).map(|row| (row % config.classes) as i64).collect();
        Ok(Self { model: Arc::new(model), store, image, timesteps, labels })
    }

    pub fn device(&self) -> &Device {
        self.store.device()
    }

    fn run(&self, forward: &Forward) -> Result<Tensor> {
        let conditioning = Conditioning { labels: &self.labels };
        Ok(self.model.forward(forward, &self.image, &self.timesteps, &conditioning)?)
    }

    /// Times or profiles `work`, whose operations are those of `passes` forward passes.
    fn measure(
        &self,
        arguments: &BenchModel,
        what: String,
        passes: f64,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let device = self.device().clone();
        if arguments.profile {
            let rows = clock::profile(&device, arguments.warmup.max(1), arguments.steps, work)?;
            print_profile(&what, &device, &rows, arguments.steps, arguments.json);
            return Ok(());
        }
        let mut repeated = Repeated::new(&device, arguments.eager);
        let warmup = clock::capturing_warmup(&device, arguments.warmup);
        let timed = clock::time(&device, warmup, arguments.steps, || repeated.run(&mut work))?;
        let operations = passes * forward_operations(self.model.config()) * arguments.batch as f64;
        let images = arguments.batch;
        Measured { what, device, timed, images, operations, extra: Map::new() }.print(arguments.json);
        Ok(())
    }
}

/// Refuses flags of training where none is done.
pub fn refuse_training_flags(arguments: &BenchModel) -> Result<()> {
    let flags = [
        (arguments.keep_norms, "--keep-norms"),
        (arguments.checkpoint_activations, "--checkpoint-activations"),
    ];
    match flags.into_iter().find(|(given, _)| *given) {
        Some((_, flag)) => bail!("{flag} is for training: it applies to `bench step` and `bench block`"),
        None => Ok(()),
    }
}

pub fn block(arguments: &BenchModel) -> Result<()> {
    let config = DitConfig { depth: 1, ..config(arguments)? };
    let evaluated = Evaluated::new(arguments, &config, true)?;
    let what =
        format!("forward and backward of one block with embedders and output, {}", name(&config, arguments));
    evaluated.measure(arguments, what, 3.0, || {
        let tape = Tape::new().with_remaking(settings::remaking(!arguments.keep_norms));
        let forward = Forward::new(evaluated.store.clone())
            .recording(&tape)
            .checkpoint_blocks(arguments.checkpoint_activations);
        let output = evaluated.run(&forward)?;
        tape.backward(&ops::mean(&ops::square(&output)?, &[0, 1, 2, 3], false)?)?;
        evaluated.store.clear_gradients();
        Ok(())
    })
}

pub fn forward(arguments: &BenchModel) -> Result<()> {
    refuse_training_flags(arguments)?;
    let config = config(arguments)?;
    let evaluated = Evaluated::new(arguments, &config, false)?;
    let forward = Forward::new(evaluated.store.clone());
    let what = format!("one model evaluation, {}", name(&config, arguments));
    evaluated.measure(arguments, what, 1.0, || {
        evaluated.run(&forward)?;
        Ok(())
    })
}
