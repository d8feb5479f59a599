//! Small data sets made on the fly.
#![allow(dead_code)]

use anneal_data::decode::Pixels;
use anneal_data::{Batch, Cursor, DataError, Dataset, Loader, LoaderConfig, SourceConfig, open};
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn source(path: &Path) -> SourceConfig {
    SourceConfig { path: path.display().to_string(), ..SourceConfig::default() }
}

pub fn open_path(path: &Path) -> Arc<dyn Dataset> {
    open(&source(path)).unwrap()
}

/// The message of a source that must not open.
pub fn open_error(config: &SourceConfig) -> String {
    match open(config) {
        Ok(_) => panic!("{} opened", config.path),
        Err(error) => error.to_string(),
    }
}

/// A smooth picture that differs with `number`.
pub fn picture(number: usize, height: usize, width: usize) -> Pixels {
    let bytes = (0..height * width * 3)
        .map(|element| {
            let (channel, x, y) = (element % 3, element / 3 % width, element / 3 / width);
            (number * 37 + channel * 60 + x * 200 / width + y * 90 / height) as u8
        })
        .collect();
    Pixels { channels: 3, height, width, bytes }
}

pub fn encode(pixels: &Pixels, format: ImageFormat) -> Vec<u8> {
    let color = if pixels.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let (width, height) = (pixels.width as u32, pixels.height as u32);
    let mut bytes = Vec::new();
    match format {
        ImageFormat::Png => {
            image::codecs::png::PngEncoder::new(&mut bytes).write_image(&pixels.bytes, width, height, color)
        }
        ImageFormat::Jpeg => image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 92).write_image(
            &pixels.bytes,
            width,
            height,
            color,
        ),
        _ => image::codecs::webp::WebPEncoder::new_lossless(&mut bytes).write_image(
            &pixels.bytes,
            width,
            height,
            color,
        ),
    }
    .unwrap();
    bytes
}

pub fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Three classes of JPEGs, PNGs and WebPs of mixed sizes.
pub fn class_folder(root: &Path, count: usize) {
    for number in 0..count {
        let pixels = picture(number, 20 + number % 7 * 9, 20 + number % 5 * 11);
        let (ending, format) =
            [("jpg", ImageFormat::Jpeg), ("png", ImageFormat::Png), ("webp", ImageFormat::WebP)]
                [number / 3 % 3];
        let class = ["ape", "bee", "cow"][number % 3];
        write(&root.join(class).join(format!("{number:04}.{ending}")), encode(&pixels, format));
    }
}

pub fn loader(dataset: &Arc<dyn Dataset>, config: &LoaderConfig, cursor: Cursor) -> Loader {
    Loader::new(dataset.clone(), config, cursor).unwrap()
}

pub fn batches(loader: &mut Loader, count: usize) -> Vec<Batch> {
    (0..count).map(|_| loader.next_batch().unwrap().clone()).collect()
}

/// Runs until the loader fails.
pub fn first_error(loader: &mut Loader) -> DataError {
    for _ in 0..10_000 {
        if let Err(error) = loader.next_batch() {
            return error;
        }
    }
    panic!("no error came");
}
