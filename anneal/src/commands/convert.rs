//! `convert`: the same weights in another layout.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anneal_diffusion::Process;
use anneal_models::dit::{diffusers_keys, original_keys};
use anneal_recipe::GuidanceMode;
use anneal_tensor::Device;
use anneal_weights::{DiffusersWriter, SaveOptions, StoredDType, Target};
use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cli::{Convert, Layout, Precision};
use crate::output::{check_file, in_folder};
use crate::sampling::SamplingSettings;
use crate::scheduler;
use crate::source::{self, CONFIG_KEY, Opening, SAMPLING_KEY, SCHEDULER_KEY, Source};

pub fn convert(arguments: &Convert) -> Result<ExitCode> {
    let out = &arguments.out;
    if out.exists() {
        bail!("{} exists already: name a new one, or remove it first", out.display());
    }
    if arguments.to == Layout::Original {
        check_file(out)?;
    }
    let opening = Opening {
        ema: arguments.ema.as_deref(),
        heads: arguments.heads,
        // The stored dtype is chosen below; in between nothing is rounded.
        precision: Precision::Fp32,
        device: Device::cpu(None, None),
    };
    let source = source::open(&arguments.source, &opening)?;
    for warning in &source.warnings {
        eprintln!("warning: {warning}");
    }
    let dtype = match arguments.precision {
        Precision::Fp32 => StoredDType::F32,
        Precision::Bf16 => StoredDType::BF16,
    };
    in_folder(out.parent().unwrap_or(Path::new("")), || match arguments.to {
        Layout::Diffusers => write_diffusers(&source, out, dtype),
        Layout::Original => write_original(&source, out, dtype),
    })?;
    println!("{} -> {}", source.description, out.display());
    if let (Layout::Diffusers, Some(sampling)) = (arguments.to, &source.sampling) {
        print_guidance(sampling);
    }
    Ok(ExitCode::SUCCESS)
}

fn options(source: &Source, dtype: StoredDType) -> Result<SaveOptions> {
    let config = serde_json::to_string(source.model.config())?;
    let scheduler = serde_json::to_string(&scheduler(source)?)?;
    let mut metadata = BTreeMap::from([
        ("format".into(), "pt".into()),
        (CONFIG_KEY.into(), config),
        (SCHEDULER_KEY.into(), scheduler),
    ]);
    if let Some(sampling) = &source.sampling {
        metadata.insert(SAMPLING_KEY.into(), serde_json::to_string(sampling)?);
    }
    Ok(SaveOptions { dtype, metadata, ..SaveOptions::default() })
}

fn scheduler(source: &Source) -> Result<Value> {
    let shift = source.sampling.as_ref().map_or(1.0, |sampling| sampling.shift);
    source.scheduler.clone().map_or_else(|| scheduler::config(&source.objective, shift), Ok)
}

/// What the folder has no place for that other programs read.
fn print_guidance(sampling: &SamplingSettings) {
    if sampling.guidance == 1.0 {
        return;
    }
    let mode = match sampling.guidance_mode {
        GuidanceMode::All => "",
        _ => ", which has no guidance mode",
    };
    println!(
        "anneal samples it with the run's guidance; diffusers{mode} takes it at the call: pipeline(class_labels=[...], guidance_scale={}, num_inference_steps={})",
        sampling.guidance, sampling.steps
    );
}

fn write_diffusers(source: &Source, out: &Path, dtype: StoredDType) -> Result<()> {
    if *source.objective.process() == Process::Flow {
        bail!(
            "a model trained by flow matching cannot be sampled by diffusers' DiTPipeline: use --to original"
        );
    }
    let config = source.model.config();
    if config.frequency_shift == 0 {
        eprintln!(
            "warning: this model was trained with the original code's timestep frequencies; diffusers computes slightly different ones, so its images will differ slightly (train with model.convention=diffusers for an exact export)"
        );
    }
    let transformer = config.to_diffusers()?;
    let scheduler = scheduler(source)?;
    let mut writer = DiffusersWriter::create(out, "DiTPipeline")?;
    let folder = writer.component("transformer", "diffusers", "DiTTransformer2DModel", &transformer)?;
    let keys = diffusers_keys(config, source.store.parameters());
    let target = Target::Component { folder: &folder, variant: None };
    anneal_weights::save(&*source.store, &keys, &options(source, dtype)?, target)?;
    let class = scheduler["_class_name"].as_str().context("the scheduler has no class name")?.to_owned();
    writer.component("scheduler", "diffusers", &class, &scheduler)?;
    let labels: serde_json::Map<String, serde_json::Value> =
        (0..config.classes).map(|class| (class.to_string(), class.to_string().into())).collect();
    writer.index_value("id2label", labels.into());
    writer.finish()?;
    Ok(())
}

fn write_original(source: &Source, out: &Path, dtype: StoredDType) -> Result<()> {
    if out.extension().is_none_or(|ending| ending != "safetensors") {
        bail!("{}: the original layout is one file whose name ends in .safetensors", out.display());
    }
    if source.model.config().frequency_shift == 1 {
        eprintln!(
            "warning: this model uses diffusers' timestep frequencies; the original code computes slightly different ones (the file says so to anneal)"
        );
    }
    let keys = original_keys(source.store.parameters());
    anneal_weights::save(&*source.store, &keys, &options(source, dtype)?, Target::File(out))?;
    Ok(())
}
