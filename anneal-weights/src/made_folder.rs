//! A folder for work that may come to nothing.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::FileError;

/// What was made of a folder and those above it. What cannot be removed of it stays, since there is an error to report
/// already.
pub struct MadeFolder {
    /// From the innermost out.
    made: Vec<PathBuf>,
}

impl MadeFolder {
    /// Makes a folder and those above it, where they are missing.
    ///
    /// # Errors
    /// If one cannot be made; those made until then are removed.
    pub fn make(folder: &Path) -> Result<Self, FileError> {
        let missing = folder.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let missing: Vec<&Path> = missing.collect();
        // One that another process makes at this moment is not ours.
        let made = missing.into_iter().rev().filter(|path| fs::create_dir(path).is_ok());
        let mut made: Vec<PathBuf> = made.map(Path::to_owned).collect();
        made.reverse();
        let this = Self { made };
        match fs::create_dir_all(folder) {
            Ok(()) => Ok(this),
            Err(cause) => {
                this.remove();
                // The system says of a file in the folder's place no more than that it exists.
                let cause = if folder.is_file() { ErrorKind::NotADirectory.into() } else { cause };
                Err(FileError::on("make the folder", folder)(cause))
            }
        }
    }

    /// Removes the folders that were made, as far as nothing is in them.
    pub fn remove(&self) {
        for path in &self.made {
            if fs::remove_dir(path).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_that_were_made_and_are_empty_are_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let [above, folder] = ["runs", "runs/deep/er"].map(|name| scratch.path().join(name));
        let make = || MadeFolder::make(&folder).unwrap();
        let made = make();
        fs::write(folder.join("other"), "").unwrap();
        made.remove();
        assert!(folder.join("other").exists());
        fs::remove_file(folder.join("other")).unwrap();
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
