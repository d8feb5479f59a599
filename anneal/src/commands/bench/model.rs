//! Training steps, one block, and model evaluations.

use std::sync::Arc;

use anneal_data::npz::{self, Array, Values};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_recipe::Recipe;
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_train::trainer::Trainer;
use anyhow::{Context, Result};
use serde_json::json;

use super::{Measured, time};
use crate::cli::{BenchModel, Precision};

/// Multiply-adds of a matrix product count as two operations.
const OPERATIONS: f64 = 2.0;

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
    Ok(config)
}

pub fn name(config: &DitConfig, batch: usize) -> String {
    let DitConfig { hidden_size, depth, heads, patch_size, channels, image_size: [height, width], .. } =
        config;
    format!(
        "DiT {hidden_size}x{depth}, {heads} heads, patch {patch_size}, {channels}x{height}x{width}, batch {batch}"
    )
}

/// Operations of one forward pass of one image: every linear layer, and attention.
fn forward_operations(config: &DitConfig) -> f64 {
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

/// A recipe of this model over ready random tensors in `folder`.
fn recipe(arguments: &BenchModel, config: &DitConfig, folder: &std::path::Path) -> Result<Recipe> {
    let [height, width] = config.image_size;
    let count = 2 * arguments.batch;
    let path = folder.join("random.npz");
    let images = normals(1, count * height * width * config.channels);
    let labels = (0..count as i64).map(|index| index % config.classes as i64).collect();
    let images = Array::new([count, height, width, config.channels], Values::F32(images));
    npz::write_npz(&path, &[("images", &images), ("labels", &Array::new([count], Values::I64(labels)))])?;
    let precision = if arguments.precision == Precision::Bf16 { "bf16" } else { "fp32" };
    let recipe = json!({
        "name": "bench",
        "device": arguments.device,
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
        },
        "data": {"kind": "npz", "path": path, "workers": 1},
        "ema": {"rates": [0.9999]},
        "train": {"steps": 1_000_000, "batch": arguments.batch, "precision": precision},
        "sample": {"every": 0},
    });
    // JSON is YAML.
    Ok(Recipe::from_yaml(&recipe.to_string(), "the benchmark's recipe", &[])?)
}

pub fn step(arguments: &BenchModel) -> Result<()> {
    let config = config(arguments)?;
    let folder = tempfile::tempdir().context("no temporary folder for random data")?;
    let mut trainer = Trainer::new(&recipe(arguments, &config, folder.path())?)?;
    let milliseconds = time(arguments.warmup, arguments.steps, || {
        trainer.step()?;
        Ok(())
    })?;
    let memory = trainer.device().memory();
    let operations = 3.0 * forward_operations(&config) * arguments.batch as f64;
    let purposes: serde_json::Map<String, serde_json::Value> = anneal_device::Purpose::ALL
        .iter()
        .zip(memory.peak)
        .map(|(purpose, bytes)| (purpose.name().to_owned(), bytes.into()))
        .collect();
    let gigaflops = operations / super::median(&milliseconds) / 1e6;
    Measured {
        what: format!("training step, {}", name(&config, arguments.batch)),
        milliseconds,
        images: arguments.batch,
        peak_bytes: memory.peak_total,
        extra: json!({
            "gflop_per_second": gigaflops,
            "gflop_per_step": operations / 1e9,
            "peak_bytes_by_purpose": purposes,
            "allocator_misses": memory.cache_misses,
        }),
    }
    .print(arguments.json);
    Ok(())
}

struct Evaluated {
    model: Dit,
    store: Arc<ResidentStore>,
    image: Tensor,
    timesteps: Vec<f32>,
    labels: Vec<i64>,
}

impl Evaluated {
    fn new(arguments: &BenchModel, config: &DitConfig, train: bool) -> Result<Self> {
        let device = Device::parse(&arguments.device, None)?;
        let (model, parameters) = Dit::new(config)?;
        let compute_dtype = if arguments.precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
        let options = StoreOptions { compute_dtype, chunk_elements: 8 << 20, train };
        let store = Arc::new(ResidentStore::new(Arc::new(parameters), &device, options)?);
        store.initialise(0)?;
        let [channels, height, width] = model.image_shape();
        let sizes = [arguments.batch, channels, height, width];
        let image = Tensor::from_slice(&device, &normals(2, sizes.iter().product()), &sizes)?;
        let timesteps = (0..arguments.batch).map(|row| (row * 997 % 1000) as f32).collect();
        let labels = (0..arguments.batch).map(|row| (row % config.classes) as i64).collect();
        Ok(Self { model, store, image, timesteps, labels })
    }

    fn run(&self, forward: &Forward) -> Result<Tensor> {
        let conditioning = Conditioning { labels: &self.labels };
        Ok(self.model.forward(forward, &self.image, &self.timesteps, &conditioning)?)
    }
}

pub fn block(arguments: &BenchModel) -> Result<()> {
    let config = DitConfig { depth: 1, ..config(arguments)? };
    let evaluated = Evaluated::new(arguments, &config, true)?;
    let milliseconds = time(arguments.warmup, arguments.steps, || {
        let tape = Tape::new();
        let forward = Forward::new(evaluated.store.clone()).recording(&tape);
        let output = evaluated.run(&forward)?;
        tape.backward(&ops::mean(&ops::square(&output)?, &[0, 1, 2, 3], false)?)?;
        evaluated.store.clear_gradients();
        Ok(())
    })?;
    Measured {
        what: format!(
            "forward and backward of one block with embedders and output, {}",
            name(&config, arguments.batch)
        ),
        milliseconds,
        images: arguments.batch,
        peak_bytes: evaluated.store.device().memory().peak_total,
        extra: json!({}),
    }
    .print(arguments.json);
    Ok(())
}

pub fn sample(arguments: &BenchModel) -> Result<()> {
    let config = config(arguments)?;
    let evaluated = Evaluated::new(arguments, &config, false)?;
    let forward = Forward::new(evaluated.store.clone());
    let milliseconds = time(arguments.warmup, arguments.steps, || {
        evaluated.run(&forward)?;
        Ok(())
    })?;
    Measured {
        what: format!("one model evaluation, {}", name(&config, arguments.batch)),
        images: arguments.batch,
        peak_bytes: evaluated.store.device().memory().peak_total,
        extra: json!({
            "gflop_per_second":
                forward_operations(&config) * arguments.batch as f64 / super::median(&milliseconds) / 1e6,
        }),
        milliseconds,
    }
    .print(arguments.json);
    Ok(())
}
