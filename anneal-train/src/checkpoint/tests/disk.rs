use std::process::Command;

use super::*;

/// A small disk in memory, mounted for one test.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(test: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let disk = Self { folder };
        if disk.run("mount", &["-t", "tmpfs", "-o", "size=256k", "tmpfs"]) {
            return Some(disk);
        }
        skip_without("right to mount a small disk (run as root)", test);
        None
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> bool {
        run(program, arguments, self.path())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.run("umount", &[]);
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) -> bool {
    Command::new(program).args(arguments).arg(path).output().is_ok_and(|output| output.status.success())
}

/// A checkpoint of about 200 kB.
fn save_large(lock: &RunLock, step: u64) -> Result<Checkpoint, CheckpointError> {
    let mut writer = lock.checkpoint(step)?.shard_bytes(100_000);
    let specs: Vec<TensorSpec> =
        ["a", "b"].map(|name| TensorSpec::new(name, StoredDType::F32, &[25_000])).into_iter().collect();
    writer.group("weights", &specs, |_, sink| -> Result<(), CheckpointError> {
        Ok(sink.f32(&[1.5; 25_000])?)
    })?;
    writer.commit(Value::Null)
}

#[test]
fn a_full_disk_is_named_and_nothing_is_lost() {
    let Some(disk) = SmallDisk::mount("a_full_disk_is_named_and_nothing_is_lost") else { return };
    let run = disk.path().join("run");
    let lock = RunLock::acquire(&run).unwrap();
    let first = save_large(&lock, 1).unwrap();
    let message = save_large(&lock, 2).unwrap_err().to_string();
    let front = format!("cannot write {}/checkpoints/.step-00000002.", run.display());
    assert!(message.starts_with(&front), "{message}");
    let back = "the disk is full; free some space or choose another folder, then run the same command again";
    assert!(message.ends_with(back), "{message}");
    assert_eq!(names(&run.join("checkpoints")), ["step-00000001"]);
    first.verify().unwrap();

    // The same lock tries again once there is space.
    fs::remove_dir_all(first.path()).unwrap();
    save_large(&lock, 2).unwrap().verify().unwrap();
}

#[test]
fn a_read_only_disk_is_named() {
    let Some(disk) = SmallDisk::mount("a_read_only_disk_is_named") else { return };
    let refused = |action: &str, path: &Path| {
        format!(
            "cannot {action} {}: the file system is read-only; choose a folder that you may write to",
            path.display()
        )
    };
    let folder = disk.path().join("run");
    let lock = RunLock::acquire(&folder).unwrap();
    let first = save(&lock, 1).unwrap();

    // In the middle of a run.
    let checkpoints = folder.join("checkpoints");
    assert!(run("mount", &["--bind", checkpoints.to_str().unwrap()], &checkpoints));
    assert!(run("mount", &["-o", "remount,bind,ro"], &checkpoints));
    let during = save(&lock, 2).unwrap_err().to_string();
    assert!(run("umount", &[], &checkpoints));
    assert_eq!(during, refused("create", &checkpoints.join("step-00000002")));
    save(&lock, 2).unwrap();

    // Before it.
    drop(lock);
    assert!(disk.run("mount", &["-o", "remount,ro"]));
    let message = RunLock::acquire(&folder).unwrap_err().to_string();
    assert_eq!(message, refused("open for writing", &folder.join(".writer.lock")));
    first.verify().unwrap();
}

#[test]
fn a_file_in_place_of_a_folder_is_named() {
    let (folder, run) = run_folder();
    fs::write(&run, "").unwrap();
    let message = RunLock::acquire(&run).unwrap_err().to_string();
    assert!(message.starts_with(&format!("cannot create {}: ", run.display())), "{message}");
    fs::remove_file(&run).unwrap();

    let lock = RunLock::acquire(&run).unwrap();
    let checkpoints = run.join("checkpoints");
    fs::write(&checkpoints, "").unwrap();
    let message = save(&lock, 1).unwrap_err().to_string();
    assert!(message.starts_with(&format!("cannot create {}: ", checkpoints.display())), "{message}");
    assert_eq!(names(folder.path()), ["run"]);

    fs::remove_file(&checkpoints).unwrap();
    save(&lock, 1).unwrap();
}
