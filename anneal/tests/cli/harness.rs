//! A fresh folder, the binary run in it, and what came of it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anneal_data::npz::{self, Array, Npz, Values};
use tempfile::TempDir;

/// A model that a step of takes a millisecond; checkpoints at every second step.
pub const TINY: &str = "\
model: {hidden_size: 16, depth: 1, heads: 2, patch_size: 2, image_size: 8, channels: 1, classes: 10}
diffusion: {schedule: squared_cosine, target: v}
data: {kind: digits, workers: 1}
optim: {lr: 1e-3}
ema: {rates: [0.9]}
train: {steps: 6, batch: 8, log_every: 1, checkpoint: {every: 2, keep_last: 2}}
sample: {every: 0, num: 4, steps: 4, guidance: 2.0}
";

/// Longer than any test should wait for a thing that takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder in which commands run; removed at the end.
pub struct Folder(TempDir);

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Folder {
    /// Holds `tiny.yaml` and nothing else.
    pub fn new() -> Self {
        let folder = Self(TempDir::new().unwrap());
        folder.write("tiny.yaml", TINY.as_bytes());
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Writes `images` and `labels` of an npz.
    pub fn write_npz(&self, name: &str, images: Array, labels: Vec<i64>) {
        let labels = Array::new([labels.len()], Values::I64(labels));
        npz::write_npz(&self.path(name), &[("images", &images), ("labels", &labels)]).unwrap();
    }

    pub fn npz(&self, name: &str) -> Npz {
        Npz::read(&self.path(name)).unwrap()
    }

    /// Names in a folder, sorted, hidden ones too; none if it is not there.
    pub fn names(&self, name: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(name)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anneal"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    /// Runs `anneal ARGUMENTS` to its end.
    pub fn anneal(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(arguments).output().unwrap())
    }

    /// `anneal train tiny.yaml output=RUN CHANGES`, without a progress bar.
    pub fn train(&self, run: &str, changes: &[&str]) -> Outcome {
        self.anneal(&train_arguments(&format!("output={run}"), changes))
    }

    /// As [`Self::train`], but returns at once.
    pub fn spawn_train(&self, run: &str, changes: &[&str]) -> Running {
        self.spawn(&train_arguments(&format!("output={run}"), changes))
    }

    /// As [`Self::anneal`], but returns at once.
    pub fn spawn(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        Running(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// Runs a shell script with the binary in `$ANNEAL`.
    pub fn script(&self, program: &[&str], script: &str) -> Outcome {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).args(["sh", "-c", script]).env("ANNEAL", env!("CARGO_BIN_EXE_anneal"));
        Outcome::of(command.current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap())
    }
}

fn train_arguments<'a>(output: &'a str, changes: &[&'a str]) -> Vec<&'a str> {
    [&["train", "tiny.yaml", "--quiet", output], changes].concat()
}

/// A command that is still running; ended with its test.
pub struct Running(Option<Child>);

impl Running {
    pub fn process(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    /// Waits for a path to appear.
    pub fn wait_for(&mut self, path: &Path) {
        self.wait_until(&path.display().to_string(), || path.exists());
    }

    /// Waits until signals are caught: SIGTERM is the last that a handler is set up for.
    pub fn wait_for_handlers(&mut self) {
        const TERM: u32 = 15;
        let status = format!("/proc/{}/status", self.process());
        self.wait_until("the handler of SIGTERM", || {
            let status = std::fs::read_to_string(&status).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            u64::from_str_radix(caught.trim(), 16).unwrap() >> (TERM - 1) & 1 == 1
        });
    }

    fn wait_until(&mut self, what: &str, is_there: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_there() {
            let child = self.0.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                let outcome = self.finish();
                panic!("it ended ({status}) before {what} appeared: {outcome:?}");
            }
            assert!(start.elapsed() < PATIENCE, "{what} did not appear");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal by its name, such as `INT`.
    pub fn signal(&self, name: &str) {
        let status =
            Command::new("sh").args(["-c", &format!("kill -{name} {}", self.process())]).status().unwrap();
        assert!(status.success(), "kill -{name}");
    }

    pub fn finish(&mut self) -> Outcome {
        Outcome::of(self.0.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Outcome {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("messages are UTF-8");
        Self { status: output.status, out: text(output.stdout), err: text(output.stderr) }
    }

    /// Exit code 0, with these words on standard output or standard error.
    #[track_caller]
    pub fn succeeds(self, words: &[&str]) -> Self {
        self.ends(0, words)
    }

    /// Exit code 1, and an error of its own words, among them these.
    #[track_caller]
    pub fn fails(self, words: &[&str]) -> Self {
        assert!(
            self.err.lines().any(|line| line.starts_with("error: ")),
            "no line begins with `error: `: {self:#?}"
        );
        self.ends(1, words)
    }

    #[track_caller]
    pub fn ends(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "exit code of {self:#?}");
        assert!(!self.err.contains("panicked"), "{self:#?}");
        self.says(words)
    }

    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.out.contains(word) || self.err.contains(word), "`{word}` is missing in {self:#?}");
        }
        self
    }
}

/// Repeatable bytes that look random.
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// The same as f32 in -1..1.
pub fn noise_f32(seed: u64, count: usize) -> Vec<f32> {
    noise(seed, count).into_iter().map(|byte| f32::from(byte) / 127.5 - 1.0).collect()
}
