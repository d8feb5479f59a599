//! Pipeline folders in diffusers' layout.

use std::fs;
use std::path::{Path, PathBuf};

use anneal_testkit::Golden;
use anneal_weights::{
    Component, DiffusersFolder, DiffusersWriter, StoredDType, TensorSink, TensorSpec, WeightsError,
    write_sharded,
};
use serde_json::{Value, json};

/// A pipeline that diffusers wrote.
fn golden_folder() -> PathBuf {
    let asked = Golden::folder().join("dit_pipeline");
    if asked.is_dir() {
        return asked;
    }
    // The folder that was asked for holds other cases only.
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../anneal-testkit/golden/dit_pipeline")
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_folder_of_diffusers_opens() {
    let folder = DiffusersFolder::open(&golden_folder()).unwrap();
    assert_eq!(folder.class_name(), "DiTPipeline");
    let component = |name: &str, class: &str| Component {
        name: name.into(),
        library: "diffusers".into(),
        class: class.into(),
    };
    assert_eq!(
        folder.components(),
        [
            component("scheduler", "DDIMScheduler"),
            component("transformer", "DiTTransformer2DModel"),
            component("vae", "AutoencoderKL")
        ]
    );
    assert_eq!(folder.component_config("scheduler").unwrap()["_class_name"], "DDIMScheduler");
    let config = folder.component_config("transformer").unwrap();
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let width = number("num_attention_heads") * number("attention_head_dim");
    let weights = folder.component_weights("transformer", None).unwrap();
    assert_eq!(weights.shape("transformer_blocks.0.attn1.to_q.weight").unwrap(), [width, width]);
    let embedding = weights.shape("pos_embed.proj.weight").unwrap();
    assert_eq!(embedding, [width, number("in_channels"), number("patch_size"), number("patch_size")]);
    assert!(weights.read_f32("pos_embed.proj.weight").unwrap().iter().all(|value| value.is_finite()));
    assert!(!folder.component_weights("vae", None).unwrap().is_empty());
}

#[test]
fn what_is_not_there_is_named() {
    let path = golden_folder();
    let folder = DiffusersFolder::open(&path).unwrap();
    assert_eq!(
        folder.component_config("unet").unwrap_err().to_string(),
        format!(
            "{} is not a diffusers folder: its model_index.json names no component 'unet' (it names scheduler, \
             transformer, vae)",
            path.display()
        )
    );
    assert_eq!(
        folder.component_weights("transformer", Some("fp16")).unwrap_err().to_string(),
        format!(
            "{} holds no weights of the variant 'fp16' in .safetensors files; it holds \
             diffusion_pytorch_model.safetensors",
            path.join("transformer").display()
        )
    );
    assert_eq!(
        folder.component_weights("scheduler", None).unwrap_err().to_string(),
        format!(
            "{} holds no weights in .safetensors files; it holds no weight file",
            path.join("scheduler").display()
        )
    );
}

#[test]
fn other_folders_are_refused_with_the_reason() {
    let empty = tempfile::tempdir().unwrap();
    let message = |path: &Path| {
        let message = DiffusersFolder::open(path).unwrap_err().to_string();
        message.strip_prefix(&format!("{} is not a diffusers folder: ", path.display())).map(String::from)
    };
    assert_eq!(message(empty.path()).unwrap(), "it has no model_index.json");
    assert_eq!(message(&empty.path().join("none")).unwrap(), "there is no such folder");
    assert_eq!(
        message(&golden_folder().join("transformer")).unwrap(),
        "it has no model_index.json; it is one component, so name the folder above it"
    );
    fs::write(empty.path().join("model_index.json"), "[]").unwrap();
    assert_eq!(message(empty.path()).unwrap(), "its model_index.json names no class");
    fs::write(empty.path().join("model_index.json"), "{").unwrap();
    let broken = DiffusersFolder::open(empty.path()).unwrap_err().to_string();
    assert!(
        broken.starts_with(&format!("{}: not JSON: ", empty.path().join("model_index.json").display())),
        "{broken}"
    );
}

fn write_weights(folder: &Path, variant: Option<&str>, value: f32) {
    let specs = [TensorSpec::new("a", StoredDType::F16, &[4]), TensorSpec::new("b", StoredDType::F16, &[4])];
    let data = |_: usize, sink: &mut TensorSink<'_>| -> Result<(), WeightsError> { sink.f32(&[value; 4]) };
    write_sharded(folder, "diffusion_pytorch_model", variant, &specs, &Default::default(), 8, data).unwrap();
}

#[test]
fn a_written_folder_reads_back() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("new/pipeline");
    let golden = DiffusersFolder::open(&golden_folder()).unwrap();
    let config = json!({ "_class_name": "DiTTransformer2DModel", "num_layers": 2, "norm_eps": 1e-5 });
    let mut writer = DiffusersWriter::create(&path, "DiTPipeline").unwrap();
    let transformer = writer.component("transformer", "diffusers", "DiTTransformer2DModel", &config).unwrap();
    write_weights(&transformer, None, 1.0);
    write_weights(&transformer, Some("fp16"), 2.0);
    writer.component("scheduler", "diffusers", "DDIMScheduler", &json!({ "steps_offset": 0 })).unwrap();
    writer.copy_component(&golden, "vae").unwrap();
    writer.index_value("id2label", json!({ "0": "tench" }));
    assert!(!path.exists(), "nothing is seen before the end");
    writer.finish().unwrap();

    assert_eq!(names(&path), ["model_index.json", "scheduler", "transformer", "vae"]);
    assert_eq!(names(&path.join("scheduler")), ["scheduler_config.json"]);
    assert_eq!(names(place.path()), ["new"]);
    assert_eq!(names(&place.path().join("new")), ["pipeline"]);
    let folder = DiffusersFolder::open(&path).unwrap();
    let index = Value::Object(folder.index().clone());
    assert_eq!(
        index,
        json!({
            "_class_name": "DiTPipeline", "_diffusers_version": "0.30.0", "id2label": { "0": "tench" },
            "scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"]
        })
    );
    assert_eq!(folder.component_config("transformer").unwrap(), config);
    assert_eq!(folder.component_config("scheduler").unwrap(), json!({ "steps_offset": 0 }));
    let value = |variant| folder.component_weights("transformer", variant).unwrap().read_f32("b").unwrap()[0];
    assert_eq!((value(None), value(Some("fp16"))), (1.0, 2.0));
    for name in names(&golden_folder().join("vae")) {
        let read = |folder: &Path| fs::read(folder.join("vae").join(&name)).unwrap();
        assert_eq!(read(&path), read(&golden_folder()), "{name}");
    }
}

#[test]
fn a_folder_that_exists_is_not_overwritten() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("pipeline");
    let refused =
        format!("{} exists and is not empty; choose another folder or remove it first", path.display());
    let writer = DiffusersWriter::create(&path, "DiTPipeline").unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("mine"), "mine").unwrap();
    assert_eq!(writer.finish().unwrap_err().to_string(), refused);
    assert_eq!(DiffusersWriter::create(&path, "DiTPipeline").unwrap_err().to_string(), refused);
    let file = DiffusersWriter::create(&path.join("mine"), "DiTPipeline").unwrap_err().to_string();
    assert!(file.contains("mine exists and is not empty"), "{file}");
    assert_eq!(names(place.path()), ["pipeline"]);
    assert_eq!(fs::read(path.join("mine")).unwrap(), b"mine");

    fs::remove_file(path.join("mine")).unwrap();
    DiffusersWriter::create(&path, "DiTPipeline").unwrap().finish().unwrap();
    assert_eq!(names(&path), ["model_index.json"]);
}

#[test]
fn a_writer_that_is_given_up_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let mut writer = DiffusersWriter::create(&place.path().join("pipeline"), "DiTPipeline").unwrap();
    let folder = writer.component("transformer", "diffusers", "DiTTransformer2DModel", &json!({})).unwrap();
    write_weights(&folder, None, 1.0);
    drop(writer);
    assert!(names(place.path()).is_empty());
}
