mod messages;
mod ranges;

use std::path::PathBuf;

use crate::load::{MINIMAL, known_keys};
use crate::suggest::{ALIASES, nearest};
use crate::{
    ByteSize, DIT_PRESETS, DataKind, Diffusion, DitArchitecture, Flow, Gaussian, GuidanceMode, ImageSize,
    Model, NoiseSchedule, OptimKind, Precision, Recipe, RecipeError, Sampler, Target, TimeDensity,
    differences, node,
};

const DIGITS: &str = "\
model: {hidden_size: 128, depth: 6, heads: 4, patch_size: 2, image_size: 8, channels: 1, classes: 10}
data: {kind: digits}
train: {steps: 10, batch: 8}
";

fn load(yaml: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Recipe::from_yaml(yaml, "recipes/x.yaml", &overrides)
}

fn message(yaml: &str, overrides: &[&str]) -> String {
    load(yaml, overrides).expect_err("this recipe is wrong").to_string()
}

#[test]
fn a_short_recipe_gets_every_default() {
    let recipe = load(DIGITS, &[]).unwrap();
    assert_eq!(recipe.name, "x");
    assert_eq!(recipe.output, PathBuf::from("runs/x"));
    assert_eq!(recipe.device, "cpu");
    let Model::Dit(dit) = &recipe.model;
    let free = DitArchitecture::Free { hidden_size: 128, depth: 6, heads: 4, patch_size: 2, mlp_ratio: 4.0 };
    assert_eq!(dit.architecture(), Some(free));
    assert_eq!(dit.label_dropout, 0.1);
    let Diffusion::Gaussian(gaussian) = &recipe.diffusion else { panic!("gaussian is the default") };
    assert_eq!(
        (gaussian.schedule, gaussian.steps, gaussian.target),
        (NoiseSchedule::Linear, 1000, Target::Epsilon)
    );
    assert_eq!((recipe.data.image_size, recipe.data.channels), (ImageSize::square(8), 1));
    assert_eq!(
        (recipe.optim.kind, recipe.optim.lr, recipe.optim.betas),
        (OptimKind::Adamw, 1e-4, [0.9, 0.999])
    );
    assert_eq!(recipe.ema.rates, [0.9999]);
    assert_eq!(recipe.train.chunk_size, ByteSize(32 << 20));
    assert_eq!(recipe.sample.sampler, Sampler::Ddim);
    assert_eq!(load(DIGITS, &["diffusion.kind=flow"]).unwrap().sample.sampler, Sampler::FlowEuler);
}

#[test]
fn overrides_replace_values_of_every_form() {
    let overrides = [
        "optim.lr=2e-4",
        "ema.rates=[0.99, 0.999]",
        "optim.clip=1.5",
        "optim.clip=null",
        "train.steps=2e5",
        "train.chunk_size=1MiB",
        "sample.guidance_mode={interval: {low: 0.1, high: 0.8}}",
        "data.flip=true",
        "train.precision=bf16",
        "name=try",
        "seed=18446744073709551615",
        "model.mlp_ratio=2",
    ];
    let recipe = load(DIGITS, &overrides).unwrap();
    assert_eq!(recipe.optim.lr, 2e-4);
    assert_eq!(recipe.ema.rates, [0.99, 0.999]);
    assert_eq!(recipe.optim.clip, None);
    assert_eq!(recipe.train.steps, 200_000);
    assert_eq!(recipe.train.chunk_size, ByteSize(1 << 20));
    assert_eq!(recipe.sample.guidance_mode, GuidanceMode::Interval { low: 0.1, high: 0.8 });
    assert!(recipe.data.flip);
    assert_eq!(recipe.train.precision, Precision::Bf16);
    assert_eq!((recipe.name.as_str(), recipe.output), ("try", PathBuf::from("runs/try")));
    assert_eq!(recipe.seed, u64::MAX);
    let Model::Dit(dit) = recipe.model;
    assert_eq!(dit.mlp_ratio, Some(2.0));
}

#[test]
fn the_resolved_recipe_loads_back_to_itself() {
    let variants: [&[&str]; 6] = [
        &[],
        &["diffusion.kind=flow", "diffusion.time={logit_normal: {mean: -0.5, std: 1.2}}"],
        &["diffusion.min_snr_gamma=5", "optim.clip=0.1", "optim.eps=1e-12", "data.range=[0, 16]"],
        &[
            "sample.guidance_mode=power_cosine",
            "sample.classes=[1, 2]",
            "sample.ema=0.9999",
            "output='a b/: #c'",
        ],
        &[
            "name='1e3'",
            "device='cpu:2'",
            "data={kind: npz, path: x, images: 'null'}",
            "data.cache=0B",
            "ema.rates=[]",
        ],
        &["model.image_size=[8, 16]", "data={kind: npz, path: 'true'}", "seed=18446744073709551615"],
    ];
    for overrides in variants {
        let recipe = load(DIGITS, overrides).unwrap();
        let again = Recipe::from_yaml(&recipe.to_yaml(), "elsewhere/resolved.yaml", &[]).unwrap();
        assert_eq!(again, recipe, "{overrides:?}");
        assert_eq!(differences(&recipe, &again), Vec::<String>::new());
    }
}

#[test]
fn the_resolved_recipe_writes_every_default() {
    let yaml = load(MINIMAL, &[]).unwrap().to_yaml();
    for line in
        ["kind: gaussian", "weight_decay: 0.0", "clip: null", "chunk_size: 32MiB", "keep_last: 3", "eta: 0.0"]
    {
        assert!(yaml.contains(line), "{line} is not in\n{yaml}");
    }
}

#[test]
fn differences_are_told_key_by_key() {
    let before = load(DIGITS, &["ema.rates=[0.9]"]).unwrap();
    let after = load(DIGITS, &["optim.lr=2e-4", "ema.rates=[0.9, 0.99]", "diffusion.kind=flow"]).unwrap();
    let expected = [
        "diffusion.kind: gaussian -> flow",
        "diffusion.schedule: linear -> absent",
        "diffusion.steps: 1000 -> absent",
        "diffusion.target: epsilon -> absent",
        "diffusion.min_snr_gamma: null -> absent",
        "optim.lr: 0.0001 -> 0.0002",
        "ema.rates: [0.9] -> [0.9, 0.99]",
        "sample.sampler: ddim -> flow_euler",
        "diffusion.time: absent -> uniform",
    ];
    assert_eq!(differences(&before, &after), expected);
}

#[test]
fn presets_are_the_published_twelve() {
    for preset in DIT_PRESETS {
        let Model::Dit(dit) = load(MINIMAL, &[&format!("model.preset={preset}")]).unwrap().model;
        assert_eq!(dit.architecture(), Some(DitArchitecture::Preset(preset.into())));
        assert_eq!(dit.patch_size(), preset[preset.len() - 1..].parse().ok());
    }
}

#[test]
fn guidance_modes_have_a_short_form() {
    let modes = [
        ("all", GuidanceMode::All),
        ("first_three", GuidanceMode::FirstThree),
        ("interval:0.1:0.7", GuidanceMode::Interval { low: 0.1, high: 0.7 }),
        ("power_cosine", GuidanceMode::PowerCosine { power: 4.0 }),
        ("power_cosine:2", GuidanceMode::PowerCosine { power: 2.0 }),
    ];
    for (text, mode) in modes {
        assert_eq!(text.parse(), Ok(mode), "{text}");
        let recipe = Recipe::from_yaml(MINIMAL, "x.yaml", &[format!("sample.guidance_mode={text}")]).unwrap();
        assert_eq!(recipe.sample.guidance_mode, mode, "{text}");
    }
    for text in ["", "all:1", "interval", "interval:0.1", "interval:0.1:x", "interval:0:0.5:1", "between:0:1"]
    {
        assert!(text.parse::<GuidanceMode>().is_err(), "{text}");
    }
}

#[test]
fn byte_sizes_read_and_print() {
    let sizes = [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("64 KiB", 64 << 10),
        ("1tib", 1 << 40),
        ("7", 7),
        ("7B", 7),
        ("0.5GiB", 1 << 29),
        ("8GB", 8_000_000_000),
        ("1.5 kB", 1500),
        ("2tb", 2_000_000_000_000),
        ("0.3B", 0),
    ];
    for (text, bytes) in sizes {
        assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
    }
    for text in ["", "GiB", ".GiB", "1.5.2GiB", "-1MiB", "1G", "99999999999TiB", "99999999999.0TiB"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
    for (bytes, text) in [(0, "0B"), (1, "1B"), (1536, "1536B"), (3 << 20, "3MiB"), (1 << 30, "1GiB")] {
        assert_eq!(ByteSize(bytes).to_string(), text);
    }
}

#[test]
fn variants_read_in_all_their_forms() {
    let time = |text: &str| match load(DIGITS, &["diffusion.kind=flow", text]).unwrap().diffusion {
        Diffusion::Flow(Flow { time }) => time,
        Diffusion::Gaussian(_) => panic!("flow was asked for"),
    };
    assert_eq!(time("diffusion.time=uniform"), TimeDensity::Uniform);
    assert_eq!(time("diffusion.time=logit_normal"), TimeDensity::LogitNormal { mean: 0.0, std: 1.0 });
    assert_eq!(
        time("diffusion.time={logit_normal: {mean: 1}}"),
        TimeDensity::LogitNormal { mean: 1.0, std: 1.0 }
    );
    let overrides = ["diffusion={schedule: squared_cosine, target: v, steps: 4}", "sample.steps=4"];
    let gaussian =
        Gaussian { schedule: NoiseSchedule::SquaredCosine, steps: 4, target: Target::V, min_snr_gamma: None };
    assert_eq!(load(DIGITS, &overrides).unwrap().diffusion, Diffusion::Gaussian(gaussian));
}

#[test]
fn a_tree_keeps_lines_and_numbers() {
    let tree = node::parse("a: 1e-4\nb:\n  c: [1, x]\n  d: 0x10\n", "t").unwrap();
    let leaves: Vec<_> =
        tree.leaves().into_iter().map(|(key, node)| (key, node.value.to_string(), node.origin)).collect();
    let expected = [("a", "0.0001", 1), ("b.c", "[1, x]", 3), ("b.d", "16", 4)]
        .map(|(key, value, line)| (key.to_string(), value.to_string(), node::Origin::Line(line)));
    assert_eq!(leaves, expected);
}

/// What the resolved form writes is what the reader knows: setting any written key to an unreadable value must be
/// refused as that key's value, never as an unknown key.
#[test]
fn every_written_key_is_read() {
    for kind in ["gaussian", "flow"] {
        let kind = format!("diffusion.kind={kind}");
        let keys = known_keys(&load(MINIMAL, &[&kind]).unwrap().tree());
        assert!(keys.len() > 40);
        for key in keys {
            let message = message(MINIMAL, &[&kind, &format!("{key}={{a: {{b: 1}}, c: 2}}")]);
            assert!(
                message.contains(&format!("'{key}")) && !message.contains("unknown key"),
                "{key}: {message}"
            );
        }
    }
}

#[test]
fn files_are_read_and_missing_ones_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.yaml");
    std::fs::write(&path, DIGITS).unwrap();
    let recipe = Recipe::load(&path, &["train.batch=2".into()]).unwrap();
    assert_eq!((recipe.name.as_str(), recipe.train.batch, recipe.data.kind), ("mine", 2, DataKind::Digits));
    let absent = folder.path().join("absent.yaml");
    let message = Recipe::load(&absent, &[]).unwrap_err().to_string();
    assert!(message.starts_with(&format!("cannot read the recipe {}: ", absent.display())), "{message}");
}

#[test]
fn the_recipes_of_this_repository_load_and_say_how_to_run_them() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../recipes");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        Recipe::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        let text = std::fs::read_to_string(&path).unwrap();
        let head = text.lines().take_while(|line| line.starts_with('#')).collect::<Vec<_>>().join("\n");
        for word in ["anneal train recipes/", "reach", "akes"] {
            assert!(head.contains(word), "the head of {} lacks '{word}'", path.display());
        }
        count += 1;
    }
    assert!(count >= 5);
}
