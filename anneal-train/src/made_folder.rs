//! Folders that a start has made, and takes away again if it comes to nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anneal_weights::FileError;

/// A folder, of which is known whether it and those above it were there before.
pub(crate) struct MadeFolder {
    folder: PathBuf,
    /// From the innermost out.
    made: Vec<PathBuf>,
}

impl MadeFolder {
    /// Makes a folder and those above it, where they are missing.
    pub fn make(folder: &Path) -> Result<Self, FileError> {
        let missing = folder.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let missing: Vec<&Path> = missing.collect();
        // One that another process makes at this moment is not ours.
        let made = missing.into_iter().rev().filter(|path| fs::create_dir(path).is_ok());
        let mut made: Vec<PathBuf> = made.map(Path::to_owned).collect();
        made.reverse();
        fs::create_dir_all(folder).map_err(FileError::on("make the run folder", folder))?;
        Ok(Self { folder: folder.to_owned(), made })
    }

    /// Removes what was made: the folder with all that is in it, those above it if nothing else came into them. What
    /// cannot be removed stays, since there is an error to report already.
    pub fn remove(self) {
        for path in self.made {
            let removed = if path == self.folder { fs::remove_dir_all(&path) } else { fs::remove_dir(&path) };
            if removed.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_made_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let [above, folder] = ["runs", "runs/deep/er"].map(|name| scratch.path().join(name));
        let make = || MadeFolder::make(&folder).unwrap();
        let made = make();
        fs::write(folder.join("file"), "").unwrap();
        made.remove();
        assert!(!above.exists() && scratch.path().exists());
        let made = make();
        fs::write(above.join("other"), "").unwrap();
        made.remove();
        assert_eq!(fs::read_dir(&above).unwrap().count(), 1, "the other file");
        fs::create_dir_all(&folder).unwrap();
        make().remove();
        assert!(folder.exists(), "it was there before");
    }
}
