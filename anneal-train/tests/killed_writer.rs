//! A process that writes checkpoints is killed at arbitrary instants, again and again: each time the newest
//! checkpoint is whole and none is lost. Without the test harness, because the process to kill is this program
//! itself, started again with the run's folder in its environment.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anneal_train::checkpoint::{Checkpoint, CheckpointError, RunLock, list, open_newest_whole};
use anneal_weights::{StoredDType, TensorSpec};
use serde_json::json;

const RUN: &str = "ANNEAL_TEST_RUN";
const KILLS: u64 = 40;
const ELEMENTS: usize = 20_000;

fn main() {
    match std::env::var_os(RUN) {
        Some(run) => write_for_ever(Path::new(&run)).expect("the writer goes on until it is killed"),
        None => {
            second_process_is_refused();
            kill_again_and_again();
            println!("test result: ok. 2 passed; {KILLS} writers killed");
        }
    }
}

/// Saves step after step, replacing some, and prunes.
fn write_for_ever(run: &Path) -> Result<(), CheckpointError> {
    let lock = RunLock::acquire(run)?;
    println!("ready");
    let mut step = open_newest_whole(run)?.checkpoint.map_or(0, |checkpoint| checkpoint.step());
    loop {
        step += 1;
        save(&lock, step)?;
        save(&lock, step)?;
        lock.prune(2)?;
    }
}

fn save(lock: &RunLock, step: u64) -> Result<Checkpoint, CheckpointError> {
    let mut writer = lock.checkpoint(step)?.shard_bytes(50_000);
    let specs = ["a", "b"].map(|name| TensorSpec::new(name, StoredDType::F32, &[ELEMENTS]));
    for group in ["weights", "optimizer"] {
        writer.group(group, &specs, |_, sink| -> Result<(), CheckpointError> {
            Ok(sink.f32(&[step as f32; ELEMENTS])?)
        })?;
    }
    writer.commit(json!({ "step": step }))
}

struct Writer {
    process: Child,
}

impl Writer {
    /// Starts a writer and waits until it holds the run.
    fn start(run: &Path) -> Self {
        let program = std::env::current_exe().expect("the path of this program");
        let mut process =
            Command::new(program).env(RUN, run).stdout(Stdio::piped()).spawn().expect("a second process");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "the writer could not start");
        Self { process }
    }

    fn kill(mut self) {
        self.process.kill().expect("it runs until now");
        let status = self.process.wait().expect("it ends");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL), "{status}");
    }
}

fn second_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let writer = Writer::start(run);
    let message = RunLock::acquire(run).unwrap_err().to_string();
    let process = writer.process.id();
    let front = format!("another run is writing to {}: process {process} on ", run.display());
    let back = format!(
        ", epoch 1; wait until it ends, stop it with `kill {process}`, or choose another folder (output=FOLDER)"
    );
    assert!(message.starts_with(&front) && message.ends_with(&back), "{message}");
    writer.kill();
    assert_eq!(RunLock::acquire(run).unwrap().epoch(), 2, "its lock ended with it");
    println!("test second_process_is_refused ... ok");
}

fn time_of_a_save() -> Duration {
    let folder = tempfile::tempdir().unwrap();
    let lock = RunLock::acquire(folder.path()).unwrap();
    let start = Instant::now();
    save(&lock, 1).unwrap();
    start.elapsed()
}

fn kill_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let one_save = time_of_a_save();
    let mut newest = 0;
    for round in 0..KILLS {
        let writer = Writer::start(run);
        // Spread over the time of some saves, whatever the disk.
        std::thread::sleep(one_save.mul_f64(1.0 + 0.23 * (round % 17) as f64));
        writer.kill();
        let found = open_newest_whole(run).unwrap();
        assert!(found.warnings.is_empty(), "round {round}: {:?}", found.warnings);
        let Some(checkpoint) = found.checkpoint else {
            // Killed before the first was there, or between the two renames that replace it.
            assert!(newest <= 1, "round {round}: step {newest} is gone");
            continue;
        };
        let step = checkpoint.step();
        // One less: killed between the two renames that replace the newest, which the next start gives back.
        assert!(step + 1 >= newest, "round {round}: step {newest} is gone, the newest is {step}");
        newest = newest.max(step);
        for (group, name) in [("weights", "a"), ("weights", "b"), ("optimizer", "a"), ("optimizer", "b")] {
            assert_eq!(
                checkpoint.read(group, name).unwrap(),
                [step as f32; ELEMENTS],
                "round {round}: {group} {name}"
            );
        }
    }
    assert!(newest > KILLS / 4, "the writers got on: {newest}");
    let lock = RunLock::acquire(run).unwrap();
    assert_eq!(lock.epoch(), KILLS + 1);
    let names = std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "left-overs are gone");
    // The last writer may have been killed between the two renames that replace a step which none of the looks
    // above saw: taking the lock gave that step back.
    let last = list(run).unwrap().last().unwrap().0;
    assert!((newest..=newest + 1).contains(&last), "step {newest} was seen, and now the newest is {last}");
    println!("test kill_again_and_again ... ok");
}
