//! Checkpoints of a run: written whole, verified when read, by one writer at a time.
//!
//! A run folder holds `checkpoints/step-00001000/`: groups of tensors as safetensors shards
//! (`weights-00001.safetensors`, ...), and `manifest.json` with the length and SHA-256 of every file,
//! the caller's state as JSON, and a hash of itself.
//!
//! Contract: a checkpoint is filled under a hidden name, is on the disk, and then gets its name by one
//! rename; killed at any instant, a run folder holds the checkpoints before or those after. A damaged
//! one is named and passed over, never used. A failed save leaves the older ones and no rubbish.
//! A [`RunLock`] is the right to write: the operating system's lock keeps a second run out, and the
//! epoch in `writer.json` keeps out an older process whose lock was lost, as on some network disks.
//! Deliberately absent: what the tensors mean, and which device or shard they come from.

mod lock;
mod manifest;
mod read;
mod runs;
mod write;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use anneal_weights::{FileError, WeightsError};

pub use lock::RunLock;
pub use manifest::{Manifest, ManifestFile};
pub use read::Checkpoint;
pub(crate) use runs::open_newest;
pub use runs::{Newest, list, open_newest_whole};
pub use write::CheckpointWriter;

/// What can go wrong with checkpoints; every message names the path and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error("another run is writing to {run}: {writer}; {advice}", run = run.display())]
    Locked { run: PathBuf, writer: String, advice: String },
    #[error(
        "{run} was taken over by a newer run ({writer}), so this older one may not write there any more: end it",
        run = run.display()
    )]
    Stale { run: PathBuf, writer: String },
    #[error("checkpoint {path} is damaged: {reason}", path = path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "checkpoint {path} was written by a newer Anneal ({writer}, format {found}; this one reads up to {known}): use that version",
        path = path.display()
    )]
    NewerFormat { path: PathBuf, writer: String, found: u32, known: u32 },
    /// Each with its reason, one a line.
    #[error(
        "no checkpoint of {run} is whole:\n{list}\nRestore one from a copy, or remove {run}/checkpoints to start again",
        run = run.display()
    )]
    AllDamaged { run: PathBuf, list: String },
    #[error("checkpoint {path} has no group '{group}'; it has {groups}", path = path.display())]
    NoGroup { path: PathBuf, group: String, groups: String },
    #[error("'{group}' cannot be a group of a checkpoint: {reason}")]
    GroupName { group: String, reason: &'static str },
}

/// The folder of a run's checkpoints.
const FOLDER: &str = "checkpoints";

/// The name of a step's folder; sorted by name is sorted by step, up to a hundred million.
fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a folder's name.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}
