//! Safetensors files: against the format's own library both ways, and everything that can be wrong with one.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anneal_testkit::Golden;
use anneal_weights::{
    StoredDType, TensorFiles, TensorSpec, WeightsError, WrittenFile, sha256, write_file, write_sharded,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

type Nothing = Result<(), WeightsError>;

fn no_metadata() -> BTreeMap<String, String> {
    BTreeMap::new()
}

/// A file that the format's own library wrote: `a` f32 [2, 3], `b` bf16 [4], `c` i64 [2], `d` f64 [1], `e` f16 [2].
fn foreign_file(folder: &Path) -> PathBuf {
    let a: Vec<u8> = (0..6).flat_map(|value| (value as f32 / 3.0).to_le_bytes()).collect();
    let b: Vec<u8> =
        [0x3f80_u16, 0xbf80, 0x4049, 0x7f80].iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let c: Vec<u8> = [i64::MIN, 3].iter().flat_map(|value| value.to_le_bytes()).collect();
    let d = 0.1_f64.to_le_bytes().to_vec();
    let e: Vec<u8> = [0x3c00_u16, 0x0001].iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let tensors = [
        ("a", Dtype::F32, vec![2, 3], &a),
        ("b", Dtype::BF16, vec![4], &b),
        ("c", Dtype::I64, vec![2], &c),
        ("d", Dtype::F64, vec![1], &d),
        ("e", Dtype::F16, vec![2], &e),
    ]
    .map(|(name, dtype, shape, bytes)| (name, TensorView::new(dtype, shape, bytes).unwrap()));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let path = folder.join("foreign.safetensors");
    fs::write(&path, safetensors::serialize(tensors, Some(metadata)).unwrap()).unwrap();
    path
}

#[test]
fn files_of_the_formats_own_library_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let files = TensorFiles::open(&foreign_file(folder.path())).unwrap();
    assert_eq!(files.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
    assert_eq!((files.len(), files.contains("a"), files.contains("f")), (5, true, false));
    assert_eq!(files.metadata()["format"], "pt");
    assert_eq!((files.shape("a").unwrap(), files.dtype("b").unwrap()), (&[2, 3][..], StoredDType::BF16));
    assert_eq!(files.read_f32("a").unwrap(), [0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 4.0 / 3.0, 5.0 / 3.0]);
    assert_eq!(files.read_f32("b").unwrap(), [1.0, -1.0, 3.140_625, f32::INFINITY]);
    assert_eq!(files.read_i64("c").unwrap(), [i64::MIN, 3]);
    assert_eq!(files.read_f32("d").unwrap(), [0.1]);
    assert_eq!(files.read_f32("e").unwrap(), [1.0, 2.0_f32.powi(-24)]);
    assert_eq!(files.read_bytes("e").unwrap(), [0, 0x3c, 1, 0]);
}

#[test]
fn golden_files_read_as_the_formats_own_library_reads_them() {
    for golden in Golden::matching("dit_") {
        let files = TensorFiles::open(golden.path()).unwrap();
        assert_eq!(files.names().map(String::from).collect::<Vec<_>>(), golden.names(""));
        let floats = golden.names("").into_iter().filter(|name| files.dtype(name) == Some(StoredDType::F32));
        let mut compared = 0;
        for name in floats {
            let (values, shape) = golden.f32(&name);
            assert_eq!(
                (files.read_f32(&name).unwrap(), files.shape(&name).unwrap()),
                (values, &shape[..]),
                "{name}"
            );
            compared += 1;
        }
        assert!(compared > 10, "{}", golden.name());
    }
}

#[test]
fn a_prefix_selects_and_is_cut() {
    let golden = Golden::open("dit_small");
    let files = TensorFiles::open(golden.path()).unwrap();
    let parameters = files.under("param.");
    let expected = golden.names("param.");
    assert_eq!(parameters.len(), expected.len());
    assert!(parameters.names().zip(&expected).all(|(name, full)| *full == format!("param.{name}")));
    let name = "x_embedder.proj.weight";
    assert_eq!(parameters.read_f32(name).unwrap(), golden.f32(&format!("param.{name}")).0);
    assert_eq!(parameters.spec(name).unwrap().name, name);
}

/// Mixed types in an order that would leave the wide ones unaligned.
fn mixed() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("bytes", StoredDType::U8, &[3]),
        TensorSpec::new("half", StoredDType::BF16, &[3]),
        TensorSpec::new("float", StoredDType::F32, &[1, 3]),
        TensorSpec::new("count", StoredDType::I64, &[1]),
        TensorSpec::new("scalar", StoredDType::F64, &[]),
        TensorSpec::new("nothing", StoredDType::F16, &[0]),
    ]
}

fn fill(index: usize, sink: &mut anneal_weights::TensorSink<'_>) -> Nothing {
    match index {
        0 => sink.bytes(&[1, 2, 3]),
        1 | 2 => sink.f32(&[1.0, -2.5, 3.0]),
        3 => sink.bytes(&7_i64.to_le_bytes()),
        4 => sink.f32(&[0.25]),
        _ => Ok(()),
    }
}

#[test]
fn the_formats_own_library_reads_written_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mixed.safetensors");
    let metadata =
        BTreeMap::from([("format".to_string(), "pt".to_string()), ("é\"\\".to_string(), "\n".to_string())]);
    let written = write_file(&path, &mixed(), &metadata, fill).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(
        written,
        WrittenFile { name: "mixed.safetensors".into(), bytes: bytes.len() as u64, sha256: sha256(&bytes) }
    );

    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap(), &metadata.into_iter().collect::<HashMap<_, _>>());
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| read.tensor(name).unwrap().data().to_vec();
    assert_eq!(data("bytes"), [1, 2, 3]);
    assert_eq!(data("half"), [0x80, 0x3f, 0x20, 0xc0, 0x40, 0x40]);
    assert_eq!(data("float"), [1.0_f32, -2.5, 3.0].map(f32::to_le_bytes).concat());
    assert_eq!(data("scalar"), 0.25_f64.to_le_bytes());
    assert_eq!(
        (read.tensor("float").unwrap().shape(), read.tensor("scalar").unwrap().shape()),
        (&[1, 3][..], &[][..])
    );
    for (name, view) in read.tensors() {
        let size = match view.dtype() {
            Dtype::I64 | Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::U8 => 1,
            _ => 2,
        };
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(offset.is_multiple_of(size), "{name} starts at byte {offset}");
    }
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    fs::write(&path, "old").unwrap();
    let specs = [TensorSpec::new("a", StoredDType::F32, &[2]), TensorSpec::new("n", StoredDType::I64, &[1])];
    let message = |values: &[f32]| {
        let data = |_: usize, sink: &mut anneal_weights::TensorSink<'_>| sink.f32(values);
        write_file(&path, &specs[..1], &no_metadata(), data).unwrap_err().to_string()
    };
    assert!(message(&[1.0]).ends_with("'a' needs 8 bytes and was given 4"));
    assert!(message(&[1.0; 3]).ends_with("'a' needs 8 bytes and was given 12"));
    let wrong =
        write_file(&path, &specs[1..], &no_metadata(), |_, sink| sink.f32(&[1.0])).unwrap_err().to_string();
    assert!(wrong.ends_with("'n' is I64; f32 values cannot be written to it"), "{wrong}");
    let twice = [specs[0].clone(), specs[0].clone()];
    let twice =
        write_file(&path, &twice, &no_metadata(), |_, sink| sink.f32(&[1.0; 2])).unwrap_err().to_string();
    assert_eq!(twice, format!("{}: 'a' is a name that is already taken", path.display()));
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Five tensors of 40 bytes.
fn five() -> Vec<TensorSpec> {
    (0..5).map(|index| TensorSpec::new(format!("t{index}"), StoredDType::F32, &[10])).collect()
}

fn write_five(folder: &Path, variant: Option<&str>, max_shard_bytes: u64) -> Vec<String> {
    let data = |index: usize, sink: &mut anneal_weights::TensorSink<'_>| -> Nothing {
        sink.f32(&[index as f32; 10])
    };
    let written =
        write_sharded(folder, "model", variant, &five(), &no_metadata(), max_shard_bytes, data).unwrap();
    written.into_iter().map(|file| file.name).collect()
}

#[test]
fn shards_and_their_index_read_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let names = write_five(folder.path(), None, 80);
    assert_eq!(
        names,
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors"
        ]
    );
    let index_path = folder.path().join("model.safetensors.index.json");
    let index: serde_json::Value = serde_json::from_slice(&fs::read(&index_path).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 200);
    let expected = (0..5).map(|tensor| (format!("t{tensor}"), names[tensor / 2].clone()));
    let map: BTreeMap<String, String> = serde_json::from_value(index["weight_map"].clone()).unwrap();
    assert_eq!(map, expected.collect());
    for path in [folder.path(), index_path.as_path()] {
        let files = TensorFiles::open(path).unwrap();
        assert_eq!(files.path(), index_path);
        assert_eq!(files.paths().len(), 3);
        for tensor in 0..5 {
            let name = format!("t{tensor}");
            assert_eq!(files.read_f32(&name).unwrap(), [tensor as f32; 10]);
            assert_eq!(files.file_of(&name).unwrap(), folder.path().join(&names[tensor / 2]));
        }
    }
}

#[test]
fn names_of_files_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(write_five(folder.path(), None, 200), ["model.safetensors"]);
    assert_eq!(write_five(folder.path(), Some("fp16"), 200), ["model.fp16.safetensors"]);
    let shards = write_five(folder.path(), Some("ema"), 160);
    assert_eq!(shards, ["model.ema-00001-of-00002.safetensors", "model.ema-00002-of-00002.safetensors"]);
    assert!(folder.path().join("model.safetensors.index.ema.json").is_file());
    // Larger than a shard: alone in one.
    assert_eq!(write_five(folder.path(), None, 1).len(), 5);
}

fn error_of(path: &Path) -> String {
    TensorFiles::open(path).unwrap_err().to_string()
}

#[test]
fn a_missing_shard_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let names = write_five(folder.path(), None, 80);
    let index = folder.path().join("model.safetensors.index.json");
    fs::remove_file(folder.path().join(&names[1])).unwrap();
    fs::remove_file(folder.path().join(&names[2])).unwrap();
    assert_eq!(
        error_of(folder.path()),
        format!(
            "{} names shards that are not there: {}, {}; download them into the same folder",
            index.display(),
            names[1],
            names[2]
        )
    );
}

#[test]
fn an_index_that_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let names = write_five(folder.path(), None, 120);
    let index = folder.path().join("model.safetensors.index.json");
    let message = |text: String| {
        fs::write(&index, text).unwrap();
        error_of(&index).strip_prefix(&format!("{}: ", index.display())).unwrap().to_string()
    };
    let map = |tensor: &str, shard: &str| format!(r#"{{"weight_map": {{"{tensor}": "{shard}"}}}}"#);
    assert_eq!(
        message(map("t4", &names[0])),
        format!("the index says that 't4' is in {}, and it is not", names[0])
    );
    let outside = "the index names the shard '../secret.safetensors', which is not a plain file name";
    assert_eq!(message(map("t4", "../secret.safetensors")), outside);
    assert!(message("{}".into()).starts_with("not an index of weight shards: missing field `weight_map`"));
    assert_eq!(message(r#"{"weight_map": {}}"#.into()), "the index names no tensors");
}

#[test]
fn two_shards_with_the_same_tensor_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let one = foreign_file(folder.path());
    let other = folder.path().join("other.safetensors");
    fs::copy(&one, &other).unwrap();
    assert_eq!(
        TensorFiles::open_all(&[one.clone(), other.clone()]).unwrap_err().to_string(),
        format!("'c' is both in {} and in {}; give only one of them", other.display(), one.display())
    );
    assert_eq!(
        error_of(folder.path()),
        format!(
            "{} holds several weight files (foreign.safetensors, other.safetensors); name one of them",
            folder.path().display()
        )
    );
}

#[test]
fn a_place_without_weights_is_named() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(error_of(folder.path()), format!("{} holds no .safetensors file", folder.path().display()));
    let missing = folder.path().join("no.safetensors");
    assert_eq!(error_of(&missing), format!("cannot read {}: no such file or folder", missing.display()));
}

#[test]
fn tensors_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = foreign_file(folder.path());
    let files = TensorFiles::open(&path).unwrap();
    let path = path.display();
    assert_eq!(files.read_f32("z").unwrap_err().to_string(), format!("{path} holds no tensor 'z'"));
    assert_eq!(
        files.read_f32("c").unwrap_err().to_string(),
        format!("'c' in {path} is I64; it cannot be read as f32")
    );
    assert_eq!(
        files.read_i64("a").unwrap_err().to_string(),
        format!("'a' in {path} is F32; it cannot be read as i64")
    );
}

#[test]
fn a_file_cut_anywhere_is_refused_with_both_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let path = foreign_file(folder.path());
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let cut = folder.path().join("cut.safetensors");
    for length in 0..whole.len() {
        fs::write(&cut, &whole[..length]).unwrap();
        let name = cut.display();
        let expected = match length {
            0..8 => format!(
                "{name} is not a safetensors file: it has {length} bytes, and the header alone needs more than 8"
            ),
            _ if length < header => format!(
                "{name} is a damaged safetensors file: it ends inside its header: expected at least {header} bytes, \
                 found {length}; copy or download it again"
            ),
            _ => format!(
                "{name} is a damaged safetensors file: it was cut off: expected {} bytes, found {length}; copy or \
                 download it again",
                whole.len()
            ),
        };
        assert_eq!(error_of(&cut), expected);
        // A truncation in place makes some disks wait for the medium.
        fs::remove_file(&cut).unwrap();
    }
    fs::write(&cut, [&whole[..], b"xy"].concat()).unwrap();
    assert!(error_of(&cut).contains(&format!(
        "it has bytes after its end: expected {} bytes, found {}",
        whole.len(),
        whole.len() + 2
    )));
}

/// A turned bit in the header is refused, or changes what is in it and is harmless to memory.
#[test]
fn a_turned_bit_in_the_header_never_reads_outside() {
    let folder = tempfile::tempdir().unwrap();
    let path = foreign_file(folder.path());
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (mut refused, mut harmless) = (0, 0);
    for bit in 0..8 * header {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &changed).unwrap();
        match TensorFiles::open(&path) {
            Err(WeightsError::Damaged { .. } | WeightsError::NotSafetensors { .. }) => refused += 1,
            Err(error) => panic!("bit {bit}: {error}"),
            Ok(files) => {
                files.names().for_each(|name| drop(files.read_bytes(name).unwrap()));
                harmless += 1;
            }
        }
    }
    // Names, texts, and types of the same size are all that can change: the checkpoint's hashes catch those.
    assert!(refused > 3 * harmless, "{refused} refused, {harmless} harmless");
}

/// A header as text, with so many bytes of data behind it.
fn crafted(folder: &Path, header: &str, data: usize) -> String {
    let path = folder.join("crafted.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    fs::write(&path, bytes).unwrap();
    let message = error_of(&path);
    message.strip_prefix(&format!("{} is a", path.display())).unwrap_or(&message).to_string()
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |name: &str, dtype: &str, shape: &str, from: usize, to: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let message =
        |tensors: &[String], data| crafted(folder.path(), &format!("{{{}}}", tensors.join(",")), data);
    let damaged = |reason: &str| format!(" damaged safetensors file: {reason}; copy or download it again");
    let a = tensor("a", "F32", "[2]", 0, 8);
    let cases = [
        (
            vec![a.clone(), tensor("b", "F32", "[2]", 4, 12)],
            12,
            "'b' overlaps the tensor before it: it starts at byte 4 of the data, expected 8",
        ),
        (
            vec![a.clone(), tensor("b", "F32", "[2]", 12, 20)],
            20,
            "'b' leaves a gap before it: it starts at byte 12 of the data, expected 8",
        ),
        (vec![tensor("a", "F32", "[3]", 0, 8)], 8, "'a' is F32 [3], which does not fill its bytes 0 to 8"),
        (vec![tensor("a", "F32", "[2]", 8, 0)], 8, "'a' is F32 [2], which does not fill its bytes 8 to 0"),
        (
            vec![tensor("a", "F32", "[4611686018427387904, 4]", 0, 0)],
            0,
            "'a' is F32 [4611686018427387904, 4], which does not fill its bytes 0 to 0",
        ),
        (vec![tensor("a", "F3", "[2]", 0, 8)], 8, "'a' has the unknown element type 'F3'"),
        (vec![a.clone(), a.clone()], 8, "its header names 'a' twice"),
    ];
    for (tensors, data, reason) in cases {
        assert_eq!(message(&tensors, data), damaged(reason));
    }
    let unreadable = crafted(folder.path(), r#"{"a":{"dtype":"F32"}}"#, 0);
    assert!(
        unreadable.starts_with(" damaged safetensors file: its header cannot be read: 'a': "),
        "{unreadable}"
    );
}

#[test]
fn other_files_are_not_taken_for_damaged_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.safetensors");
    let message = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        error_of(&path)
            .strip_prefix(&format!("{} is not a safetensors file: ", path.display()))
            .unwrap()
            .to_string()
    };
    let png = b"\x89PNG\r\n\x1a\n and so on";
    assert_eq!(
        message(png),
        format!("its first 8 bytes give a header of {} bytes", u64::from_le_bytes(*b"\x89PNG\r\n\x1a\n"))
    );
    assert_eq!(message(b"\x04\0\0\0\0\0\0\0abcd"), "its header is not JSON");
    assert_eq!(message(b""), "it has 0 bytes, and the header alone needs more than 8");
}
