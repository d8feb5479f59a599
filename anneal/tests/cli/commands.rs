//! The commands around training: help, plans, inspection, the quick start, measurements.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Folder, Outcome};
use crate::resume::assert_same_checkpoint;

const COMMANDS: [&str; 10] = [
    "quickstart",
    "train",
    "resume",
    "sample",
    "verify-resume",
    "inspect",
    "convert",
    "doctor",
    "bench",
    "completions",
];

fn json(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error} in {outcome:#?}"))
}

#[test]
fn every_command_has_help_with_examples() {
    let folder = Folder::new();
    let all = folder.anneal(&["--help"]).succeeds(&["anneal quickstart"]);
    for command in COMMANDS {
        assert!(all.out.contains(&format!("\n  {command} ")), "{command} is missing in {}", all.out);
        let help = folder.anneal(&[command, "--help"]).succeeds(&[&format!("Usage: anneal {command}")]);
        let (_, examples) =
            help.out.split_once("Example").unwrap_or_else(|| panic!("{command} has no examples"));
        assert!(examples.contains(&format!("\n  anneal {command}")), "{examples}");
    }
    folder.anneal(&["--version"]).succeeds(&["anneal ", env!("CARGO_PKG_VERSION")]);
}

/// What was given is no more required than it is in the help.
#[test]
fn changes_to_a_recipe_are_optional_in_every_usage_line() {
    let folder = Folder::new();
    for command in
        ["quickstart", "train tiny.yaml", "resume run", "verify-resume tiny.yaml", "bench data tiny.yaml"]
    {
        let words: Vec<&str> = command.split(' ').chain(["seed=1", "--nonsense"]).collect();
        let wrong = folder.anneal(&words).ends(2, &["--nonsense"]);
        let usage = |text: &str| text.lines().find(|line| line.starts_with("Usage: ")).unwrap().to_owned();
        assert!(usage(&wrong.err).ends_with(" [KEY=VALUE]..."), "{wrong:#?}");
        let help = folder.anneal(&[&words[..words.len() - 2], &["--help"]].concat()).succeeds(&[]);
        assert_eq!(usage(&help.out), usage(&wrong.err));
    }
}

#[test]
fn flags_of_train_stand_for_keys_of_the_recipe() {
    let folder = Folder::new();
    folder.train("run", &["--device", "cpu:2", "--steps", "4"]).succeeds(&["trained 4 steps"]);
    let recipe = folder.text("run/recipe.yaml");
    assert!(recipe.contains("device: cpu:2") && recipe.contains("steps: 4"), "{recipe}");
    folder.train("run", &["--device", "gpu"]).fails(&["gpu"]);
    folder.train("run", &["--steps", "0"]).fails(&["train.steps is 0"]);
}

/// They are kept, as keys are, so that the next `resume` needs none.
#[test]
fn flags_of_resume_stand_for_keys_of_the_recipe() {
    let folder = Folder::new();
    let constant = "optim.schedule=constant";
    folder.train("whole", &["train.steps=12", constant]).succeeds(&["trained 12 steps"]);
    folder.train("run", &["--device", "cpu:2", constant]).succeeds(&["trained 6 steps"]);
    for (flag, value, words) in
        [("--device", "gpu", "gpu"), ("--memory-limit", "1KiB", "the memory limit is reached, 1024 bytes")]
    {
        folder.anneal(&["resume", "run", "--quiet", "train.steps=12", flag, value]).fails(&[words]);
    }
    folder.anneal(&["resume", "run", "--steps", "0"]).fails(&["train.steps is 0"]);
    let flags = ["--device", "cpu:1", "--steps", "12", "--memory-limit", "1GiB"];
    folder
        .anneal(&[&["resume", "run", "--quiet"], &flags[..]].concat())
        .succeeds(&["6 more steps, 12 in all"]);
    let recipe = folder.text("run/recipe.yaml");
    for kept in ["device: cpu:1", "steps: 12", "memory_limit: 1GiB"] {
        assert!(recipe.contains(kept), "{kept} is missing in {recipe}");
    }
    assert_same_checkpoint(&folder, "whole", "run", 12);
    folder.anneal(&["resume", "run", "--quiet"]).succeeds(&["already complete at step 12"]);
}

/// The examples are commands that the parser takes: only files may be missing.
#[test]
fn the_examples_are_commands() {
    let folder = Folder::new();
    for command in ["train", "resume", "sample", "inspect", "convert", "verify-resume"] {
        let help = folder.anneal(&[command, "--help"]);
        for example in help.out.lines().filter_map(|line| line.strip_prefix("  anneal ")) {
            let words: Vec<&str> = example.split("   ").next().unwrap().split_whitespace().collect();
            folder.anneal(&words).ends(1, &["error: "]);
        }
    }
}

#[test]
fn the_shipped_recipes_make_plans() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes");
    let folder = Folder::new();
    let mut count = 0;
    for entry in std::fs::read_dir(recipes).unwrap() {
        let path = entry.unwrap().path();
        let plan = folder.anneal(&["train", path.to_str().unwrap(), "--plan"]);
        let plan = plan.succeeds(&["parameters", "training", "device"]);
        match path.file_name().unwrap().to_string_lossy().contains("digits") {
            true => assert!(plan.out.contains("built-in digits: 1,797 images, 10 classes"), "{plan:#?}"),
            false => assert!(plan.err.contains("no such file or folder; check the path"), "{plan:#?}"),
        }
        count += 1;
    }
    assert!(count >= 4, "{count} recipes");
    assert_eq!(folder.names("."), ["tiny.yaml"], "a plan writes nothing");
}

/// Data and GPU may be another machine's; a name of no device and a limit that is too low are wrong on every one.
#[test]
fn a_plan_says_what_would_stop_training() {
    let folder = Folder::new();
    let plan = |flags: &[&str]| folder.anneal(&[&["train", "tiny.yaml", "--plan"], flags].concat());
    let fitting = plan(&["--device", "cpu:2", "--memory-limit", "1GiB"]).succeeds(&["predicted memory"]);
    assert_eq!(fitting.err, "");
    plan(&["--device", "gpu"]).fails(&["predicted memory", "unknown device 'gpu'"]);
    plan(&["--device", "cpu:999999"]).fails(&["cpu:999999 asks for too many threads"]);
    let absent = plan(&["--device", "cuda:99"]).succeeds(&["predicted memory"]);
    assert!(absent.err.starts_with("warning: cuda:99 cannot be used on this machine: "), "{absent:#?}");
    let activations = |plan: &Outcome| {
        let line = plan.out.lines().find(|line| line.starts_with("activations")).unwrap();
        line.split_whitespace().nth_back(1).unwrap().parse::<f64>().unwrap()
    };
    let kept = plan(&["--device", "cuda:99", "model.recompute_norms=false"]).succeeds(&["predicted memory"]);
    assert!(activations(&kept) > 1.05 * activations(&absent), "{kept:#?}");
    let known =
        "the memory limit of 100KiB lies below the 198.5 KiB of weights, gradients, optimizer and averages";
    plan(&["--memory-limit", "100KiB"]).fails(&["predicted memory", known]);
    let estimated = plan(&["memory_limit=300KiB"]).succeeds(&["predicted memory"]);
    let warning = "warning: the memory limit of 300KiB lies below the predicted sum of 388.5 KiB: raise it, ";
    assert!(estimated.err.starts_with(warning) && estimated.err.lines().count() == 1, "{estimated:#?}");
    assert_eq!(folder.names("."), ["tiny.yaml"], "a plan writes nothing");
}

#[test]
fn a_run_folder_holds_what_the_manual_says() {
    let folder = Folder::new();
    let trained =
        folder.anneal(&["train", "tiny.yaml", "sample.every=3"]).succeeds(&["run folder: runs/tiny"]);
    assert!(
        trained.err.contains("predicted memory") || trained.out.contains("predicted memory"),
        "{trained:#?}"
    );
    let names = folder.names("runs/tiny");
    for name in ["checkpoints", "loss.png", "metrics.jsonl", "plan.txt", "recipe.yaml", "samples"] {
        assert!(names.iter().any(|there| there == name), "{name} is missing in {names:?}");
    }
    assert!(names.iter().any(|name| name.starts_with("events.out.tfevents.")), "{names:?}");
    let first: Value =
        serde_json::from_str(folder.text("runs/tiny/metrics.jsonl").lines().next().unwrap()).unwrap();
    for key in ["step", "loss", "grad_norm", "lr", "images_per_second", "memory_bytes"] {
        assert!(first[key].is_number(), "{key} in {first}");
    }
    assert_eq!(folder.names("runs/tiny/samples"), ["step-00000003.png", "step-00000006.png"]);
}

#[test]
fn the_quick_start_draws_samples() {
    let folder = Folder::new();
    let changes = [
        "train.steps=4",
        "model.depth=1",
        "model.hidden_size=16",
        "train.batch=8",
        "sample.steps=4",
        "optim.warmup=1",
    ];
    let start = ["quickstart", "--output", "runs/mine", "--device", "cpu:2", "--memory-limit", "none"];
    let started = folder.anneal(&[&start[..], &changes].concat());
    started.succeeds(&["Samples: runs/mine/samples.png", "anneal sample runs/mine --class 3"]);
    image::open(folder.path("runs/mine/samples.png")).unwrap();
    folder.anneal(&[&start[..], &changes].concat()).succeeds(&["already complete at step 4"]);
}

#[test]
fn inspection_shows_tensors_sizes_and_hashes() {
    let folder = Folder::new();
    folder.train("run", &[]).succeeds(&[]);
    folder.anneal(&["convert", "run", "dit.safetensors", "--to", "original"]).succeeds(&[]);
    folder.anneal(&["convert", "run", "exported", "--to", "diffusers"]).succeeds(&[]);
    for source in ["run", "run/checkpoints/step-00000004", "dit.safetensors", "exported"] {
        let facts = json(&folder.anneal(&["inspect", source, "--json"]).succeeds(&[]));
        assert_eq!(facts["model"]["hidden_size"], 16, "{source}");
        let files = facts["files"].as_array().unwrap();
        assert!(
            files.iter().all(|file| file["sha256"].as_str().unwrap().len() == 64 && file["bytes"].is_u64())
        );
        let tensors = facts["tensors"].as_array().unwrap();
        assert!(!files.is_empty() && tensors.len() > 20, "{source}: {} tensors", tensors.len());
        assert!(tensors.iter().all(|tensor| tensor["shape"].is_array() && tensor["dtype"] == "F32"));
        folder.anneal(&["inspect", source]).succeeds(&["width 16, depth 1, 2 heads", "sha-256"]);
    }
    let listed = folder.anneal(&["inspect", "run", "--tensors"]);
    listed.succeeds(&["step", "6 (6 optimizer steps, 0 skipped)", "optimizer/second.", "ema-0.9/"]);
}

#[test]
fn completions_are_printed_for_every_shell() {
    let folder = Folder::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        folder.anneal(&["completions", shell]).succeeds(&["anneal", "verify-resume", "guidance"]);
    }
    folder.anneal(&["completions", "cmd"]).ends(2, &["invalid value 'cmd'", "bash"]);
}

#[test]
fn the_doctor_reports() {
    let folder = Folder::new();
    folder.anneal(&["doctor"]).succeeds(&["cpu", "GPU", "libnvrtc", "compiles kernels"]);
    assert!(json(&folder.anneal(&["doctor", "--json"]).succeeds(&[])).is_object());
}

#[test]
fn every_measurement_ends_in_numbers() {
    let folder = Folder::new();
    let model =
        "--hidden 16 --depth 1 --heads 2 --patch 2 --image-size 8 --channels 1 --classes 10 --batch 2";
    let few = "--steps 1 --warmup 0 --json";
    for what in ["op", "op --attention 1,2,8,16", "block", "step", "forward", "sample --sampling-steps 5"] {
        let line = format!("bench {what} {model} {few}");
        let outcome = folder.anneal(&line.split(' ').collect::<Vec<_>>()).succeeds(&[]);
        assert!(outcome.out.chars().any(|letter| letter.is_ascii_digit()));
        json(&outcome);
    }
    let table = format!("bench step {model} --steps 2");
    let table = folder.anneal(&table.split(' ').collect::<Vec<_>>());
    let rows = ["images/s", "FLOP/s, 743.4 kFLOP a run", "  activations", "memory held", "last loss  "];
    let table = table.succeeds(&rows);
    assert!(!table.out.contains(['{', '_']), "names and units for people: {table:#?}");
    let digits = |word: &str| word.chars().filter(char::is_ascii_digit).count();
    assert!(table.out.split_whitespace().all(|word| digits(word) <= 6), "figures are rounded: {table:#?}");
    let data = folder.anneal(&["bench", "data", "tiny.yaml", "--batches", "3", "--json"]).succeeds(&[]);
    json(&data);
    folder.anneal(&["bench", "step", "--model", "DiT-Q/3"]).fails(&["DiT-Q/3"]);
    folder.anneal(&["bench", "op", "--attention", "64,16"]).ends(2, &["64,16,256,72"]);
    let profile = format!("bench forward {model} --profile");
    folder.anneal(&profile.split(' ').collect::<Vec<_>>()).fails(&["--device cuda"]);
}
