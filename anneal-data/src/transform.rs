//! Pixels to model input: resize, crop, flip, and values in [-1, 1].
//!
//! Contract: `cover` shrinks or enlarges an image until it just covers the target;
//! `Placement` then picks the part that is used, and `PixelMap` turns bytes into numbers.
//! Source: the preprocessing published with "Diffusion Models Beat GANs on Image Synthesis"
//! (Dhariwal and Nichol, arXiv 2105.05233), used by DiT too: halve with a box filter while both
//! sides are at least twice the target, then bicubic to the shorter side, then crop. Both filters
//! are antialiased convolutions with 8-bit results between the passes, as in Pillow.
//! A target need not be square; for a square one this is the published rule exactly.

use crate::decode::Pixels;
use anneal_tensor::rng::{Purpose, Stream};
use fast_image_resize as resize;
use serde::{Deserialize, Serialize};

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
            let (half_height, half_width) = (pixels.height / 2, pixels.width / 2);
            pixels = self.convolve(pixels, half_height, half_width, resize::FilterType::Box);
        }
        let scale = (height as f64 / pixels.height as f64).max(width as f64 / pixels.width as f64);
        let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
        // The side that decides the scale must not lose a pixel to rounding.
        let (new_height, new_width) = (scaled(pixels.height).max(height), scaled(pixels.width).max(width));
        // Pillow's bicubic is Catmull-Rom, the cubic with a = -1/2.
        self.convolve(pixels, new_height, new_width, resize::FilterType::CatmullRom)
    }

    fn convolve(
        &mut self,
        pixels: Pixels,
        height: usize,
        width: usize,
        filter: resize::FilterType,
    ) -> Pixels {
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
        let options =
            resize::ResizeOptions::new().resize_alg(resize::ResizeAlg::Convolution(filter)).use_alpha(false);
        self.resizer.resize(&source, &mut target, &options).expect("source and target have one pixel type");
        Pixels { height, width, bytes: target.into_vec(), ..pixels }
    }
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
        let channels = pixels.channels;
        for channel in 0..channels {
            for row in 0..part.height {
                let start = ((part.top + row) * pixels.width + part.left) * channels;
                let source = &pixels.bytes[start..start + part.width * channels];
                let values =
                    source[channel..].iter().step_by(channels).map(|byte| self.values[usize::from(*byte)]);
                let target = &mut output[(channel * part.height + row) * part.width..][..part.width];
                if part.mirrored {
                    target.iter_mut().rev().zip(values).for_each(|(target, value)| *target = value);
                } else {
                    target.iter_mut().zip(values).for_each(|(target, value)| *target = value);
                }
            }
        }
    }
}

/// The linear map of [low, high] onto [-1, 1]; for [0, 255] it is value / 127.5 - 1.
pub(crate) fn normalised(value: f32, [low, high]: [f32; 2]) -> f32 {
    (value - low) / ((high - low) / 2.0) - 1.0
}
