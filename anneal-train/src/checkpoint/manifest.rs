//! `manifest.json`: what a checkpoint consists of. It is written last, and its last entry is the hash
//! of the text before it, so that no byte of a checkpoint can change unseen.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anneal_weights::FileError;
use anneal_weights::sha256;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::CheckpointError;

/// The layout that this code writes, and the newest that it reads.
const FORMAT: u32 = 1;

const FILE_NAME: &str = "manifest.json";

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    pub name: String,
    pub group: String,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// What a checkpoint consists of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub step: u64,
    /// Program and version.
    pub writer: String,
    /// Of the run's start that wrote it.
    pub epoch: u64,
    pub files: Vec<ManifestFile>,
    /// The caller's.
    pub state: Value,
}

impl Manifest {
    pub(super) fn new(step: u64, epoch: u64, files: Vec<ManifestFile>, state: Value) -> Self {
        let writer = concat!("anneal ", env!("CARGO_PKG_VERSION")).into();
        Self { format: FORMAT, step, writer, epoch, files, state }
    }

    /// Writes it into a folder, on the disk when this returns.
    pub(super) fn write(&self, folder: &Path) -> Result<(), FileError> {
        let path = folder.join(FILE_NAME);
        File::create(&path)
            .and_then(|mut file| {
                file.write_all(self.sealed().as_bytes())?;
                file.sync_all()
            })
            .map_err(FileError::on("write", &path))
    }

    /// Reads the manifest of a checkpoint's folder.
    pub(super) fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(FILE_NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let reason = format!("it has no {FILE_NAME}");
                return Err(CheckpointError::Damaged { path: folder.to_path_buf(), reason });
            }
            Err(error) => return Err(FileError::on("read", &path)(error).into()),
        };
        Self::parse(folder, &text)
    }

    /// Reads the text of the manifest in `folder`.
    pub(super) fn parse(folder: &Path, text: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged { path: folder.to_path_buf(), reason };
        if !is_sealed(text) {
            return Err(damaged(format!("its {FILE_NAME} was cut off or changed")));
        }
        let unreadable =
            |error: serde_json::Error| damaged(format!("its {FILE_NAME} cannot be read: {error}"));
        let Format { format, writer } = serde_json::from_slice(text).map_err(unreadable)?;
        if format > FORMAT {
            let path = folder.to_path_buf();
            return Err(CheckpointError::NewerFormat { path, writer, found: format, known: FORMAT });
        }
        serde_json::from_slice(text).map_err(unreadable)
    }

    fn sealed(&self) -> String {
        let text = serde_json::to_string_pretty(self).expect("strings, numbers and JSON serialize");
        let body = text.strip_suffix("\n}").expect("a pretty object ends in its brace");
        format!("{body}{}", seal(body.as_bytes()))
    }
}

/// The part of any format, this and later ones.
#[derive(Deserialize)]
struct Format {
    format: u32,
    writer: String,
}

/// The end of a manifest: the hash of all before it. Its length is always the same.
fn seal(body: &[u8]) -> String {
    format!(",\n  \"sha256\": \"{}\"\n}}\n", sha256(body))
}

fn is_sealed(text: &[u8]) -> bool {
    let Some(length) = text.len().checked_sub(seal(b"").len()) else { return false };
    let (body, end) = text.split_at(length);
    seal(body).as_bytes() == end
}
