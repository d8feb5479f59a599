//! Writing whole files, whole folders and whole records.
//!
//! Contract of [`write_atomic`]: a reader sees the old content or the new content, never a part. The bytes go
//! to a temporary name in the same folder, which is then renamed over the target. A failure removes the
//! temporary file, keeps the old content and names the target. Folders are not created.
//!
//! Contract of [`StagedFolder`]: the same for a folder. A kill leaves a hidden folder whose name ends in
//! [`TEMPORARY_ENDING`]; whoever knows that its writer is dead may remove it.
//!
//! Contract of [`Appender`]: each record is one write call, and a record that a full disk took only in part is
//! cut off again, so that the file stays readable and can go on. A kill may leave a part of the last record.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file operation that failed, with what the user can do about it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {reason}{advice}", path = path.display(), reason = reason(cause), advice = advice(cause))]
pub struct FileError {
    /// The verb of the sentence: `read`, `write`, `create`.
    pub action: &'static str,
    pub path: PathBuf,
    /// Not called `source`: the message says it already, and whoever prints an error's sources would repeat it.
    pub cause: io::Error,
}

impl FileError {
    /// For `map_err`: turns an [`io::Error`] into one that names the path.
    pub fn on<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> FileError + 'a {
        move |cause| FileError { action, path: path.to_path_buf(), cause }
    }
}

fn reason(cause: &io::Error) -> String {
    match cause.kind() {
        io::ErrorKind::StorageFull => "the disk is full".into(),
        io::ErrorKind::QuotaExceeded => "the disk quota is used up".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".into(),
        io::ErrorKind::NotFound => "no such file or folder".into(),
        io::ErrorKind::NotADirectory => "a part of the path is a file, not a folder".into(),
        io::ErrorKind::DirectoryNotEmpty => "the folder exists and is not empty".into(),
        io::ErrorKind::IsADirectory => "it is a folder".into(),
        // Without the number of the system's error, which tells a person nothing.
        _ => cause.to_string().split(" (os error").next().unwrap_or_default().to_owned(),
    }
}

fn advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space or choose another folder, then run the same command again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder that you may write to"
        }
        io::ErrorKind::NotADirectory => "; choose another path",
        _ => "",
    }
}

/// Replaces `path` by `bytes`, on the disk when this returns: it survives a power cut.
///
/// # Errors
/// Names `path` and what to do; the old content is then still there.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    replace(path, bytes, true)
}

/// As [`write_atomic`], without waiting for the disk: for pictures, which can be drawn again. It survives a
/// killed process, not a power cut.
///
/// # Errors
/// Names `path` and what to do; the old content is then still there.
pub fn write_atomic_unsynced(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    replace(path, bytes, false)
}

fn replace(path: &Path, bytes: &[u8], sync: bool) -> Result<(), FileError> {
    replace_by(path, sync, |temporary| {
        let write = || {
            let mut file = File::create(temporary)?;
            file.write_all(bytes)?;
            if sync { file.sync_all() } else { Ok(()) }
        };
        write().map_err(FileError::on("write", path))
    })
}

/// Replaces `path` by the file that `write` makes under the name it is given, and brings to the disk itself
/// if that matters. `sync` waits until the new name is on the disk too, since a rename lives in the folder.
pub(crate) fn replace_by<T, E: From<FileError>>(
    path: &Path,
    sync: bool,
    write: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let temporary = temporary_name(path).map_err(FileError::on("write", path))?;
    let replaced = write(&temporary).and_then(|written| {
        fs::rename(&temporary, path).map_err(FileError::on("write", path))?;
        if sync {
            sync_folder(parent(path))?;
        }
        Ok(written)
    });
    if replaced.is_err() {
        // The first error is the one to report; the file may not even exist.
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// Waits until the names in a folder are on the disk.
///
/// # Errors
/// Names the folder.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|opened| opened.sync_all()).map_err(FileError::on("write", folder))
}

/// What the hidden names of unfinished files and folders end in.
pub const TEMPORARY_ENDING: &str = ".tmp";

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A hidden name beside `path` that no other writer of this machine uses now.
pub fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name"))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    hidden.push(format!(".{}-{count}{TEMPORARY_ENDING}", std::process::id()));
    Ok(parent(path).join(hidden))
}

/// A folder that is filled under a hidden name and then appears whole. Dropped before that, it is removed.
#[derive(Debug)]
pub struct StagedFolder {
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl StagedFolder {
    /// Makes the hidden folder beside `target`, whose parent must exist.
    ///
    /// # Errors
    /// Names `target` and what to do.
    pub fn create(target: &Path) -> Result<Self, FileError> {
        let temporary = temporary_name(target).map_err(FileError::on("create", target))?;
        fs::create_dir(&temporary).map_err(FileError::on("create", target))?;
        Ok(Self { temporary, target: target.to_path_buf(), committed: false })
    }

    /// Where to put the files. Each must be on the disk before [`Self::commit`], and so must inner folders.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Where the folder will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the folder its name, on the disk when this returns.
    ///
    /// # Errors
    /// Names the target, which must not exist or be an empty folder; the hidden folder is then removed.
    pub fn commit(mut self) -> Result<(), FileError> {
        sync_folder(&self.temporary)?;
        fs::rename(&self.temporary, &self.target).map_err(FileError::on("write", &self.target))?;
        self.committed = true;
        sync_folder(parent(&self.target))
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be reported here, and a left-over does no harm.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A file that grows by whole records. It has one writer.
#[derive(Debug)]
pub struct Appender {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    length: u64,
}

impl Appender {
    /// Opens `path` at its end, creating it if needed.
    ///
    /// # Errors
    /// Names `path` and what to do.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(FileError::on("open for writing", path))?;
        let length = file.metadata().map_err(FileError::on("read", path))?.len();
        Ok(Self { path: path.to_path_buf(), file, length })
    }

    /// Adds one record. It is in the system's hands on return: a killed process does not lose it.
    ///
    /// # Errors
    /// Names the path and what to do; the file then ends in the record before.
    pub fn append(&mut self, record: &[u8]) -> Result<(), FileError> {
        if let Err(error) = self.file.write_all(record) {
            // The write error is the one to report, whether or not the cut works.
            let _ = self.file.set_len(self.length);
            return Err(FileError::on("write", &self.path)(error));
        }
        self.length += record.len() as u64;
        Ok(())
    }

    /// Waits until every record is on the disk.
    ///
    /// # Errors
    /// If the system reports that it could not write them.
    pub fn sync(&mut self) -> Result<(), FileError> {
        self.file.sync_data().map_err(FileError::on("write", &self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_content_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        write_atomic(&path, b"first").unwrap();
        write_atomic_unsynced(&path, b"second, longer").unwrap();
        write_atomic(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(names(folder.path()), ["loss.png"]);
    }

    #[test]
    fn an_error_says_its_cause_once() {
        let error = FileError::on("write", Path::new("run/loss.png"))(io::ErrorKind::PermissionDenied.into());
        assert!(std::error::Error::source(&error).is_none(), "printed again by whoever follows sources");
    }

    #[test]
    fn failed_rename_keeps_the_target_and_removes_the_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        let message = write_atomic(&path, b"bytes").unwrap_err().to_string();
        assert!(message.starts_with(&format!("cannot write {}: ", path.display())), "{message}");
        assert_eq!(names(folder.path()), ["taken"]);
    }

    #[test]
    fn a_staged_folder_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("weights");
        let staged = StagedFolder::create(&target).unwrap();
        fs::write(staged.path().join("a"), b"1").unwrap();
        assert!(!target.exists());
        drop(staged);
        assert!(names(folder.path()).is_empty());

        let staged = StagedFolder::create(&target).unwrap();
        fs::write(staged.path().join("a"), b"2").unwrap();
        staged.commit().unwrap();
        assert_eq!((names(folder.path()), names(&target)), (vec!["weights".into()], vec!["a".into()]));

        let late = StagedFolder::create(&target).unwrap();
        let message = late.commit().unwrap_err().to_string();
        assert!(message.starts_with(&format!("cannot write {}: ", target.display())), "{message}");
        assert_eq!((names(folder.path()), names(&target)), (vec!["weights".into()], vec!["a".into()]));
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run");
        fs::write(&file, b"").unwrap();
        let path = file.join("loss.png");
        assert_eq!(
            write_atomic(&path, b"bytes").unwrap_err().to_string(),
            format!(
                "cannot write {}: a part of the path is a file, not a folder; choose another path",
                path.display()
            )
        );
    }

    #[test]
    fn read_only_and_full_disks_say_what_to_do() {
        let path = Path::new("runs/digits/metrics.jsonl");
        let message = |kind: io::ErrorKind| FileError::on("write", path)(kind.into()).to_string();
        assert_eq!(
            message(io::ErrorKind::ReadOnlyFilesystem),
            "cannot write runs/digits/metrics.jsonl: the file system is read-only; choose a folder that you \
             may write to"
        );
        assert_eq!(
            message(io::ErrorKind::StorageFull),
            "cannot write runs/digits/metrics.jsonl: the disk is full; free some space or choose another \
             folder, then run the same command again"
        );
    }

    #[test]
    fn a_folder_that_forbids_writing_is_named() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
        let written = write_atomic(&path, b"bytes");
        let am_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        match written {
            Err(error) => assert_eq!(
                error.to_string(),
                format!(
                    "cannot write {}: permission denied; choose a folder that you may write to",
                    path.display()
                )
            ),
            // Modes do not bind root.
            Ok(()) => assert!(am_root, "wrote into a read-only folder"),
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn appends_after_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for record in [b"one;", b"two;"] {
            let mut appender = Appender::open(&path).unwrap();
            appender.append(record).unwrap();
            appender.sync().unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), b"one;two;");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named() {
        let mut appender = Appender::open(Path::new("/dev/full")).unwrap();
        assert_eq!(
            appender.append(b"record").unwrap_err().to_string(),
            "cannot write /dev/full: the disk is full; free some space or choose another folder, then run the \
             same command again"
        );
        assert_eq!(appender.length, 0);
    }
}
