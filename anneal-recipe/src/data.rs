//! The section `data`: where training images come from and what happens to them on the way.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, ImageSize};

/// The data set and its loading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// The form in which the data lies there.
    pub kind: DataKind,
    /// File or folder, relative to the folder in which the command runs. Not for `digits`, which is built in.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Size to which images are scaled and cropped; the model's when left out.
    pub image_size: ImageSize,
    /// Channels that images are converted to (1 grey, 3 colour); the model's when left out.
    pub channels: usize,
    /// Which part of an image that is not of the wanted shape is kept.
    #[serde(default)]
    pub crop: Crop,
    /// Mirror each image left to right with probability one half.
    #[serde(default)]
    pub flip: bool,
    /// Raw values that become -1 and 1. Null: [0, 255] for bytes, [0, 16] for `digits`, floats as they are.
    #[serde(default)]
    pub range: Option<[f64; 2]>,
    /// Factor on ready latents, for `latents` only (0.18215 if they were stored unscaled).
    #[serde(default = "one")]
    pub scale: f64,
    /// Name of the images' array, for `npz` only. Null: `images`, or `arr_0`.
    #[serde(default)]
    pub images: Option<String>,
    /// Name of the labels' array, for `npz` only. Null: `labels`, or `arr_1`; the file may have none.
    #[serde(default)]
    pub labels: Option<String>,
    /// Threads that read, decode and transform ahead of the step; 0 does it within the step. The batches are the same for
    /// any number.
    #[serde(default = "default_workers")]
    pub workers: usize,
    /// Batches made ready ahead of the step.
    #[serde(default = "default_prefetch")]
    pub prefetch: usize,
    /// Memory for decoded images, kept from one epoch to the next; `0B` keeps none.
    #[serde(default = "default_cache")]
    pub cache: ByteSize,
    /// Unreadable images that are skipped, counted and named before the run stops.
    #[serde(default = "default_max_bad")]
    pub max_bad: usize,
}

/// The forms of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// The 1797 handwritten digits that ship with the program, 8x8 grey, 10 classes.
    Digits,
    /// One numpy archive: images [N, H, W, C] and labels [N].
    Npz,
    /// A folder of class folders, or a folder with `metadata.jsonl` / `metadata.csv`.
    ImageFolder,
    /// The binary version of CIFAR-10: a folder of `data_batch_*.bin`.
    #[serde(rename = "cifar10")]
    Cifar10,
    /// Tar shards whose members share a stem: `.jpg/.png/.webp` with `.cls/.txt/.json`.
    Webdataset,
    /// Safetensors shards of ready latents [N, C, H, W] and labels [N].
    Latents,
}

/// The part of an image that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    /// The middle.
    #[default]
    Center,
    /// A place drawn anew each epoch.
    Random,
}

fn one() -> f64 {
    1.0
}
fn default_workers() -> usize {
    2
}
fn default_prefetch() -> usize {
    4
}
fn default_cache() -> ByteSize {
    ByteSize(1 << 30)
}
fn default_max_bad() -> usize {
    100
}
