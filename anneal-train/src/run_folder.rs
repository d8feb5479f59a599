//! What a run folder would say to a start, found out without writing anything.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use anneal_recipe::Recipe;
use anneal_weights::FileError;

use crate::checkpoint::{self, Checkpoint, Newest};
use crate::error::{Result, TrainError};
use crate::state::{self, SavedState};

/// Bytes of a file's name, on every usual file system.
const LONGEST_NAME: usize = 255;

/// Looks at the recipe's run folder: the step of the checkpoint that training would go on from, if there is one, and
/// warnings of newer ones that are damaged.
///
/// Files of checkpoints are not read: what is damaged is seen by their manifests and lengths.
///
/// # Errors
/// If it cannot be made or is a file; if all of its checkpoints are damaged, or the newest is of a newer Anneal, of another
/// recipe, or further than this one goes.
pub fn check_run_folder(recipe: &Recipe) -> Result<(Option<u64>, Vec<String>)> {
    let run = &recipe.output;
    check_path(run)?;
    let Newest { checkpoint, warnings } = checkpoint::open_newest(run, Checkpoint::open)?;
    let Some(newest) = checkpoint else { return Ok((None, warnings)) };
    let saved = SavedState::of(&newest)?;
    state::check_steps(recipe, saved.step, run)?;
    state::check_same_recipe(&saved.recipe()?, recipe, run, false)?;
    Ok((Some(saved.step), warnings))
}

/// Whether a folder is there or can be made, as far as that can be seen.
fn check_path(run: &Path) -> Result<()> {
    // Where a folder above is missing too, the system would not say so.
    if run.components().any(|part| part.as_os_str().len() > LONGEST_NAME) {
        let too_long = io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        return Err(FileError::on("make the run folder", run)(too_long).into());
    }
    let here = Path::new(".");
    for path in run.ancestors() {
        let path = if path.as_os_str().is_empty() { here } else { path };
        let there = match fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            there => there.map_err(FileError::on("make the run folder", run))?,
        };
        if !there.is_dir() {
            let message = format!("output is {}: {} is a file, not a folder", run.display(), path.display());
            return Err(TrainError::Settings { message });
        }
        return may_write(path).map_err(|cause| FileError::on("write to", path)(cause).into());
    }
    Ok(())
}

fn may_write(folder: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: the name ends in a zero and outlives the call.
    match unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
