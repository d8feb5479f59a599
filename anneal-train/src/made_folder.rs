//! Folders that a start has made, and takes away again if it comes to nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anneal_weights::FileError;

/// A folder, of which is known whether it and those above it were there before. What cannot be removed of it stays,
/// since there is an error to report already.
pub(crate) struct MadeFolder {
    folder: PathBuf,
    /// From the innermost out.
    made: Vec<PathBuf>,
}

impl MadeFolder {
    /// Makes a folder and those above it, where they are missing. If that fails, those made until then are removed.
    pub fn make(folder: &Path) -> Result<Self, FileError> {
        let missing = folder.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        let missing: Vec<&Path> = missing.collect();
        // One that another process makes at this moment is not ours.
        let made = missing.into_iter().rev().filter(|path| fs::create_dir(path).is_ok());
        let mut made: Vec<PathBuf> = made.map(Path::to_owned).collect();
        made.reverse();
        let this = Self { folder: folder.to_owned(), made };
        match fs::create_dir_all(folder) {
            Ok(()) => Ok(this),
            Err(cause) => {
                this.remove();
                Err(FileError::on("make the run folder", folder)(cause))
            }
        }
    }

    /// Whether the folder itself is a made one, not only some above it.
    pub fn is_new(&self) -> bool {
        self.made.first() == Some(&self.folder)
    }

    /// Removes files of these names from the folder if it is new: others are not from this start, whoever put them there.
    pub fn remove_files(&self, is_own: impl Fn(&str) -> bool) {
        if !self.is_new() {
            return;
        }
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(&is_own)) {
            let _ = fs::remove_file(entry.path());
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
    fn only_what_was_made_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let [above, folder] = ["runs", "runs/deep/er"].map(|name| scratch.path().join(name));
        let make = || MadeFolder::make(&folder).unwrap();
        let write = |path: &Path| fs::write(path, "").unwrap();
        let remove = |made: &MadeFolder| {
            made.remove_files(|name| name == "own");
            made.remove();
        };
        let made = make();
        write(&folder.join("own"));
        made.remove();
        assert!(folder.join("own").exists(), "another start may have written it");
        write(&folder.join("other"));
        remove(&made);
        assert!(!folder.join("own").exists() && folder.join("other").exists());
        fs::remove_file(folder.join("other")).unwrap();
        remove(&made);
        assert!(!above.exists() && scratch.path().exists());

        let made = make();
        write(&above.join("other"));
        remove(&made);
        assert_eq!(fs::read_dir(&above).unwrap().count(), 1, "the other file");

        fs::create_dir_all(&folder).unwrap();
        write(&folder.join("own"));
        remove(&make());
        assert!(folder.join("own").exists(), "it was there before");
    }
}
