//! What can be trained on: one trait, and a kind for each layout on disk.
//!
//! Contract: a `Dataset` gives random access by index from several threads at once; labels are
//! read and checked when it is opened, contents when they are loaded. Indices follow from the
//! names of the files alone, so they are the same on every machine.

mod cifar;
mod folder;
mod latents;
mod metadata;
mod npz;
mod pattern;
mod shard;
mod tar;

use crate::DataError;
use crate::decode::Pixels;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// Random access to samples.
pub trait Dataset: Send + Sync {
    /// How many samples there are; at least one.
    fn len(&self) -> usize;

    /// Always false: opening a source without samples is an error.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of classes; 0 when the samples have no labels.
    fn classes(&self) -> usize;

    /// The classes' names in the order of their ids, where the source has them.
    fn class_names(&self) -> &[String] {
        &[]
    }

    /// [channels, height, width] where all samples share it.
    fn shape(&self) -> Option<[usize; 3]>;

    fn holds(&self) -> Holds;

    /// What a message calls this sample: its path, or file and position.
    fn sample_name(&self, index: usize) -> String;

    /// The class id, below `classes`; 0 when the samples have no labels.
    fn label(&self, index: usize) -> i64;

    /// Reads one sample. An error means that this sample cannot be used.
    fn load(&self, index: usize) -> Result<Item, DataError>;

    /// What a user should know about the source as it was opened.
    fn warnings(&self) -> &[String] {
        &[]
    }
}

/// What a data set's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// 8-bit images, which are resized and cropped.
    Images,
    /// Images as floating-point numbers, of the right size already.
    FloatImages,
    /// Encoded images, of the right size already; mirroring one is not encoding the mirror image.
    Latents,
}

/// One sample as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    pub content: Content,
    /// Empty where there is none.
    pub caption: String,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// The bytes of a JPEG, PNG or WebP file.
    Encoded(Vec<u8>),
    Pixels(Pixels),
    /// [channels, height, width] as the data set's `shape` says.
    Values(Vec<f32>),
}

/// The layout of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Decided by the path: see [`open`].
    #[default]
    Auto,
    Npz,
    ImageFolder,
    Cifar10,
    TarShards,
    Latents,
}

/// Where the data are and how to read them.
#[derive(Clone, Debug, Default)]
pub struct SourceConfig {
    pub kind: SourceKind,
    /// A file or folder, `builtin:digits`, or for shards a pattern: `shards/{000..099}.tar`, `latents/*.safetensors`.
    pub path: String,
    /// The number of classes; without it, one more than the largest label.
    pub classes: Option<usize>,
    /// The names of the arrays in an `.npz`; without them `images` and `labels`, or `arr_0` and `arr_1`.
    pub image_array: Option<String>,
    pub label_array: Option<String>,
}

/// The path of the digits that come with Anneal (see DATA_LICENSE.md).
pub const BUILTIN_DIGITS: &str = "builtin:digits";

/// Opens a data set and checks what can be checked without reading every sample.
///
/// `SourceKind::Auto` takes `.npz`, `.tar` and `.safetensors` by their endings (for a folder, by
/// the endings of its files), a folder with `data_batch_1.bin` as CIFAR-10, and any other folder as
/// images.
///
/// # Errors
/// A missing path, no samples, damaged files, and labels out of range.
pub fn open(config: &SourceConfig) -> Result<Arc<dyn Dataset>, DataError> {
    if config.path.is_empty() {
        return Err(DataError::settings("the path of the data is empty"));
    }
    if config.classes == Some(0) {
        return Err(DataError::settings("the number of classes is 0; leave it out to count them"));
    }
    Ok(match resolve_kind(config)? {
        SourceKind::Npz => Arc::new(npz::NpzDataset::open(config)?),
        SourceKind::ImageFolder => Arc::new(folder::FolderDataset::open(config)?),
        SourceKind::Cifar10 => Arc::new(cifar::CifarDataset::open(config)?),
        SourceKind::TarShards => Arc::new(tar::TarDataset::open(config)?),
        SourceKind::Latents => Arc::new(latents::LatentDataset::open(config)?),
        SourceKind::Auto => unreachable!("resolve_kind decides"),
    })
}

fn resolve_kind(config: &SourceConfig) -> Result<SourceKind, DataError> {
    if config.kind != SourceKind::Auto {
        return Ok(config.kind);
    }
    if config.path == BUILTIN_DIGITS {
        return Ok(SourceKind::Npz);
    }
    if let Some(kind) = kind_of_file(&config.path) {
        return Ok(kind);
    }
    let path = Path::new(&config.path);
    let metadata = std::fs::metadata(path).map_err(|error| DataError::read(path, error))?;
    if !metadata.is_dir() {
        return Err(DataError::unsupported(
            &config.path,
            "is of no known kind; expected a folder, .npz, .tar, .safetensors or a CIFAR-10 .bin",
        ));
    }
    if path.join("data_batch_1.bin").is_file() {
        return Ok(SourceKind::Cifar10);
    }
    // The first file in order of name that is a shard decides; a folder without any holds images.
    Ok(shard::folder_files(path)?
        .iter()
        .filter_map(|file| kind_of_file(&file.to_string_lossy()))
        .find(|kind| matches!(kind, SourceKind::TarShards | SourceKind::Latents))
        .unwrap_or(SourceKind::ImageFolder))
}

fn kind_of_file(path: &str) -> Option<SourceKind> {
    match Path::new(path).extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "npz" => Some(SourceKind::Npz),
        "bin" => Some(SourceKind::Cifar10),
        "tar" => Some(SourceKind::TarShards),
        "safetensors" => Some(SourceKind::Latents),
        _ => None,
    }
}

/// The number of classes, once every label has been found within it.
///
/// `name` says for the message what an index of `labels` is.
fn count_classes(
    labels: impl Iterator<Item = i64> + Clone,
    asked: Option<usize>,
    name: impl Fn(usize) -> String,
) -> Result<usize, DataError> {
    let largest = labels.clone().max().unwrap_or(0).max(0);
    let classes = asked.unwrap_or(largest as usize + 1);
    for (index, label) in labels.enumerate() {
        if !usize::try_from(label).is_ok_and(|label| label < classes) {
            return Err(DataError::LabelOutOfRange { sample: name(index), label, classes });
        }
    }
    Ok(classes)
}
