//! From a run to other layouts and back: the same weights, and the same images.

use anneal_weights::{StoredDType, TensorFiles};
use serde_json::Value;

use crate::harness::{Folder, noise_f32};

/// Latents of four channels, so that samples are f32 and nothing hides behind rounding to bytes.
fn trained_on_latents(changes: &[&str]) -> Folder {
    let folder = Folder::new();
    let latents = noise_f32(4, 40 * 4 * 64);
    let bytes: Vec<u8> = latents.iter().flat_map(|value| value.to_le_bytes()).collect();
    let labels: Vec<u8> = (0..40_i64).flat_map(|index| (index % 10).to_le_bytes()).collect();
    let header = serde_json::json!({
        "labels": {"dtype": "I64", "shape": [40], "data_offsets": [0, labels.len()]},
        "latents": {"dtype": "F32", "shape": [40, 4, 8, 8], "data_offsets": [labels.len(), labels.len() + bytes.len()]},
    });
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &labels, &bytes].concat();
    folder.write("latents/0.safetensors", &file);
    let data =
        ["data.kind=latents", "data.path=latents", "model.channels=4", "train.steps=20", "optim.lr=1e-2"];
    folder.train("run", &[&data[..], changes].concat()).succeeds(&["trained 20 steps"]);
    folder
}

/// Samples of a source, as the file's bytes.
#[track_caller]
fn samples(folder: &Folder, source: &str, changes: &[&str]) -> Vec<u8> {
    let same = ["--num", "4", "--steps", "6", "--guidance", "2", "--out", "out.npz"];
    folder.anneal(&[&["sample", source], &same[..], changes].concat()).succeeds(&["4 samples"]);
    let array = folder.npz("out.npz").array("arr_0").unwrap().clone();
    assert_eq!(array.shape(), [4, 4, 8, 8]);
    folder.read("out.npz")
}

#[track_caller]
fn convert(folder: &Folder, from: &str, to: &str, layout: &str) -> String {
    folder.anneal(&["convert", from, to, "--to", layout]).succeeds(&[&format!("-> {to}")]).err
}

#[test]
fn a_run_through_both_layouts_draws_the_same_images() {
    let folder = trained_on_latents(&["model.convention=diffusers"]);
    let expected = samples(&folder, "run", &[]);
    assert!(expected != samples(&folder, "run", &["--seed", "100"]), "the comparison can fail");
    assert!(expected != samples(&folder, "run", &["--ema", "none"]), "the average is what is converted");
    assert_eq!(convert(&folder, "run", "exported", "diffusers"), "");
    assert!(samples(&folder, "exported", &[]) == expected, "diffusers folder");
    convert(&folder, "exported", "original.safetensors", "original");
    assert!(samples(&folder, "original.safetensors", &[]) == expected, "original file");
    convert(&folder, "original.safetensors", "again", "diffusers");
    assert!(samples(&folder, "again", &[]) == expected, "and back");
    let index: Value = serde_json::from_str(&folder.text("exported/model_index.json")).unwrap();
    assert_eq!(index["_class_name"], "DiTPipeline");
    assert_eq!(index["transformer"][1], "DiTTransformer2DModel");
    let scheduler: Value =
        serde_json::from_str(&folder.text("exported/scheduler/scheduler_config.json")).unwrap();
    assert_eq!(scheduler["prediction_type"], "v_prediction");
    assert_eq!(scheduler["beta_schedule"], "squaredcos_cap_v2");
}

/// Writes the exported scheduler's configuration with other values, and gives the samples and warnings.
#[track_caller]
fn with_scheduler(folder: &Folder, changes: Value) -> (Vec<u8>, String) {
    let path = "exported/scheduler/scheduler_config.json";
    let before = folder.text(path);
    let mut config: Value = serde_json::from_str(&before).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    folder.write(path, config.to_string().as_bytes());
    let bytes = samples(folder, "exported", &[]);
    let sampled = ["sample", "exported", "--num", "1", "--steps", "2", "--out", "b.npz"];
    let warnings = folder.anneal(&sampled).succeeds(&[]).err;
    folder.write(path, before.as_bytes());
    (bytes, warnings)
}

#[test]
fn a_scheduler_is_followed_or_named() {
    let folder = trained_on_latents(&[]);
    convert(&folder, "run", "exported", "diffusers");
    let expected = samples(&folder, "run", &[]);
    let clipped = samples(&folder, "run", &["--clip"]);
    assert!(clipped != expected, "the comparison can fail");
    let followed = |changes| {
        let (bytes, warnings) = with_scheduler(&folder, changes);
        assert!(!warnings.contains("warning"), "{warnings}");
        bytes
    };
    assert!(followed(serde_json::json!({})) == expected);
    assert!(followed(serde_json::json!({"clip_sample": true})) == clipped);
    // Their library clips where nothing is said.
    assert!(followed(serde_json::json!({"clip_sample": null})) == clipped);
    assert!(followed(serde_json::json!({"timestep_spacing": "trailing"})) != expected);
    for (key, value) in [("steps_offset", Value::from(1)), ("set_alpha_to_one", Value::from(false))] {
        let (bytes, warnings) = with_scheduler(&folder, serde_json::json!({key: value.clone()}));
        assert!(bytes == expected, "{key}");
        assert!(warnings.contains(&format!("warning: the scheduler's {key} is {value}")), "{warnings}");
    }
}

#[test]
fn an_original_file_remembers_what_the_model_predicts() {
    let objectives: [&[&str]; 4] = [
        &["diffusion.target=epsilon"],
        &["diffusion.target=x0", "diffusion.schedule=linear"],
        &["diffusion.target=epsilon", "diffusion.schedule=linear", "diffusion.steps=500"],
        &["diffusion.target=epsilon", "model.learn_sigma=true", "sample.sampler=ddpm"],
    ];
    for changes in objectives {
        let folder = trained_on_latents(changes);
        convert(&folder, "run", "original.safetensors", "original");
        let drawn = |source| samples(&folder, source, &["--sampler", "ddim"]);
        assert!(drawn("run") == drawn("original.safetensors"), "{changes:?}");
    }
}

/// Without a word on the command line, weights that were taken elsewhere are sampled as their run samples.
#[test]
fn converted_weights_remember_the_guidance_and_sampler_of_their_run() {
    let draw = |folder: &Folder, source: &str| {
        let sampled = folder.anneal(&["sample", source, "--num", "4", "--out", "out.npz"]);
        sampled.succeeds(&["sampler dpm_solver_2m, 4 steps, guidance 2.5"]);
        folder.read("out.npz")
    };
    let own = ["sample.sampler=dpm_solver_2m", "sample.guidance=2.5", "model.convention=diffusers"];
    let folder = trained_on_latents(&own);
    let expected = draw(&folder, "run");
    let call = "diffusers takes it at the call: pipeline(class_labels=[...], guidance_scale=2.5, num_inference_steps=4)";
    folder.anneal(&["convert", "run", "exported", "--to", "diffusers"]).succeeds(&[call]);
    assert!(draw(&folder, "exported") == expected, "diffusers folder");
    let original = folder.anneal(&["convert", "exported", "original.safetensors", "--to", "original"]);
    assert!(!original.succeeds(&[]).out.contains("diffusers takes"), "anneal itself reads the file");
    assert!(draw(&folder, "original.safetensors") == expected, "original file");
}

#[test]
fn a_flow_model_has_an_original_file_and_no_diffusers_folder() {
    let folder = Folder::new();
    let flow = crate::harness::TINY.replace("{schedule: squared_cosine, target: v}", "{kind: flow}");
    folder.write("tiny.yaml", flow.as_bytes());
    folder.train("run", &["sample.shift=3"]).succeeds(&[]);
    let refused = folder.anneal(&["convert", "run", "exported", "--to", "diffusers"]);
    refused.fails(&["flow matching", "use --to original"]);
    assert!(!folder.path("exported").exists());
    convert(&folder, "run", "flow.safetensors", "original");
    folder.anneal(&["sample", "flow.safetensors", "--num", "2", "--out", "a.npz"]).succeeds(&["flow_euler"]);
    folder.anneal(&["sample", "run", "--num", "2", "--out", "b.npz"]).succeeds(&["flow_euler"]);
    assert!(folder.read("a.npz") == folder.read("b.npz"), "the shift is the run's");
}

#[test]
fn the_two_conventions_are_told_apart() {
    let folder = trained_on_latents(&["model.convention=original"]);
    assert!(
        convert(&folder, "run", "exported", "diffusers")
            .contains("model.convention=diffusers for an exact export")
    );
    assert_eq!(convert(&folder, "run", "original.safetensors", "original"), "");
}

#[test]
fn bf16_weights_are_the_rounded_ones() {
    let folder = trained_on_latents(&[]);
    convert(&folder, "run", "full.safetensors", "original");
    let half = ["convert", "run", "half.safetensors", "--to", "original", "--precision", "bf16"];
    folder.anneal(&half).succeeds(&[]);
    let [full, half] =
        ["full", "half"].map(|name| TensorFiles::open(&folder.path(&format!("{name}.safetensors"))).unwrap());
    assert_eq!(half.dtype("final_layer.linear.weight"), Some(StoredDType::BF16));
    for name in full.names() {
        for (full, half) in full.read_f32(name).unwrap().into_iter().zip(half.read_f32(name).unwrap()) {
            // bf16 keeps 8 bits of the significand: half a unit in the last of them.
            assert!((full - half).abs() <= full.abs() / 256.0, "{name}: {full} and {half}");
        }
    }
}
