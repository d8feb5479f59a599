mod damage;
mod disk;
mod writers;

use std::fs;
use std::path::{Path, PathBuf};

use anneal_testkit::skip_without;
use anneal_weights::{StoredDType, TensorSpec};
use serde_json::{Value, json};

use super::*;

/// A run folder of its own for one test.
fn run_folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    (folder, run)
}

/// The names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A small checkpoint whose values depend on its step.
fn save(lock: &RunLock, step: u64) -> Result<Checkpoint, CheckpointError> {
    let mut writer = lock.checkpoint(step)?.shard_bytes(64);
    let specs =
        [TensorSpec::new("a", StoredDType::F32, &[2, 3]), TensorSpec::new("b", StoredDType::F32, &[20])];
    writer.group("weights", &specs, |index, sink| -> Result<(), CheckpointError> {
        Ok(sink.f32(&vec![step as f32 + index as f32; specs[index].elements()])?)
    })?;
    writer.commit(json!({ "step": step }))
}

fn steps(run: &Path) -> Vec<u64> {
    list(run).unwrap().into_iter().map(|(step, _)| step).collect()
}

/// Turns one bit of a file around.
fn flip(path: &Path, byte: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[byte] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn every_bit_comes_back() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    // Among them infinities, a NaN with a payload, the smallest subnormal and negative zero.
    let odd = [0x7f80_0000_u32, 0xff80_0000, 0x7fc1_2345, 1, 0x8000_0000, 0x3f80_0001].map(f32::from_bits);
    let many: Vec<f32> = (0..100_000).map(|index| (index as f32).sin()).collect();
    let weights = [
        TensorSpec::new("odd", StoredDType::F32, &[6]),
        TensorSpec::new("many", StoredDType::F32, &[250, 400]),
    ];
    let mixed = [
        TensorSpec::new("half", StoredDType::BF16, &[3]),
        TensorSpec::new("count", StoredDType::I64, &[2]),
        TensorSpec::new("bytes", StoredDType::U8, &[5]),
        TensorSpec::new("nothing", StoredDType::F32, &[0, 4]),
        TensorSpec::new("number", StoredDType::F32, &[]),
    ];
    let state = json!({
        "recipe": "optim:\n  lr: 1e-4\n", "cursor": { "epoch": 3, "next": 17 }, "seed": u64::MAX,
        "floats": [0.1 + 0.2, 1e-300, 5e-324, f64::MAX, 0.000_123_456_789_012_345_68]
    });
    let mut writer = lock.checkpoint(1000).unwrap().shard_bytes(100_000);
    writer
        .group("weights", &weights, |index, sink| -> Result<(), CheckpointError> {
            // In pieces, as a sharded optimizer gives them.
            [&odd[..], &many[..]][index].chunks(70_001).try_for_each(|part| Ok(sink.f32(part)?))
        })
        .unwrap();
    writer
        .group("ema-0.9999", &mixed, |index, sink| -> Result<(), CheckpointError> {
            match index {
                0 => sink.f32(&[1.0, 1.005, -2.0])?,
                1 => sink.bytes(&[(-5_i64).to_le_bytes(), 7_i64.to_le_bytes()].concat())?,
                2 => sink.bytes(b"12345")?,
                3 => sink.f32(&[])?,
                _ => sink.f32(&[0.5])?,
            }
            Ok(())
        })
        .unwrap();
    writer.commit(state.clone()).unwrap();

    let newest = open_newest_whole(&run).unwrap();
    assert!(newest.warnings.is_empty());
    let checkpoint = newest.checkpoint.unwrap();
    assert_eq!(checkpoint.path(), run.join("checkpoints/step-00001000"));
    assert_eq!((checkpoint.step(), checkpoint.manifest().epoch), (1000, 1));
    assert_eq!(checkpoint.state(), &state);
    assert_eq!(checkpoint.groups(), ["weights", "ema-0.9999"]);
    assert_eq!(
        names(checkpoint.path()),
        [
            "ema-0.9999-00001.safetensors",
            "manifest.json",
            "weights-00001.safetensors",
            "weights-00002.safetensors"
        ]
    );
    assert_eq!(checkpoint.names("weights").unwrap(), ["many", "odd"]);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&checkpoint.read("weights", "odd").unwrap()), bits(&odd));
    assert_eq!(bits(&checkpoint.read("weights", "many").unwrap()), bits(&many));
    let average = checkpoint.tensors("ema-0.9999").unwrap();
    // 1.005 lies between the bf16 values 1 and 1.0078125, nearer to the second.
    assert_eq!(average.read_f32("half").unwrap(), [1.0, 1.007_812_5, -2.0]);
    assert_eq!(average.read_i64("count").unwrap(), [-5, 7]);
    assert_eq!(average.read_bytes("bytes").unwrap(), b"12345");
    assert_eq!(average.shape("nothing").unwrap(), [0, 4]);
    assert_eq!(average.read_f32("number").unwrap(), [0.5]);
}

#[test]
fn the_listed_hashes_are_those_of_the_files() {
    if std::process::Command::new("sha256sum").arg("--version").output().is_err() {
        return skip_without("sha256sum program", "the_listed_hashes_are_those_of_the_files");
    }
    let (_folder, run) = run_folder();
    let checkpoint = save(&RunLock::acquire(&run).unwrap(), 5).unwrap();
    let files = &checkpoint.manifest().files;
    assert_eq!(files.len(), 2);
    for file in files {
        let path = checkpoint.path().join(&file.name);
        let printed = std::process::Command::new("sha256sum").arg(&path).output().unwrap().stdout;
        assert!(String::from_utf8(printed).unwrap().starts_with(&file.sha256), "{}", file.name);
        assert_eq!(fs::metadata(&path).unwrap().len(), file.bytes);
    }
}

#[test]
fn a_step_saved_again_replaces_the_first() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let first = save(&lock, 7).unwrap();
    flip(&first.path().join("weights-00001.safetensors"), 90);
    let second = save(&lock, 7).unwrap();
    second.verify().unwrap();
    assert_eq!(names(&run.join("checkpoints")), ["step-00000007"]);
}

#[test]
fn an_empty_group_is_a_group() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let mut writer = lock.checkpoint(1).unwrap();
    writer
        .group("optimizer", &[], |_, _| -> Result<(), CheckpointError> {
            unreachable!("no tensor is asked for")
        })
        .unwrap();
    let checkpoint = writer.commit(Value::Null).unwrap();
    assert!(checkpoint.names("optimizer").unwrap().is_empty());
    assert_eq!(
        checkpoint.names("weights").unwrap_err().to_string(),
        format!("checkpoint {} has no group 'weights'; it has optimizer", checkpoint.path().display())
    );
    let message = checkpoint.read("optimizer", "a").unwrap_err().to_string();
    assert!(message.ends_with("optimizer-00001.safetensors holds no tensor 'a'"), "{message}");
}

#[test]
fn groups_have_plain_names_and_full_tensors() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let mut writer = lock.checkpoint(1).unwrap();
    let specs = [TensorSpec::new("a", StoredDType::F32, &[2])];
    let mut group = |name: &str, values: &[f32]| {
        let written =
            writer.group(name, &specs, |_, sink| -> Result<(), CheckpointError> { Ok(sink.f32(values)?) });
        written.err().map(|error| error.to_string())
    };
    assert_eq!(group("weights", &[1.0, 2.0]), None);
    assert_eq!(
        group("weights", &[1.0, 2.0]).unwrap(),
        "'weights' cannot be a group of a checkpoint: it was already written"
    );
    for name in ["", "../weights", "Weights", ".hidden"] {
        assert_eq!(
            group(name, &[1.0, 2.0]).unwrap(),
            format!("'{name}' cannot be a group of a checkpoint: a name consists of a-z, 0-9, '.' and '-'")
        );
    }
    assert!(group("few", &[1.0]).unwrap().ends_with("'a' needs 8 bytes and was given 4"));
    assert!(group("many", &[1.0, 2.0, 3.0]).unwrap().ends_with("'a' needs 8 bytes and was given 12"));
}

#[test]
fn a_caller_that_fails_leaves_nothing() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    save(&lock, 1).unwrap();
    let mut writer = lock.checkpoint(2).unwrap();
    let specs = [TensorSpec::new("a", StoredDType::F32, &[2])];
    let failed: Result<(), CheckpointError> = writer.group("weights", &specs, |_, _| {
        Err(CheckpointError::GroupName { group: "x".into(), reason: "the caller's" })
    });
    assert_eq!(failed.unwrap_err().to_string(), "'x' cannot be a group of a checkpoint: the caller's");
    drop(writer);
    assert_eq!(names(&run.join("checkpoints")), ["step-00000001"]);
}

#[test]
fn a_run_without_checkpoints_is_no_error() {
    let (_folder, run) = run_folder();
    assert!(open_newest_whole(&run).unwrap().checkpoint.is_none());
    RunLock::acquire(&run).unwrap();
    assert!(open_newest_whole(&run).unwrap().checkpoint.is_none());
}

#[test]
fn pruning_keeps_the_last_and_the_newest_whole_one() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    (1..=5).for_each(|step| drop(save(&lock, step).unwrap()));
    assert!(lock.prune(5).unwrap().is_empty());
    let folder = |step: u64| run.join("checkpoints").join(folder_name(step));
    assert_eq!(lock.prune(3).unwrap(), [folder(1), folder(2)]);
    assert_eq!(names(&run.join("checkpoints")), ["step-00000003", "step-00000004", "step-00000005"]);

    // A new start has written none of them, so it reads them; this lock would notice a length.
    drop(lock);
    let lock = RunLock::acquire(&run).unwrap();
    flip(&folder(5).join("weights-00002.safetensors"), 90);
    fs::write(folder(4).join("manifest.json"), "").unwrap();
    assert!(lock.prune(2).unwrap().is_empty(), "3 is the newest whole one");
    assert_eq!(steps(&run), [3, 4, 5]);
    save(&lock, 6).unwrap();
    assert_eq!(lock.prune(1).unwrap(), [folder(3), folder(4), folder(5)]);
    assert!(lock.prune(0).unwrap().is_empty());
    assert_eq!(steps(&run), [6]);
}
