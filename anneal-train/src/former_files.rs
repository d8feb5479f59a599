//! What a start finds in a run's folder, to be put back if it comes to nothing.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anneal_weights::{FileError, write_atomic};

/// The files of a folder before a start that has the right to write there. What cannot be put back stays as it is, since
/// there is an error to report already.
pub(crate) struct FormerFiles {
    folder: PathBuf,
    names: BTreeSet<OsString>,
    contents: Vec<(PathBuf, Vec<u8>)>,
}

impl FormerFiles {
    /// Remembers the names of all files, and what is in those named in `replaced`.
    pub fn of(folder: &Path, replaced: &[&str]) -> Result<Self, FileError> {
        let entries = fs::read_dir(folder).map_err(FileError::on("read folder", folder))?;
        let names = entries.map(|entry| Ok(entry.map_err(FileError::on("read folder", folder))?.file_name()));
        let content = |name: &&str| {
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(content) => Some(Ok((path, content))),
                Err(cause) if cause.kind() == ErrorKind::NotFound => None,
                // What cannot be put back must not be replaced.
                Err(cause) => Some(Err(FileError::on("read", &path)(cause))),
            }
        };
        Ok(Self {
            folder: folder.to_owned(),
            names: names.collect::<Result<_, FileError>>()?,
            contents: replaced.iter().filter_map(content).collect::<Result<_, FileError>>()?,
        })
    }

    /// Removes the files that came since and have names of the start's own, and gives the replaced ones their content back.
    pub fn put_back(&self, is_own: impl Fn(&str) -> bool) {
        // New files go first: on a full disk the old ones need their room.
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if !self.names.contains(&name) && name.to_str().is_some_and(&is_own) {
                let _ = fs::remove_file(entry.path());
            }
        }
        for (path, content) in &self.contents {
            if fs::read(path).ok().as_ref() != Some(content) {
                let _ = write_atomic(path, content);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_as_they_were_except_others_new_ones() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        let write = |name: &str, content: &str| fs::write(path(name), content).unwrap();
        write("own", "before");
        write("own too", "before");
        let former = FormerFiles::of(scratch.path(), &["own", "own new"]).unwrap();
        for name in ["own", "own too", "own new", "other"] {
            write(name, "now");
        }
        former.put_back(|name| name.starts_with("own"));
        let content = |name: &str| fs::read_to_string(path(name)).ok();
        let contents = ["own", "own too", "own new", "other"].map(content);
        let expected = [Some("before"), Some("now"), None, Some("now")];
        assert_eq!(contents, expected.map(|content| content.map(str::to_owned)));
    }
}
