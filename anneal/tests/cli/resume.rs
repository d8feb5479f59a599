//! A run that was stopped, however it was, ends with the bits of one that was not.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Folder, TINY};

/// Long enough to be stopped in the middle; each checkpoint stays.
const LONG: [&str; 4] =
    ["train.steps=2000", "train.checkpoint.every=200", "train.checkpoint.keep_last=100", "sample.every=1000"];
const LAST: u64 = 2000;
const FIRST_CHECKPOINT: &str = "run/checkpoints/step-00000200";

/// Files and hashes of a checkpoint, and where its data stood.
fn checkpoint(folder: &Folder, run: &str, step: u64) -> (Value, Value) {
    let manifest = folder.text(&format!("{run}/checkpoints/step-{step:08}/manifest.json"));
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    (manifest["files"].clone(), manifest["state"]["cursor"].clone())
}

/// Weights, optimizer and averages have the same hashes, and the data stands at the same place.
#[track_caller]
pub fn assert_same_checkpoint(folder: &Folder, expected: &str, run: &str, step: u64) {
    let (files, cursor) = checkpoint(folder, expected, step);
    let groups: Vec<&str> =
        files.as_array().unwrap().iter().map(|file| file["group"].as_str().unwrap()).collect();
    assert!(groups.starts_with(&["weights", "optimizer"]) && groups.len() > 2, "{groups:?}");
    assert_eq!((files, cursor), checkpoint(folder, run, step), "{expected} and {run}");
}

/// What a step did, without how long it took.
fn steps(folder: &Folder, run: &str) -> Vec<[Value; 5]> {
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        ["step", "loss", "grad_norm", "lr", "nonfinite_skipped"].map(|key| line[key].clone())
    };
    folder.text(&format!("{run}/metrics.jsonl")).lines().map(line).collect()
}

#[track_caller]
fn assert_same_run(folder: &Folder, expected: &str, run: &str, last: u64) {
    assert_same_checkpoint(folder, expected, run, last);
    let (expected_steps, steps) = (steps(folder, expected), steps(folder, run));
    let numbers: Vec<u64> = steps.iter().map(|step| step[0].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=last).collect::<Vec<u64>>(), "every step once");
    assert_eq!(expected_steps, steps);
}

#[track_caller]
fn assert_same_grids(folder: &Folder, expected: &str, run: &str, steps: [u64; 2]) {
    let names = folder.names(&format!("{expected}/samples"));
    assert_eq!(names, steps.map(|step| format!("step-{step:08}.png")));
    for name in names {
        let grid = |run: &str| folder.read(&format!("{run}/samples/{name}"));
        assert!(grid(expected) == grid(run), "{name} of {expected} and {run}");
    }
}

#[test]
fn a_killed_run_continues_with_the_same_bits() {
    let folder = Folder::new();
    folder.train("whole", &LONG).succeeds(&["trained 2,000 steps"]);
    for _ in 0..2 {
        let seen = folder.names("run/checkpoints").len();
        let next = format!("run/checkpoints/step-{:08}", 200 * (seen + 1));
        let mut running = folder.spawn_train("run", &LONG);
        running.wait_for(&folder.path(&next));
        running.signal("KILL");
        assert_eq!(running.finish().status.signal(), Some(9), "it must be stopped in the middle");
    }
    folder.train("run", &LONG).succeeds(&[" more steps, 2,000 in all, in "]);
    assert_same_run(&folder, "whole", "run", LAST);
    assert_same_grids(&folder, "whole", "run", [1000, 2000]);
    assert!(
        folder.names("run/checkpoints").iter().all(|name| name.starts_with("step-")),
        "nothing half written"
    );
}

#[test]
fn a_signal_saves_a_checkpoint_and_says_how_to_continue() {
    let folder = Folder::new();
    folder.train("whole", &LONG).succeeds(&[]);
    for (signal, code) in [("INT", 130), ("HUP", 129), ("TERM", 143)] {
        // A checkpoint of the other signal's run would let the signal come before the handler.
        let _ = std::fs::remove_dir_all(folder.path("run"));
        let mut running = folder.spawn_train("run", &LONG);
        running.wait_for(&folder.path(FIRST_CHECKPOINT));
        running.signal(signal);
        let stopped = running.finish();
        let stopped = stopped.ends(
            code,
            &[
                "stopped after step ",
                " of 2000; a checkpoint is saved in run",
                "continue with: anneal train tiny.yaml --quiet output=run train.steps=2000",
            ],
        );
        let step = stopped.out.split("after step ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let step: u64 = step.parse().unwrap();
        assert!(step < LAST, "it must be stopped in the middle");
        assert!(
            folder.path(&format!("run/checkpoints/step-{step:08}")).is_dir(),
            "no checkpoint of step {step}"
        );
    }
    folder.anneal(&["resume", "run", "--quiet"]).succeeds(&[" more steps, 2,000 in all, in "]);
    assert_same_run(&folder, "whole", "run", LAST);
}

#[test]
fn a_terminal_that_closes_does_not_stop_a_run_under_nohup() {
    let folder = Folder::new();
    let script = "\"$ANNEAL\" train tiny.yaml --quiet output=run train.steps=500 &
        while [ ! -d run/checkpoints/step-00000004 ]; do sleep 0.01; done
        kill -HUP $!
        wait $!";
    folder.script(&["nohup"], script).succeeds(&["trained 500 steps"]);
}

/// The start that was to train it longer has written the run's recipe, and no checkpoint.
#[test]
fn a_run_made_longer_and_killed_continues_by_its_own_recipe() {
    let folder = Folder::new();
    let longer = ["train.steps=2000", "train.checkpoint.every=100000", "sample.every=500"];
    folder.train("whole", &longer).succeeds(&["trained 2,000 steps"]);
    let same_words = [&["train", "tiny.yaml", "output=run"], &longer[..]].concat();
    for command in [&["resume", "run"][..], &same_words] {
        let _ = std::fs::remove_dir_all(folder.path("run"));
        folder.train("run", &[]).succeeds(&["trained 6 steps"]);
        let mut running = folder.spawn(&[&["resume", "run"], &longer[..]].concat());
        running.wait_for(&folder.path("run/samples/step-00000500.png"));
        running.signal("KILL");
        assert_eq!(running.finish().status.signal(), Some(9), "it must be stopped in the middle");
        let other = folder.train("run", &["train.steps=1000"]);
        other.fails(&["run was made by another recipe", "train.steps: 2000 -> 1000"]);
        let fixed = folder.anneal(&["resume", "run", "model.depth=2"]);
        fixed.fails(&["run was made by another recipe", "model.depth: 1 -> 2", "with the old values"]);
        let words =
            ["continues with train.steps=2000 (the checkpoint: 6)\n", "1,994 more steps, 2,000 in all"];
        folder.anneal(command).succeeds(&words);
        assert_same_checkpoint(&folder, "whole", "run", 2000);
    }
}

/// What it was to train with would else be the run's from then on, the cause of the failure included.
#[test]
fn a_resume_that_fails_changes_nothing_and_says_how_to_lift_the_limit() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    let files = || {
        let texts =
            ["recipe.yaml", "plan.txt", "metrics.jsonl"].map(|name| folder.text(&format!("run/{name}")));
        (folder.names("run"), texts)
    };
    let before = files();
    let limits: [(&[&str], &str); 2] = [
        (&["--memory-limit", "200KiB"], "The limit is that of --memory-limit 200KiB; "),
        (&["memory_limit=200KiB"], "The limit is that of memory_limit=200KiB; "),
    ];
    let longer = ["resume", "run", "--quiet", "--steps", "12"];
    for (limit, origin) in limits {
        folder.anneal(&[&longer, limit].concat()).fails(&["bytes of activations", origin]);
        assert_eq!(files(), before, "{limit:?}");
    }
    let recipe = before.1[0].replace("memory_limit: null", "memory_limit: 200KiB");
    folder.write("run/recipe.yaml", recipe.as_bytes());
    let origin = "memory_limit: 200KiB in run/recipe.yaml; --memory-limit none takes it away";
    folder.anneal(&longer).fails(&[origin]);
    folder.anneal(&[&longer[..], &["--memory-limit", "none"]].concat()).succeeds(&["6 more steps"]);
    assert!(folder.text("run/recipe.yaml").contains("memory_limit: null"));
}

/// The start waits for who reads its lock, which is a pipe here, until the signal has come.
#[test]
fn a_signal_before_the_first_step_saves_nothing_and_says_so() {
    let folder = Folder::new();
    folder.script(&["env"], "mkdir run && mkfifo run/.writer.lock").succeeds(&[]);
    let mut running = folder.spawn_train("run", &[]);
    running.wait_for_handlers();
    running.signal("INT");
    let lock = folder.path("run/.writer.lock");
    let _reader = std::fs::OpenOptions::new().read(true).write(true).open(lock).unwrap();
    let said = "stopped before the first step: nothing is trained or saved\nstart again with: anneal train";
    let stopped = running.finish().ends(130, &[said]);
    assert!(
        !stopped.out.contains("checkpoint") && folder.names("run/checkpoints").is_empty(),
        "{stopped:#?}"
    );
}

/// A moment after the checkpoint and its plot the samples of the same step are being drawn, which would take seconds.
#[test]
fn a_signal_stops_the_drawing_of_samples_too() {
    let folder = Folder::new();
    let often = ["train.steps=8", "train.checkpoint.every=4", "sample.every=4"];
    folder.train("whole", &often).succeeds(&["trained 8 steps"]);
    let slowly = ["sample.num=64", "sample.steps=1000"];
    let mut running = folder.spawn_train("run", &[&often[..], &slowly].concat());
    running.wait_for(&folder.path("run/loss.png"));
    std::thread::sleep(Duration::from_millis(100));
    running.signal("INT");
    let said =
        "stopped before the samples of step 4 of 8 were drawn; a checkpoint is saved in run\ncontinue with: ";
    let stopped = running.finish().ends(130, &[said]);
    assert!(stopped.err.is_empty() && folder.names("run/samples").is_empty(), "{stopped:#?}");
    let resume = ["resume", "run", "--quiet", "sample.num=4", "sample.steps=4"];
    folder.anneal(&resume).succeeds(&["4 more steps, 8 in all"]);
    assert_same_run(&folder, "whole", "run", 8);
    assert_same_grids(&folder, "whole", "run", [4, 8]);
}

/// The samples that come after training take seconds, and nothing of them can be saved.
#[test]
fn a_signal_ends_the_quick_start_at_its_samples() {
    let folder = Folder::new();
    let changes = ["train.steps=1", "optim.warmup=0", "sample.every=0", "sample.steps=1000"];
    let mut running = folder.spawn(&[&["quickstart", "--output", "run"], &changes[..]].concat());
    running.wait_for(&folder.path("run/checkpoints/step-00000001"));
    std::thread::sleep(Duration::from_millis(300));
    running.signal("INT");
    let stopped = running.finish().ends(130, &["trained 1 step"]);
    assert!(!folder.path("run/samples.png").exists(), "{stopped:#?}");
}

/// With fewer steps than are done the recipe would no longer fit its checkpoints.
#[test]
fn fewer_steps_than_are_done_are_refused_and_change_nothing() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&["trained 6 steps"]);
    let recipe = std::fs::read(folder.path("run/recipe.yaml")).unwrap();
    let refused = "run is at step 6 already, and train.steps is 4: ask for at least 6";
    for changes in [["--steps", "4"], ["train.steps=4", "--quiet"]] {
        folder.anneal(&[&["resume", "run"], &changes[..]].concat()).fails(&[refused]);
    }
    folder.train("run", &["train.steps=4"]).fails(&[refused]);
    assert_eq!(std::fs::read(folder.path("run/recipe.yaml")).unwrap(), recipe);
    folder.anneal(&["resume", "run", "--steps", "8", "--quiet"]).succeeds(&["2 more steps, 8 in all"]);
}

/// As a run leaves that ended before its last samples were drawn.
#[test]
fn samples_that_are_missing_at_the_end_are_drawn() {
    let folder = Folder::new();
    folder.train("run", &["sample.every=4"]).succeeds(&["trained 6 steps"]);
    let last = folder.read("run/samples/step-00000006.png");
    std::fs::remove_file(folder.path("run/samples/step-00000006.png")).unwrap();
    let words = ["already complete at step 6; its samples are drawn now"];
    folder.train("run", &["sample.every=4"]).succeeds(&words);
    assert!(folder.read("run/samples/step-00000006.png") == last);
}

#[test]
fn a_complete_run_is_left_as_it_is() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    let (names, metrics) = (folder.names("run"), folder.text("run/metrics.jsonl"));
    let (recipe, plan) = (folder.text("run/recipe.yaml"), folder.text("run/plan.txt"));
    assert!(names.iter().any(|name| name.starts_with("events.out.tfevents.")), "{names:?}");
    let commands: [&[&str]; 4] = [
        &["train", "tiny.yaml", "output=run"],
        &["resume", "run"],
        &["train", "tiny.yaml", "output=run", "--device", "cpu:2"],
        &["resume", "run", "--device", "cpu:2", "--memory-limit", "1GiB"],
    ];
    for command in commands {
        let again = folder.anneal(command).succeeds(&["already complete at step 6; nothing to do"]);
        assert!(!again.err.contains("continuing"), "{again:#?}");
        assert_eq!((folder.names("run"), folder.text("run/metrics.jsonl")), (names.clone(), metrics.clone()));
        assert_eq!(
            (folder.text("run/recipe.yaml"), folder.text("run/plan.txt")),
            (recipe.clone(), plan.clone()),
            "no device is kept that nothing was done on: {command:?}"
        );
    }
}

#[test]
fn more_steps_that_raise_a_fallen_learning_rate_are_warned_of() {
    let warns = |schedule: &str, more: &[&str]| {
        let folder = Folder::new();
        folder.train("run", &[schedule]).succeeds(&[]);
        let resumed = folder.anneal(&[&["resume", "run", "--quiet", "train.steps=12"], more].concat());
        let told = resumed.succeeds(&["continues with", "6 more steps"]).err;
        let warnings = told.lines().filter(|line| line.starts_with("warning: "));
        let warnings: Vec<String> = warnings.map(str::to_owned).collect();
        let again = folder.anneal(&["resume", "run", "--quiet"]).succeeds(&[]);
        assert_eq!(again.err, "", "it is told once");
        warnings
    };
    let told = warns("optim.schedule=cosine", &[]);
    assert_eq!(told.len(), 1, "{told:?}");
    let rise =
        "train.steps=12 stretches the cosine: the learning rate, 0.0e0 at step 6, rises to 4.3e-4 again";
    assert!(
        told[0].contains(rise) && told[0].contains("optim.schedule=constant optim.lr=1.0e-4"),
        "{told:?}"
    );
    assert_eq!(warns("optim.schedule=cosine", &["optim.schedule=constant", "optim.lr=1.0e-4"]), [""; 0]);
    assert_eq!(warns("optim.schedule=constant", &[]), [""; 0]);
}

#[test]
fn what_changes_no_bit_may_change_within_a_run() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    let changed = ["model.recompute_norms=false", "model.checkpoint_activations=true"];
    let longer = folder.anneal(&[&["resume", "run", "--steps", "8"], &changed[..]].concat());
    let longer = longer.succeeds(&["continuing run after step 6 of 8"]);
    assert!(!longer.err.contains("recompute_norms") && !longer.err.contains("warning"), "{longer:#?}");
}

#[test]
fn workers_threads_and_chunks_do_not_change_a_bit() {
    let folder = Folder::new();
    let steps = ["train.steps=30", "data.flip=true"];
    folder.train("run", &steps).succeeds(&[]);
    let others: [(&str, &[&str]); 5] = [
        ("no-workers", &["data.workers=0"]),
        ("four-workers", &["data.workers=4", "data.prefetch=7"]),
        ("one-thread", &["device=cpu:1"]),
        ("three-threads", &["device=cpu:3"]),
        ("no-activations", &["model.checkpoint_activations=true", "data.cache=0B"]),
    ];
    for (other, changes) in others {
        folder.train(other, &[&steps[..], changes].concat()).succeeds(&[]);
        assert_same_run(&folder, "run", other, 30);
    }
    folder.train("other-seed", &[&steps[..], &["seed=1"]].concat()).succeeds(&[]);
    assert_ne!(
        checkpoint(&folder, "run", 30),
        checkpoint(&folder, "other-seed", 30),
        "the comparison can fail"
    );
}

#[test]
fn verify_resume_finds_the_same_bits() {
    let folder = Folder::new();
    let verify = |recipe: &str, changes: &[&str]| {
        let outcome = folder.anneal(&[&["verify-resume", recipe, "--steps", "8"], changes].concat());
        let words =
            ["losses of 8 steps", "weights", "first moment", "second moment", "samples", "bit-identical"];
        assert!(!outcome.succeeds(&words).out.contains("first:"));
    };
    verify("tiny.yaml", &[]);
    verify("tiny.yaml", &["optim.clip=0.1", "optim.schedule=cosine", "optim.warmup=3", "--stop-at", "3"]);
    verify("tiny.yaml", &["ema.rates=[0.9, 0.99]", "ema.warmup=true"]);
    verify("tiny.yaml", &["train.accumulate=2", "data.flip=true"]);
    verify("tiny.yaml", &["train.precision=bf16"]);
    verify("tiny.yaml", &["model.learn_sigma=true", "diffusion.target=epsilon", "optim.weight_decay=0.1"]);
    let flow = TINY.replace("{schedule: squared_cosine, target: v}", "{kind: flow}");
    folder.write("flow.yaml", flow.as_bytes());
    verify(
        "flow.yaml",
        &["optim.clip=1", "ema.rates=[0.9, 0.99]", "train.accumulate=2", "train.precision=bf16"],
    );
}

/// A large model's checkpoint is gigabytes.
#[test]
fn verify_resume_takes_its_folder_away_when_it_is_stopped() {
    let folder = Folder::new();
    let script = "mkdir tmp; export TMPDIR=\"$PWD/tmp\"
        \"$ANNEAL\" verify-resume tiny.yaml --steps 1000000 --stop-at 4 &
        while [ -z \"$(ls tmp)\" ]; do sleep 0.01; done
        ls tmp
        kill -TERM $!
        wait $!";
    folder.script(&["env"], script).ends(143, &["anneal-verify-"]);
    assert!(folder.names("tmp").is_empty());
}

/// As a second signal does, which ends the process at once.
#[test]
fn what_a_killed_verify_resume_leaves_goes_with_the_next() {
    let folder = Folder::new();
    let script = "mkdir tmp; export TMPDIR=\"$PWD/tmp\"
        \"$ANNEAL\" verify-resume tiny.yaml --steps 1000000 --stop-at 4 &
        for _ in $(seq 6000); do ls tmp/*/.anneal-lock && break; sleep 0.01; done
        kill -KILL $!
        wait $!
        ls tmp
        \"$ANNEAL\" verify-resume tiny.yaml --steps 4";
    folder.script(&["env"], script).succeeds(&["\nanneal-verify-", "bit-identical"]);
    assert!(folder.names("tmp").is_empty());
}

#[test]
fn verify_resume_wants_a_middle() {
    let folder = Folder::new();
    folder.anneal(&["verify-resume", "tiny.yaml", "--steps", "1"]).fails(&["--steps must be at least 2"]);
    let stop = folder.anneal(&["verify-resume", "tiny.yaml", "--steps", "4", "--stop-at", "4"]);
    stop.fails(&["between 1 and 3"]);
}
