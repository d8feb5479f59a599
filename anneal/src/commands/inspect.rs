//! `inspect`: what is in a run, a checkpoint or a weights file.

use std::process::ExitCode;

use anneal_models::dit::DitConfig;
use anneal_train::checkpoint::Checkpoint;
use anneal_train::report::summary::{self, Align, Table};
use anneal_train::state::SavedState;
use anneal_weights::{DiffusersFolder, TensorFiles};
use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::Inspect;
use crate::source::{self, Kind};

/// What is shown of any kind of source.
struct Facts {
    lines: Vec<(String, String)>,
    /// Name, bytes, SHA-256.
    files: Vec<(String, u64, String)>,
    /// Group (may be empty) and its tensors.
    tensors: Vec<(String, TensorFiles)>,
    model: Option<DitConfig>,
}

pub fn inspect(arguments: &Inspect) -> Result<ExitCode> {
    let (kind, warnings) = source::identify(&arguments.path)?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    let facts = match kind {
        Kind::Checkpoint(checkpoint) => of_checkpoint(&checkpoint)?,
        Kind::Weights(path) => of_weights(TensorFiles::open(&path)?)?,
        Kind::Diffusers(path) => of_diffusers(&DiffusersFolder::open(&path)?)?,
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&as_json(&facts))?),
        false => print(&facts, arguments.tensors),
    }
    Ok(ExitCode::SUCCESS)
}

fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Facts> {
    let saved = SavedState::of(checkpoint)?;
    let manifest = checkpoint.manifest();
    let cursor = saved.cursor;
    let lines = vec![
        ("checkpoint".into(), checkpoint.path().display().to_string()),
        (
            "step".into(),
            format!("{} ({} optimizer steps, {} skipped)", saved.step, saved.optimizer_steps, saved.skipped),
        ),
        ("data".into(), format!("epoch {}, sample {} of {}", cursor.epoch, cursor.position, cursor.samples)),
        ("written by".into(), manifest.writer.clone()),
    ];
    let files =
        manifest.files.iter().map(|file| (file.name.clone(), file.bytes, file.sha256.clone())).collect();
    let groups = checkpoint.groups();
    let tensors = groups
        .iter()
        .map(|group| Ok(((*group).to_owned(), checkpoint.tensors(group)?)))
        .collect::<Result<_>>()?;
    Ok(Facts { lines, files, tensors, model: Some(saved.model) })
}

fn of_weights(files: TensorFiles) -> Result<Facts> {
    let model = source::weights_config(&files, None).ok();
    let mut lines: Vec<(String, String)> =
        files.paths().iter().map(|path| ("weights".into(), path.display().to_string())).collect();
    let own = [source::CONFIG_KEY, source::SCHEDULER_KEY, source::SAMPLING_KEY];
    let shown = files.metadata().iter().filter(|(key, _)| !own.contains(&key.as_str()));
    lines.extend(shown.map(|(key, value)| (format!("metadata {key}"), value.clone())));
    let hashed = files.paths().iter().map(|path| hash(path)).collect::<Result<_>>()?;
    Ok(Facts { lines, files: hashed, tensors: vec![(String::new(), files)], model })
}

fn of_diffusers(folder: &DiffusersFolder) -> Result<Facts> {
    let mut lines = vec![("pipeline".into(), folder.class_name().to_owned())];
    for component in folder.components() {
        lines.push((component.name.clone(), format!("{} ({})", component.class, component.library)));
    }
    let model = DitConfig::from_diffusers(&folder.component_config("transformer")?).ok();
    let files = folder.component_weights("transformer", None)?;
    let hashed = files.paths().iter().map(|path| hash(path)).collect::<Result<_>>()?;
    Ok(Facts { lines, files: hashed, tensors: vec![("transformer".into(), files)], model })
}

fn hash(path: &std::path::Path) -> Result<(String, u64, String)> {
    let sha256 = anneal_weights::sha256_of_file(path)?;
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((name, bytes, sha256))
}

fn print(facts: &Facts, list_tensors: bool) {
    let mut table = Table::new([("what", Align::Left), ("value", Align::Left)]);
    for (name, value) in &facts.lines {
        table.row([name, value]);
    }
    if let Some(model) = &facts.model {
        let DitConfig { hidden_size, depth, heads, patch_size, channels, classes, .. } = model;
        let [height, width] = model.image_size;
        table.row([
            "model".to_owned(),
            format!(
                "DiT, width {hidden_size}, depth {depth}, {heads} heads, patch {patch_size}, images {channels}x{height}x{width}, {classes} classes, learned sigma {}",
                model.learn_sigma
            ),
        ]);
    }
    for (group, tensors) in &facts.tensors {
        let elements: usize = tensors.names().filter_map(|name| Some(tensors.spec(name)?.elements())).sum();
        let name = if group.is_empty() { "tensors" } else { group };
        table.row([
            name.to_owned(),
            format!("{} tensors, {} numbers", tensors.len(), summary::count(elements as u64)),
        ]);
    }
    println!("{table}");
    let mut table = Table::new([("file", Align::Left), ("size", Align::Right), ("sha-256", Align::Left)]);
    for (name, bytes, sha256) in &facts.files {
        table.row([name.clone(), summary::bytes(*bytes), sha256.clone()]);
    }
    print!("{table}");
    if !list_tensors {
        println!("\nlist every tensor with --tensors");
        return;
    }
    let mut table = Table::new([("tensor", Align::Left), ("shape", Align::Left), ("type", Align::Left)]);
    for (group, tensors) in &facts.tensors {
        for name in tensors.names() {
            if let Some(spec) = tensors.spec(name) {
                let name = if group.is_empty() { name.to_owned() } else { format!("{group}/{name}") };
                table.row([name, format!("{:?}", spec.shape), spec.dtype.name().to_owned()]);
            }
        }
    }
    print!("\n{table}");
}

fn as_json(facts: &Facts) -> Value {
    let lines: serde_json::Map<String, Value> =
        facts.lines.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let files: Vec<Value> = facts
        .files
        .iter()
        .map(|(name, bytes, sha256)| json!({"name": name, "bytes": bytes, "sha256": sha256}))
        .collect();
    let tensors: Vec<Value> = facts
        .tensors
        .iter()
        .flat_map(|(group, tensors)| {
            tensors.names().filter_map(move |name| {
                let spec = tensors.spec(name)?;
                Some(json!({"group": group, "name": name, "shape": spec.shape, "dtype": spec.dtype.name()}))
            })
        })
        .collect();
    json!({"about": lines, "model": facts.model, "files": files, "tensors": tensors})
}
