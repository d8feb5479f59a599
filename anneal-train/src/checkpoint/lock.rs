//! The right to write into a run's folder.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use anneal_weights::files::{TEMPORARY_ENDING, sync_folder, temporary_name};
use anneal_weights::{FileError, write_atomic};
use serde::{Deserialize, Serialize};

use super::runs::{entries, list, open_whole};
use super::write::REPLACED_ENDING;
use super::{Checkpoint, CheckpointError, CheckpointWriter, FOLDER, folder_name};

/// Who writes; replaced as a whole at every start.
const WRITER_NAME: &str = "writer.json";

/// What the operating system locks; never replaced, since a lock belongs to a file and not to its name.
const LOCK_NAME: &str = ".writer.lock";

/// The right to write into a run's folder. Clones are the same right; it ends with the last of them, with
/// the last [`CheckpointWriter`], or with the process, however that ends.
#[derive(Clone, Debug)]
pub struct RunLock(Arc<Held>);

#[derive(Debug)]
struct Held {
    run: PathBuf,
    writer: Writer,
    warning: Option<String>,
    /// Whether the file that is locked was not there before.
    made_lock: bool,
    /// Steps that this process wrote itself: their content need not be read to be known.
    trusted: Mutex<BTreeSet<u64>>,
    /// Locked as long as it is open.
    _file: File,
}

/// One start of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Writer {
    /// Counts the starts.
    epoch: u64,
    /// Tells apart two starts that took the same epoch at once.
    token: String,
    process: u32,
    host: String,
    /// Seconds since 1970.
    started: u64,
}

impl RunLock {
    /// Takes the next epoch in a run's folder, which is created if needed, and clears away what killed
    /// writers left.
    ///
    /// # Errors
    /// If another process (or this one) writes there, or the folder cannot be written to.
    pub fn acquire(run: &Path) -> Result<Self, CheckpointError> {
        fs::create_dir_all(run).map_err(FileError::on("create", run))?;
        let path = run.join(LOCK_NAME);
        let made_lock = !path.exists();
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(FileError::on("open for writing", &path))?;
        let warning = match file.try_lock() {
            Ok(()) => None,
            Err(TryLockError::WouldBlock) => return Err(locked(run)),
            Err(TryLockError::Error(error)) => Some(format!(
                "the disk of {} knows no locks ({error}): make sure yourself that only one run writes there",
                run.display()
            )),
        };
        let last = read_writer(run).map_or(0, |writer| writer.epoch);
        let writer = Writer::this_process(last + 1);
        let text = serde_json::to_vec_pretty(&writer).expect("strings and numbers serialize");
        write_atomic(&run.join(WRITER_NAME), &text)?;
        clear_leftovers(&run.join(FOLDER))?;
        let trusted = Mutex::default();
        Ok(Self(Arc::new(Held { run: run.to_path_buf(), writer, warning, made_lock, trusted, _file: file })))
    }

    /// Counts the starts of this run, from 1.
    pub fn epoch(&self) -> u64 {
        self.0.writer.epoch
    }

    pub fn run(&self) -> &Path {
        &self.0.run
    }

    /// What the user should know: that this disk has no locks.
    pub fn warning(&self) -> Option<&str> {
        self.0.warning.as_deref()
    }

    /// Whether the right still holds.
    ///
    /// # Errors
    /// [`CheckpointError::Stale`] if a newer start took over, or the folder cannot be read any more.
    pub fn check(&self) -> Result<(), CheckpointError> {
        let writer =
            read_writer(&self.0.run).map_err(FileError::on("read", &self.0.run.join(WRITER_NAME)))?;
        if writer == self.0.writer {
            return Ok(());
        }
        Err(CheckpointError::Stale { run: self.0.run.clone(), writer: writer.describe() })
    }

    /// Begins the checkpoint of a step.
    ///
    /// # Errors
    /// If a newer start took over, or the folder cannot be written to.
    pub fn checkpoint(&self, step: u64) -> Result<CheckpointWriter, CheckpointError> {
        self.check()?;
        let folder = self.0.run.join(FOLDER);
        if !folder.is_dir() {
            fs::create_dir(&folder).map_err(FileError::on("create", &folder))?;
            sync_folder(&self.0.run)?;
        }
        CheckpointWriter::new(self.clone(), step, &folder.join(folder_name(step)))
    }

    /// Removes all checkpoints but the last ones, and never the newest whole one. Gives what was removed.
    ///
    /// # Errors
    /// If a newer start took over, or the disk refuses.
    pub fn prune(&self, keep_last: usize) -> Result<Vec<PathBuf>, CheckpointError> {
        self.check()?;
        let all = list(&self.0.run)?;
        let old = all.len().saturating_sub(keep_last);
        if old == 0 {
            return Ok(Vec::new());
        }
        let newest_whole =
            all.iter().rev().find(|(step, path)| self.is_whole(*step, path)).map(|(step, _)| *step);
        let mut removed = Vec::new();
        for (step, path) in all.into_iter().take(old).filter(|(step, _)| Some(*step) != newest_whole) {
            // Under a hidden name first, so that a kill leaves no half checkpoint.
            let hidden = temporary_name(&path).map_err(FileError::on("remove", &path))?;
            fs::rename(&path, &hidden).map_err(FileError::on("remove", &path))?;
            fs::remove_dir_all(&hidden).map_err(FileError::on("remove", &hidden))?;
            self.trusted().remove(&step);
            removed.push(path);
        }
        Ok(removed)
    }

    /// Removes the writer's name, then what is locked, if no start before this one left them: the last files of a start
    /// that has come to nothing. One that comes while they go makes them anew. What cannot be removed stays.
    pub(crate) fn remove_made_files(&self) {
        if self.0.writer.epoch > 1 {
            return;
        }
        let made = [(WRITER_NAME, true), (LOCK_NAME, self.0.made_lock)];
        for (name, _) in made.into_iter().filter(|(_, made)| *made) {
            let _ = fs::remove_file(self.0.run.join(name));
        }
    }

    /// Remembers that this process wrote the checkpoint of a step.
    pub(super) fn trust(&self, step: u64) {
        self.trusted().insert(step);
    }

    fn is_whole(&self, step: u64, path: &Path) -> bool {
        if self.trusted().contains(&step) { Checkpoint::open(path).is_ok() } else { open_whole(path).is_ok() }
    }

    fn trusted(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.0.trusted.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Writer {
    fn this_process(epoch: u64) -> Self {
        // The standard library's hash keys are random.
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        Self {
            epoch,
            token: format!("{random:016x}"),
            process: std::process::id(),
            host: host(),
            started: now(),
        }
    }

    fn describe(&self) -> String {
        let age = age(now().saturating_sub(self.started));
        format!("process {} on {}, started {age} ago, epoch {}", self.process, self.host, self.epoch)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn host() -> String {
    let mut name = [0_u8; 256];
    // SAFETY: the pointer and the length are those of `name`; one byte is left for the closing zero.
    let status = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    if status == 0 { String::from_utf8_lossy(&name[..length]).into_owned() } else { "an unknown host".into() }
}

fn read_writer(run: &Path) -> io::Result<Writer> {
    Ok(serde_json::from_slice(&fs::read(run.join(WRITER_NAME))?)?)
}

fn locked(run: &Path) -> CheckpointError {
    let other_folder = "or choose another folder (output=FOLDER)";
    let (writer, advice) = match read_writer(run) {
        Ok(writer) if writer.process == std::process::id() && writer.host == host() => {
            ("this same process".to_string(), "end the first run before the second".to_string())
        }
        Ok(writer) if writer.host == host() => {
            let stop = format!("wait until it ends, stop it with `kill {}`, {other_folder}", writer.process);
            (writer.describe(), stop)
        }
        Ok(writer) => {
            let stop = format!("wait until it ends, stop it on {}, {other_folder}", writer.host);
            (writer.describe(), stop)
        }
        // It has the lock and is about to write its name.
        Err(_) => ("a process that has just started".into(), format!("wait until it ends, {other_folder}")),
    };
    CheckpointError::Locked { run: run.to_path_buf(), writer, advice }
}

/// Removes unfinished and pruned checkpoints of dead writers, and gives back replaced ones whose successor
/// did not appear. Who holds the lock knows that all other writers are dead.
fn clear_leftovers(folder: &Path) -> Result<(), CheckpointError> {
    for path in entries(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(hidden) = name.strip_prefix('.') else { continue };
        if hidden.ends_with(TEMPORARY_ENDING) {
            remove(&path)?;
        } else if let Some(original) = hidden.strip_suffix(REPLACED_ENDING) {
            let original = folder.join(original);
            if original.exists() {
                remove(&path)?;
            } else {
                fs::rename(&path, &original).map_err(FileError::on("restore", &original))?;
            }
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), FileError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(FileError::on("remove", path))
}
