//! Damaged checkpoints, a disk that is full, and two runs in one folder: a clear line, and nothing is lost.

use crate::harness::{Folder, TINY};
use crate::resume::assert_same_checkpoint;

const NEWEST: &str = "run/checkpoints/step-00000006";
const OLDER: &str = "run/checkpoints/step-00000004";
const WEIGHTS: &str = "weights-00001.safetensors";

/// A finished run with two checkpoints.
fn finished() -> Folder {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&["trained 6 steps"]);
    assert_eq!(folder.names("run/checkpoints"), ["step-00000004", "step-00000006"]);
    folder.train("reference", &[]).succeeds(&[]);
    folder
}

fn flip_bit(folder: &Folder, file: &str) {
    let mut bytes = folder.read(file);
    let last = bytes.len() - 3;
    bytes[last] ^= 4;
    folder.write(file, &bytes);
}

fn truncate(folder: &Folder, file: &str) {
    let bytes = folder.read(file);
    folder.write(file, &bytes[..bytes.len() - 10]);
}

/// The run goes on from the older checkpoint and arrives at the same bits.
#[track_caller]
fn continues_from_the_older(folder: &Folder, reason: &[&str]) {
    let newest = format!("checkpoint {NEWEST} is damaged");
    let used = format!("{OLDER} is used instead");
    let continued = folder.train("run", &[]).succeeds(&["warning: ", &newest, &used, "6 in all"]);
    continued.says(reason);
    assert_same_checkpoint(folder, "reference", "run", 6);
}

#[test]
fn a_bit_flip_is_seen_and_the_older_checkpoint_is_used() {
    let folder = finished();
    flip_bit(&folder, &format!("{NEWEST}/{WEIGHTS}"));
    let sampled = folder.anneal(&["sample", "run", "--num", "1"]);
    sampled.succeeds(&["warning: ", "is damaged", &format!("{OLDER} is used instead"), "step 4"]);
    folder.anneal(&["sample", NEWEST, "--num", "1"]).fails(&[NEWEST, "is damaged", WEIGHTS]);
    continues_from_the_older(&folder, &["the content of weights-00001.safetensors has changed"]);
}

#[test]
fn a_truncated_file_is_seen_and_the_older_checkpoint_is_used() {
    let folder = finished();
    truncate(&folder, &format!("{NEWEST}/optimizer-00001.safetensors"));
    let plan = folder.anneal(&["train", "tiny.yaml", "--plan", "output=run"]);
    let newest = format!("warning: checkpoint {NEWEST} is damaged");
    plan.succeeds(&[&newest, &format!("{OLDER} is used instead"), "training would go on after step 4"]);
    continues_from_the_older(&folder, &["optimizer-00001.safetensors has", "bytes, expected"]);
}

#[test]
fn a_missing_file_is_seen_and_the_older_checkpoint_is_used() {
    let folder = finished();
    std::fs::remove_file(folder.path(&format!("{NEWEST}/ema-0.9-00001.safetensors"))).unwrap();
    continues_from_the_older(&folder, &["ema-0.9-00001.safetensors is missing"]);
}

#[test]
fn a_broken_manifest_is_seen_and_the_older_checkpoint_is_used() {
    let folder = finished();
    flip_bit(&folder, &format!("{NEWEST}/manifest.json"));
    continues_from_the_older(&folder, &["its manifest.json was cut off or changed"]);
    truncate(&folder, &format!("{NEWEST}/manifest.json"));
    continues_from_the_older(&folder, &["its manifest.json was cut off or changed"]);
}

#[test]
fn if_all_checkpoints_are_damaged_nothing_is_started_over() {
    let folder = finished();
    flip_bit(&folder, &format!("{NEWEST}/{WEIGHTS}"));
    truncate(&folder, &format!("{OLDER}/{WEIGHTS}"));
    let metrics = folder.read("run/metrics.jsonl");
    let words =
        ["no checkpoint of run is whole", NEWEST, "has changed", OLDER, "bytes, expected", "from a copy"];
    folder.train("run", &[]).fails(&words);
    folder.anneal(&["resume", "run"]).fails(&words);
    folder.anneal(&["sample", "run"]).fails(&words);
    folder.anneal(&["inspect", "run"]).fails(&words);
    assert_eq!(folder.names("run/checkpoints"), ["step-00000004", "step-00000006"]);
    assert_eq!(folder.read("run/metrics.jsonl"), metrics);
}

/// An older one would be whole, and yet not what the run has come to.
#[test]
fn a_checkpoint_of_a_newer_format_stops_the_plan_as_it_stops_the_run() {
    let folder = finished();
    let manifest = format!("{NEWEST}/manifest.json");
    let text = folder.text(&manifest).replace("\"format\": 1", "\"format\": 2");
    let (body, _) = text.rsplit_once(",\n  \"sha256\"").unwrap();
    let seal = anneal_weights::sha256(body.as_bytes());
    folder.write(&manifest, format!("{body},\n  \"sha256\": \"{seal}\"\n}}\n").as_bytes());
    let words =
        [NEWEST, "was written by a newer Anneal", "format 2; this one reads up to 1): use that version"];
    folder.anneal(&["train", "tiny.yaml", "--plan", "output=run"]).fails(&words);
    folder.train("run", &[]).fails(&words);
    folder.anneal(&["resume", "run"]).fails(&words);
}

#[test]
fn a_file_in_place_of_the_checkpoints_or_the_run_is_named() {
    let folder = Folder::new();
    folder.write("run/checkpoints", b"a file");
    folder.train("run", &[]).fails(&["run/checkpoints", "a file, not a folder"]);
    assert_eq!(folder.read("run/checkpoints"), b"a file");
    folder.write("file", b"mine");
    folder.train("file", &[]).fails(&["cannot make the run folder file"]);
    assert_eq!(folder.read("file"), b"mine");
}

/// Saves in between only warn; that of the last step is an error.
#[test]
fn a_checkpoint_that_cannot_be_written_is_reported_and_tried_again() {
    let folder = Folder::new();
    let mut running = folder.spawn_train("run", &["train.steps=6000", "train.checkpoint.every=2000"]);
    running.wait_for(&folder.path("run/metrics.jsonl"));
    folder.write("run/checkpoints", b"a file in the way");
    running.finish().fails(&[
        "warning: no checkpoint at step 2000: ",
        "run/checkpoints",
        "training goes on and tries again",
        "warning: no checkpoint at step 4000: ",
    ]);
    assert_eq!(folder.read("run/checkpoints"), b"a file in the way");
}

/// The disk has room for one checkpoint and a half: the second cannot be written beside the first.
#[test]
fn a_full_disk_loses_nothing_and_the_same_command_continues() {
    let folder = Folder::new();
    let wide = TINY.replace("hidden_size: 16, depth: 1", "hidden_size: 64, depth: 2");
    folder.write("tiny.yaml", wide.as_bytes());
    folder.train("reference", &[]).succeeds(&[]);
    let checkpoint = "reference/checkpoints/step-00000006";
    let size: usize =
        folder.names(checkpoint).iter().map(|name| folder.read(&format!("{checkpoint}/{name}")).len()).sum();
    std::fs::create_dir(folder.path("small")).unwrap();
    let probe = folder.script(&["unshare", "-rm"], "mount -t tmpfs none small");
    if !probe.status.success() {
        anneal_testkit::skip_without("right to mount a small disk", "a_full_disk_loses_nothing");
        return;
    }
    let script = format!(
        "mount -t tmpfs -o size={}k none small || exit 90
         $ANNEAL train tiny.yaml --quiet output=small/run; echo first exit $?
         ls -A small/run/checkpoints
         mount -o remount,size=100m small || exit 91
         $ANNEAL train tiny.yaml --quiet output=small/run; echo second exit $?
         cp -r small/run run",
        (size + size / 2) / 1024
    );
    let outcome = folder.script(&["unshare", "-rm"], &script).succeeds(&[
        "warning: no checkpoint at step 4: ",
        "the disk is full",
        "free some space",
        "training goes on and tries again",
        "first exit 1\nstep-00000002\n",
        "6 in all",
        "second exit 0",
    ]);
    assert!(outcome.err.contains("error: "), "the last save must not fail in silence: {outcome:#?}");
    assert_same_checkpoint(&folder, "reference", "run", 6);
}

#[test]
fn a_disk_that_is_full_at_the_start_is_named() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("small")).unwrap();
    if !folder.script(&["unshare", "-rm"], "mount -t tmpfs none small").status.success() {
        anneal_testkit::skip_without("right to mount a small disk", "a_disk_that_is_full_at_the_start");
        return;
    }
    let script = "mount -t tmpfs -o size=64k none small || exit 90
        head -c 100000 /dev/zero > small/filler 2> filler.err
        $ANNEAL train tiny.yaml --quiet output=small/run; echo exit $?
        mount -o remount,ro small || exit 91
        $ANNEAL train tiny.yaml --quiet output=small/other; echo exit $?";
    let outcome = folder.script(&["unshare", "-rm"], script);
    outcome.succeeds(&[
        "the disk is full",
        "small/run",
        "the file system is read-only",
        "small/other",
        "exit 1",
    ]);
}

#[test]
fn a_second_run_in_the_same_folder_is_refused() {
    let folder = Folder::new();
    let mut first = folder.spawn_train("run", &["train.steps=1000000", "train.checkpoint.every=1000000"]);
    first.wait_for(&folder.path("run/metrics.jsonl"));
    let process = first.process();
    let words = [
        "another run is writing to run".to_owned(),
        format!("process {process} on "),
        format!("stop it with `kill {process}`"),
        "output=FOLDER".to_owned(),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    folder.train("run", &[]).fails(&words);
    folder.anneal(&["resume", "run"]).fails(&words);
    first.signal("TERM");
    first.finish().ends(143, &["stopped after step"]);
}

#[test]
fn another_recipe_does_not_continue_a_run() {
    let folder = finished();
    folder.train("run", &["optim.lr=5e-4"]).fails(&["made by another recipe", "optim.lr: 0.001 -> 0.0005"]);
    folder
        .anneal(&["resume", "run", "model.depth=2"])
        .fails(&["model.depth: 1 -> 2", "Run it with the old values, or choose"]);
    folder.train("run", &[]).succeeds(&["already complete at step 6", "anneal resume run train.steps=12"]);
    folder
        .train("run", &["train.steps=8"])
        .fails(&["train.steps: 6 -> 8", "To go on with the new values: anneal resume run train.steps=8\n"]);
    folder
        .anneal(&["resume", "run", "--quiet", "train.steps=8"])
        .succeeds(&["trained 2 more steps, 8 in all, in "]);
}
