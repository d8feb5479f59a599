//! Bad input: what is skipped, what is an error, and what is said.

mod common;

use anneal_data::npz::{Array, Values, write_npz};
use anneal_data::{
    BUILTIN_DIGITS, Content, Cursor, DataError, Dataset, Holds, Item, Loader, LoaderConfig, SourceConfig,
    SourceKind, open,
};
use common::{
    batches, class_folder, encode, first_error, loader, open_error, open_path, picture, source, write,
};
use image::ImageFormat;
use std::sync::Arc;

fn small(max_bad: usize) -> LoaderConfig {
    LoaderConfig { batch: 4, size: Some([8, 8]), max_bad, ..LoaderConfig::default() }
}

#[test]
fn unusable_images_are_skipped_counted_and_named() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 12);
    let ape = folder.path().join("ape");
    // In order: 0000.jpg, 0003.png, 0006.webp, 0009.jpg.
    let jpeg = std::fs::read(ape.join("0000.jpg")).unwrap();
    write(&ape.join("0000.jpg"), &jpeg[..jpeg.len() / 2]);
    write(&ape.join("0003.png"), "");
    let dataset = open_path(folder.path());
    std::fs::remove_file(folder.path().join("cow/0011.jpg")).unwrap();
    for workers in [0, 1, 4] {
        let config = LoaderConfig { shuffle: false, batch: 12, workers, ..small(3) };
        let mut loader = loader(&dataset, &config, Cursor::start(0));
        let epochs = batches(&mut loader, 2);
        // Replaced by the next usable one; after the last comes the first usable.
        assert_eq!(epochs[0].indices, [2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2]);
        assert_eq!(epochs[0].labels, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 0]);
        assert!(epochs[1].images == epochs[0].images);
        let root = folder.path().display();
        assert_eq!(
            loader.take_warnings(),
            [
                format!("skipped {root}/ape/0000.jpg: the JPEG is truncated (1 skipped; the limit is 3)"),
                format!("skipped {root}/ape/0003.png: the file is empty (2 skipped; the limit is 3)"),
                format!(
                    "skipped {root}/cow/0011.jpg: no such file or folder; check the path (it is taken from the \
                     current folder) (3 skipped; the limit is 3)"
                ),
            ]
        );
        assert_eq!((loader.bad_samples(), loader.take_warnings().len()), (3, 0));
    }
}

#[test]
fn too_many_unusable_images_are_an_error_at_the_same_batch() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 60);
    for number in (0..60).step_by(3) {
        let ending = ["jpg", "png", "webp"][number / 3 % 3];
        write(&folder.path().join(format!("ape/{number:04}.{ending}")), "broken");
    }
    let dataset = open_path(folder.path());
    let mut outcomes = Vec::new();
    for workers in [0, 1, 4] {
        let mut loader = loader(&dataset, &LoaderConfig { workers, ..small(6) }, Cursor::start(1));
        let message = first_error(&mut loader).to_string();
        let tail = "is not a JPEG, PNG or WebP image; repair or remove them, or raise the limit";
        assert!(
            message.contains("unusable samples: 7, more than the limit of 6 (max_bad); the last is "),
            "{message}"
        );
        assert!(message.ends_with(tail), "{message}");
        assert!(loader.next_batch().is_err(), "the loader went on after its error");
        outcomes.push((message, loader.cursor(), loader.take_warnings()));
    }
    assert!(outcomes[1..].iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
}

#[test]
fn a_limit_of_zero_and_a_set_without_a_usable_sample() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..3 {
        write(&folder.path().join(format!("{number}.png")), "broken");
    }
    let dataset = open_path(folder.path());
    let message = first_error(&mut loader(&dataset, &small(0), Cursor::start(0))).to_string();
    assert!(
        message.starts_with("unusable samples: 1, more than the limit of 0 (max_bad); the last is "),
        "{message}"
    );
    let message = first_error(&mut loader(&dataset, &small(100), Cursor::start(0))).to_string();
    assert!(message.starts_with("none of the 3 samples can be used; the last tried: "), "{message}");
}

/// Samples that panic, as a decoder might.
struct Panicking;

impl Dataset for Panicking {
    fn len(&self) -> usize {
        4
    }
    fn classes(&self) -> usize {
        0
    }
    fn shape(&self) -> Option<[usize; 3]> {
        Some([3, 8, 8])
    }
    fn holds(&self) -> Holds {
        Holds::Images
    }
    fn sample_name(&self, index: usize) -> String {
        format!("sample {index}")
    }
    fn label(&self, _: usize) -> i64 {
        0
    }
    fn load(&self, index: usize) -> Result<Item, DataError> {
        assert_ne!(index, 2, "this panic belongs to a test");
        Ok(Item { content: Content::Pixels(picture(index, 9, 9)), caption: String::new() })
    }
}

#[test]
fn a_panic_in_a_decoder_is_an_unusable_sample() {
    let dataset: Arc<dyn Dataset> = Arc::new(Panicking);
    for workers in [0, 2] {
        let config = LoaderConfig { shuffle: false, workers, ..small(1) };
        let mut loader = loader(&dataset, &config, Cursor::start(0));
        assert_eq!(batches(&mut loader, 2)[1].indices, [0, 1, 3, 3]);
        let expected = "skipped sample 2: its decoder panicked (1 skipped; the limit is 1)";
        assert_eq!(loader.take_warnings(), [expected]);
    }
}

/// A defect of the data set itself, outside of what a bad file can cause.
struct Defective;

impl Dataset for Defective {
    fn len(&self) -> usize {
        4
    }
    fn classes(&self) -> usize {
        1
    }
    fn shape(&self) -> Option<[usize; 3]> {
        Some([3, 8, 8])
    }
    fn holds(&self) -> Holds {
        Holds::Images
    }
    fn sample_name(&self, index: usize) -> String {
        format!("sample {index}")
    }
    fn label(&self, _: usize) -> i64 {
        panic!("this panic belongs to a test")
    }
    fn load(&self, index: usize) -> Result<Item, DataError> {
        Ok(Item { content: Content::Pixels(picture(index, 8, 8)), caption: String::new() })
    }
}

#[test]
fn a_worker_that_dies_is_reported_instead_of_waited_for() {
    let dataset: Arc<dyn Dataset> = Arc::new(Defective);
    let mut loader = loader(&dataset, &small(1), Cursor::start(0));
    assert!(matches!(first_error(&mut loader), DataError::WorkerDied));
}

#[test]
fn not_finite_values_name_the_sample() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.5; 12];
        values[7] = bad;
        write_npz(&path, &[("images", &Array::new([3, 2, 2, 1], Values::F32(values)))]).unwrap();
        let dataset = open_path(&path);
        let config = LoaderConfig { batch: 3, shuffle: false, max_bad: 1, ..LoaderConfig::default() };
        let mut skipping = loader(&dataset, &config, Cursor::start(0));
        assert_eq!(batches(&mut skipping, 1)[0].indices, [0, 2, 2]);
        let message = skipping.take_warnings().remove(0);
        assert!(
            message.contains(&format!("a.npz, sample 1: holds {bad} at element 3 (1 skipped")),
            "{message}"
        );
        let strict = LoaderConfig { max_bad: 0, ..config };
        let message = first_error(&mut loader(&dataset, &strict, Cursor::start(0))).to_string();
        assert!(message.contains(&format!("a.npz, sample 1: holds {bad} at element 3")), "{message}");
    }
}

#[test]
fn extreme_shapes_are_unusable_not_memory_hungry() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("a.png"), encode(&picture(0, 1, 1000), ImageFormat::Png));
    write(&folder.path().join("b.png"), encode(&picture(0, 9, 9), ImageFormat::Png));
    let mut loader = loader(&open_path(folder.path()), &small(1), Cursor::start(0));
    batches(&mut loader, 1);
    let message = loader.take_warnings().remove(0);
    assert!(message.contains("a.png: is 1000 x 1 pixels, too narrow to be cropped"), "{message}");
}

#[test]
fn labels_out_of_range_name_file_label_and_classes() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let tail = "(classes: 3); correct the label or raise the number of classes";
    let images = Array::new([2, 1, 1, 1], Values::U8(vec![0, 1]));
    for label in [3, -1] {
        let labels = Array::new([2], Values::I64(vec![2, label]));
        write_npz(&root.join("a.npz"), &[("images", &images), ("labels", &labels)]).unwrap();
        let message = open_error(&SourceConfig { classes: Some(3), ..source(&root.join("a.npz")) });
        let expected = format!("a.npz, sample 1: label {label} is out of range 0 to 2 {tail}");
        assert!(message.ends_with(&expected), "{message}");
    }
    let mut record = vec![0; 3073 * 2];
    record[3073] = 10;
    write(&root.join("cifar/data_batch_1.bin"), record);
    let message = open_error(&source(&root.join("cifar")));
    assert!(
        message.contains("data_batch_1.bin, record 1: label 10 is out of range 0 to 9 (classes: 10)"),
        "{message}"
    );

    class_folder(&root.join("folder"), 3);
    let message = open_error(&SourceConfig { classes: Some(2), ..source(&root.join("folder")) });
    assert!(message.contains("cow/0002.jpg: label 2 is out of range 0 to 1 (classes: 2);"), "{message}");

    write(&root.join("listed/metadata.csv"), "file_name,label\na.png,0\nb.png,7\n");
    let message = open_error(&SourceConfig { classes: Some(3), ..source(&root.join("listed")) });
    assert!(message.contains("metadata.csv, line 3: label 7 is out of range"), "{message}");
}

#[test]
fn sources_without_samples_say_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let message = open_error(&source(root));
    assert!(message.ends_with(
        ": holds no samples: expected .jpg, .jpeg, .png or .webp files in a folder for each class, or listed in \
         metadata.jsonl or metadata.csv"
    ));
    std::fs::create_dir(root.join("class")).unwrap();
    write(&root.join("class/readme.txt"), "no image");
    assert!(open_error(&source(root)).contains("holds no samples"));
    write_npz(&root.join("a.npz"), &[("images", &Array::new([0, 8, 8, 1], Values::U8(Vec::new())))]).unwrap();
    assert!(
        open_error(&source(&root.join("a.npz")))
            .ends_with("holds no samples: the array `images` has length 0")
    );
    write(&root.join("a.tar"), vec![0; 1024]);
    assert!(open_error(&source(&root.join("a.tar"))).contains("holds no samples: expected members such as"));
    write(&root.join("cifar/data_batch_1.bin"), "");
    assert!(open_error(&source(&root.join("cifar"))).contains("holds no samples: expected data_batch_1.bin"));
    let pattern = SourceConfig { path: format!("{}/x*.tar", root.display()), ..SourceConfig::default() };
    assert!(open_error(&pattern).ends_with("holds no samples: no .tar file matches"));
    write(&root.join("listed/metadata.jsonl"), "");
    assert!(open_error(&source(&root.join("listed"))).contains("holds no samples"));
}

#[test]
fn missing_paths_of_every_kind_are_named() {
    for path in
        ["nowhere", "nowhere.npz", "nowhere.bin", "nowhere/{0..1}.tar", "nowhere.safetensors", "no/*.tar"]
    {
        let message = open_error(&SourceConfig { path: path.to_owned(), ..SourceConfig::default() });
        assert!(message.starts_with("no"), "{message}");
        assert!(message.contains(": no such file or folder; check the path"), "{message}");
    }
    let config =
        SourceConfig { path: "nowhere".to_owned(), kind: SourceKind::Cifar10, ..SourceConfig::default() };
    assert!(open_error(&config).starts_with("nowhere: no such file"), "{}", open_error(&config));
    assert_eq!(open_error(&SourceConfig::default()), "data settings: the path of the data is empty");
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(open_error(&source(file.path())).contains("is of no known kind; expected a folder, .npz, .tar"));
}

#[test]
fn damaged_shards_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(&root.join("data_batch_1.bin"), vec![0; 3072]);
    let message = open_error(&source(&root.join("data_batch_1.bin")));
    assert!(message.ends_with(
        "damaged: its 3072 bytes are not a whole number of 3073-byte records; write or download it again"
    ));

    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3000);
    archive.append_data(&mut header, "0001.jpg", &[7; 3000][..]).unwrap();
    let whole = archive.into_inner().unwrap();
    write(&root.join("a.tar"), &whole[..2000]);
    let message = open_error(&source(&root.join("a.tar")));
    assert!(message.contains("a.tar: damaged: "), "{message}");
    write(&root.join("a.tar"), [7; 700]);
    assert!(open_error(&source(&root.join("a.tar"))).contains("a.tar: damaged: as a tar file"));
    write(&root.join("a.tar"), [0x1F, 0x8B, 8, 0]);
    assert!(
        open_error(&source(&root.join("a.tar"))).contains("a.tar: is compressed; unpack it to a plain .tar")
    );
}

#[test]
fn damaged_latents_are_named() {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let bytes = [0; 64];
    let latents = |dtype, shape: &[usize]| TensorView::new(dtype, shape.to_vec(), &bytes).unwrap();
    let whole = serialize([("latents", latents(Dtype::F32, &[2, 2, 2, 2]))], None).unwrap();
    for length in 0..whole.len() {
        write(&path, &whole[..length]);
        let message = open_error(&source(&path));
        assert!(message.contains("a.safetensors: damaged: "), "{length}: {message}");
    }
    let message = |name: &str, dtype, shape: &[usize]| {
        write(&path, serialize([(name, latents(dtype, shape))], None).unwrap());
        open_error(&source(&path))
    };
    assert!(message("z", Dtype::F32, &[2, 2, 2, 2]).ends_with("has no array `latents`; it has `z`"));
    assert!(
        message("latents", Dtype::F32, &[2, 8])
            .ends_with("`latents` has shape [2, 8]; expected [N, C, H, W]")
    );
    assert!(
        message("latents", Dtype::I32, &[2, 2, 2, 2])
            .ends_with("`latents` holds I32; expected F32, F16 or BF16")
    );
    let text =
        String::from_utf8(whole[8..whole.len() - 64].to_vec()).unwrap().replace("[2,2,2,2]", "[4,2,2,2]");
    write(&path, [&whole[..8], text.as_bytes(), &bytes].concat());
    let message = open_error(&source(&path));
    assert!(message.contains("a.safetensors: damaged: "), "{message}");
}

#[test]
fn arrays_of_the_wrong_form_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let message = |images: Array, labels: Option<Array>| {
        let mut arrays = vec![("images", &images)];
        arrays.extend(labels.as_ref().map(|labels| ("labels", labels)));
        write_npz(&path, &arrays).unwrap();
        open_error(&source(&path))
    };
    let bytes = |shape: &[usize]| Array::new(shape, Values::U8(vec![0; shape.iter().product()]));
    assert!(
        message(bytes(&[4]), None)
            .ends_with("array `images` has shape [4]; expected [N, H, W, C] or [N, H, W]")
    );
    assert!(message(bytes(&[1, 3, 8, 8]), None).ends_with("8-bit images are [N, H, W, C] with C = 1 or 3"));
    assert!(
        message(bytes(&[2, 2, 2]), Some(Array::new([1], Values::I64(vec![0]))))
            .ends_with("array `labels` has shape [1]; expected one label for each of 2 images")
    );
    assert!(
        message(bytes(&[1, 2, 2]), Some(Array::new([1], Values::F32(vec![0.0]))))
            .ends_with("array `labels` must hold int64, int32 or uint8")
    );
}

#[test]
fn metadata_with_some_labels_names_the_line_without() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("metadata.csv"), "file_name,label\na.png,1\nb.png,\n");
    let message = open_error(&source(folder.path()));
    assert!(message.ends_with(
        "metadata.csv, line 3: has no label, but other lines have one; give every line a label or none"
    ));
}

#[test]
fn settings_that_do_not_fit_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 3);
    let images = open_path(folder.path());
    let message = |dataset: &Arc<dyn Dataset>, config: LoaderConfig| {
        Loader::new(dataset.clone(), &config, Cursor::start(0)).err().unwrap().to_string()
    };
    let base = LoaderConfig::default;
    assert!(
        message(&images, base())
            .ends_with("the images have no common size of their own; give the size to train at")
    );
    assert!(message(&images, LoaderConfig { batch: 0, ..base() }).contains("batch 0 for rank 0 of 1"));
    assert!(
        message(&images, LoaderConfig { batch: 9, world: 2, ..base() })
            .contains("batch 9 for rank 0 of 2: the batch must be a multiple of the number of ranks")
    );
    let sized = || LoaderConfig { size: Some([8, 8]), ..base() };
    assert!(
        message(&images, LoaderConfig { channels: Some(4), ..sized() }).contains("4 channels: images have 1")
    );
    assert!(message(&images, LoaderConfig { range: Some([1.0, 1.0]), ..sized() }).contains("range [1, 1]: "));
    assert!(message(&images, LoaderConfig { size: Some([0, 8]), ..base() }).contains("size 0 x 8"));
    let digits = SourceConfig { path: BUILTIN_DIGITS.to_owned(), ..SourceConfig::default() };
    let other = Cursor { samples: 1796, ..Cursor::start(0) };
    let error = Loader::new(open(&digits).unwrap(), &base(), other).err().unwrap().to_string();
    assert!(error.contains("saved with 1796 samples and the data set now has 1797"), "{error}");
    assert!(open_error(&SourceConfig { classes: Some(0), ..digits }).contains("number of classes is 0"));
}

#[test]
fn latents_refuse_flips_and_other_sizes() {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let bytes = [0; 64];
    let latents = TensorView::new(Dtype::F32, vec![1, 4, 2, 2], &bytes).unwrap();
    serialize_to_file([("latents", latents)], None, &path).unwrap();
    let message = |config: LoaderConfig| {
        Loader::new(open_path(&path), &config, Cursor::start(0)).err().unwrap().to_string()
    };
    assert!(
        message(LoaderConfig { flip: true, ..LoaderConfig::default() })
            .contains("flip: a mirrored latent is not the latent of the mirrored image; turn flip off")
    );
    assert!(
        message(LoaderConfig { size: Some([4, 4]), ..LoaderConfig::default() })
            .contains("the samples are [4, 2, 2] (channels, height, width) and [4, 4, 4] is asked")
    );
}
