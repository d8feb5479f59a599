//! What `anneal sample` draws: forms, seeds, classes, samplers.

use anneal_data::npz::{Array, Values};

use crate::harness::{Folder, TINY, noise_f32};

fn trained() -> Folder {
    let folder = Folder::new();
    folder.train("run", &["train.steps=40", "train.checkpoint.every=40", "optim.lr=1e-2"]).succeeds(&[]);
    folder
}

/// `arr_0` of an npz: its shape and bytes.
fn images(folder: &Folder, name: &str) -> (Vec<usize>, Vec<u8>) {
    let array = folder.npz(name).array("arr_0").unwrap().clone();
    let shape = array.shape().to_vec();
    match array.into_values() {
        Values::U8(bytes) => (shape, bytes),
        other => panic!("{name}: arr_0 is not u8: {other:?}"),
    }
}

fn labels(folder: &Folder, name: &str) -> Vec<i64> {
    match folder.npz(name).take("arr_1").unwrap().into_values() {
        Values::I64(labels) => labels,
        other => panic!("{name}: arr_1 is not i64: {other:?}"),
    }
}

#[track_caller]
fn sample(folder: &Folder, out: &str, arguments: &[&str]) -> (Vec<usize>, Vec<u8>) {
    folder.anneal(&[&["sample", "run", "--out", out], arguments].concat()).succeeds(&[" from run", out]);
    images(folder, out)
}

#[test]
fn an_npz_holds_what_the_evaluator_reads() {
    let folder = trained();
    let (shape, bytes) = sample(&folder, "all.npz", &["--num", "20"]);
    assert_eq!(shape, [20, 8, 8, 1]);
    assert!(bytes.iter().any(|byte| *byte != bytes[0]), "an image has more than one brightness");
    assert_eq!(labels(&folder, "all.npz"), (0..20).map(|index| index / 2).collect::<Vec<i64>>());
    sample(&folder, "list.npz", &["--num", "5", "--class", "4,1"]);
    assert_eq!(labels(&folder, "list.npz"), [4, 4, 4, 1, 1]);
    sample(&folder, "none.npz", &["--num", "2", "--class", "none"]);
    assert_eq!(labels(&folder, "none.npz"), [10, 10]);
}

#[test]
fn a_sample_depends_on_its_seed_and_class_alone() {
    let folder = trained();
    let (_, all) = sample(&folder, "all.npz", &["--num", "10", "--seed", "5"]);
    let (shape, alone) = sample(&folder, "alone.npz", &["--num", "1", "--seed", "8", "--class", "3"]);
    assert_eq!(shape, [1, 8, 8, 1]);
    assert_eq!(all[3 * 64..4 * 64], alone, "alone and in a batch");
    let (_, other) = sample(&folder, "other.npz", &["--num", "1", "--seed", "9", "--class", "3"]);
    assert_ne!(alone, other, "another seed");
    for (name, arguments) in [("batches", ["--batch", "3"]), ("threads", ["--device", "cpu:1"])] {
        let arguments = [&["--num", "10", "--seed", "5"], &arguments[..]].concat();
        assert_eq!(sample(&folder, "again.npz", &arguments).1, all, "{name}");
    }
    // Fresh noise is drawn at every step here, and must be the sample's own too.
    let ddpm = ["--sampler", "ddpm", "--steps", "6"];
    let (_, all) = sample(&folder, "all.npz", &[&["--num", "10", "--seed", "5"], &ddpm[..]].concat());
    let alone =
        sample(&folder, "a.npz", &[&["--num", "1", "--seed", "8", "--class", "3"], &ddpm[..]].concat()).1;
    assert_eq!(all[3 * 64..4 * 64], alone, "ddpm alone and in a batch");
}

#[test]
fn a_grid_and_a_folder_of_single_pictures() {
    let folder = trained();
    folder.anneal(&["sample", "run", "--num", "9"]).succeeds(&["9 samples", "samples.png"]);
    let grid = image::open(folder.path("samples.png")).unwrap();
    assert!(grid.width() >= 3 * 8 && grid.height() >= 3 * 8, "{}x{}", grid.width(), grid.height());
    let out = "deep/er/singles";
    folder.anneal(&["sample", "run", "--num", "3", "--class", "7", "--out", out]).succeeds(&[]);
    let names = ["000000-class-7.png", "000001-class-7.png", "000002-class-7.png"];
    assert_eq!(folder.names(out), names);
    let (_, bytes) = sample(&folder, "three.npz", &["--num", "3", "--class", "7"]);
    for (name, expected) in names.iter().zip(bytes.chunks(64)) {
        let picture = image::open(folder.path(out).join(name)).unwrap();
        assert_eq!((picture.width(), picture.height()), (8, 8));
        assert_eq!(picture.to_luma8().into_raw(), expected, "{name}");
    }
}

#[test]
fn samples_are_not_mixed_with_what_a_folder_holds() {
    let folder = trained();
    let into = |flags: &[&str]| folder.anneal(&[&["sample", "run", "--out", "many"], flags].concat());
    std::fs::create_dir(folder.path("many")).unwrap();
    into(&["--num", "3"]).succeeds(&["3 samples"]);
    let all = ["000000-class-0.png", "000001-class-1.png", "000002-class-2.png"];
    assert_eq!(folder.names("many"), all);
    into(&["--num", "1", "--class", "7"]).fails(&["--out many: the folder is not empty", "--overwrite"]);
    assert_eq!(folder.names("many"), all);
    for mine in ["mine.png", "1-class-2.png"] {
        folder.write(&format!("many/{mine}"), b"mine");
    }
    into(&["--num", "1", "--class", "7", "--overwrite"]).succeeds(&["1 sample from run"]);
    assert_eq!(folder.names("many"), ["000000-class-7.png", "1-class-2.png", "mine.png"]);
    folder.write("file", b"mine");
    for flags in [&[][..], &["--overwrite"]] {
        let to = |out: &str| folder.anneal(&[&["sample", "run", "--num", "2", "--out", out], flags].concat());
        // Before any work: the weights are not looked for.
        let refused = [&["sample", "nowhere", "--out", "file"], flags].concat();
        folder.anneal(&refused).fails(&["--out file: cannot read the folder"]);
        to("grid.png").succeeds(&["grid.png"]);
    }
    assert_eq!(folder.read("file"), b"mine");
}

#[test]
fn every_sampler_and_guidance_draws() {
    let folder = trained();
    let two = ["--num", "2", "--class", "1,2", "--steps", "5"];
    let (_, plain) = sample(&folder, "plain.npz", &[&two[..], &["--guidance", "1"]].concat());
    for sampler in ["ddpm", "ddim", "dpm_solver_2m", "dpm_solver_2m_karras", "unipc", "euler", "heun"] {
        let (shape, bytes) = sample(&folder, "s.npz", &[&two[..], &["--sampler", sampler]].concat());
        assert_eq!(shape, [2, 8, 8, 1], "{sampler}");
        assert_ne!(bytes, plain, "{sampler} with the recipe's guidance, against none");
    }
    for mode in ["all", "first_three", "interval:0.1:0.8", "power_cosine:2"] {
        let guided = ["--guidance", "4", "--guidance-mode", mode];
        assert_ne!(sample(&folder, "s.npz", &[&two[..], &guided].concat()).1, plain, "{mode}");
    }
    let noisy = [&two[..], &["--sampler", "ddim", "--eta", "1"]].concat();
    assert_ne!(sample(&folder, "s.npz", &noisy).1, sample(&folder, "t.npz", &two).1, "ddim with noise");
    let (_, raw) = sample(&folder, "s.npz", &[&two[..], &["--ema", "none", "--guidance", "1"]].concat());
    assert_ne!(raw, plain, "the raw weights against their average");
}

#[test]
fn flow_models_draw_with_flow_euler() {
    let folder = Folder::new();
    folder
        .write("tiny.yaml", TINY.replace("{schedule: squared_cosine, target: v}", "{kind: flow}").as_bytes());
    folder.train("run", &["train.steps=20"]).succeeds(&[]);
    let (shape, plain) = sample(&folder, "a.npz", &["--num", "3"]);
    assert_eq!(shape, [3, 8, 8, 1]);
    assert_ne!(sample(&folder, "b.npz", &["--num", "3", "--shift", "3"]).1, plain);
    folder.anneal(&["sample", "run", "--sampler", "ddim"]).fails(&["sampler ddim", "flow"]);
}

#[test]
fn given_latents_take_the_place_of_seeds() {
    let folder = trained();
    let latents = Array::new([2, 1, 8, 8], Values::F32(noise_f32(3, 128)));
    let classes = Array::new([2], Values::I64(vec![4, 6]));
    anneal_data::npz::write_npz(&folder.path("start.npz"), &[("latents", &latents), ("labels", &classes)])
        .unwrap();
    let (shape, first) = sample(&folder, "a.npz", &["--latents", "start.npz"]);
    assert_eq!((shape, labels(&folder, "a.npz")), (vec![2, 8, 8, 1], vec![4, 6]));
    assert_eq!(sample(&folder, "b.npz", &["--latents", "start.npz", "--seed", "9"]).1, first);
    let wrong = folder.anneal(&["sample", "run", "--latents", "start.npz", "--num", "3", "--class", "1"]);
    wrong.fails(&["latents"]);
}

#[test]
fn checkpoints_can_be_sampled_by_themselves() {
    let folder = Folder::new();
    folder.train("run", &["optim.lr=1e-2"]).succeeds(&[]);
    folder
        .anneal(&["sample", "run/checkpoints/step-00000004", "--num", "2", "--out", "old.npz"])
        .succeeds(&["step 4"]);
    let (_, newest) = sample(&folder, "new.npz", &["--num", "2"]);
    assert_ne!(images(&folder, "old.npz").1, newest);
}
