//! Pixels to model input: resize, crop, flip, and values in [-1, 1].
//!
//! Contract: `cover` shrinks or enlarges an image until it just covers the target;
//! `Placement` then picks the part that is used, and `PixelMap` turns bytes into numbers.
//! Source: the preprocessing published with "Diffusion Models Beat GANs on Image Synthesis"
//! (Dhariwal and Nichol, arXiv 2105.05233), used by DiT too: halve with a box filter while both
//! sides are at least twice the target, then bicubic to the shorter side, then crop. Both filters
//! are antialiased, with 8-bit results between the passes, as in Pillow.
//! A target need not be square; for a square one this is the published rule exactly.

use crate::decode::Pixels;
use anneal_tensor::rng::{Purpose, Stream};
use fast_image_resize as resize;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Which part of the resized image is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    #[default]
    Center,
    /// Uniform over all positions, drawn anew for each (epoch, sample).
    Random,
}

/// Resizes images; one for each worker, because it keeps its working memory.
pub(crate) struct Scaler {
    resizer: resize::Resizer,
}

impl Scaler {
    pub(crate) fn new() -> Self {
        Self { resizer: resize::Resizer::new() }
    }

    /// The image at the smallest size that covers `height` x `width`, its aspect kept.
    pub(crate) fn cover(&mut self, mut pixels: Pixels, height: usize, width: usize) -> Pixels {
        while pixels.height >= 2 * height && pixels.width >= 2 * width {
            pixels = halve(&pixels);
        }
        let scale = (height as f64 / pixels.height as f64).max(width as f64 / pixels.width as f64);
        let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
        // The side that decides the scale must not lose a pixel to rounding.
        let (new_height, new_width) = (scaled(pixels.height).max(height), scaled(pixels.width).max(width));
        // Horizontal first: the rounding to 8 bits between the passes is part of the result.
        let rows = pixels.height;
        let pixels = self.bicubic(pixels, rows, new_width);
        self.bicubic(pixels, new_height, new_width)
    }

    /// One pass: at most one of the sides changes.
    fn bicubic(&mut self, pixels: Pixels, height: usize, width: usize) -> Pixels {
        if (pixels.height, pixels.width) == (height, width) {
            return pixels;
        }
        let kind = match pixels.channels {
            1 => resize::PixelType::U8,
            3 => resize::PixelType::U8x3,
            channels => panic!("images have 1 or 3 channels, not {channels}"),
        };
        let side = |pixels: usize| u32::try_from(pixels).expect("an image side fits 32 bits");
        let source =
            resize::images::ImageRef::new(side(pixels.width), side(pixels.height), &pixels.bytes, kind)
                .expect("an image holds height x width x channels bytes");
        let mut target = resize::images::Image::new(side(width), side(height), kind);
        // Pillow's bicubic is Catmull-Rom, the cubic with a = -1/2.
        let algorithm = resize::ResizeAlg::Convolution(resize::FilterType::CatmullRom);
        let options = resize::ResizeOptions::new().resize_alg(algorithm).use_alpha(false);
        self.resizer.resize(&source, &mut target, &options).expect("source and target have one pixel type");
        Pixels { height, width, bytes: target.into_vec(), ..pixels }
    }
}

/// Half the size (rounded down) with a box filter: each value is the mean of two or three.
fn halve(pixels: &Pixels) -> Pixels {
    let halve_row = match pixels.channels {
        1 => halve_row::<1>,
        3 => halve_row::<3>,
        channels => panic!("images have 1 or 3 channels, not {channels}"),
    };
    let (columns, rows) = (box_spans(pixels.width), box_spans(pixels.height));
    let row_length = columns.len() * pixels.channels;
    let mut narrow = vec![0; pixels.height * row_length];
    let source_rows = pixels.bytes.chunks_exact(pixels.width * pixels.channels);
    for (source, target) in source_rows.zip(narrow.chunks_exact_mut(row_length)) {
        halve_row(source, &columns, target);
    }
    let mut bytes = Vec::with_capacity(rows.len() * row_length);
    let mut sums = vec![0; row_length];
    for span in &rows {
        sums.fill(0);
        for row in narrow[span.start * row_length..span.end * row_length].chunks_exact(row_length) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += u32::from(*value));
        }
        bytes.extend(sums.iter().map(|sum| mean(*sum, span.len())));
    }
    Pixels { height: rows.len(), width: columns.len(), bytes, ..*pixels }
}

/// The number of channels is a constant here because most of a large image's time is spent here.
fn halve_row<const CHANNELS: usize>(source: &[u8], columns: &[Range<usize>], target: &mut [u8]) {
    let source = source.as_chunks::<CHANNELS>().0;
    for (target, span) in target.as_chunks_mut::<CHANNELS>().0.iter_mut().zip(columns) {
        let sum = |pixels: &[[u8; CHANNELS]], channel: usize| -> u32 {
            pixels.iter().map(|pixel| u32::from(pixel[channel])).sum()
        };
        *target = match &source[span.clone()] {
            pair @ [_, _] => std::array::from_fn(|channel| mean(sum(pair, channel), 2)),
            several => std::array::from_fn(|channel| mean(sum(several, channel), several.len())),
        };
    }
}

/// The mean of two or three values, halves upwards.
fn mean(sum: u32, count: usize) -> u8 {
    (if count == 2 { sum.div_ceil(2) } else { (sum + 1) / 3 }) as u8
}

/// The pixels whose centres lie in each half-resolution pixel. In an odd length some centres lie
/// exactly on an edge; rounding first and testing then decides them as Pillow does.
fn box_spans(length: usize) -> Vec<Range<usize>> {
    let count = length / 2;
    let scale = length as f64 / count as f64;
    let inverse = 1.0 / scale;
    let span = |index: usize| {
        let center = (index as f64 + 0.5) * scale;
        let mut first = (center - 0.5 * scale + 0.5) as usize;
        let mut end = ((center + 0.5 * scale + 0.5) as usize).min(length);
        let distance = |pixel: usize| (pixel as f64 - center + 0.5) * inverse;
        first += usize::from(distance(first) <= -0.5);
        end -= usize::from(distance(end - 1) > 0.5);
        first..end
    };
    (0..count).map(span).collect()
}

/// The part of an image that is used, and whether it is mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
    pub mirrored: bool,
}

impl Placement {
    /// The middle part; an odd remainder leaves the extra pixel at the bottom and right.
    pub(crate) fn center(pixels: &Pixels, height: usize, width: usize) -> Self {
        let (top, left) = ((pixels.height - height) / 2, (pixels.width - width) / 2);
        Self { top, left, height, width, mirrored: false }
    }

    /// A part at a position drawn for this sample of this epoch.
    pub(crate) fn random(
        pixels: &Pixels,
        height: usize,
        width: usize,
        seed: u64,
        epoch: u64,
        sample: u64,
    ) -> Self {
        let mut draws = Stream::new(seed, Purpose::Crop, epoch, sample);
        let top = draws.below((pixels.height - height) as u64 + 1) as usize;
        let left = draws.below((pixels.width - width) as u64 + 1) as usize;
        Self { top, left, height, width, mirrored: false }
    }

    /// Cuts this part out.
    pub(crate) fn cut(&self, pixels: &Pixels) -> Pixels {
        let channels = pixels.channels;
        let mut bytes = Vec::with_capacity(self.height * self.width * channels);
        for row in self.top..self.top + self.height {
            let start = (row * pixels.width + self.left) * channels;
            bytes.extend_from_slice(&pixels.bytes[start..start + self.width * channels]);
        }
        Pixels { channels, height: self.height, width: self.width, bytes }
    }
}

/// Whether a sample is mirrored in an epoch: a fair draw for each (epoch, sample).
pub(crate) fn mirrored(seed: u64, epoch: u64, sample: u64) -> bool {
    Stream::new(seed, Purpose::Flip, epoch, sample).next_u32() >> 31 == 1
}

/// Bytes to numbers: `low` becomes -1 and `high` becomes 1.
pub(crate) struct PixelMap {
    values: [f32; 256],
}

impl PixelMap {
    pub(crate) fn new([low, high]: [f32; 2]) -> Self {
        Self { values: std::array::from_fn(|byte| normalised(byte as f32, [low, high])) }
    }

    /// Writes the part as [channels, height, width].
    pub(crate) fn write(&self, pixels: &Pixels, part: Placement, output: &mut [f32]) {
        match pixels.channels {
            1 => self.write_planes::<1>(pixels, part, output),
            3 => self.write_planes::<3>(pixels, part, output),
            channels => panic!("images have 1 or 3 channels, not {channels}"),
        }
    }

    fn write_planes<const CHANNELS: usize>(&self, pixels: &Pixels, part: Placement, output: &mut [f32]) {
        let source = pixels.bytes.as_chunks::<CHANNELS>().0;
        for row in 0..part.height {
            let start = (part.top + row) * pixels.width + part.left;
            let source = &source[start..start + part.width];
            for channel in 0..CHANNELS {
                let target = &mut output[(channel * part.height + row) * part.width..][..part.width];
                for (target, pixel) in target.iter_mut().zip(source) {
                    *target = self.values[usize::from(pixel[channel])];
                }
                if part.mirrored {
                    target.reverse();
                }
            }
        }
    }
}

/// The linear map of [low, high] onto [-1, 1]; for [0, 255] it is value / 127.5 - 1.
pub(crate) fn normalised(value: f32, [low, high]: [f32; 2]) -> f32 {
    (value - low) / ((high - low) / 2.0) - 1.0
}
