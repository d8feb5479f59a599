//! From a layout's tensors to parameters and back, on a made-up model with every kind of key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anneal_nn::{Builder, Init, KeyEntry, KeyMap, ParamStore, ResidentStore, StoreOptions};
use anneal_tensor::{DType, Device};
use anneal_weights::{
    LoadReport, SaveOptions, StoredDType, Target, TensorFiles, TensorSink, TensorSpec, WeightsError, load,
    save, write_file,
};

/// Parameters: `qkv [6, 2]`, `norm [2]`, `table [3, 2]` and a frozen `positions [2, 2]`.
fn store(compute_dtype: DType) -> ResidentStore {
    let mut builder = Builder::new();
    builder.scope("all", |builder| {
        builder.add("qkv", &[6, 2], Init::Zeros);
        builder.add("norm", &[2], Init::Ones);
        builder.add("table", &[3, 2], Init::Zeros);
        builder.add_frozen("positions", &[2, 2], Init::Values(vec![9.0; 4].into()));
    });
    let options = StoreOptions { compute_dtype, chunk_elements: 16, train: false };
    let store = ResidentStore::new(Arc::new(builder.finish()), &Device::cpu(Some(1), None), options).unwrap();
    store.initialise(0).unwrap();
    store
}

/// Queries, keys and values apart; the norm twice; the table padded to five rows; positions computed.
fn map() -> KeyMap {
    let homes = vec![vec!["block0.norm".into()], vec!["block1.norm".into()]];
    KeyMap {
        entries: vec![
            KeyEntry::joined("qkv", ["q", "k", "v"].map(String::from)),
            KeyEntry { homes, ..KeyEntry::renamed("norm", "") },
            KeyEntry { padded_rows: Some(5), ..KeyEntry::renamed("table", "labels") },
            KeyEntry::computed("positions", "pos"),
        ],
    }
}

type Tensors = BTreeMap<&'static str, (Vec<usize>, Vec<f32>)>;

/// What the map asks for.
fn foreign() -> Tensors {
    BTreeMap::from([
        ("q", (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0])),
        ("k", (vec![2, 2], vec![5.0, 6.0, 7.0, 8.0])),
        ("v", (vec![2, 2], vec![9.0, 10.0, 11.0, 12.0])),
        ("block0.norm", (vec![2], vec![0.5, -0.5])),
        ("block1.norm", (vec![2], vec![0.5, -0.5])),
        ("labels", (vec![5, 2], vec![1.0, 1.5, 2.0, 2.5, 70.0, 70.0, 80.0, 80.0, 3.0, 3.5])),
    ])
}

fn write(folder: &Path, tensors: &Tensors) -> PathBuf {
    let path = folder.join("foreign.safetensors");
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(name, (shape, _))| TensorSpec::new(*name, StoredDType::F32, shape)).collect();
    let values: Vec<&Vec<f32>> = tensors.values().map(|(_, values)| values).collect();
    let data =
        |index: usize, sink: &mut TensorSink<'_>| -> Result<(), WeightsError> { sink.f32(values[index]) };
    write_file(&path, &specs, &BTreeMap::new(), data).unwrap();
    path
}

fn load_tensors(store: &ResidentStore, tensors: &Tensors) -> Result<LoadReport, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    load(store, &map(), &TensorFiles::open(&write(folder.path(), tensors)).unwrap())
}

fn values(store: &ResidentStore, name: &str) -> Vec<f32> {
    store.read(store.parameters().find(name).unwrap()).unwrap()
}

#[test]
fn pieces_are_joined_and_padding_is_dropped() {
    let store = store(DType::F32);
    let report = load_tensors(&store, &foreign()).unwrap();
    assert_eq!(report, LoadReport { parameters: 3, computed: vec!["positions".into()], warnings: vec![] });
    assert_eq!(values(&store, "qkv"), (1..=12).map(|value| value as f32).collect::<Vec<_>>());
    assert_eq!(values(&store, "norm"), [0.5, -0.5]);
    assert_eq!(values(&store, "table"), [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]);
    assert_eq!(values(&store, "positions"), [9.0; 4]);
}

#[test]
fn saving_writes_every_home_and_pads_with_the_last_row() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(DType::F32);
    let mut expected = foreign();
    load_tensors(&store, &expected).unwrap();
    let path = folder.path().join("saved.safetensors");
    let written = save(&store, &map(), &SaveOptions::default(), Target::File(&path)).unwrap();
    assert_eq!(written.len(), 1);
    let files = TensorFiles::open(&path).unwrap();
    assert_eq!(files.metadata()["format"], "pt");
    expected.insert("labels", (vec![5, 2], vec![1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.0, 3.5, 3.0, 3.5]));
    let read = |name: &str| (files.shape(name).unwrap().to_vec(), files.read_f32(name).unwrap());
    let saved: BTreeMap<&str, _> = files.names().map(|name| (name, read(name))).collect();
    assert_eq!(saved, expected);
}

#[test]
fn what_is_saved_loads_again_bit_for_bit() {
    for (compute, stored) in
        [(DType::F32, StoredDType::F32), (DType::BF16, StoredDType::BF16), (DType::F32, StoredDType::F64)]
    {
        let folder = tempfile::tempdir().unwrap();
        let first = store(compute);
        for (id, spec) in first.parameters().iter() {
            let odd: Vec<f32> = (0..spec.elements()).map(|index| (index as f32 + 0.37).sin()).collect();
            first.write(id, &odd).unwrap();
        }
        let options = SaveOptions { dtype: stored, max_shard_bytes: 30, ..SaveOptions::default() };
        let target = Target::Component { folder: folder.path(), variant: None };
        assert!(save(&first, &map(), &options, target).unwrap().len() > 1, "shards");
        let second = store(compute);
        load(&second, &map(), &TensorFiles::open(folder.path()).unwrap()).unwrap();
        for name in ["qkv", "norm", "table"] {
            assert_eq!(values(&first, name), values(&second, name), "{name} as {stored}");
        }
    }
}

#[test]
fn values_are_rounded_to_the_asked_type() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(DType::F32);
    let norm = store.parameters().find("norm").unwrap();
    store.write(norm, &[1.005, 1.0 + f32::EPSILON]).unwrap();
    let path = folder.path().join("half.safetensors");
    let options = SaveOptions { dtype: StoredDType::BF16, ..SaveOptions::default() };
    save(&store, &map(), &options, Target::File(&path)).unwrap();
    let files = TensorFiles::open(&path).unwrap();
    assert_eq!(files.dtype("block0.norm"), Some(StoredDType::BF16));
    assert_eq!(files.read_f32("block1.norm").unwrap(), [1.007_812_5, 1.0]);

    let options = SaveOptions { dtype: StoredDType::I64, ..SaveOptions::default() };
    let message = save(&store, &map(), &options, Target::File(&path)).unwrap_err().to_string();
    assert_eq!(message, "weights cannot be stored as I64; choose F32, BF16, F16 or F64");
}

#[test]
fn copies_that_differ_are_named() {
    let mut tensors = foreign();
    tensors.insert("block1.norm", (vec![2], vec![0.5, -0.25]));
    let store = store(DType::F32);
    let report = load_tensors(&store, &tensors).unwrap();
    assert_eq!(
        report.warnings,
        ["block0.norm was read, and 1 of its 1 copies differ from it and were not: block1.norm"]
    );
    assert_eq!(values(&store, "norm"), [0.5, -0.5]);

    tensors.remove("block1.norm");
    assert!(load_tensors(&store, &tensors).unwrap().warnings.is_empty(), "a copy need not be there");
}

#[test]
fn computed_tensors_are_ignored_where_present() {
    let mut tensors = foreign();
    tensors.insert("pos", (vec![7], vec![0.0; 7]));
    let store = store(DType::F32);
    load_tensors(&store, &tensors).unwrap();
    assert_eq!(values(&store, "positions"), [9.0; 4]);
}

#[test]
fn all_that_does_not_fit_is_listed_and_nothing_is_written() {
    let mut tensors = foreign();
    tensors.remove("k");
    tensors.remove("labels");
    tensors.insert("bias", (vec![3], vec![0.0; 3]));
    tensors.insert("q", (vec![2, 3], vec![0.0; 6]));
    tensors.insert("block1.norm", (vec![1, 2], vec![0.0; 2]));
    let store = store(DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &tensors);
    let error = load(&store, &map(), &TensorFiles::open(&path).unwrap()).unwrap_err();
    let expected = [
        &format!("{} does not fit the model:", path.display()),
        "  missing: k [2, 2]",
        "  missing: labels [5, 2]",
        "  extra: bias [3]",
        "  misshapen: q: the file has [2, 3], the model needs [2, 2]",
        "  misshapen: block1.norm: the file has [1, 2], the model needs [2]",
    ];
    assert_eq!(error.to_string(), expected.join("\n"));
    assert_eq!((values(&store, "qkv"), values(&store, "norm")), (vec![0.0; 12], vec![1.0; 2]));
}

#[test]
fn a_long_list_is_cut_with_a_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    let specs: Vec<TensorSpec> =
        (0..45).map(|index| TensorSpec::new(format!("layer.{index:02}"), StoredDType::I64, &[])).collect();
    let data = |_: usize, sink: &mut TensorSink<'_>| -> Result<(), WeightsError> { sink.bytes(&[0; 8]) };
    write_file(&path, &specs, &BTreeMap::new(), data).unwrap();
    let message =
        load(&store(DType::F32), &map(), &TensorFiles::open(&path).unwrap()).unwrap_err().to_string();
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines.len(), 1 + 5 + 21 + 1, "{message}");
    assert_eq!((lines[6], lines[25]), ("  extra: layer.00 []", "  extra: layer.19 []"));
    assert_eq!(lines[26], "  extra: and 25 more");
    assert_eq!(lines[27], "  no tensor fits: these are weights of another model, or in another layout");
}

#[test]
fn tensors_of_another_type_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = foreign();
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(name, (shape, _))| TensorSpec::new(*name, StoredDType::I32, shape)).collect();
    let path = folder.path().join("integers.safetensors");
    let data = |index: usize, sink: &mut TensorSink<'_>| -> Result<(), WeightsError> {
        sink.bytes(&vec![0; specs[index].bytes() as usize])
    };
    write_file(&path, &specs, &BTreeMap::new(), data).unwrap();
    let message =
        load(&store(DType::F32), &map(), &TensorFiles::open(&path).unwrap()).unwrap_err().to_string();
    assert!(message.contains("\n  of another type: q: the file has I32, not floating point\n"), "{message}");
}

#[test]
fn key_maps_that_do_not_fit_the_model_are_refused() {
    let store = store(DType::F32);
    let message = |change: fn(&mut KeyMap)| {
        let mut map = map();
        change(&mut map);
        let message =
            save(&store, &map, &SaveOptions::default(), Target::File(Path::new("unused"))).unwrap_err();
        message.to_string().strip_prefix("the key map does not fit the model: ").unwrap().to_string()
    };
    assert_eq!(message(|map| drop(map.entries.remove(1))), "'norm' has no entry");
    assert_eq!(message(|map| map.entries.push(map.entries[0].clone())), "'qkv' has two entries");
    assert_eq!(message(|map| map.entries[0].parameter = "qk".into()), "the model has no parameter 'qk'");
    assert_eq!(
        message(|map| map.entries[0].homes[0].push("w".into())),
        "'qkv' has 6 rows, which do not divide into 4 tensors"
    );
    assert_eq!(
        message(|map| map.entries[2].padded_rows = Some(2)),
        "'table' has 3 rows and cannot be stored in 2"
    );
}
