//! Data that is broken, absent or does not fit, and training that diverges.

use std::io::Cursor;

use anneal_data::npz::{Array, Values};
use image::{DynamicImage, ImageFormat, RgbImage};

use crate::harness::{Folder, noise, noise_f32};

/// An image of mixed sizes as a file's bytes.
fn picture(seed: u64, format: ImageFormat) -> Vec<u8> {
    let (width, height) = (9 + seed as u32 % 7, 8 + seed as u32 % 11);
    let pixels = noise(seed, (width * height * 3) as usize);
    let image = DynamicImage::ImageRgb8(RgbImage::from_raw(width, height, pixels).unwrap());
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Two classes of ten images each, as JPEG and PNG.
fn image_folder(folder: &Folder) {
    for index in 0..20 {
        let (format, ending) =
            if index % 4 == 0 { (ImageFormat::Png, "png") } else { (ImageFormat::Jpeg, "jpg") };
        let class = ["cats", "dogs"][index % 2];
        folder.write(&format!("photos/{class}/{index:02}.{ending}"), &picture(index as u64, format));
    }
}

const IMAGES: [&str; 5] =
    ["data.kind=image_folder", "data.path=photos", "model.channels=3", "model.classes=2", "train.steps=8"];

fn train_images(folder: &Folder, run: &str, changes: &[&str]) -> crate::harness::Outcome {
    folder.train(run, &[&IMAGES, changes].concat())
}

fn train_npz(folder: &Folder, path: &str, changes: &[&str]) -> crate::harness::Outcome {
    let path = format!("data.path={path}");
    folder.train("run", &[&["data.kind=npz", &path], changes].concat())
}

fn floats(count: usize) -> Vec<f32> {
    noise_f32(1, count * 64)
}

fn labels(count: usize) -> Vec<i64> {
    (0..count as i64).map(|index| index % 10).collect()
}

#[test]
fn a_folder_of_images_trains_and_samples() {
    let folder = Folder::new();
    image_folder(&folder);
    let trained = train_images(&folder, "run", &["data.flip=true", "data.crop=random", "sample.every=4"]);
    let trained = trained.succeeds(&["trained 8 steps"]);
    assert!(!trained.err.contains("skipped"), "{trained:#?}");
    assert_eq!(folder.names("run/samples"), ["step-00000004.png", "step-00000008.png"]);
    assert_eq!(folder.text("run/metrics.jsonl").lines().count(), 8);
    folder.anneal(&["sample", "run", "--num", "4", "--out", "four.npz"]).succeeds(&["4 samples"]);
    assert_eq!(folder.npz("four.npz").array("arr_0").unwrap().shape(), [4, 8, 8, 3]);
}

#[test]
fn broken_images_are_skipped_counted_and_named() {
    let folder = Folder::new();
    image_folder(&folder);
    let whole = folder.read("photos/cats/02.jpg");
    folder.write("photos/cats/02.jpg", &whole[..whole.len() / 2]);
    folder.write("photos/dogs/05.jpg", b"not an image at all");
    folder.write("photos/dogs/07.jpg", b"");
    let trained = train_images(&folder, "run", &[]).succeeds(&[
        "trained 8 steps",
        "photos/cats/02.jpg",
        "photos/dogs/05.jpg",
        "photos/dogs/07.jpg",
        "3 skipped; the limit is 100",
    ]);
    assert_eq!(trained.err.matches("warning: skipped").count(), 3, "each is named once: {trained:#?}");
    let limited = train_images(&folder, "limited", &["data.max_bad=2"]);
    limited.fails(&["unusable samples: 3, more than the limit of 2 (max_bad)", "photos/", "raise the limit"]);
    let all_broken = Folder::new();
    all_broken.write("photos/cats/1.jpg", b"nothing");
    all_broken.write("photos/dogs/1.jpg", b"nothing");
    train_images(&all_broken, "run", &[]).fails(&["none of the 2 samples can be used", "1.jpg"]);
}

#[test]
fn a_label_out_of_range_names_the_sample() {
    let folder = Folder::new();
    let labels: Vec<i64> = (0..20).collect();
    folder.write_npz("data.npz", Array::new([20, 8, 8, 1], Values::F32(floats(20))), labels);
    train_npz(&folder, "data.npz", &[]).fails(&["data.npz, sample 10: label 10 is out of range 0 to 9"]);
    image_folder(&folder);
    let classes = train_images(&folder, "run", &["model.classes=1"]);
    classes.fails(&["photos/dogs/", "label 1 is out of range 0 to 0", "raise the number of classes"]);
}

#[test]
fn a_plan_looks_at_the_data() {
    let folder = Folder::new();
    image_folder(&folder);
    let with =
        |changes: &[&str]| folder.anneal(&[&["train", "tiny.yaml", "--plan"], &IMAGES[..], changes].concat());
    let fitting = with(&[]).succeeds(&["photos: 20 images, 2 classes"]);
    assert_eq!(fitting.err, "");
    with(&["model.classes=1"]).fails(&["predicted memory", "photos/dogs/", "label 1 is out of range 0 to 0"]);
    let advice = "warning: the data has 2 classes, so those of the model from class 2 on are never trained: give model.classes=2, not 7";
    with(&["model.classes=7"]).succeeds(&["2 classes", advice]);
    assert!(train_images(&folder, "run", &["model.classes=7"]).succeeds(&[]).err.contains(advice));
    std::fs::create_dir(folder.path("photos/emus")).unwrap();
    with(&[]).succeeds(&["photos: 20 images, 3 classes", "photos/emus: the class has no images"]);
    let images = || Array::new([20, 8, 8, 1], Values::F32(floats(20)));
    anneal_data::npz::write_npz(&folder.path("bare.npz"), &[("images", &images())]).unwrap();
    let bare = ["train", "tiny.yaml", "--plan", "data.kind=npz", "data.path=bare.npz"];
    folder.anneal(&bare).succeeds(&["bare.npz: 20 images, no labels", "give model.classes=1"]);
    folder.write_npz(
        "wide.npz",
        Array::new([20, 12, 12, 3], Values::F32(noise_f32(2, 20 * 432))),
        labels(20),
    );
    let wide = ["train", "tiny.yaml", "--plan", "data.kind=npz", "data.path=wide.npz"];
    folder.anneal(&wide).fails(&["predicted memory", "[3, 12, 12]"]);
    assert!(!folder.path("runs").exists(), "a plan writes nothing");
}

#[test]
fn data_of_no_length_is_refused() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("photos")).unwrap();
    train_images(&folder, "run", &[]).fails(&["photos: holds no samples", ".jpg"]);
    std::fs::create_dir(folder.path("photos/cats")).unwrap();
    train_images(&folder, "run", &[]).fails(&["photos: holds no samples"]);
    folder.write_npz("data.npz", Array::new([0, 8, 8, 1], Values::U8(Vec::new())), Vec::new());
    train_npz(&folder, "data.npz", &[])
        .fails(&["data.npz: holds no samples: the array `images` has length 0"]);
}

#[test]
fn values_that_are_not_finite_are_skipped_and_counted() {
    let folder = Folder::new();
    let mut values = floats(20);
    values[3 * 64] = f32::NAN;
    values[7 * 64 + 5] = f32::INFINITY;
    folder.write_npz("data.npz", Array::new([20, 8, 8, 1], Values::F32(values)), labels(20));
    train_npz(&folder, "data.npz", &[]).succeeds(&[
        "skipped data.npz, sample 3: holds NaN at element 0",
        "skipped data.npz, sample 7: holds inf at element 5",
        "2 skipped; the limit is 100",
        "trained 6 steps",
    ]);
    let metrics = folder.text("run/metrics.jsonl");
    assert!(!metrics.contains("NaN") && !metrics.contains("null"), "{metrics}");
    folder.write_npz("none.npz", Array::new([4, 8, 8, 1], Values::F32(vec![f32::NAN; 256])), labels(4));
    let none = train_npz(&folder, "none.npz", &["output=other"]);
    none.fails(&["none of the 4 samples can be used", "holds NaN"]);
}

#[test]
fn data_of_another_shape_than_the_model_is_refused() {
    let folder = Folder::new();
    let values = noise_f32(2, 20 * 12 * 12 * 3);
    folder.write_npz("data.npz", Array::new([20, 12, 12, 3], Values::F32(values)), labels(20));
    train_npz(&folder, "data.npz", &[]).fails(&[
        "[3, 12, 12]",
        "[1, 8, 8]",
        "floating-point data are not resized",
    ]);
    folder.write_npz("flat.npz", Array::new([20, 64], Values::F32(floats(20))), labels(20));
    train_npz(&folder, "flat.npz", &[]).fails(&["flat.npz", "[20, 64]"]);
    folder.write_npz("few.npz", Array::new([20, 8, 8, 1], Values::F32(floats(20))), labels(19));
    train_npz(&folder, "few.npz", &[]).fails(&["few.npz", "19", "20"]);
}

#[test]
fn a_truncated_archive_is_damaged() {
    let folder = Folder::new();
    folder.write_npz("data.npz", Array::new([20, 8, 8, 1], Values::F32(floats(20))), labels(20));
    let whole = folder.read("data.npz");
    folder.write("short.npz", &whole[..whole.len() / 2]);
    train_npz(&folder, "short.npz", &[]).fails(&["short.npz: damaged", "download it again"]);
    let mut flipped = whole;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    folder.write("flipped.npz", &flipped);
    train_npz(&folder, "flipped.npz", &[]).fails(&["flipped.npz", "damaged"]);
}

#[test]
fn training_that_diverges_skips_steps_and_then_stops() {
    let folder = Folder::new();
    let diverged = folder.train("run", &["optim.lr=1e30", "train.steps=20", "train.nonfinite_limit=3"]);
    let diverged = diverged.fails(&[
        "step 2 skipped: its gradient is not finite (1 so far)",
        "(2 so far)",
        "step 4 skipped: its gradient is not finite (3 so far)",
        "3 steps in a row had a gradient that is not finite",
        "lower optim.lr",
    ]);
    assert!(!diverged.out.contains("trained"), "{diverged:#?}");
}
