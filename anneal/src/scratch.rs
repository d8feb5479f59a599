//! Folders for work under way.
//!
//! Contract: a folder goes with its [`ScratchFolder`]. A process that is killed leaves it to the next one that makes such
//! a folder in the same place: in each lies a file that its process keeps locked, and the operating system unlocks it
//! however the process ends. On a disk without locks there is no such file, and what a kill leaves there stays.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use tempfile::TempDir;

/// Locked by a living process.
pub const LOCK_NAME: &str = ".anneal-lock";

/// The lock until it is locked: whoever finds the other name unlocked knows that its process is dead.
const LOCKING_NAME: &str = ".anneal-locking";

/// A folder that is removed when it is dropped.
pub struct ScratchFolder {
    // Dropped in this order: locked until it is gone.
    folder: TempDir,
    _lock: File,
}

impl ScratchFolder {
    /// Makes one whose name begins with `prefix` in `place`, where it first clears away what killed processes left.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make(place: &Path, prefix: &str) -> io::Result<Self> {
        remove_left(place, prefix);
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(place)?;
        let locking = folder.path().join(LOCKING_NAME);
        let lock = File::create(&locking)?;
        if lock.try_lock().is_ok() {
            fs::rename(&locking, folder.path().join(LOCK_NAME))?;
        }
        Ok(Self { folder, _lock: lock })
    }

    /// The same in the folder for temporary files.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn temporary(prefix: &str) -> io::Result<Self> {
        Self::make(&std::env::temp_dir(), prefix)
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes it.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn close(self) -> io::Result<()> {
        self.folder.close()
    }
}

/// Removes the folders of such names in `place` whose processes were killed. What cannot be removed stays.
pub fn remove_left(place: &Path, prefix: &str) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let is_named = entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes());
        // Not through links, which may be another user's in a place that all may write to.
        if !is_named || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        // For writing, as locks of network disks want it; for reading too, so that a pipe of this name does not wait.
        let lock = File::options().read(true).write(true).open(entry.path().join(LOCK_NAME));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_left_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let make = || ScratchFolder::make(place.path(), ".new-").unwrap();
        let (alive, dead) = (make(), make());
        let mine = place.path().join(".new-mine");
        let other = place.path().join("other");
        for folder in [&mine, &other] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(other.join(LOCK_NAME), "").unwrap();
        fs::write(dead.path().join("picture"), "").unwrap();
        // A kill unlocks, and removes nothing.
        let ScratchFolder { folder, _lock } = dead;
        let left = folder.keep();
        make();
        assert!(left.exists(), "it is still locked");
        drop(_lock);
        make();
        assert!(!left.exists());
        assert!(alive.path().exists() && mine.exists() && other.exists());
        alive.close().unwrap();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2);
    }
}
