//! Samples to files; the ending of the name decides the form.

use std::io::ErrorKind;
use std::path::Path;

use anneal_data::npz::{self, Array, Values};
use anneal_infer::Samples;
use anneal_train::report::grid::{self, Batch, GridOptions, Pixels};
use anneal_train::report::picture::brightness;
use anyhow::{Context, Result, bail};

/// Writes a grid (`.png`), arrays (`.npz`), or a folder of single pictures (no ending).
pub fn write(samples: &Samples, out: &Path, caption: &str) -> Result<()> {
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    match out.extension().and_then(|ending| ending.to_str()) {
        Some("png") => write_grid(samples, out, caption),
        Some("npz") => write_arrays(samples, out),
        None => write_singles(samples, out, caption),
        Some(ending) => {
            bail!("--out {}: write .png, .npz, or a folder without an ending, not .{ending}", out.display())
        }
    }
}

/// Whether `write` will know what to do with a name, before the samples are drawn. A folder must be empty, unless
/// `overwrite`: old pictures beside new ones would pass for a part of them.
pub fn check(out: &Path, overwrite: bool) -> Result<()> {
    match out.extension().and_then(|ending| ending.to_str()) {
        Some("png" | "npz") => Ok(()),
        None if !overwrite && !names(out)?.is_empty() => {
            bail!(
                "--out {}: the folder is not empty; choose another, or add --overwrite to replace the samples in it",
                out.display()
            )
        }
        None => Ok(()),
        Some(ending) => {
            bail!("--out {}: write .png, .npz, or a folder without an ending, not .{ending}", out.display())
        }
    }
}

/// What lies in a folder; nothing if it is not there.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("--out {}: cannot read the folder", folder.display()))?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn single_name(index: usize, label: i64) -> String {
    format!("{index:06}-class-{label}.png")
}

/// Whether a name is one that [`single_name`] makes.
fn is_single(name: &str) -> bool {
    let parts = name.strip_suffix(".png").and_then(|name| name.split_once("-class-"));
    let numbers = parts.and_then(|(index, label)| Some((index.parse().ok()?, label.parse().ok()?)));
    numbers.is_some_and(|(index, label)| single_name(index, label) == name)
}

fn batch(samples: &Samples) -> Batch<'_> {
    let [channels, height, width] = samples.shape;
    Batch { pixels: Pixels::Floats(&samples.values), count: samples.labels.len(), height, width, channels }
}

fn write_grid(samples: &Samples, out: &Path, caption: &str) -> Result<()> {
    let picture = grid::grid(&batch(samples), &GridOptions::default())?;
    picture.with_text("parameters", caption).write_png(out)?;
    Ok(())
}

/// Pictures of an earlier call go, those that have no successor too.
fn write_singles(samples: &Samples, out: &Path, caption: &str) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
    for old in names(out)?.iter().filter(|name| is_single(name)) {
        let old = out.join(old);
        std::fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    for (index, picture) in grid::singles(&batch(samples))?.into_iter().enumerate() {
        let name = single_name(index, samples.labels[index]);
        picture.with_text("parameters", caption).write_png(&out.join(name))?;
    }
    Ok(())
}

/// Pixels as the ADM evaluator reads them, u8 [N, H, W, C]; latents as they are, f32 [N, C, H, W].
fn write_arrays(samples: &Samples, out: &Path) -> Result<()> {
    let [channels, height, width] = samples.shape;
    let count = samples.labels.len();
    let labels = samples.labels.clone();
    if channels == 1 || channels == 3 {
        let bytes = to_bytes(&samples.values, samples.shape);
        npz::write_samples(out, bytes, [count, height, width, channels], Some(labels))?;
    } else {
        let images = Array::new([count, channels, height, width], Values::F32(samples.values.clone()));
        let labels = Array::new([count], Values::I64(labels));
        npz::write_npz(out, &[("arr_0", &images), ("arr_1", &labels)])?;
    }
    Ok(())
}

/// [N, C, H, W] in [-1, 1] to [N, H, W, C] bytes.
fn to_bytes(values: &[f32], [channels, height, width]: [usize; 3]) -> Vec<u8> {
    let size = channels * height * width;
    let mut bytes = Vec::with_capacity(values.len());
    for image in values.chunks_exact(size) {
        for pixel in 0..height * width {
            bytes.extend((0..channels).map(|channel| brightness(image[channel * height * width + pixel])));
        }
    }
    bytes
}
