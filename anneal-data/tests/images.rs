//! Decoding and the resize rule against Pillow (see fixtures/make.py).

mod common;

use anneal_data::decode::{Pixels, decode};
use anneal_data::{Cursor, LoaderConfig};
use common::{batches, encode, fixture, loader, open_path, picture, write};
use image::ImageFormat;

fn read(name: &str, channels: usize) -> Pixels {
    decode(name, &std::fs::read(fixture(name)).unwrap(), channels).unwrap()
}

/// The largest difference between two images of one shape.
fn largest_difference(left: &Pixels, right: &Pixels) -> u8 {
    assert_eq!((left.channels, left.height, left.width), (right.channels, right.height, right.width));
    left.bytes.iter().zip(&right.bytes).map(|(left, right)| left.abs_diff(*right)).max().unwrap()
}

#[test]
fn formats_decode_as_pillow_decodes_them() {
    // Lossless formats are exact. JPEG leaves the rounding of the inverse transform and of the colour
    // conversion to the decoder, and, where chroma is subsampled, its interpolation too.
    for (name, bound) in [
        ("palette.png", 0),
        ("alpha.png", 0),
        ("lossless.webp", 0),
        ("baseline.jpg", 2),
        ("turned.jpg", 2),
        ("progressive.jpg", 2),
        ("subsampled.jpg", 8),
        ("lossy.webp", 4),
    ] {
        let difference = largest_difference(&read(name, 3), &read(&format!("{name}.png"), 3));
        assert!(difference <= bound, "{name}: {difference}");
    }
}

#[test]
fn grey_is_the_luma_and_rgb_repeats_grey() {
    assert_eq!(read("source_rgb.png", 1), read("source_rgb_as_grey.png", 1));
    let (grey, rgb) = (read("source_grey.png", 1), read("source_grey.png", 3));
    assert!(rgb.bytes.chunks(3).zip(&grey.bytes).all(|(pixel, value)| pixel == [*value; 3]));
}

#[test]
fn the_content_decides_the_format_not_the_name() {
    let pixels = picture(1, 5, 4);
    assert_eq!(decode("a.jpg", &encode(&pixels, ImageFormat::Png), 3).unwrap(), pixels);
}

#[test]
fn truncated_and_corrupt_images_are_errors() {
    let message = |bytes: &[u8]| decode("a.jpg", bytes, 3).unwrap_err().to_string();
    assert_eq!(message(b""), "a.jpg: the file is empty");
    assert_eq!(message(b"<!DOCTYPE html>"), "a.jpg: is not a JPEG, PNG or WebP image");
    for name in ["baseline.jpg", "progressive.jpg", "subsampled.jpg", "turned.jpg"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        for length in 3..whole.len() {
            assert_eq!(message(&whole[..length]), "a.jpg: the JPEG is truncated", "{name} at {length}");
        }
        decode(name, &[&whole[..], b"trailing"].concat(), 3).unwrap();
    }
    for name in ["source_rgb.png", "lossy.webp", "lossless.webp"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        // Pixels end before the file does: the last chunk of a PNG is empty, and WebP pads.
        for length in 12..whole.len() - 13 {
            let message = message(&whole[..length]);
            assert!(message.starts_with("a.jpg: cannot be decoded ("), "{name} at {length}: {message}");
        }
    }
}

/// One image through the loader, back as bytes.
fn loaded(name: &str, channels: usize, size: usize) -> Pixels {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join(name), std::fs::read(fixture(name)).unwrap());
    let config = LoaderConfig {
        batch: 1,
        size: Some([size, size]),
        channels: Some(channels),
        workers: 0,
        ..LoaderConfig::default()
    };
    let batch = batches(&mut loader(&open_path(folder.path()), &config, Cursor::start(0)), 1).remove(0);
    let byte = |channel: usize, pixel: usize| {
        let value = (batch.images[channel * size * size + pixel] + 1.0) * 127.5;
        assert!((value - value.round()).abs() < 1e-4);
        value.round() as u8
    };
    let bytes =
        (0..size * size).flat_map(|pixel| (0..channels).map(move |channel| byte(channel, pixel))).collect();
    Pixels { channels, height: size, width: size, bytes }
}

#[test]
fn resize_and_crop_equal_the_published_preprocessing() {
    for (source, channels, size) in [("source_rgb", 3, 10), ("source_rgb", 3, 64), ("source_grey", 1, 32)] {
        let expected = read(&format!("{source}_to_{size}.png"), channels);
        let ours = loaded(&format!("{source}.png"), channels, size);
        let difference = largest_difference(&ours, &expected);
        // Fixed-point convolutions with 8-bit results between four passes may round apart by one.
        assert!(difference <= 1, "{source} to {size}: {difference}");
        let apart = ours.bytes.iter().zip(&expected.bytes).filter(|(left, right)| left != right).count();
        assert!(apart * 100 <= expected.bytes.len(), "{source} to {size}: {apart} values differ");
    }
}
