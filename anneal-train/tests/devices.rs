//! Whole training runs on each device and in each precision: equal losses, captured steps, resuming.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anneal_nn::ParamStore;
use anneal_recipe::Recipe;
use anneal_testkit::{poisoned_cuda, skip_without};
use anneal_train::report::progress::Show;
use anneal_train::run::{self, DrawingProgress, PreviewImages, RunOptions, RunReport, SamplesReport};
use anneal_train::trainer::{StepOutcome, Trainer};
use anneal_train::verify::{VerifyOptions, verify_resume};

const DIGITS: &str = "
model: {hidden_size: 64, depth: 2, heads: 2, patch_size: 2, image_size: 8, channels: 1, classes: 10}
data: {kind: digits, workers: 1}
optim: {lr: 1e-3, warmup: 5, clip: 1.0}
ema: {rates: [0.99], warmup: true}
train: {steps: 1000, batch: 24, accumulate: 2, chunk_size: 64KiB}
";

fn recipe(overrides: &[&str]) -> Recipe {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Recipe::from_yaml(DIGITS, "digits.yaml", &overrides).unwrap()
}

/// The outcomes of some steps, and the weights and the average after them.
fn train(recipe: &Recipe, steps: u64) -> (Vec<StepOutcome>, Vec<f32>) {
    let mut trainer = Trainer::new(recipe).unwrap();
    let mut outcomes = Vec::new();
    while trainer.steps_done() < steps {
        trainer.step(&mut outcomes).unwrap();
    }
    trainer.finish_steps(&mut outcomes).unwrap();
    assert_eq!(trainer.take_warnings(), Vec::<String>::new(), "steps are captured");
    let order: Vec<u64> = outcomes.iter().map(|outcome| outcome.step).collect();
    assert_eq!(order, (1..=steps).collect::<Vec<_>>());
    let mut values = all_weights(&**trainer.store());
    values.extend(all_weights(&*trainer.sampling_store(Some(0.99)).unwrap()));
    (outcomes, values)
}

fn all_weights(store: &dyn ParamStore) -> Vec<f32> {
    store.parameters().iter().flat_map(|(id, _)| store.read(id).unwrap()).collect()
}

/// Losses, norms and weights.
fn bits((outcomes, weights): &(Vec<StepOutcome>, Vec<f32>)) -> Vec<u64> {
    let figures =
        outcomes.iter().flat_map(|outcome| [outcome.loss.to_bits(), outcome.gradient_norm.to_bits()]);
    figures.chain(weights.iter().map(|value| u64::from(value.to_bits()))).collect()
}

/// Weights in place of pictures: this crate does not sample.
fn assert_resumes(recipe: &Recipe) {
    let preview = |store: Arc<dyn ParamStore>, _: &mut DrawingProgress| {
        let values = all_weights(&*store);
        let (shape, caption) = ([1, 1, values.len()], String::new());
        Ok(Some(PreviewImages { shape, values, count: 1, caption, warnings: Vec::new() }))
    };
    let scratch = tempfile::tempdir().unwrap();
    let options = VerifyOptions { steps: 9, stop_at: 4 };
    let stop = AtomicBool::new(false);
    for comparison in verify_resume(recipe, options, scratch.path(), &preview, &stop).unwrap() {
        assert!(comparison.numbers > 0);
        assert_eq!(comparison.first, None, "{comparison:?}");
    }
}

/// A run whose samples take a thousand calls, and a stop comes after the second call of the drawing of this number (from 1).
/// The report, and the calls of each drawing.
fn run_stopped_in(drawing: usize, recipe: &Recipe) -> (RunReport, Vec<usize>) {
    let stop = Arc::new(AtomicBool::new(false));
    let calls = Cell::new(Vec::new());
    let preview = |store: Arc<dyn ParamStore>, progress: &mut DrawingProgress| {
        let mut done = calls.take();
        done.push(0);
        let number = done.len();
        let stopped = (1..=1000).any(|call| {
            done[number - 1] = call;
            stop.fetch_or(number == drawing && call == 2, Ordering::Relaxed);
            progress(call, 1000) == ControlFlow::Break(())
        });
        calls.set(done);
        let (values, shape) = (all_weights(&*store)[..64].to_vec(), [1, 8, 8]);
        let (caption, warnings) = (String::new(), Vec::new());
        Ok((!stopped).then_some(PreviewImages { shape, values, count: 1, caption, warnings }))
    };
    let options =
        RunOptions { show: Show::Nothing, stop: stop.clone(), preview: &preview, own_recipe: false };
    let report = run::run(recipe, &options).unwrap();
    (report, calls.take())
}

/// What steps did, without how long they took; and names and bytes of pictures.
fn traces(run: &Path) -> (Vec<String>, Vec<(String, Vec<u8>)>) {
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        format!("{} {} {}", line["step"], line["loss"], line["grad_norm"])
    };
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut pictures: Vec<(String, Vec<u8>)> = std::fs::read_dir(run.join("samples"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    pictures.sort();
    (metrics.lines().map(line).collect(), pictures)
}

/// Samples in the middle and at the end: both are given up at once and drawn by the next start, and no bit of a step changes.
fn assert_stops_while_drawing(device: &[&str]) {
    let scratch = tempfile::tempdir().unwrap();
    let recipe = |name: &str| {
        let output = format!("output={}", scratch.path().join(name).display());
        let steps = ["train.steps=6", "train.log_every=1", "sample.every=3", &output];
        recipe(&[device, &steps[..]].concat())
    };
    let ends =
        |(report, calls): (RunReport, Vec<usize>)| (report.steps, report.stopped, report.samples, calls);
    use SamplesReport::{Drawn, Left, MadeUp};
    assert_eq!(ends(run_stopped_in(0, &recipe("whole"))), (6, false, Drawn, vec![1000, 1000]));
    let run = recipe("run");
    assert_eq!(ends(run_stopped_in(1, &run)), (3, true, Left, vec![2]));
    assert_eq!(ends(run_stopped_in(2, &run)), (6, true, Left, vec![1000, 2]));
    assert_eq!(ends(run_stopped_in(0, &run)), (6, false, MadeUp, vec![1000]));
    assert_eq!(ends(run_stopped_in(0, &run)), (6, false, Drawn, vec![]));
    let (whole, run) = (traces(&scratch.path().join("whole")), traces(&run.output));
    let names: Vec<&str> = whole.1.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((whole.0.len(), names), (6, vec!["step-00000003.png", "step-00000006.png"]));
    assert!(whole == run, "{:?} and {:?}, or their pictures", whole.0, run.0);
}

#[test]
fn a_run_stopped_while_drawing_goes_on_with_the_same_bits() {
    assert_stops_while_drawing(&["device=cpu:2"]);
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "stops while drawing") };
    assert_stops_while_drawing(&["device=cuda", "train.deterministic=true"]);
    drop(turn);
}

#[test]
fn fp16_trains_as_fp32_does_and_resumes_bit_for_bit() {
    let (fp32, _) = train(&recipe(&["device=cpu:2"]), 12);
    let (fp16, _) = train(&recipe(&["device=cpu:2", "train.precision=fp16"]), 12);
    for (fp32, fp16) in fp32.iter().zip(&fp16) {
        assert!(!fp16.skipped && fp16.loss_scale == 65_536.0 && fp32.loss_scale == 1.0);
        assert!((fp16.loss / fp32.loss - 1.0).abs() < 0.01, "{fp16:?} for {fp32:?}");
        assert!((fp16.gradient_norm / fp32.gradient_norm - 1.0).abs() < 0.1, "{fp16:?} for {fp32:?}");
    }
    assert_resumes(&recipe(&["device=cpu:2", "train.precision=fp16", "data.workers=2"]));
}

#[test]
fn a_gpu_trains_as_the_cpu_does() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "losses against the CPU") };
    let (cpu, _) = train(&recipe(&[]), 50);
    let (gpu, _) = train(&recipe(&["device=cuda"]), 50);
    for (cpu, gpu) in cpu.iter().zip(&gpu) {
        assert!((cpu.loss - gpu.loss).abs() < 1e-4, "{gpu:?} for {cpu:?}");
        assert_eq!((cpu.step, cpu.learning_rate), (gpu.step, gpu.learning_rate));
    }
    drop(turn);
}

#[test]
fn a_replayed_step_has_the_bits_of_a_plain_one() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "captured steps") };
    for precision in ["fp32", "bf16", "fp16"] {
        let precision = format!("train.precision={precision}");
        let on_gpu = ["device=cuda", "train.deterministic=true", &precision];
        let captured = train(&recipe(&on_gpu), 12);
        let plain = train(&recipe(&[&on_gpu[..], &["train.capture_steps=false"]].concat()), 12);
        assert!(bits(&captured) == bits(&plain), "{precision}");
    }
    drop(turn);
}

#[test]
fn norms_kept_or_made_again_have_the_same_bits() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "norms made again") };
    let [again, kept] = ["true", "false"].map(|again| {
        let again = format!("model.recompute_norms={again}");
        let recipe = recipe(&["device=cuda", "train.deterministic=true", "train.precision=bf16", &again]);
        let mut trainer = Trainer::new(&recipe).unwrap();
        let mut outcomes = Vec::new();
        for _ in 0..6 {
            trainer.step(&mut outcomes).unwrap();
        }
        trainer.finish_steps(&mut outcomes).unwrap();
        let memory = trainer.device().memory().peak_total;
        (bits(&(outcomes, all_weights(&**trainer.store()))), memory)
    });
    assert!(again.0 == kept.0, "the bits differ");
    assert!(again.1 < kept.1, "{} and {} bytes", again.1, kept.1);
    drop(turn);
}

#[test]
fn the_host_does_not_wait_inside_the_steady_state() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "waits of the host") };
    let mut trainer = Trainer::new(&recipe(&["device=cuda"])).unwrap();
    let mut outcomes = Vec::new();
    for _ in 0..4 {
        trainer.step(&mut outcomes).unwrap();
    }
    let anneal_tensor::Device::Cuda(cuda) = trainer.device().clone() else { panic!("a GPU was asked for") };
    let (launches, waits) = (cuda.launches(), cuda.waits());
    let steps = 20;
    for _ in 0..steps {
        trainer.step(&mut outcomes).unwrap();
    }
    assert_eq!(cuda.launches() - launches, steps, "a step is one piece of work");
    // The one wait a step is for the step two before: it keeps the queue short, and the device busy.
    assert!(cuda.waits() - waits <= steps, "{} waits", cuda.waits() - waits);
    drop(turn);
}

#[test]
fn a_run_on_a_gpu_resumes_bit_for_bit() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "resuming on a GPU") };
    assert_resumes(&recipe(&["device=cuda"]));
    assert_resumes(&recipe(&["device=cuda", "train.precision=bf16"]));
    assert_resumes(&recipe(&["device=cuda", "train.precision=fp16"]));
    drop(turn);
}
