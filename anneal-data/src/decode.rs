//! Compressed images to pixels: JPEG, PNG and WebP, recognised by their content.
//!
//! Contract: `decode` gives 8-bit pixels with exactly the channels asked for. RGB becomes grey by
//! the BT.601 luma in 16-bit fixed point (as Pillow's mode "L"), grey becomes RGB by repetition,
//! an alpha channel is dropped, and the EXIF orientation is applied, so an image is upright.
//! A truncated JPEG is an error here, although its decoder would fill the rest with grey.
//! Not done: colour profiles (values are taken as they are stored), animations (first frame).

use crate::DataError;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};
use std::io::Cursor;

/// 8-bit pixels in rows, channels innermost: [height, width, channels].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub bytes: Vec<u8>,
}

/// Decodes an image to 1 (grey) or 3 (RGB) channels; `sample` names it in errors.
pub fn decode(sample: &str, bytes: &[u8], channels: usize) -> Result<Pixels, DataError> {
    if bytes.is_empty() {
        return Err(DataError::bad(sample, "the file is empty"));
    }
    let unreadable =
        |error: image::ImageError| DataError::bad(sample, format!("cannot be decoded ({error})"));
    let reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| DataError::bad(sample, format!("cannot be read ({error})")))?;
    match reader.format() {
        Some(ImageFormat::Jpeg) if !jpeg_is_complete(bytes) => {
            return Err(DataError::bad(sample, "the JPEG is truncated"));
        }
        Some(ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP) => {}
        _ => return Err(DataError::bad(sample, "is not a JPEG, PNG or WebP image")),
    }
    let mut decoder = reader.into_decoder().map_err(unreadable)?;
    let orientation = decoder.orientation().map_err(unreadable)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
    image.apply_orientation(orientation);
    if image.width() == 0 || image.height() == 0 {
        return Err(DataError::bad(sample, "has no pixels"));
    }
    Ok(into_pixels(image).with_channels(channels))
}

/// Grey images stay grey; everything else becomes RGB.
fn into_pixels(image: DynamicImage) -> Pixels {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let (channels, bytes) = match image {
        DynamicImage::ImageLuma8(_)
        | DynamicImage::ImageLumaA8(_)
        | DynamicImage::ImageLuma16(_)
        | DynamicImage::ImageLumaA16(_) => (1, image.into_luma8().into_raw()),
        _ => (3, image.into_rgb8().into_raw()),
    };
    Pixels { channels, height, width, bytes }
}

impl Pixels {
    /// The same image with 1 or 3 channels.
    ///
    /// # Panics
    /// For another number of channels.
    pub fn with_channels(self, channels: usize) -> Self {
        let bytes = match (self.channels, channels) {
            (present, asked) if present == asked => self.bytes,
            (1, 3) => self.bytes.iter().flat_map(|value| [*value; 3]).collect(),
            (3, 1) => self.bytes.as_chunks().0.iter().map(luma).collect(),
            (present, asked) => panic!("no conversion from {present} to {asked} channels"),
        };
        Self { channels, bytes, ..self }
    }
}

/// 0.299 R + 0.587 G + 0.114 B, rounded, in 16 fractional bits.
fn luma(rgb: &[u8; 3]) -> u8 {
    let [red, green, blue] = rgb.map(u32::from);
    ((red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16) as u8
}

/// Whether the segments of a JPEG lead to its end marker (ITU T.81, annex B).
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const END: u8 = 0xD9;
    let mut position = 2;
    loop {
        // Entropy-coded data and fill bytes are passed over: there a marker is 0xFF before a
        // byte that is neither 0x00 (a stuffed 0xFF), a restart marker nor another 0xFF.
        let marker = loop {
            let Some(offset) = bytes[position.min(bytes.len())..].iter().position(|byte| *byte == 0xFF)
            else {
                return false;
            };
            position += offset + 1;
            match bytes.get(position) {
                None => return false,
                Some(0x00 | 0x01 | 0xD0..=0xD8 | 0xFF) => {}
                Some(marker) => break *marker,
            }
        };
        position += 1;
        if marker == END {
            return true;
        }
        let Some(length) = bytes.get(position..position + 2) else { return false };
        position += usize::from(u16::from_be_bytes([length[0], length[1]]));
    }
}
