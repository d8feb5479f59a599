//! The words of every refusal of a value that is well formed and cannot be meant.

use super::*;

const TYPED: &str = "on the command line";
const FILE: &str = "in recipes/x.yaml";
const LINE_1: &str = "in recipes/x.yaml, line 1";

/// Overrides on a valid recipe (several are parted by `; `), the line that they must give, and its place.
#[rustfmt::skip]
const CASES: [(&str, &str, &str); 70] = [
    ("train.batch=0", "train.batch is 0; it must be at least 1", TYPED),
    ("train.steps=0", "train.steps is 0; it must be at least 1", TYPED),
    ("train.accumulate=3", "train.accumulate is 3, which does not divide train.batch 8", TYPED),
    ("train.accumulate=0", "train.accumulate is 0; it must be at least 1", TYPED),
    ("train.chunk_size=12B", "train.chunk_size is 12B; it must be at least 1KiB", TYPED),
    ("train.log_every=0", "train.log_every is 0; it must be at least 1", TYPED),
    ("train.checkpoint.every=0", "train.checkpoint.every is 0; it must be at least 1", TYPED),
    ("train.checkpoint.keep_last=0", "train.checkpoint.keep_last is 0; it must be at least 1", TYPED),
    ("train.nonfinite_limit=0", "train.nonfinite_limit is 0; it must be at least 1", TYPED),
    ("model.patch_size=3", "model.image_size is 8x8, which patches of 3 do not divide", LINE_1),
    ("model.heads=3", "model.heads is 3, which does not divide model.hidden_size 128", TYPED),
    ("model.hidden_size=6; model.heads=2", "model.hidden_size is 6; it must be a multiple of 4 for the position embedding", TYPED),
    ("model.depth=0", "model.depth is 0; it must be at least 1", TYPED),
    ("model.channels=0", "model.channels is 0; it must be at least 1", TYPED),
    ("model.classes=0", "model.classes is 0; it must be at least 1", TYPED),
    ("model.image_size=0", "model.image_size is 0x0; both sides must be at least 1", TYPED),
    ("model.mlp_ratio=0", "model.mlp_ratio is 0; it must be above 0", TYPED),
    ("model.label_dropout=1", "model.label_dropout is 1; it must be from 0 to below 1", TYPED),
    ("model.label_dropout=-0.1", "model.label_dropout is -0.1; it must be from 0 to below 1", TYPED),
    ("model.preset=DiT-S/2", "model.hidden_size contradicts model.preset, which sets it; give one of the two", LINE_1),
    ("model.preset=DiT-XS/2", "model.preset is 'DiT-XS/2'; did you mean 'DiT-S/2'?", TYPED),
    ("model.heads=null", "model lacks heads; give them, or a preset such as DiT-S/2", LINE_1),
    ("diffusion.steps=1", "diffusion.steps is 1; it must be at least 2", TYPED),
    ("diffusion.min_snr_gamma=0", "diffusion.min_snr_gamma is 0; it must be above 0", TYPED),
    ("diffusion.kind=flow; diffusion.time={logit_normal: {std: 0}}", "diffusion.time.logit_normal.std is 0; it must be above 0", TYPED),
    ("diffusion.kind=flow; diffusion.time={logit_normal: {mean: .nan}}", "diffusion.time.logit_normal.mean is NaN; it must be finite", TYPED),
    ("diffusion.kind=flow; model.learn_sigma=true", "model.learn_sigma is true, but flow matching has no variance to learn; set it to false", TYPED),
    ("data.path=x", "data.path does not apply to data.kind digits, which is built in; remove it", TYPED),
    ("data.kind=npz", "data.path is missing; name the file or folder of the data", FILE),
    ("data.image_size=16", "data.image_size is 16x16, but model.image_size is 8x8; make them equal", TYPED),
    ("data.channels=3", "data.channels is 3, but model.channels is 1; make them equal", TYPED),
    ("model.channels=4; data={kind: image_folder, path: x}", "data.channels is 4; pictures have 1 (grey) or 3 (colour)", TYPED),
    ("model.image_size=16", "model is 16x16 with 1 channels, but the built-in digits are 8x8 with 1", LINE_1),
    ("model.classes=9", "model.classes is 9, but the built-in digits have 10", TYPED),
    ("data.range=[1,1]", "data.range is [1, 1]; it must rise", TYPED),
    ("data.scale=0", "data.scale is 0; it must be above 0", TYPED),
    ("data.scale=2", "data.scale is 2, which applies to data.kind latents only; use data.range", TYPED),
    ("data.scale=2; data.range=[0, 1]", "data.scale is 2 and data.range is given; give one of the two", TYPED),
    ("data.images=x", "data.images names an array, which applies to data.kind npz only; remove it", TYPED),
    ("data.labels=y", "data.labels names an array, which applies to data.kind npz only; remove it", TYPED),
    ("data.prefetch=0", "data.prefetch is 0; it must be at least 1", TYPED),
    ("optim.lr=0", "optim.lr is 0; it must be above 0", TYPED),
    ("optim.clip=.nan", "optim.clip is NaN; it must be above 0", TYPED),
    ("optim.betas=[0.9,1]", "optim.betas[1] is 1; it must be from 0 to below 1", TYPED),
    ("optim.eps=0", "optim.eps is 0; it must be above 0", TYPED),
    ("optim.weight_decay=-1", "optim.weight_decay is -1; it must be 0 or more", TYPED),
    ("optim.weight_decay=.inf", "optim.weight_decay is inf; it must be 0 or more", TYPED),
    ("optim.min_lr=1", "optim.min_lr is 1; it must not exceed optim.lr, which is 0.0001", TYPED),
    ("optim.warmup=11", "optim.warmup is 11; it must not exceed train.steps, which is 10: add optim.warmup=1", TYPED),
    ("ema.rates=[1]", "ema.rates is 1; it must be between 0 and 1", TYPED),
    ("ema.rates=[0.9,0.9]", "ema.rates holds 0.9 twice", TYPED),
    ("sample.num=1000001", "sample.num is 1000001; it must be at most 1000000", TYPED),
    ("diffusion.steps=1000001", "diffusion.steps is 1000001; it must be at most 1000000", TYPED),
    ("data.workers=1025", "data.workers is 1025; it must be at most 1024", TYPED),
    ("sample.num=0", "sample.num is 0; it must be at least 1", TYPED),
    ("sample.steps=0", "sample.steps is 0; it must be at least 1", TYPED),
    ("sample.steps=1001", "sample.steps is 1001; it must be at most diffusion.steps, which is 1000", TYPED),
    ("sample.classes=[3,10]", "sample.classes holds 10; model.classes is 10, so write 0 to 9", TYPED),
    ("sample.eta=2", "sample.eta is 2; it must be from 0 to 1", TYPED),
    ("sample.shift=0", "sample.shift is 0; it must be above 0", TYPED),
    ("sample.guidance=-1", "sample.guidance is -1; it must be 0 or more", TYPED),
    ("sample.guidance=2; model.label_dropout=0", "sample.guidance is 2, which needs model.label_dropout above 0; use guidance 1 or dropout 0.1", TYPED),
    ("sample.guidance_mode={interval: {low: 0.5, high: 0.5}}", "sample.guidance_mode.interval is 0.5 to 0.5; it must rise within 0 to 1", TYPED),
    ("sample.guidance_mode={power_cosine: {power: 0}}", "sample.guidance_mode.power_cosine.power is 0; it must be above 0", TYPED),
    ("sample.ema=0.5", "sample.ema is 0.5; it must be one of ema.rates, which are [0.9999]", TYPED),
    ("sample.sampler=flow_euler", "sample.sampler does not fit diffusion.kind gaussian; use ddim or another than flow_euler", TYPED),
    ("diffusion.kind=flow; sample.sampler=ddim", "sample.sampler does not fit diffusion.kind flow; use flow_euler", TYPED),
    ("name=''", "name is empty; give the run a name", TYPED),
    ("device=' '", "device is empty; write cpu, cpu:2 or cuda", TYPED),
    ("output=''", "output is empty; name the run's folder", TYPED),
];

#[test]
fn every_range_has_its_line() {
    for (overrides, problem, place) in CASES {
        let message = message(DIGITS, &overrides.split("; ").collect::<Vec<_>>());
        let expected = format!("{problem} ({place})");
        assert!(message.lines().any(|line| line == expected), "{overrides} gave\n{message}\nnot\n{expected}");
    }
}

#[test]
fn settings_of_other_samplers_are_told_but_no_errors() {
    let told = |overrides: &[&str]| load(DIGITS, overrides).unwrap().without_effect();
    let none: [String; 0] = [];
    assert_eq!(told(&["sample.eta=0", "sample.sampler=ddpm"]), none);
    assert_eq!(told(&["sample.eta=0.5"]), none);
    let expected = "sample.eta does not apply to the sampler ddpm: it is for ddim alone";
    assert_eq!(told(&["sample.eta=0.5", "sample.sampler=ddpm"]), [expected]);
    let expected = "sample.shift does not apply to the sampler ddim: it is for flow_euler alone";
    assert_eq!(told(&["sample.shift=3"]), [expected]);
    assert_eq!(told(&["sample.shift=3", "diffusion.kind=flow"]), none);
}

#[test]
fn every_problem_is_reported_at_once() {
    let message = message(DIGITS, &["train.batch=0", "optim.lr=0"]);
    assert_eq!(message.lines().count(), 2, "{message}");
}

#[test]
fn a_preset_brings_its_patch() {
    let expected = "model.image_size is 36x36, which patches of 8 do not divide (on the command line)";
    assert_eq!(message(MINIMAL, &["model.preset=DiT-S/8", "model.image_size=36"]), expected);
}
