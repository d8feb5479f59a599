//! From the words of a recipe to the settings of each crate.

use anneal_data::{Crop, LoaderConfig, SourceConfig, SourceKind};
use anneal_diffusion::{BetaSchedule, Objective, Prediction, Process, Schedule, TimeDensity};
use anneal_models::dit::DitConfig;
use anneal_optim::{AdamWOptions, LearningRate, Shape};
use anneal_recipe::{
    ByteSize, Convention, DataKind, Diffusion, Dit, DitArchitecture, ImageSize, LearningRateSchedule, Model,
    NoiseSchedule, Precision, Recipe, Target,
};
use anneal_tensor::{DType, Device, Remaking};

use crate::error::{Result, TrainError};

/// The network of a recipe.
pub fn model_config(recipe: &Recipe) -> Result<DitConfig> {
    let Model::Dit(dit) = &recipe.model;
    let sized = match architecture(dit)? {
        DitArchitecture::Preset(name) => DitConfig::preset(&name)?,
        DitArchitecture::Free { hidden_size, depth, heads, patch_size, mlp_ratio } => {
            DitConfig { hidden_size, depth, heads, patch_size, mlp_ratio, ..DitConfig::preset("DiT-S/2")? }
        }
    };
    let ImageSize { height, width } = dit.image_size;
    let config = DitConfig {
        image_size: [height, width],
        channels: dit.channels,
        classes: dit.classes,
        learn_sigma: dit.learn_sigma,
        frequency_shift: usize::from(dit.convention == Convention::Diffusers),
        block_embedders: false,
        ..sized
    };
    config.check()?;
    Ok(config)
}

fn architecture(dit: &Dit) -> Result<DitArchitecture> {
    dit.architecture().ok_or_else(|| TrainError::Settings {
        message: "model: give a preset, or hidden_size, depth, heads and patch_size".into(),
    })
}

/// What training minimises and sampling inverts.
pub fn objective(recipe: &Recipe) -> Result<Objective> {
    let Model::Dit(dit) = &recipe.model;
    let (process, prediction, gamma) = match &recipe.diffusion {
        Diffusion::Gaussian(gaussian) => {
            let betas = match gaussian.schedule {
                NoiseSchedule::Linear => BetaSchedule::linear(gaussian.steps),
                NoiseSchedule::SquaredCosine => BetaSchedule::SquaredCosine,
            };
            let prediction = match gaussian.target {
                Target::Epsilon => Prediction::Epsilon,
                Target::V => Prediction::V,
                Target::X0 => Prediction::Clean,
            };
            (Process::Diffusion(Schedule::new(betas, gaussian.steps)?), prediction, gaussian.min_snr_gamma)
        }
        Diffusion::Flow(_) => (Process::Flow, Prediction::Flow, None),
    };
    Ok(Objective::new(process, prediction, dit.learn_sigma, gamma)?)
}

/// How training draws its times.
pub fn time_density(recipe: &Recipe) -> TimeDensity {
    match &recipe.diffusion {
        Diffusion::Gaussian(_) => TimeDensity::Uniform,
        Diffusion::Flow(flow) => match flow.time {
            anneal_recipe::TimeDensity::Uniform => TimeDensity::Uniform,
            anneal_recipe::TimeDensity::LogitNormal { mean, std } => {
                TimeDensity::LogitNormal { mean, standard_deviation: std }
            }
        },
    }
}

pub fn optimizer(recipe: &Recipe) -> AdamWOptions {
    let optim = &recipe.optim;
    AdamWOptions {
        betas: optim.betas,
        epsilon: optim.eps,
        weight_decay: optim.weight_decay,
        decay: match optim.decay {
            anneal_recipe::Decay::All => anneal_optim::Decay::All,
            anneal_recipe::Decay::Matrices => anneal_optim::Decay::Matrices,
        },
        clip: optim.clip,
        ema_rates: recipe.ema.rates.clone(),
        ema_warmup: recipe.ema.warmup,
        scale_loss: recipe.train.precision == Precision::Fp16,
    }
}

pub fn learning_rate(recipe: &Recipe) -> LearningRate {
    let optim = &recipe.optim;
    let shape = match optim.schedule {
        LearningRateSchedule::Constant => Shape::Constant,
        LearningRateSchedule::Cosine => {
            Shape::Cosine { steps: recipe.train.steps as u64, minimum: optim.min_lr }
        }
    };
    LearningRate { base: optim.lr, warmup: optim.warmup as u64, shape }
}

pub fn compute_dtype(recipe: &Recipe) -> DType {
    match recipe.train.precision {
        Precision::Fp32 | Precision::Tf32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::Fp16 => DType::F16,
    }
}

/// Where a recipe computes, told what it may do with numbers.
///
/// # Errors
/// If there is no such device, or it does not have the recipe's precision.
pub fn device(recipe: &Recipe) -> Result<Device> {
    let device = Device::parse(&recipe.device, recipe.memory_limit.map(ByteSize::bytes))?;
    let tf32 = recipe.train.precision == Precision::Tf32;
    match &device {
        Device::Cuda(cuda) => {
            cuda.set_tf32(tf32);
            cuda.set_deterministic(recipe.train.deterministic);
        }
        Device::Cpu(_) if tf32 => {
            let message = format!("the precision tf32 is for GPUs: on {} use fp32 or bf16", recipe.device);
            return Err(TrainError::Settings { message });
        }
        Device::Cpu(_) => {}
    }
    Ok(device)
}

/// What a recording of training keeps, by `model.recompute_norms`.
pub fn remaking(recompute_norms: bool) -> Remaking {
    if recompute_norms { Remaking::OnGpu } else { Remaking::Never }
}

/// Whether the recipe's device is a GPU.
pub fn on_gpu(recipe: &Recipe) -> bool {
    recipe.device.starts_with("cuda")
}

pub fn data_source(recipe: &Recipe) -> SourceConfig {
    let data = &recipe.data;
    let kind = match data.kind {
        DataKind::Digits | DataKind::Npz => SourceKind::Npz,
        DataKind::ImageFolder => SourceKind::ImageFolder,
        DataKind::Cifar10 => SourceKind::Cifar10,
        DataKind::Webdataset => SourceKind::TarShards,
        DataKind::Latents => SourceKind::Latents,
    };
    let path = match (data.kind, &data.path) {
        (DataKind::Digits, _) => anneal_data::BUILTIN_DIGITS.into(),
        (_, Some(path)) => path.display().to_string(),
        (_, None) => String::new(),
    };
    SourceConfig {
        kind: if data.kind == DataKind::Digits { SourceKind::Auto } else { kind },
        path,
        classes: Some(recipe.model.classes()),
        image_array: data.images.clone(),
        label_array: data.labels.clone(),
    }
}

pub fn loader(recipe: &Recipe) -> LoaderConfig {
    let data = &recipe.data;
    // A factor s on latents is the range whose ends become -1 and 1.
    let scaled = (data.scale != 1.0).then(|| [-1.0 / data.scale, 1.0 / data.scale]);
    let range = data.range.or(scaled);
    LoaderConfig {
        batch: recipe.train.batch,
        workers: data.workers,
        prefetch: data.prefetch.max(1),
        flip: data.flip,
        crop: match data.crop {
            anneal_recipe::Crop::Center => Crop::Center,
            anneal_recipe::Crop::Random => Crop::Random,
        },
        size: Some([data.image_size.height, data.image_size.width]),
        channels: Some(data.channels),
        range: range.map(|range| range.map(|end| end as f32)),
        max_bad: data.max_bad,
        cache_bytes: data.cache.bytes(),
        ..LoaderConfig::default()
    }
}
