use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anneal_weights::TensorFiles;
use anneal_weights::sha256_of_file;
use serde_json::Value;

use super::manifest::{Manifest, ManifestFile};
use super::{CheckpointError, folder_name, step_of};

/// A checkpoint whose manifest is whole and whose files have the right lengths.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Opens a checkpoint's folder. [`Self::verify`] also compares the hashes.
    ///
    /// # Errors
    /// Says what is damaged: the manifest, or every file that is missing or of another length.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let manifest = Manifest::read(path)?;
        let checkpoint = Self { path: path.to_path_buf(), manifest };
        let named = path.file_name().and_then(|name| step_of(&name.to_string_lossy()));
        if named.is_some_and(|step| step != checkpoint.step()) {
            return Err(
                checkpoint.damaged(vec![format!("its manifest says {}", folder_name(checkpoint.step()))])
            );
        }
        let wrong = |file: &ManifestFile| match fs::metadata(checkpoint.path.join(&file.name)) {
            Ok(found) if found.len() == file.bytes => None,
            Ok(found) => Some(format!("{} has {} bytes, expected {}", file.name, found.len(), file.bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Some(format!("{} is missing", file.name))
            }
            Err(error) => Some(format!("{} cannot be read: {error}", file.name)),
        };
        let reasons: Vec<String> = checkpoint.manifest.files.iter().filter_map(wrong).collect();
        if reasons.is_empty() { Ok(checkpoint) } else { Err(checkpoint.damaged(reasons)) }
    }

    /// Reads every file and compares its hash, several at a time.
    ///
    /// # Errors
    /// Names every file whose content has changed or cannot be read.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        let files = &self.manifest.files;
        let next = AtomicUsize::new(0);
        let reasons = Mutex::new(Vec::new());
        let work = || {
            while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                let reason = match sha256_of_file(&self.path.join(&file.name)) {
                    Ok(found) if found == file.sha256 => continue,
                    Ok(_) => format!("the content of {} has changed (its SHA-256 is another)", file.name),
                    Err(error) => error.to_string(),
                };
                reasons.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(reason);
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get()).min(files.len());
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        let mut reasons = reasons.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        reasons.sort();
        if reasons.is_empty() { Ok(()) } else { Err(self.damaged(reasons)) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What the caller gave to [`super::CheckpointWriter::commit`].
    pub fn state(&self) -> &Value {
        &self.manifest.state
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The groups, in the order in which they were written.
    pub fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = self.manifest.files.iter().map(|file| file.group.as_str()).collect();
        groups.dedup();
        groups
    }

    /// The names of a group's tensors, sorted.
    ///
    /// # Errors
    /// As [`Self::tensors`].
    pub fn names(&self, group: &str) -> Result<Vec<String>, CheckpointError> {
        Ok(self.tensors(group)?.names().map(String::from).collect())
    }

    /// A group's tensors.
    ///
    /// # Errors
    /// If there is no such group, or its files cannot be read.
    pub fn tensors(&self, group: &str) -> Result<TensorFiles, CheckpointError> {
        let members = self.manifest.files.iter().filter(|file| file.group == group);
        let paths: Vec<PathBuf> = members.map(|file| self.path.join(&file.name)).collect();
        if paths.is_empty() {
            let groups = self.groups().join(", ");
            return Err(CheckpointError::NoGroup { path: self.path.clone(), group: group.into(), groups });
        }
        Ok(TensorFiles::open_all(&paths)?)
    }

    /// The values of one floating-point tensor. For many, keep [`Self::tensors`].
    ///
    /// # Errors
    /// If there is no such group or tensor, or its file cannot be read.
    pub fn read(&self, group: &str, name: &str) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.tensors(group)?.read_f32(name)?)
    }

    fn damaged(&self, reasons: Vec<String>) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), reason: reasons.join("; ") }
    }
}
