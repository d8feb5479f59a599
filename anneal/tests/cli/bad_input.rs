//! Wrong recipes and wrong command lines: the line that a person gets, and the exit code.

use crate::harness::{Folder, TINY};

#[test]
fn an_unknown_key_gets_the_nearest_name() {
    let folder = Folder::new();
    folder
        .train("run", &["optim.learning_rat=1"])
        .fails(&["unknown key 'optim.learning_rat' on the command line", "did you mean 'optim.lr'?"]);
    folder.write("wrong.yaml", TINY.replace("steps: 6", "stepps: 6").as_bytes());
    folder
        .anneal(&["train", "wrong.yaml"])
        .fails(&["unknown key 'train.stepps' in wrong.yaml, line 6", "did you mean 'train.steps'?"]);
    assert!(
        folder.names("run").is_empty() && folder.names("runs").is_empty(),
        "a wrong recipe leaves no folder"
    );
}

#[test]
fn a_wrong_type_is_named_with_what_is_expected() {
    let folder = Folder::new();
    folder.train("run", &["train.steps=many"]).fails(&[
        "wrong value for 'train.steps' on the command line",
        "found the text \"many\", expected a whole number",
    ]);
    folder.write("wrong.yaml", TINY.replace("lr: 1e-3", "lr: [1]").as_bytes());
    folder.anneal(&["train", "wrong.yaml"]).fails(&["wrong value for 'optim.lr' in wrong.yaml, line 4"]);
    folder.train("run", &["diffusion.target=noise"]).fails(&["unknown value 'noise' for 'diffusion.target'"]);
    folder.write("wrong.yaml", b"model: {hidden_size: 16");
    folder.anneal(&["train", "wrong.yaml"]).fails(&["wrong.yaml is not valid YAML"]);
}

#[test]
fn missing_files_are_named_once() {
    let folder = Folder::new();
    let missing = folder.anneal(&["train", "nowhere.yaml"]).fails(&["cannot read the recipe nowhere.yaml"]);
    assert_eq!(missing.err.matches("No such file").count(), 1, "{missing:#?}");
    folder
        .train("run", &["data.kind=image_folder", "data.path=nowhere"])
        .fails(&["nowhere: no such file or folder"]);
    folder.train("run", &["data.kind=image_folder"]).fails(&["data.path is missing"]);
    folder.anneal(&["sample", "nowhere"]).fails(&["nowhere does not exist"]);
    folder.anneal(&["inspect", "nowhere"]).fails(&["nowhere does not exist"]);
    folder.anneal(&["resume", "nowhere"]).fails(&["there is no run folder nowhere"]);
}

#[test]
fn a_wrong_command_line_has_exit_code_2() {
    let folder = Folder::new();
    folder.anneal(&["train"]).ends(2, &["<RECIPE>", "Usage: anneal train"]);
    folder.anneal(&["trian"]).ends(2, &["unrecognized subcommand 'trian'", "train"]);
    folder
        .anneal(&["sample", "run", "--nmu", "3"])
        .ends(2, &["unexpected argument '--nmu'", "Usage: anneal sample"]);
    folder.anneal(&["sample", "run", "--num", "few"]).ends(2, &["invalid value 'few' for '--num"]);
    folder.anneal(&["convert", "run", "out", "--to", "onnx"]).ends(2, &["diffusers, original"]);
    folder.anneal(&[]).ends(2, &["Usage: anneal"]);
}

#[test]
fn shapes_that_contradict_each_other_are_both_named() {
    let folder = Folder::new();
    folder.train("run", &["model.channels=3"]).fails(&["8x8 with 3 channels", "digits are 8x8 with 1"]);
    folder
        .train("run", &["model.image_size=16", "data.image_size=8"])
        .fails(&["data.image_size is 8x8, but model.image_size is 16x16"]);
    folder.train("run", &["model.heads=3"]).fails(&["heads"]);
    folder.train("run", &["train.accumulate=3"]).fails(&["accumulate", "batch"]);
    folder.train("run", &["device=gpu"]).fails(&["unknown device 'gpu'", "cpu:THREADS"]);
    folder
        .train("run", &["device=cpu:999999"])
        .fails(&["cpu:999999 asks for too many threads: at most 1024"]);
}

/// What is used for what shows where to save.
#[test]
fn a_memory_limit_stops_a_run_with_a_table_by_purpose() {
    let folder = Folder::new();
    for command in [&["train", "tiny.yaml", "--quiet"][..], &["bench", "forward"], &["quickstart"]] {
        let stopped = folder.anneal(&[command, &["--memory-limit", "100KiB"]].concat());
        let stopped = stopped
            .fails(&["the memory limit is reached, 102400 bytes: raise it, or choose a smaller model"]);
        for row in ["memory ", "weights ", "gradients ", "optimizer ", "activations ", "workspace ", "sum "] {
            assert!(
                stopped.err.lines().any(|line| line.starts_with(row)),
                "{row} is missing in {stopped:#?}"
            );
        }
    }
}

/// `train` wants a recipe and `resume` a folder.
#[test]
fn train_and_resume_point_to_each_other() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    folder.write("empty/note", b"mine");
    let commands = [
        (["train", "run"], "run is a run folder, not a recipe; to continue it: anneal resume run"),
        (["train", "empty"], "empty is a folder, not a recipe file"),
        (["resume", "tiny.yaml"], "to train by a recipe: anneal train tiny.yaml"),
        (["resume", "empty"], "empty is no run folder: it has no recipe.yaml"),
    ];
    for (command, words) in commands {
        folder.anneal(&command).fails(&[words]);
    }
    let elsewhere = folder.anneal(&["resume", "run", "--steps", "8", "output=elsewhere"]);
    elsewhere.fails(&["output=elsewhere: a run is continued in its own folder"]);
}

#[test]
fn a_flag_and_a_key_that_contradict_each_other_are_refused() {
    let folder = Folder::new();
    for [flag, value, change] in [
        ["--steps", "6", "train.steps=9"],
        ["--device", "cpu", "device=cpu:1"],
        ["--memory-limit", "1GiB", "memory_limit=2MiB"],
        ["--memory-limit", "none", "memory_limit=1GiB"],
    ] {
        let refused = format!("{flag} {value} and {change} say different things of one setting");
        folder.train("run", &[flag, value, change]).fails(&[&refused]);
    }
    let same = ["--steps", "3", "train.steps=3", "--device", "cpu:1", "device=cpu:1"];
    for limit in
        [["--memory-limit", "1024MiB", "memory_limit=1GiB"], ["--memory-limit", "none", "memory_limit=null"]]
    {
        folder.train("run", &[&same[..], &limit].concat()).succeeds(&[]);
    }
}

/// Fewer steps than the limit of skipped ones in a row must not pass for a success.
#[test]
fn training_that_ends_in_divergence_says_so() {
    let folder = Folder::new();
    let wild = "optim.lr=1e30";
    let diverged = "5 steps in a row had a gradient that is not finite (step 6): training has diverged";
    folder.train("run", &[wild]).fails(&[diverged]);
    assert!(!folder.path("run/checkpoints/step-00000006").exists());
    folder.train("two", &[wild, "train.steps=2"]).fails(&["1 step in a row", "training has diverged"]);
    let fine = folder.train("fine", &["train.steps=1"]).succeeds(&["trained 1 step"]);
    assert!(fine.err.is_empty(), "{fine:#?}");
}

#[test]
fn the_end_of_a_run_names_what_is_there() {
    let folder = Folder::new();
    folder.train("one", &["train.steps=1"]).succeeds(&["run folder: one   (checkpoints, metrics.jsonl)\n"]);
    let all = "run folder: run   (checkpoints, metrics.jsonl, loss.png, samples)\n";
    folder.train("run", &["sample.every=6"]).succeeds(&[all]);
}

/// Else the next command would take an empty folder for a run.
#[test]
fn a_start_that_fails_leaves_no_folder() {
    let folder = Folder::new();
    let starts: [(&[&str], &str); 5] = [
        (&["data.kind=npz", "data.path=nowhere"], "no such file or folder"),
        (&["device=gpu"], "unknown device"),
        (&["device=cuda:99"], "no CUDA device can be used"),
        (&["memory_limit=100KiB"], "bytes of optimizer on cpu"),
        (&["memory_limit=200KiB"], "bytes of activations on cpu"),
    ];
    for (changes, words) in starts {
        folder.train("runs/deep/run", changes).fails(&[words]);
        assert_eq!(folder.names("."), ["tiny.yaml"], "{changes:?}");
    }
    // The second can be made, but no file in it has a name that the system takes.
    let deep = format!("{}/{}", vec!["x".repeat(199); 20].join("/"), "x".repeat(89));
    for output in [format!("runs/{}", "x".repeat(300)), deep] {
        folder.train(&output, &[]).fails(&["File name too long"]);
        assert_eq!(folder.names("."), ["tiny.yaml"], "a name of {} letters", output.len());
    }
    folder.write("run/note", b"mine");
    folder.train("run", &["memory_limit=200KiB"]).fails(&["bytes of activations"]);
    assert_eq!(folder.names("run"), ["note"]);
    let diverged = ["optim.lr=1e30", "train.nonfinite_limit=1", "train.checkpoint.every=100"];
    folder.train("diverged", &diverged).fails(&["training has diverged"]);
    assert_eq!(folder.text("diverged/metrics.jsonl").lines().count(), 2, "what was trained stays");
}

#[test]
fn impossible_samples_are_refused_before_any_work() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    let sample = |arguments: &[&str]| folder.anneal(&[&["sample", "run"], arguments].concat());
    sample(&["--sampler", "hoin"]).fails(&["unknown sampler 'hoin'", "dpm_solver_2m", "heun"]);
    sample(&["--class", "10"]).fails(&["class 10 does not exist: this model knows 0 to 9"]);
    sample(&["--class", "1,x"]).fails(&["'x' is no class"]);
    sample(&["--out", "x.gif"]).fails(&["--out x.gif", ".png, .npz", "not .gif"]);
    sample(&["--num", "0"]).fails(&["--num must be at least 1"]);
    for num in ["99999999999999", "18446744073709551615"] {
        sample(&["--num", num]).fails(&[&format!("--num {num} of images of 1x8x8 needs "), "choose less"]);
    }
    let seed = "18446744073709551615";
    sample(&["--seed", seed]).fails(&[&format!("--seed {seed} leaves no seeds for ")]);
    sample(&["--steps", "0"]).fails(&["0 steps", "1 to 1000"]);
    sample(&["--ema", "0.5"]).fails(&["this run keeps the averages [0.9]"]);
    sample(&["--guidance-mode", "intervall:0:1"]).fails(&["unknown guidance mode", "interval:LOW:HIGH"]);
    sample(&["--sampler", "flow_euler"]).fails(&["flow_euler", "flow matching"]);
    sample(&["--eta", "0.5", "--sampler", "heun"])
        .fails(&["--eta does not apply to the sampler heun: it is for ddim alone"]);
    sample(&["--shift", "3"])
        .fails(&["--shift does not apply to the sampler ddim: it is for flow_euler alone"]);
    folder.anneal(&["convert", "run", "dit.safetensors", "--to", "original"]).succeeds(&[]);
    let average = "--ema does not apply to dit.safetensors: only runs and checkpoints keep averages";
    folder.anneal(&["sample", "dit.safetensors", "--ema", "0.9"]).fails(&[average]);
    sample(&["--device", "gpu"]).fails(&["unknown device 'gpu'"]);
    sample(&["--latents", "nowhere.npz"]).fails(&["nowhere.npz"]);
    assert!(folder.names("samples.png").is_empty() && !folder.path("samples.png").exists());
}

#[test]
fn conversion_never_writes_over_anything() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    folder.write("there/note", b"mine");
    folder.write("there.safetensors", b"mine");
    folder.anneal(&["convert", "run", "there", "--to", "diffusers"]).fails(&["there exists already"]);
    folder.anneal(&["convert", "run", "there.safetensors", "--to", "original"]).fails(&["exists already"]);
    folder.anneal(&["convert", "run", "new.bin", "--to", "original"]).fails(&["ends in .safetensors"]);
    assert_eq!(folder.names("there"), ["note"]);
    assert_eq!(folder.read("there.safetensors"), b"mine");
}
