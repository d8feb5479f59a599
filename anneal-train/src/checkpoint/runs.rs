//! The checkpoints of a run: which there are, and the newest that can be trusted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anneal_weights::FileError;

use super::{Checkpoint, CheckpointError, FOLDER, step_of};

/// What [`open_newest`] found.
#[derive(Debug, Default)]
pub struct Newest {
    /// None if the run has no checkpoint yet.
    pub checkpoint: Option<Checkpoint>,
    /// The newer ones that are damaged, each with its reason.
    pub warnings: Vec<String>,
}

/// The steps of a run's checkpoints and their folders, ascending; none is opened.
///
/// # Errors
/// If the folder cannot be read. That it is missing is no error.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found: Vec<(u64, PathBuf)> = entries(&run.join(FOLDER))?
        .into_iter()
        .filter_map(|path| Some((step_of(&path.file_name()?.to_string_lossy())?, path)))
        .filter(|(_, path)| path.is_dir())
        .collect();
    found.sort();
    Ok(found)
}

/// Opens the newest checkpoint whose every byte is as it was written.
///
/// # Errors
/// If all are damaged (naming each), or the newest is of a newer Anneal.
pub fn open_newest_whole(run: &Path) -> Result<Newest, CheckpointError> {
    open_newest(run, open_whole)
}

/// Opens the newest checkpoint that `open` takes for undamaged.
///
/// # Errors
/// As [`open_newest_whole`].
pub(crate) fn open_newest(
    run: &Path,
    open: fn(&Path) -> Result<Checkpoint, CheckpointError>,
) -> Result<Newest, CheckpointError> {
    let mut damaged = Vec::new();
    for (_, path) in list(run)?.into_iter().rev() {
        match open(&path) {
            Ok(checkpoint) => {
                let used = checkpoint.path().display();
                let warnings =
                    damaged.iter().map(|reason| format!("{reason}; {used} is used instead")).collect();
                return Ok(Newest { checkpoint: Some(checkpoint), warnings });
            }
            Err(newer @ CheckpointError::NewerFormat { .. }) => return Err(newer),
            Err(error) => damaged.push(error.to_string()),
        }
    }
    if damaged.is_empty() {
        return Ok(Newest::default());
    }
    let list = damaged.iter().map(|reason| format!("  {reason}")).collect::<Vec<_>>().join("\n");
    Err(CheckpointError::AllDamaged { run: run.to_path_buf(), list })
}

pub(super) fn open_whole(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.verify()?;
    Ok(checkpoint)
}

/// What lies in a folder; nothing if there is no such folder.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, FileError> {
    let listing = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing.map_err(FileError::on("read", folder))?,
    };
    listing.map(|entry| Ok(entry.map_err(FileError::on("read", folder))?.path())).collect()
}
