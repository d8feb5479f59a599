//! The transformer of a whole diffusers pipeline folder: opened, compared with the output that diffusers
//! recorded for it, and written back in both layouts.
//!
//! A golden file `dit_pipeline_io.safetensors` with `tr.in`, `tr.t`, `class_labels` and `tr.out` stands beside
//! the folder `dit_pipeline`; `ANNEAL_GOLDEN` names another place of such pairs (`NAME_io`, `NAME`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anneal_models::dit::{Dit, DitConfig, diffusers_keys, original_keys};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, KeyMap, ParamId, ParamStore, Parameters, ResidentStore, StoreOptions};
use anneal_tensor::{DType, Device, Tensor};
use anneal_testkit::{Golden, Tolerance, assert_close, relative_error};
use anneal_weights::{
    DiffusersFolder, DiffusersWriter, LoadReport, SaveOptions, Target, TensorFiles, load, save,
};
use serde_json::Value;

const TRANSFORMER: &str = "transformer";
const CLASS: &str = "DiTTransformer2DModel";

struct Opened {
    model: Dit,
    store: Arc<ResidentStore>,
    report: LoadReport,
}

impl Opened {
    /// A model with weights from a file, over initial values that `seed` draws.
    fn new(config: &DitConfig, keys: impl Fn(&Parameters) -> KeyMap, files: &TensorFiles, seed: u64) -> Self {
        let opened = Self::initial(config, seed);
        let report = load(&*opened.store, &keys(opened.store.parameters()), files).unwrap();
        Self { report, ..opened }
    }

    fn initial(config: &DitConfig, seed: u64) -> Self {
        let (model, parameters) = Dit::new(config).unwrap();
        let options = StoreOptions { compute_dtype: DType::F32, chunk_elements: 1 << 14, train: false };
        let device = Device::cpu(Some(2), None);
        let store = Arc::new(ResidentStore::new(Arc::new(parameters), &device, options).unwrap());
        store.initialise(seed).unwrap();
        Self { model, store, report: LoadReport::default() }
    }

    fn diffusers(path: &Path, seed: u64) -> Self {
        let folder = DiffusersFolder::open(path).unwrap();
        assert_eq!(folder.class_name(), "DiTPipeline");
        let files = folder.component_weights(TRANSFORMER, None).unwrap();
        let read = |name: &str| files.contains(name).then(|| files.read_f32(name)).transpose();
        let config = DitConfig::from_diffusers(&folder.component_config(TRANSFORMER).unwrap()).unwrap();
        let config = config.with_embedders_of(read).unwrap();
        Self::new(&config, |parameters| diffusers_keys(&config, parameters), &files, seed)
    }

    fn original(path: &Path, config: &DitConfig, seed: u64) -> Self {
        Self::new(config, original_keys, &TensorFiles::open(path).unwrap(), seed)
    }

    fn save_diffusers(&self, path: &Path) {
        let config = self.model.config();
        let mut writer = DiffusersWriter::create(path, "DiTPipeline").unwrap();
        let written = config.to_diffusers().unwrap();
        let folder = writer.component(TRANSFORMER, "diffusers", CLASS, &written).unwrap();
        let keys = diffusers_keys(config, self.store.parameters());
        let target = Target::Component { folder: &folder, variant: None };
        save(&*self.store, &keys, &SaveOptions::default(), target).unwrap();
        writer.finish().unwrap();
    }

    fn save_original(&self, path: &Path) {
        let keys = original_keys(self.store.parameters());
        save(&*self.store, &keys, &SaveOptions::default(), Target::File(path)).unwrap();
    }

    /// The bits of every parameter, by name.
    fn bits(&self) -> Vec<(String, Vec<u32>)> {
        let of = |id: ParamId| self.store.read(id).unwrap().iter().map(|value| value.to_bits()).collect();
        self.store.parameters().iter().map(|(id, spec)| (spec.name.clone(), of(id))).collect()
    }

    #[track_caller]
    fn assert_same_bits(&self, other: &Self) {
        let (left, right) = (self.bits(), other.bits());
        assert_eq!(left.len(), right.len());
        for ((name, left), (other, right)) in left.iter().zip(&right) {
            assert_eq!(name, other);
            assert!(left == right, "{name}: the bits differ");
        }
    }

    /// The network's output for a golden file's inputs.
    fn predict(&self, golden: &Golden) -> Vec<f32> {
        let (values, shape) = golden.f32("tr.in");
        let image = Tensor::from_slice(self.store.device(), &values, &shape).unwrap();
        let timesteps: Vec<f32> = golden.i64("tr.t").0.into_iter().map(|value| value as f32).collect();
        let labels = golden.i64("class_labels").0;
        let forward = Forward::new(self.store.clone());
        let output = self.model.forward(&forward, &image, &timesteps, &Conditioning { labels: &labels });
        output.unwrap().to_vec().unwrap()
    }
}

/// The recorded inputs and outputs, each with the folder that they are of.
fn cases() -> Vec<(Golden, PathBuf)> {
    let pair = |golden: Golden| {
        let name = golden
            .name()
            .strip_suffix("_io")
            .unwrap_or_else(|| panic!("{}: not *_io", golden.path().display()));
        let folder = golden.path().with_file_name(name);
        (golden, folder)
    };
    Golden::matching_with("dit_", "tr.out").into_iter().map(pair).collect()
}

#[test]
fn the_transformer_gives_what_diffusers_recorded() {
    for (golden, folder) in cases() {
        let opened = Opened::diffusers(&folder, 0);
        assert_eq!(opened.report.computed, ["pos_embed"]);
        assert!(opened.report.warnings.is_empty(), "{:?}", opened.report.warnings);
        let expected = golden.f32("tr.out").0;
        let output = opened.predict(&golden);
        assert_close(&format!("{} transformer", golden.name()), &output, &expected, Tolerance::Forward);

        // The settings in which the two published codes differ are seen in these figures.
        let config = opened.model.config().clone();
        let shifted = DitConfig { frequency_shift: 1 - config.frequency_shift, ..config.clone() };
        let norm = DitConfig { mlp_norm_epsilon: 1e-2, ..config.clone() };
        let shared = config.block_embedders.then_some(DitConfig { block_embedders: false, ..config });
        for other in [shifted, norm].into_iter().chain(shared) {
            let files = DiffusersFolder::open(&folder).unwrap().component_weights(TRANSFORMER, None).unwrap();
            let opened = Opened::new(&other, |parameters| diffusers_keys(&other, parameters), &files, 0);
            let error = relative_error(&opened.predict(&golden), &expected);
            assert!(
                error > Tolerance::Forward.limit(),
                "{}: {other:?} goes unnoticed: {error:e}",
                golden.name()
            );
        }
    }
}

#[test]
fn written_back_in_both_layouts_it_has_the_same_bits() {
    for (golden, folder) in cases() {
        let place = tempfile::tempdir().unwrap();
        let (written, file) = (place.path().join("pipeline"), place.path().join("original.safetensors"));
        let opened = Opened::diffusers(&folder, 0);
        opened.save_diffusers(&written);
        opened.save_original(&file);
        let again = Opened::diffusers(&written, 1);
        // What diffusers needs to rebuild the network is what it wrote itself.
        assert_eq!(again.model.config(), opened.model.config(), "{}", golden.name());
        opened.assert_same_bits(&again);
        let original = Opened::original(&file, opened.model.config(), 2);
        assert!(original.report.computed.is_empty());
        let files = TensorFiles::open(&file).unwrap();
        let shape = |name: &str| files.shape(name).map(<[usize]>::to_vec);
        let inferred = DitConfig::infer(shape, Some(opened.model.config().heads)).unwrap();
        assert_eq!(inferred.block_embedders, opened.model.config().block_embedders);
        opened.assert_same_bits(&original);
        // And from the original layout on to diffusers' once more.
        let third = place.path().join("third");
        original.save_diffusers(&third);
        opened.assert_same_bits(&Opened::diffusers(&third, 3));
        let output: Vec<u32> = opened.predict(&golden).iter().map(|value| value.to_bits()).collect();
        let back: Vec<u32> = again.predict(&golden).iter().map(|value| value.to_bits()).collect();
        assert_eq!(output, back);
        let theirs = DiffusersFolder::open(&folder).unwrap().component_weights(TRANSFORMER, None).unwrap();
        let ours = DiffusersFolder::open(&written).unwrap().component_weights(TRANSFORMER, None).unwrap();
        for name in ours.names() {
            assert_eq!(ours.shape(name), theirs.shape(name), "{name}");
            assert!(ours.read_f32(name).unwrap() == theirs.read_f32(name).unwrap(), "{name}: other values");
        }
        let is_computed = |name: &&str| *name == "pos_embed.pos_embed";
        let left_out: Vec<&str> = theirs.names().filter(|name| !ours.contains(name)).collect();
        assert!(left_out.iter().all(is_computed), "not written: {left_out:?}");
    }
}

/// diffusers' class keeps these keys and no others that could change the network.
#[test]
fn the_written_configuration_is_the_recorded_one() {
    for (_, folder) in cases() {
        let theirs = DiffusersFolder::open(&folder).unwrap().component_config(TRANSFORMER).unwrap();
        let ours = DitConfig::from_diffusers(&theirs).unwrap().to_diffusers().unwrap();
        for (key, value) in theirs.as_object().unwrap().iter().filter(|(key, _)| *key != "_diffusers_version")
        {
            assert_eq!(ours.get(key), Some(value), "{key}");
        }
    }
}

#[test]
fn a_small_label_table_is_filled_up_for_diffusers_and_comes_back() {
    let config = DitConfig {
        image_size: [8, 8],
        channels: 1,
        patch_size: 2,
        hidden_size: 32,
        depth: 2,
        heads: 2,
        mlp_ratio: 4.0,
        classes: 10,
        learn_sigma: false,
        mlp_norm_epsilon: 1e-6,
        frequency_shift: 1,
        block_embedders: false,
    };
    let opened = Opened::initial(&config, 7);
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("pipeline");
    opened.save_diffusers(&path);

    let folder = DiffusersFolder::open(&path).unwrap();
    let files = folder.component_weights(TRANSFORMER, None).unwrap();
    let id = opened.store.parameters().find("y_embedder.embedding_table.weight").unwrap();
    let ours = opened.store.read(id).unwrap();
    assert_eq!(ours.len(), 11 * 32);
    let null = &ours[10 * 32..];
    assert_ne!(&ours[..32], null, "rows differ, so that a wrong one would show");
    for block in 0..2 {
        let name = format!("transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight");
        assert_eq!(files.shape(&name), Some(&[1001, 32][..]));
        let table = files.read_f32(&name).unwrap();
        assert_eq!(table[..10 * 32], ours[..10 * 32]);
        assert!(table[10 * 32..].chunks(32).all(|row| row == null), "every further row is the null row");
    }
    let again = Opened::diffusers(&path, 8);
    assert_eq!(again.model.config(), &config);
    opened.assert_same_bits(&again);

    // Without our own key, as another program would write it, the table has its 1000 classes.
    let mut written = folder.component_config(TRANSFORMER).unwrap();
    assert_eq!(written["num_embeds_ada_norm"], Value::from(1000));
    written.as_object_mut().unwrap().remove("anneal_classes");
    let wide = DitConfig::from_diffusers(&written).unwrap();
    assert_eq!(wide.classes, 1000);
    let wide = Opened::new(&wide, |parameters| diffusers_keys(&wide, parameters), &files, 9);
    let table =
        wide.store.read(wide.store.parameters().find("y_embedder.embedding_table.weight").unwrap()).unwrap();
    assert_eq!(&table[1000 * 32..], null, "label 1000, diffusers' own null label");
}
