//! What stands in a command's way: too little memory, a full disk, a place that cannot be written to, a wrong value.

use anneal_data::npz::{self, Array, Values};

use crate::harness::{Folder, noise_f32};

fn trained() -> Folder {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    folder
}

/// Whether a small disk can be had here; a test that cannot have one says so.
fn has_small_disk(folder: &Folder) -> bool {
    std::fs::create_dir(folder.path("small")).unwrap();
    let probe = folder.script(&["unshare", "-rm"], "mount -t tmpfs none small");
    if !probe.status.success() {
        eprintln!("SKIPPED: no small disk can be mounted here: {}", probe.err.trim());
    }
    probe.status.success()
}

#[test]
fn a_plan_and_a_start_compare_their_memory_with_the_machines() {
    let folder = Folder::new();
    let plan = |changes: &[&str]| folder.anneal(&[&["train", "tiny.yaml", "--plan"], changes].concat());
    let large = plan(&["train.batch=1000000000"]).succeeds(&["predicted memory"]);
    assert!(large.err.starts_with("warning: the memory of cpu, "), "{large:#?}");
    assert!(large.err.contains("lies below the predicted sum of ") && large.err.lines().count() == 1);
    assert_eq!(plan(&[]).succeeds(&[]).err, "");
    for changes in [&["train.batch=1000000000000000000"][..], &["train.batch=18446744073709551615"]] {
        plan(changes).fails(&["the predicted memory of", "is more than any machine has"]);
        folder.train("run", changes).fails(&["is more than any machine has"]);
    }
    // 200 GiB for each of six copies; nothing of it is allocated.
    let known =
        ["the memory of cpu, ", "of weights, gradients, optimizer and averages: choose a smaller model"];
    plan(&["model.hidden_size=131072", "model.depth=1"]).fails(&known);
    folder.train("run", &["model.hidden_size=131072"]).fails(&known);
    // A start warns too; this one goes on to data that are not there.
    let nowhere = ["train.batch=1000000000", "data.kind=npz", "data.path=nowhere"];
    folder.train("run", &nowhere).fails(&["warning: the memory of cpu, ", "no such file or folder"]);
    plan(&["model.hidden_size=1000000000"]).fails(&["parameters, more than any machine can hold"]);
    plan(&["model.hidden_size=18446744073709551612"]).fails(&["more than any machine can hold"]);
    plan(&["model.depth=100000"]).fails(&["depth 100000 is too much: at most 4096 blocks"]);
    assert_eq!(folder.names("."), ["tiny.yaml"]);
}

#[test]
fn a_plan_looks_at_the_run_folder_and_writes_nothing() {
    let folder = trained();
    let plan = |changes: &[&str]| folder.anneal(&[&["train", "tiny.yaml", "--plan"], changes].concat());
    plan(&["output=tiny.yaml"]).fails(&["predicted memory", "tiny.yaml is a file, not a folder"]);
    plan(&["output=tiny.yaml/x"]).fails(&["predicted memory", "a part of the path is a file"]);
    plan(&[&format!("output=runs/{}", "x".repeat(300))]).fails(&["File name too long"]);
    let other = ["made by another recipe", "model.hidden_size: 16 -> 32"];
    plan(&["output=run", "model.hidden_size=32"]).fails(&other);
    plan(&["output=run", "train.steps=3"]).fails(&["run is at step 6 already"]);
    plan(&["output=run"]).succeeds(&["the run folder holds this run, complete at step 6"]);
    std::fs::remove_dir_all(folder.path("run/checkpoints/step-00000006")).unwrap();
    plan(&["output=run"]).succeeds(&["the run folder holds this run: training would go on after step 4"]);
    plan(&["output=new/run"]).succeeds(&[]);
    assert_eq!(folder.names("."), ["run", "tiny.yaml"]);
}

#[test]
fn a_failing_standard_output_is_one_line() {
    let folder = trained();
    let commands = [
        "inspect run",
        "inspect run --json",
        "doctor",
        "completions bash",
        "train tiny.yaml --plan",
        "sample run --num 1",
        "sample --help",
        "--version",
    ];
    for command in commands {
        let full = folder.script(&["env"], &format!("\"$ANNEAL\" {command} > /dev/full"));
        let full = full.fails(&[]);
        assert_eq!(full.err, "error: cannot write to standard output: no space left\n", "{command}");
        // `true` reads nothing, and ends before or after the command writes.
        let script = format!("{{ \"$ANNEAL\" {command}; echo $? > code; }} | true; cat code");
        let gone = folder.script(&["env"], &script).succeeds(&[]);
        assert_eq!((gone.out.as_str(), gone.err.as_str()), ("0\n", ""), "{command}");
    }
}

#[test]
fn a_full_disk_keeps_the_old_samples_and_no_part_of_the_new() {
    let folder = trained();
    if !has_small_disk(&folder) {
        return;
    }
    let script = "
        set -e; mount -t tmpfs -o size=64k none small; cd small; run=../run
        $ANNEAL sample $run --num 3 --class 1 --out many
        sum() { cat many/* | cksum; }
        sum > ../before; ls -A many > ../names
        dd if=/dev/zero of=filler bs=1k 2> /dev/null || true
        for out in 'many --overwrite' new/deep grid.png a.npz; do
            if $ANNEAL sample $run --num 200 --class 1 --out $out; then echo \"not full: $out\"; exit 7; fi
        done
        sum | cmp - ../before; ls -A many | cmp - ../names; ls -A";
    let full = folder.script(&["unshare", "-rm"], script).succeeds(&[]);
    assert!(full.out.ends_with("\nfiller\nmany\n"), "{full:#?}");
    let lines: Vec<&str> = full.err.lines().filter(|line| !line.starts_with("sampling")).collect();
    assert!(lines.len() == 4 && lines.iter().all(|line| line.starts_with("error: ")), "{full:#?}");
    let clean = |line: &&str| line.contains("the disk is full") || line.contains("No space left");
    assert!(lines.iter().all(clean), "{full:#?}");
}

#[test]
fn names_that_cannot_be_written_are_told_without_numbers() {
    let folder = trained();
    for name in ["dd.png", "dd.npz"] {
        std::fs::create_dir(folder.path(name)).unwrap();
    }
    let refused = |arguments: &[&str], words: &str| {
        let refused = folder.anneal(arguments).fails(&[words]);
        assert!(!refused.err.contains("os error"), "{refused:#?}");
    };
    // Before any work: the weights are not looked for.
    for name in ["dd.png", "dd.npz"] {
        refused(&["sample", "nowhere", "--out", name], &format!("--out {name} is a folder"));
    }
    refused(&["sample", "nowhere", "--out", "many.png/"], "many.png/: a name with this ending is a file's");
    refused(&["sample", "run", "-n1", "--out", "tiny.yaml/a.png"], "a part of the path is a file");
    let original = |out| ["convert", "run", out, "--to", "original"];
    refused(&original("z.safetensors/"), "z.safetensors/: a name with this ending is a file's");
    folder.anneal(&original("deep/er/y.safetensors")).succeeds(&[]);
    assert_eq!(folder.names("deep/er"), ["y.safetensors"]);
    folder.anneal(&original("other/er/y.bin")).fails(&["ends in .safetensors"]);
    assert!(!folder.path("other").exists(), "a folder that was made in vain is removed");
}

#[test]
fn numbers_below_zero_reach_the_check_of_their_flag() {
    let folder = trained();
    let wrong = |flags: &str, code: i32, words: &[&str]| {
        let arguments: Vec<&str> = ["sample", "run"].into_iter().chain(flags.split(' ')).collect();
        let ended = folder.anneal(&arguments).ends(code, words);
        assert!(!ended.err.contains("tip: to pass"), "{ended:#?}");
    };
    for flags in ["--guidance -3", "--guidance=-3", "-g -3"] {
        wrong(flags, 1, &["--guidance is -3; it must be 0 or more"]);
    }
    wrong("--eta -1", 1, &["--eta is -1; it must be from 0 to 1"]);
    wrong("--eta 2", 1, &["--eta is 2; it must be from 0 to 1"]);
    wrong("--sampler flow_euler --shift -1", 1, &["--shift is -1; it must be above 0"]);
    wrong("--num -3", 2, &["invalid value '-3' for '--num <NUM>': a whole number is wanted, 0 or more"]);
    wrong("--seed -1", 2, &["invalid value '-1' for '--seed <SEED>'"]);
    wrong("--batch 0", 2, &["invalid value '0' for '--batch <BATCH>'", "1 or more"]);
    for (mode, words) in [
        ("interval:0.2", "guidance mode 'interval:0.2': write it as interval:LOW:HIGH"),
        ("interval:0.2:x", "'x' in 'interval:0.2:x' is not a number"),
        ("interval:0.8:0.2", "interval is 0.8 to 0.2; it must rise within 0 to 1"),
        ("power_cosine:-1", "power_cosine is -1; it must be above 0"),
    ] {
        wrong(&format!("--guidance-mode {mode}"), 1, &[words]);
    }
}

#[test]
fn a_guidance_mode_is_written_in_recipes_as_on_the_command_line() {
    let folder = Folder::new();
    folder.train("run", &["train.steps=1", "sample.guidance_mode=interval:0.2:0.8"]).succeeds(&[]);
    let recipe = folder.text("run/recipe.yaml");
    assert!(recipe.contains("low: 0.2") && recipe.contains("high: 0.8"), "{recipe}");
    for mode in ["interval", "interval:0.2"] {
        let wrong = folder.train("other", &[&format!("sample.guidance_mode={mode}")]);
        wrong.fails(&["sample.guidance_mode", "write it as interval:LOW:HIGH (on the command line)"]);
    }
}

#[test]
fn a_benchmark_names_the_flag_that_is_wrong() {
    let folder = Folder::new();
    for what in ["op", "block", "step", "forward", "sample"] {
        for flag in ["--steps", "--batch", "--hidden", "--depth"] {
            let wrong = folder.anneal(&["bench", what, flag, "0"]);
            wrong.ends(2, &["invalid value '0' for", flag, "1 or more"]);
        }
    }
    for what in ["op", "block", "step", "forward", "sample"] {
        for batch in ["99999999999", "18446744073709551615"] {
            let absurd = folder.anneal(&["bench", what, "--batch", batch]);
            let absurd =
                absurd.fails(&[&format!("--batch {batch} of images of 4x32x32 needs "), "choose less"]);
            assert_eq!(absurd.err.lines().count(), 1, "{absurd:#?}");
        }
    }
    let shape = "99999999999,99999999999,256,72";
    let absurd = folder.anneal(&["bench", "op", "--attention", shape]);
    absurd.fails(&[&format!("attention {shape}: it needs "), "1 op could not be measured"]);
    for what in ["op", "forward", "sample"] {
        let kept = folder.anneal(&["bench", what, "--keep-norms"]);
        kept.fails(&["--keep-norms is for training: it applies to `bench step` and `bench block`"]);
    }
    let small = ["--hidden", "16", "--depth", "1", "--heads", "2", "--steps", "1"];
    for what in ["op", "step", "forward"] {
        let tf32 = folder.anneal(&[&["bench", what, "--precision", "tf32"], &small[..]].concat());
        tf32.fails(&["the precision tf32 is for GPUs: on cpu use fp32 or bf16"]);
    }
    folder.train("run", &["train.precision=tf32"]).fails(&["the precision tf32 is for GPUs"]);
    folder
        .anneal(&["train", "tiny.yaml", "--plan", "train.precision=tf32"])
        .fails(&["predicted memory", "the precision tf32 is for GPUs"]);
}

#[test]
fn flags_that_contradict_a_source_are_refused() {
    let folder = trained();
    folder.anneal(&["convert", "run", "w.safetensors", "--to", "original"]).succeeds(&[]);
    folder.anneal(&["convert", "run", "exported", "--to", "diffusers"]).succeeds(&[]);
    for source in ["run", "w.safetensors", "exported"] {
        folder.anneal(&["sample", source, "--heads", "7"]).fails(&["--heads 7: this model", "has 2"]);
        folder.anneal(&["convert", source, "out", "--to", "diffusers", "--heads", "7"]).fails(&["--heads 7"]);
        folder.anneal(&["sample", source, "--heads", "2", "--num", "1"]).succeeds(&["1 sample from"]);
    }
    let latents = Array::new([3, 1, 8, 8], Values::F32(noise_f32(3, 192)));
    let classes = Array::new([3], Values::I64(vec![4, 6, 7]));
    npz::write_npz(&folder.path("start.npz"), &[("latents", &latents), ("labels", &classes)]).unwrap();
    let from = |num| folder.anneal(&["sample", "run", "--latents", "start.npz", "--num", num]);
    from("7").fails(&["--num is 7, but --latents holds 3"]);
    from("3").succeeds(&["3 samples from"]);
}

/// The advice of a limit is for what did not fit.
#[test]
fn a_memory_limit_is_named_with_what_helps() {
    let folder = Folder::new();
    let lasting =
        "the memory limit is reached, 102400 bytes: raise it, or choose a smaller model or fewer ema.rates";
    let stopped = folder.train("run", &["memory_limit=100KiB"]).fails(&["bytes of optimizer", lasting]);
    assert!(stopped.err.contains("now KiB") && !stopped.err.contains("batch"), "{stopped:#?}");
    folder.train("run", &["memory_limit=0.21MB"]).fails(&[
        "of activations",
        "the memory limit is reached, 210000 bytes: raise it, or use a smaller batch",
    ]);
}
