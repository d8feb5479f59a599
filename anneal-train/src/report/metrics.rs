//! `metrics.jsonl`: one JSON object a line and a step, readable by anything, while the run goes on.
//!
//! Contract: steps increase from line to line, and a run that was interrupted and resumed leaves each step once,
//! as an uninterrupted one does. So the first line that a run writes after step S, or its first checkpoint, drops the
//! lines after S (the run computes them again) and finishes a last line that a kill left without its end, or drops it;
//! a start that comes to neither changes nothing. Dropping rewrites the file beside itself and renames it, so a kill
//! during the repair loses nothing either. A line is one write call: it is in the kernel's hands when
//! [`MetricsLog::write`] returns, and on the disk after [`MetricsLog::sync`], which a checkpoint calls so that its own
//! step is never missing.
//!
//! JSON has no NaN and no infinity: they are written as `null` and read back as NaN.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ReportError;
use anneal_weights::{Appender, FileError, write_atomic};

/// One line of the file. The fields that are not finite become `null`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Optimizer steps done, counted from 1.
    pub step: u64,
    /// See [`super::unix_seconds`].
    pub time: f64,
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    pub lr: f64,
    pub images_per_second: f64,
    /// Peak memory of the process or the device, in bytes.
    pub memory_bytes: u64,
    /// Steps skipped since the run began because their gradient was not finite.
    pub nonfinite_skipped: u64,
    /// Further figures (validation loss, timings), each its own key of the same object.
    #[serde(flatten)]
    pub extra: BTreeMap<String, f64>,
}

const FIELDS: [&str; 8] =
    ["step", "time", "loss", "grad_norm", "lr", "images_per_second", "memory_bytes", "nonfinite_skipped"];

/// The open file. It has one writer.
#[derive(Debug)]
pub struct MetricsLog {
    file: Appender,
    /// The step that the run goes on after, until the lines of later ones are dropped.
    undropped: Option<u64>,
    last_step: Option<u64>,
}

impl MetricsLog {
    /// Opens or creates `path` for a run that goes on after `resumed_step` (0: from the start). What it holds stays as it
    /// is.
    ///
    /// # Errors
    /// If the file cannot be opened or read; the message names it.
    pub fn open(path: &Path, resumed_step: u64) -> Result<Self, ReportError> {
        let file = Appender::open(path)?;
        // What cannot be read later should be known now.
        File::open(path).map_err(FileError::on("read", path))?;
        Ok(Self { file, undropped: Some(resumed_step), last_step: None })
    }

    /// Whether the next [`Self::write`] or [`Self::sync`] is the first, which may drop lines.
    pub fn is_untouched(&self) -> bool {
        self.undropped.is_some()
    }

    /// Drops the lines after the step that the run goes on after, once.
    fn drop_later_steps(&mut self) -> Result<(), ReportError> {
        let Some(resumed_step) = self.undropped else { return Ok(()) };
        let path = self.file.path();
        let content = repaired(path, resumed_step)?;
        if let Some(bytes) = &content.rewritten {
            write_atomic(path, bytes)?;
            self.file = Appender::open(path)?;
        }
        self.last_step = content.last_step;
        self.undropped = None;
        Ok(())
    }

    /// Appends one line.
    ///
    /// # Errors
    /// A step that is not after the last one, an extra key with a built-in name, a file that cannot be read or rewritten,
    /// or a failed write (a full disk), after which the file still ends in a whole line.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<(), ReportError> {
        self.drop_later_steps()?;
        if let Some(last) = self.last_step.filter(|last| metrics.step <= *last) {
            return Err(ReportError::StepOrder {
                path: self.file.path().to_path_buf(),
                step: metrics.step,
                last,
            });
        }
        if let Some(key) = metrics.extra.keys().find(|key| FIELDS.contains(&key.as_str())) {
            return Err(ReportError::ReservedKey { key: key.clone() });
        }
        let mut line = serde_json::to_vec(metrics).expect("numbers under string keys always serialize");
        line.push(b'\n');
        self.file.append(&line)?;
        self.last_step = Some(metrics.step);
        Ok(())
    }

    /// Waits until every line is on the disk.
    ///
    /// # Errors
    /// If the system reports that it could not write them.
    pub fn sync(&mut self) -> Result<(), ReportError> {
        // A step between two lines may be saved: the next start would take later lines of before for its past.
        self.drop_later_steps()?;
        Ok(self.file.sync()?)
    }
}

struct Content {
    /// The new content, where it differs from the file's.
    rewritten: Option<Vec<u8>>,
    last_step: Option<u64>,
}

/// The one field that ordering needs; the rest of the line only has to be JSON.
#[derive(Deserialize)]
struct StepOnly {
    step: u64,
}

fn repaired(path: &Path, resumed_step: u64) -> Result<Content, FileError> {
    let bytes = std::fs::read(path).map_err(FileError::on("read", path))?;
    let mut kept: Vec<(u64, &[u8])> = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        let Ok(StepOnly { step }) = serde_json::from_slice(text) else { continue };
        if step > resumed_step {
            continue;
        }
        // A step that comes again was computed again: the later line is the run's.
        while kept.last().is_some_and(|(last, _)| *last >= step) {
            kept.pop();
        }
        kept.push((step, text));
    }
    let last_step = kept.last().map(|(step, _)| *step);
    let mut whole = Vec::with_capacity(bytes.len() + 1);
    for (_, text) in &kept {
        whole.extend_from_slice(text);
        whole.push(b'\n');
    }
    Ok(Content { rewritten: (whole != bytes).then_some(whole), last_step })
}

/// Reads named figures over the steps, for a plot: `curves(path, &["loss", "grad_norm"])` gives one list of
/// `(step, value)` per key. `null` is NaN; lines without the key, and lines that are no JSON (the last one may be
/// half-written), are passed over.
///
/// # Errors
/// If the file cannot be read.
pub fn curves(path: &Path, keys: &[&str]) -> Result<Vec<Vec<(u64, f64)>>, ReportError> {
    let file = File::open(path).map_err(FileError::on("read", path))?;
    let mut curves = vec![Vec::new(); keys.len()];
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(FileError::on("read", path))?;
        let Ok(object) = serde_json::from_slice::<serde_json::Value>(&line) else { continue };
        let Some(step) = object.get("step").and_then(serde_json::Value::as_u64) else { continue };
        for (key, curve) in keys.iter().zip(&mut curves) {
            match object.get(key) {
                Some(serde_json::Value::Null) => curve.push((step, f64::NAN)),
                Some(value) => curve.extend(value.as_f64().map(|value| (step, value))),
                None => {}
            }
        }
    }
    Ok(curves)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn metrics(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            time: 1_700_000_000.5 + step as f64,
            loss: 0.1 / step as f32,
            grad_norm: 0.5,
            lr: 1e-4,
            images_per_second: 512.25,
            memory_bytes: 1 << 30,
            nonfinite_skipped: 0,
            extra: BTreeMap::new(),
        }
    }

    fn write_steps(path: &Path, resumed_step: u64, steps: std::ops::RangeInclusive<u64>) {
        let mut log = MetricsLog::open(path, resumed_step).unwrap();
        for step in steps {
            log.write(&metrics(step)).unwrap();
        }
    }

    fn file() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        (folder, path)
    }

    fn uninterrupted(steps: u64) -> Vec<u8> {
        let (_folder, path) = file();
        write_steps(&path, 0, 1..=steps);
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_line_is_one_flat_object() {
        let (_folder, path) = file();
        let mut log = MetricsLog::open(&path, 0).unwrap();
        let mut line = metrics(1);
        line.extra.insert("validation_loss".into(), 0.25);
        log.write(&line).unwrap();
        log.sync().unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"time\":1700000001.5,\"loss\":0.1,\"grad_norm\":0.5,\"lr\":0.0001,\
             \"images_per_second\":512.25,\"memory_bytes\":1073741824,\"nonfinite_skipped\":0,\
             \"validation_loss\":0.25}\n"
        );
    }

    #[test]
    fn non_finite_numbers_stay_valid_json() {
        let (_folder, path) = file();
        let mut log = MetricsLog::open(&path, 0).unwrap();
        let mut line = metrics(1);
        line.loss = f32::NAN;
        line.grad_norm = f32::INFINITY;
        line.images_per_second = 0.0;
        line.extra.insert("validation_loss".into(), f64::NEG_INFINITY);
        log.write(&line).unwrap();
        let object: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for key in ["loss", "grad_norm", "validation_loss"] {
            assert!(object[key].is_null(), "{key}: {object}");
        }
        let read = curves(&path, &["loss", "lr"]).unwrap();
        assert!(read[0][0].1.is_nan());
        assert_eq!(read[1], [(1, 1e-4)]);
    }

    #[test]
    fn resumed_file_equals_the_uninterrupted_one() {
        let (_folder, path) = file();
        write_steps(&path, 0, 1..=7);
        write_steps(&path, 4, 5..=9);
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(9));
    }

    #[test]
    fn lines_stay_until_the_first_new_one_or_a_checkpoint() {
        let (_folder, path) = file();
        write_steps(&path, 0, 1..=7);
        let mut log = MetricsLog::open(&path, 4).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(7));
        log.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(4));
        log.write(&metrics(5)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(5));
    }

    #[test]
    fn killed_amid_any_line_it_resumes_to_the_same_file() {
        let whole = uninterrupted(6);
        let four = uninterrupted(4).len();
        for length in (four..whole.len()).step_by(3) {
            let (folder, path) = file();
            std::fs::write(&path, &whole[..length]).unwrap();
            write_steps(&path, 4, 5..=6);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "cut at byte {length}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_last_line_without_its_newline_is_kept() {
        let (_folder, path) = file();
        let whole = uninterrupted(3);
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        write_steps(&path, 3, 4..=4);
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(4));
    }

    #[test]
    fn zeros_left_by_a_power_cut_are_dropped() {
        let (_folder, path) = file();
        let mut bytes = uninterrupted(2);
        bytes.extend_from_slice(&[0; 40]);
        std::fs::write(&path, bytes).unwrap();
        MetricsLog::open(&path, 9).unwrap().sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(2));
    }

    #[test]
    fn of_a_step_written_twice_the_later_line_stays() {
        let (_folder, path) = file();
        let mut bytes = uninterrupted(3);
        bytes.extend_from_slice(b"{\"step\":2,\"loss\":7.0}\n");
        std::fs::write(&path, bytes).unwrap();
        MetricsLog::open(&path, 9).unwrap().sync().unwrap();
        assert_eq!(curves(&path, &["loss"]).unwrap(), [vec![(1, 0.1), (2, 7.0)]]);
    }

    #[test]
    fn an_intact_file_is_not_rewritten() {
        use std::os::unix::fs::MetadataExt;
        let (_folder, path) = file();
        write_steps(&path, 0, 1..=3);
        let inode = std::fs::metadata(&path).unwrap().ino();
        write_steps(&path, 3, 4..=5);
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
        assert_eq!(std::fs::read(&path).unwrap(), uninterrupted(5));
    }

    #[test]
    fn steps_only_go_up() {
        let (_folder, path) = file();
        let mut log = MetricsLog::open(&path, 0).unwrap();
        log.write(&metrics(5)).unwrap();
        let message = log.write(&metrics(5)).unwrap_err().to_string();
        assert!(message.contains("cannot record step 5 after step 5"), "{message}");
    }

    #[test]
    fn an_extra_key_may_not_hide_a_field() {
        let (_folder, path) = file();
        let mut log = MetricsLog::open(&path, 0).unwrap();
        let mut line = metrics(1);
        line.extra.insert("loss".into(), 1.0);
        let message = log.write(&line).unwrap_err().to_string();
        assert_eq!(message, "metric `loss` has the name of a built-in field; choose another name");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn curves_pass_over_what_they_cannot_read() {
        let (_folder, path) = file();
        std::fs::write(
            &path,
            "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":null,\"lr\":1}\nnot json\n{\"step\":3,\"lo",
        )
        .unwrap();
        let read = curves(&path, &["loss", "lr"]).unwrap();
        assert_eq!(read[0][0], (1, 0.5));
        assert!(read[0][1].0 == 2 && read[0][1].1.is_nan());
        assert_eq!(read[0].len(), 2);
        assert_eq!(read[1], [(2, 1.0)]);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let message = MetricsLog::open(Path::new("no/such/folder/metrics.jsonl"), 0).unwrap_err().to_string();
        assert_eq!(message, "cannot open for writing no/such/folder/metrics.jsonl: no such file or folder");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named() {
        let file = Appender::open(Path::new("/dev/full")).unwrap();
        let mut log = MetricsLog { file, undropped: None, last_step: None };
        assert_eq!(
            log.write(&metrics(1)).unwrap_err().to_string(),
            "cannot write /dev/full: the disk is full; free some space or choose another folder, then run the \
             same command again"
        );
        assert_eq!(log.last_step, None, "the step may be written again");
    }
}
