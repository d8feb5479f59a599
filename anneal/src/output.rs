//! Samples to files; the ending of the name decides the form.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;

use anneal_data::npz::{self, Array, Values};
use anneal_infer::Samples;
use anneal_train::report::grid::{self, Batch, GridOptions, Pixels};
use anneal_train::report::picture::brightness;
use anneal_weights::{FileError, MadeFolder};
use anyhow::{Context, Result, anyhow, bail};

use crate::scratch::{self, ScratchFolder};

/// The names of folders for single pictures that have not all been written begin with this.
const NEW_PREFIX: &str = ".new-";

/// Where samples go, and in which form.
pub struct Target<'a> {
    out: &'a Path,
    form: Form,
}

enum Form {
    /// One picture with all samples: `.png`.
    Grid,
    /// `.npz`.
    Arrays,
    /// A folder of single pictures: no ending.
    Singles { overwrite: bool },
}

impl<'a> Target<'a> {
    /// Finds before the samples are drawn what would keep them from being written. A folder must be empty, unless
    /// `overwrite`: old pictures beside new ones would pass for a part of them.
    pub fn new(out: &'a Path, overwrite: bool) -> Result<Self> {
        let form = match out.extension().and_then(|ending| ending.to_str()) {
            Some("png") => Form::Grid,
            Some("npz") => Form::Arrays,
            None => Form::Singles { overwrite },
            Some(ending) => {
                bail!(
                    "--out {}: write .png, .npz, or a folder without an ending, not .{ending}",
                    out.display()
                )
            }
        };
        match form {
            Form::Singles { .. } => drop(names_before(out, overwrite)?),
            Form::Grid | Form::Arrays => check_file(out).map_err(|error| anyhow!("--out {error}"))?,
        }
        Ok(Self { out, form })
    }

    pub fn write(&self, samples: &Samples, caption: &str) -> Result<()> {
        let folder = match self.form {
            Form::Singles { .. } => self.out,
            Form::Grid | Form::Arrays => self.out.parent().unwrap_or(Path::new("")),
        };
        in_folder(folder, || match self.form {
            Form::Grid => write_grid(samples, self.out, caption),
            Form::Arrays => write_arrays(samples, self.out),
            Form::Singles { overwrite } => write_singles(samples, self.out, caption, overwrite),
        })
    }
}

/// Refuses what cannot be the name of a file.
pub fn check_file(out: &Path) -> Result<()> {
    let name = out.display().to_string();
    if name.ends_with('/') {
        bail!("{name}: a name with this ending is a file's; leave out the / behind it");
    }
    if out.is_dir() {
        bail!("{name} is a folder: name a file in it, or another");
    }
    Ok(())
}

/// Makes a folder and those above it, where they are missing; removes them again if `write` fails and leaves them empty.
pub fn in_folder<T>(folder: &Path, write: impl FnOnce() -> Result<T>) -> Result<T> {
    if folder.as_os_str().is_empty() {
        return write();
    }
    let made = MadeFolder::make(folder)?;
    write().inspect_err(|_| made.remove())
}

/// What lies in the folder for single pictures, killed calls' pictures apart, which go. Without `overwrite` that must be
/// nothing.
fn names_before(out: &Path, overwrite: bool) -> Result<Vec<String>> {
    scratch::remove_left(out, NEW_PREFIX);
    let names = names(out)?;
    if !overwrite && !names.is_empty() {
        bail!(
            "--out {}: the folder is not empty; choose another, or add --overwrite to replace the samples in it",
            out.display()
        );
    }
    Ok(names)
}

/// What lies in a folder; nothing if it is not there.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries
            .map_err(FileError::on("read the folder", folder))
            .with_context(|| format!("--out {}", folder.display()))?,
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

/// Pictures of an earlier call go if they are to be overwritten, those that have no successor too. The new ones take their
/// places when all are written, so that the old ones are still there, and no part of the new ones, if they cannot be.
/// Since the samples were begun, another call may have filled the folder: it is looked at again.
fn write_singles(samples: &Samples, out: &Path, caption: &str, overwrite: bool) -> Result<()> {
    let before = names_before(out, overwrite)?;
    // In the folder, so that they are on its disk. The name is hidden, and removed with all in it.
    let new = ScratchFolder::make(out, NEW_PREFIX).map_err(FileError::on("write to the folder", out))?;
    let mut written = HashSet::new();
    for (index, picture) in grid::singles(&batch(samples))?.into_iter().enumerate() {
        let name = single_name(index, samples.labels[index]);
        let png = picture.with_text("parameters", caption).to_png();
        // An error names the place that the picture is meant for.
        anneal_weights::write_atomic_unsynced(&new.path().join(&name), &png)
            .map_err(|error| FileError { path: out.join(&name), ..error })?;
        written.insert(name);
    }
    for name in &written {
        let place = out.join(name);
        std::fs::rename(new.path().join(name), &place).map_err(FileError::on("write", &place))?;
    }
    new.close().map_err(FileError::on("tidy up", out))?;
    for old in before.iter().filter(|name| is_single(name) && !written.contains(*name)) {
        let old = out.join(old);
        std::fs::remove_file(&old).map_err(FileError::on("remove", &old))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Two of class 0 and 1.
    fn samples() -> Samples {
        Samples { values: vec![0.5; 2 * 16], labels: vec![0, 1], shape: [1, 4, 4], warnings: Vec::new() }
    }

    fn sorted_names(folder: &Path) -> Vec<String> {
        let mut names = names(folder).unwrap();
        names.sort();
        names
    }

    #[test]
    fn pictures_that_came_while_samples_were_drawn_stay() {
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("many");
        let [first, second] = [(), ()].map(|()| Target::new(&out, false).unwrap());
        let mut others = samples();
        others.labels = vec![7, 8];
        first.write(&others, "").unwrap();
        let refused = second.write(&samples(), "").unwrap_err();
        assert!(
            refused.to_string().ends_with("or add --overwrite to replace the samples in it"),
            "{refused}"
        );
        assert_eq!(sorted_names(&out), ["000000-class-7.png", "000001-class-8.png"]);
    }

    #[test]
    fn what_a_killed_call_left_in_the_folder_is_not_in_the_way() {
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("many");
        let left = out.join(".new-killed");
        std::fs::create_dir_all(&left).unwrap();
        std::fs::write(left.join("000000-class-0.png"), "killed").unwrap();
        let refused = Target::new(&out, false).err().unwrap();
        assert!(refused.to_string().contains("the folder is not empty"), "not known to be dead: {refused}");
        std::fs::write(left.join(scratch::LOCK_NAME), "").unwrap();
        Target::new(&out, false).unwrap().write(&samples(), "").unwrap();
        assert_eq!(sorted_names(&out), ["000000-class-0.png", "000001-class-1.png"]);
    }

    #[test]
    fn old_pictures_stay_until_the_new_ones_are_there() {
        let scratch = tempfile::tempdir().unwrap();
        let (old, in_the_way) = ("000000-class-7.png", "000001-class-1.png");
        let out = scratch.path().join("many");
        std::fs::create_dir_all(out.join(in_the_way)).unwrap();
        std::fs::write(out.join(old), "old").unwrap();
        let target = Target::new(&out, true).unwrap();
        target.write(&samples(), "").unwrap_err();
        assert_eq!(std::fs::read(out.join(old)).unwrap(), b"old");
        std::fs::remove_dir(out.join(in_the_way)).unwrap();
        target.write(&samples(), "").unwrap();
        assert_eq!(sorted_names(&out), ["000000-class-0.png", in_the_way]);
    }
}
