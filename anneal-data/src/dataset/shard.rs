//! Files that hold many samples: listing them, and reading parts of them from several threads.

use crate::DataError;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// How many shards keep their file open; the rest are opened for each read, so that a large
/// set stays within the usual limit on open files.
const KEPT_OPEN: usize = 256;

/// A file that is read at positions.
pub(super) struct Shard {
    path: PathBuf,
    length: u64,
    kept: Option<File>,
}

impl Shard {
    /// `ordinal` counts the shards of a data set.
    pub(super) fn open(path: &Path, ordinal: usize) -> Result<Self, DataError> {
        let failed = |error| DataError::read(path, error);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self { path: path.to_owned(), length, kept: (ordinal < KEPT_OPEN).then_some(file) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// Reads `size` bytes at `offset`.
    pub(super) fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size];
        match &self.kept {
            Some(file) => read_exact_at(file, &mut bytes, offset)?,
            None => read_exact_at(&File::open(&self.path)?, &mut bytes, offset)?,
        }
        Ok(bytes)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[count..];
        offset += count as u64;
    }
    Ok(())
}

/// The files directly in a folder, sorted by name, hidden ones left out.
pub(super) fn folder_files(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    Ok(folder_entries(folder)?.into_iter().filter(|path| path.is_file()).collect())
}

/// What a folder holds, sorted by name, hidden entries left out.
pub(super) fn folder_entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let failed = |error| DataError::read(folder, error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            paths.push(path);
        }
    }
    paths.sort_unstable();
    Ok(paths)
}
