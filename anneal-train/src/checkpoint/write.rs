use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anneal_weights::{FileError, StagedFolder, TensorSink, TensorSpec, WeightsError, write_shards};
use serde_json::Value;

use super::manifest::{Manifest, ManifestFile};
use super::{Checkpoint, CheckpointError, RunLock};

/// Half a gibibyte: large enough for the disk's full speed, small enough to hash and copy in parallel.
const SHARD_BYTES: u64 = 512 << 20;

/// Writes one checkpoint. Dropped before [`Self::commit`], it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    lock: RunLock,
    step: u64,
    staged: StagedFolder,
    shard_bytes: u64,
    files: Vec<ManifestFile>,
}

impl CheckpointWriter {
    pub(super) fn new(lock: RunLock, step: u64, target: &Path) -> Result<Self, CheckpointError> {
        let staged = StagedFolder::create(target)?;
        Ok(Self { lock, step, staged, shard_bytes: SHARD_BYTES, files: Vec::new() })
    }

    /// Cuts groups into files of at most this size; a larger tensor has a file of its own.
    pub fn shard_bytes(mut self, bytes: u64) -> Self {
        self.shard_bytes = bytes;
        self
    }

    /// Writes a group of tensors. `data` is called once for each index of `specs` (wide element types first,
    /// else in order) and gives the values to the sink; memory holds no more than it does.
    ///
    /// # Errors
    /// Those of `data`; a full or read-only disk; a name that is taken or not of `a-z 0-9 . -`.
    pub fn group<E: From<CheckpointError> + From<WeightsError>>(
        &mut self,
        group: &str,
        specs: &[TensorSpec],
        data: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check_name(group)?;
        let folder = self.staged.path();
        let written = write_shards(folder, group, specs, &BTreeMap::new(), self.shard_bytes, data);
        let written = written.map_err(|error| self.blame(error))?;
        self.files.extend(written.into_iter().map(|file| ManifestFile {
            name: file.name,
            group: group.into(),
            bytes: file.bytes,
            sha256: file.sha256,
        }));
        Ok(())
    }

    /// Makes the checkpoint appear, in place of one of the same step. It survives a power cut on return.
    ///
    /// # Errors
    /// If a newer start of the run took over, or the disk refuses; the older checkpoints are then untouched.
    pub fn commit(self, state: Value) -> Result<Checkpoint, CheckpointError> {
        let manifest = Manifest::new(self.step, self.lock.epoch(), self.files.clone(), state);
        let written = manifest.write(self.staged.path());
        written.map_err(|error| self.blame(CheckpointError::from(error)))?;
        self.lock.check()?;
        let target = self.staged.target().to_path_buf();
        replace(self.staged)?;
        self.lock.trust(self.step);
        Checkpoint::open(&target)
    }

    /// A newer start removes this writer's folder: that is the reason to report, not the missing folder.
    fn blame<E: From<CheckpointError>>(&self, error: E) -> E {
        match self.lock.check() {
            Err(stale @ CheckpointError::Stale { .. }) => stale.into(),
            _ => error,
        }
    }

    fn check_name(&self, group: &str) -> Result<(), CheckpointError> {
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte);
        let reason = if group.is_empty() || group.starts_with('.') || !group.bytes().all(is_plain) {
            "a name consists of a-z, 0-9, '.' and '-'"
        } else if self.files.iter().any(|file| file.group == group) {
            "it was already written"
        } else {
            return Ok(());
        };
        Err(CheckpointError::GroupName { group: group.into(), reason })
    }
}

/// What the hidden name of a replaced checkpoint ends in.
pub(super) const REPLACED_ENDING: &str = ".replaced";

/// A folder cannot be renamed over another: the old one steps aside first. A kill in between leaves it under
/// a hidden name, which the next start gives back.
fn replace(staged: StagedFolder) -> Result<(), CheckpointError> {
    let target = staged.target().to_path_buf();
    if !target.exists() {
        return Ok(staged.commit()?);
    }
    let aside = aside(&target);
    fs::rename(&target, &aside).map_err(FileError::on("replace", &target))?;
    if let Err(error) = staged.commit() {
        // The first error is the one to report; the next start tries this again.
        let _ = fs::rename(&aside, &target);
        return Err(error.into());
    }
    // The next start removes what could not be removed now.
    let _ = fs::remove_dir_all(&aside);
    Ok(())
}

fn aside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}{REPLACED_ENDING}"))
}
