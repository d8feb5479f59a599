//! Each kind of source, from files made here.

mod common;

use anneal_data::decode::decode;
use anneal_data::npz::{Array, Values, write_npz, write_samples};
use anneal_data::{BUILTIN_DIGITS, Content, Cursor, Holds, LoaderConfig, SourceConfig, SourceKind, open};
use common::{batches, class_folder, encode, loader, open_path, picture, source, write};
use image::ImageFormat;
use std::path::Path;

#[test]
fn the_shipped_digits_are_the_published_ones() {
    let dataset = open(&SourceConfig { path: BUILTIN_DIGITS.to_owned(), ..SourceConfig::default() }).unwrap();
    assert_eq!((dataset.len(), dataset.classes(), dataset.shape()), (1797, 10, Some([1, 8, 8])));
    // The counts of each class in the UCI data's test part.
    let mut counts = [0; 10];
    (0..1797).for_each(|index| counts[dataset.label(index) as usize] += 1);
    assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    // The first row of the file: 0 0 5 13 9 1 0 0, of 16.
    let Content::Pixels(first) = dataset.load(0).unwrap().content else { panic!("digits are pixels") };
    assert_eq!(first.bytes[..8], [0, 0, 5, 13, 9, 1, 0, 0].map(|count: u32| ((count * 255 + 8) / 16) as u8));
    assert_eq!(dataset.label(0), 0);
}

#[test]
fn npz_holds_8_bit_or_floating_point_images() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let labels = Array::new([2], Values::I32(vec![2, 0]));
    let floats = Array::new([2, 1, 2, 3], Values::F32((0..12).map(|value| value as f32).collect()));
    write_npz(&path, &[("images", &floats), ("labels", &labels)]).unwrap();
    let dataset = open_path(&path);
    assert_eq!((dataset.len(), dataset.classes(), dataset.holds()), (2, 3, Holds::FloatImages));
    assert_eq!(dataset.shape(), Some([3, 1, 2]));
    assert_eq!(dataset.load(1).unwrap().content, Content::Values(vec![6.0, 9.0, 7.0, 10.0, 8.0, 11.0]));

    write_samples(&path, (0..24).collect(), [2, 2, 2, 3], Some(vec![4, 1])).unwrap();
    let dataset = open_path(&path);
    assert_eq!((dataset.holds(), dataset.classes(), dataset.label(0)), (Holds::Images, 5, 4));

    let grey = Array::new([1, 2, 2], Values::U8(vec![0, 128, 255, 16]));
    write_npz(&path, &[("x", &grey)]).unwrap();
    let named = SourceConfig { image_array: Some("x".to_owned()), ..source(&path) };
    let dataset = open(&named).unwrap();
    assert_eq!((dataset.shape(), dataset.classes(), dataset.label(0)), (Some([1, 2, 2]), 0, 0));
    let config = LoaderConfig { batch: 1, range: Some([0.0, 16.0]), ..LoaderConfig::default() };
    let batch = batches(&mut loader(&dataset, &config, Cursor::start(0)), 1).remove(0);
    assert_eq!(batch.images, [-1.0, 15.0, 30.875, 1.0]);
}

#[test]
fn class_folders_are_numbered_by_name_and_other_files_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    class_folder(root, 9);
    write(&root.join("bee/deeper/x.PNG"), encode(&picture(5, 3, 4), ImageFormat::Png));
    write(&root.join("bee/notes.txt"), "not an image");
    write(&root.join("bee/.hidden.png"), "not read");
    write(&root.join(".cache/y.png"), "not read");
    write(&root.join("loose.png"), "ignored");
    std::fs::create_dir(root.join("dog")).unwrap();
    let dataset = open_path(root);
    assert_eq!(dataset.class_names(), ["ape", "bee", "cow", "dog"]);
    assert_eq!((dataset.len(), dataset.classes(), dataset.shape()), (10, 4, None));
    let labels: Vec<i64> = (0..10).map(|index| dataset.label(index)).collect();
    assert_eq!(labels, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]);
    assert!(dataset.sample_name(6).ends_with("bee/deeper/x.PNG"));
    let root = root.display();
    assert_eq!(
        dataset.warnings(),
        [
            format!("{root}: images outside the class folders, ignored: 1"),
            format!("{root}/dog: the class has no images"),
            format!("{root}: files other than .jpg, .jpeg, .png and .webp, ignored: 1"),
        ]
    );
}

#[test]
fn a_flat_folder_has_no_labels() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("a.png"), encode(&picture(1, 3, 4), ImageFormat::Png));
    let dataset = open_path(folder.path());
    assert_eq!((dataset.len(), dataset.classes(), dataset.label(0)), (1, 0, 0));
}

#[test]
fn metadata_gives_captions_and_labels() {
    let rows = [("b/1.png", "a bee, small", "bee"), ("2.png", "an \"ape\"", "ape"), ("3.png", "", "bee")];
    for form in ["metadata.jsonl", "metadata.csv"] {
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::new();
        if form == "metadata.csv" {
            text.push_str("label,file_name,text\n");
        }
        for (number, (file, caption, label)) in rows.iter().enumerate() {
            write(&folder.path().join(file), encode(&picture(number, 3, 4), ImageFormat::Png));
            if form == "metadata.csv" {
                text.push_str(&format!("{label},{file},\"{}\"\n", caption.replace('"', "\"\"")));
            } else {
                text.push_str(&format!(
                    "{{\"file_name\": {file:?}, \"text\": {caption:?}, \"label\": {label:?}}}\n"
                ));
            }
        }
        write(&folder.path().join(form), text);
        write(&folder.path().join("unlisted.png"), "ignored");
        let dataset = open_path(folder.path());
        assert_eq!((dataset.len(), dataset.classes()), (3, 2), "{form}");
        assert_eq!(dataset.class_names(), ["ape", "bee"]);
        for (index, (file, caption, label)) in rows.iter().enumerate() {
            assert!(dataset.sample_name(index).ends_with(file));
            assert_eq!(dataset.load(index).unwrap().caption, *caption);
            assert_eq!(dataset.class_names()[dataset.label(index) as usize], *label);
        }
        let config = LoaderConfig { batch: 3, shuffle: false, size: Some([2, 2]), ..LoaderConfig::default() };
        let batch = batches(&mut loader(&dataset, &config, Cursor::start(0)), 1).remove(0);
        assert_eq!(batch.captions, rows.map(|(_, caption, _)| caption));
    }
}

#[test]
fn cifar_records_become_pixels() {
    let folder = tempfile::tempdir().unwrap();
    let record = |label: u8, offset: usize| {
        let mut bytes = vec![label];
        bytes.extend((0..3072).map(|element| ((element + offset) % 251) as u8));
        bytes
    };
    write(&folder.path().join("data_batch_1.bin"), [record(3, 0), record(9, 1)].concat());
    write(&folder.path().join("data_batch_2.bin"), record(0, 2));
    write(&folder.path().join("test_batch.bin"), record(1, 3));
    write(&folder.path().join("batches.meta.txt"), "airplane\nautomobile\n\n");
    let dataset = open_path(folder.path());
    assert_eq!((dataset.len(), dataset.classes(), dataset.shape()), (3, 10, Some([3, 32, 32])));
    assert_eq!([0, 1, 2].map(|index| dataset.label(index)), [3, 9, 0]);
    assert_eq!(dataset.class_names(), ["airplane", "automobile"]);
    let Content::Pixels(pixels) = dataset.load(2).unwrap().content else { panic!("CIFAR is pixels") };
    let plane = |channel: usize, pixel: usize| ((channel * 1024 + pixel + 2) % 251) as u8;
    for pixel in [0, 31, 32, 1023] {
        let expected = [plane(0, pixel), plane(1, pixel), plane(2, pixel)];
        assert_eq!(pixels.bytes[pixel * 3..pixel * 3 + 3], expected);
    }
    assert!(dataset.sample_name(2).ends_with("data_batch_2.bin, record 0"));
    assert_eq!(open_path(&folder.path().join("test_batch.bin")).len(), 1);
}

fn write_tar(path: &Path, members: &[(&str, Vec<u8>)]) {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    write(path, archive.into_inner().unwrap());
}

#[test]
fn tar_shards_are_indexed_by_stem() {
    let folder = tempfile::tempdir().unwrap();
    let image = |number: usize, format| encode(&picture(number, 6, 5), format);
    let long = format!("{}/0003", "long".repeat(40));
    write_tar(
        &folder.path().join("00.tar"),
        &[
            ("a/0001.cls", b"7\n".to_vec()),
            ("a/0001.jpg", image(1, ImageFormat::Jpeg)),
            ("a/0001.txt", b"first\n".to_vec()),
            ("a/0002.seg.png", b"another view, not used".to_vec()),
            ("a/0002.png", image(2, ImageFormat::Png)),
            ("a/0002.json", br#"{"label": 2, "caption": "second", "more": [1]}"#.to_vec()),
        ],
    );
    write_tar(
        &folder.path().join("01.tar"),
        &[
            (&format!("{long}.webp"), image(3, ImageFormat::WebP)),
            (&format!("{long}.cls"), b"0".to_vec()),
            ("orphan.txt", b"no image".to_vec()),
        ],
    );
    let root = folder.path().display();
    for pattern in [format!("{root}/{{00..01}}.tar"), format!("{root}/*.tar"), format!("{root}")] {
        let dataset = open(&SourceConfig { path: pattern.clone(), ..SourceConfig::default() }).unwrap();
        assert_eq!((dataset.len(), dataset.classes()), (3, 8), "{pattern}");
        assert_eq!([0, 1, 2].map(|index| dataset.label(index)), [7, 2, 0]);
        assert_eq!([0, 1, 2].map(|index| dataset.load(index).unwrap().caption), ["first", "second", ""]);
        for index in [1, 2] {
            let Content::Encoded(bytes) = dataset.load(index).unwrap().content else { panic!("not encoded") };
            assert_eq!(decode("member", &bytes, 3).unwrap(), picture(index + 1, 6, 5));
        }
        assert!(dataset.sample_name(0).ends_with("00.tar: a/0001.jpg"));
        assert_eq!(
            dataset.warnings(),
            [format!("{pattern}: groups of members without a .jpg, .png or .webp, ignored: 1")]
        );
    }
}

#[test]
fn latents_are_read_from_all_shards_in_each_type() {
    use half::{bf16, f16};
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().unwrap();
    let value = |element: usize| element as f32 * 0.25 - 3.0;
    let mut labels_of_all: Vec<i64> = Vec::new();
    for (number, count) in [2, 0, 3].into_iter().enumerate() {
        let values = (0..count * 8).map(|element| value(element + number * 100));
        let (dtype, bytes): (_, Vec<u8>) = match number {
            0 => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
            1 => (Dtype::F16, values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect()),
            _ => (Dtype::BF16, values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()),
        };
        let labels: Vec<i64> = (0..count).map(|index| (index + number) as i64).collect();
        labels_of_all.extend(&labels);
        let label_bytes: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        let tensors = [
            ("latents", TensorView::new(dtype, vec![count, 2, 2, 2], &bytes).unwrap()),
            ("labels", TensorView::new(Dtype::I64, vec![count], &label_bytes).unwrap()),
        ];
        serialize_to_file(tensors, None, &folder.path().join(format!("{number}.safetensors"))).unwrap();
    }
    let dataset = open_path(folder.path());
    assert_eq!((dataset.len(), dataset.classes(), dataset.holds()), (5, 5, Holds::Latents));
    assert_eq!(dataset.shape(), Some([2, 2, 2]));
    let labels: Vec<i64> = (0..5).map(|index| dataset.label(index)).collect();
    assert_eq!(labels, labels_of_all);
    for (index, (number, row)) in [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)].into_iter().enumerate() {
        // bf16 has 8 significant bits.
        let expected = (0..8).map(|element| value(number * 100 + row * 8 + element));
        let Content::Values(values) = dataset.load(index).unwrap().content else { panic!("not values") };
        let close = |(found, expected): (&f32, f32)| (found - expected).abs() <= expected.abs() / 256.0;
        assert!(values.iter().zip(expected).all(close), "sample {index}");
    }
    let config = LoaderConfig { batch: 1, shuffle: false, ..LoaderConfig::default() };
    let batch = batches(&mut loader(&dataset, &config, Cursor::start(0)), 1).remove(0);
    assert_eq!(batch.images, (0..8).map(value).collect::<Vec<f32>>());
}

#[test]
fn f16_latents_are_exact() {
    use half::f16;
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let bytes: Vec<u8> =
        [1.5f32, -0.25].iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
    serialize_to_file(
        [("latents", TensorView::new(Dtype::F16, vec![1, 2, 1, 1], &bytes).unwrap())],
        None,
        &path,
    )
    .unwrap();
    let dataset = open_path(&path);
    assert_eq!(dataset.load(0).unwrap().content, Content::Values(vec![1.5, -0.25]));
    assert_eq!(dataset.classes(), 0);
}

#[test]
fn a_kind_that_is_named_is_not_guessed() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("a.png"), encode(&picture(1, 3, 4), ImageFormat::Png));
    write(&folder.path().join("x.tar"), "not looked at");
    let config = SourceConfig { kind: SourceKind::ImageFolder, ..source(folder.path()) };
    assert_eq!(open(&config).unwrap().len(), 1);
}
