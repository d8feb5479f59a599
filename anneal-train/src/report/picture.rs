//! An 8-bit picture and its PNG file.
//!
//! Contract: rows from the top, pixels from the left, grey (1 byte) or RGB (3 bytes), tagged as sRGB. Text chunks
//! carry what made the picture; keys are Latin-1 of 1 to 79 characters, values any text (`tEXt` where Latin-1
//! holds it, else `iTXt`). Equal input gives equal bytes: no time of writing is stored.
//! Source: PNG specification, third edition, sections 11.3.2 and 11.3.3.

use std::path::Path;

use super::ReportError;
use anneal_weights::write_atomic_unsynced;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    channels: usize,
    pixels: Vec<u8>,
    text: Vec<(String, String)>,
}

impl Picture {
    /// A picture from `height * width * channels` bytes, `channels` being 1 (grey) or 3 (RGB).
    ///
    /// # Errors
    /// If a size is zero, the channels are neither 1 nor 3, or the number of bytes does not fit.
    pub fn new(width: usize, height: usize, channels: usize, pixels: Vec<u8>) -> Result<Self, ReportError> {
        let what = "picture";
        if width == 0 || height == 0 || (channels != 1 && channels != 3) {
            return Err(ReportError::Picture {
                what,
                reason: format!(
                    "{height}x{width} with {channels} channels cannot be drawn; sizes start at 1 and channels \
                     are 1 (grey) or 3 (RGB)"
                ),
            });
        }
        let expected = width * height * channels;
        if pixels.len() != expected {
            let actual = pixels.len();
            return Err(ReportError::PixelCount {
                what,
                count: 1,
                height,
                width,
                channels,
                expected,
                actual,
            });
        }
        Ok(Self { width, height, channels, pixels, text: Vec::new() })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn height(&self) -> usize {
        self.height
    }

    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Row after row from the top, `channels` bytes a pixel.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The bytes of one pixel.
    ///
    /// # Panics
    /// Outside the picture.
    pub fn pixel(&self, x: usize, y: usize) -> &[u8] {
        assert!(x < self.width && y < self.height, "({x}, {y}) is outside {}x{}", self.width, self.height);
        &self.pixels[(y * self.width + x) * self.channels..][..self.channels]
    }

    /// Adds a text chunk: `("seed", "7")`.
    #[must_use]
    pub fn with_text(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.text.push((key.into(), value.into()));
        self
    }

    pub fn text(&self) -> &[(String, String)] {
        &self.text
    }

    /// The bytes of the PNG file.
    ///
    /// # Panics
    /// If a text key is not a valid PNG keyword: keys are our own.
    pub fn to_png(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(if self.channels == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Balanced);
        encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
        for (key, value) in &self.text {
            let added = match value.chars().all(is_latin1_text) {
                true => encoder.add_text_chunk(key.clone(), value.clone()),
                false => encoder.add_itxt_chunk(key.clone(), value.clone()),
            };
            added.expect("text keys are chosen by this program");
        }
        let mut writer = encoder.write_header().expect("writing to memory with a valid header");
        writer.write_image_data(&self.pixels).expect("the number of bytes was checked");
        writer.finish().expect("writing to memory");
        bytes
    }

    /// Writes the PNG file in one piece: a viewer never sees a part of it.
    ///
    /// # Errors
    /// Names the path and what to do.
    pub fn write_png(&self, path: &Path) -> Result<(), ReportError> {
        Ok(write_atomic_unsynced(path, &self.to_png())?)
    }
}

/// What `tEXt` may hold: printable Latin-1 and the line feed.
fn is_latin1_text(character: char) -> bool {
    matches!(character, '\n' | ' '..='~' | '\u{a1}'..='\u{ff}')
}

/// The brightness of a value in [-1, 1], rounded half up; outside it saturates, NaN is black.
pub fn brightness(value: f32) -> u8 {
    (value * 127.5 + 128.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> (png::OutputInfo, Vec<u8>, Vec<(String, String)>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        let latin1 =
            reader.info().uncompressed_latin1_text.iter().map(|t| (t.keyword.clone(), t.text.clone()));
        let utf8 = reader.info().utf8_text.iter().map(|t| (t.keyword.clone(), t.get_text().unwrap()));
        let text = latin1.chain(utf8).collect();
        (info, pixels, text)
    }

    #[test]
    fn a_file_decodes_to_its_pixels_and_text() {
        let pixels: Vec<u8> = (0..2 * 3 * 3).map(|value| value * 13).collect();
        let picture = Picture::new(3, 2, 3, pixels.clone())
            .unwrap()
            .with_text("parameters", "steps: 50\nguidance: 2")
            .with_text("prompt", "ein Bär, 熊");
        let (info, decoded, text) = decode(&picture.to_png());
        assert_eq!((info.width, info.height, info.color_type), (3, 2, png::ColorType::Rgb));
        assert_eq!(decoded, pixels);
        assert_eq!(
            text,
            [("parameters".into(), "steps: 50\nguidance: 2".into()), ("prompt".into(), "ein Bär, 熊".into())]
        );
    }

    #[test]
    fn grey_stays_grey() {
        let (info, decoded, _) = decode(&Picture::new(2, 1, 1, vec![7, 250]).unwrap().to_png());
        assert_eq!((info.color_type, decoded), (png::ColorType::Grayscale, vec![7, 250]));
    }

    #[test]
    fn writing_is_repeatable() {
        let folder = tempfile::tempdir().unwrap();
        let picture = Picture::new(2, 1, 1, vec![7, 250]).unwrap().with_text("seed", "1");
        let paths = [folder.path().join("a.png"), folder.path().join("b.png")];
        for path in &paths {
            picture.write_png(path).unwrap();
        }
        assert_eq!(std::fs::read(&paths[0]).unwrap(), std::fs::read(&paths[1]).unwrap());
    }

    #[test]
    fn impossible_pictures_are_refused() {
        assert_eq!(
            Picture::new(2, 2, 3, vec![0; 11]).unwrap_err().to_string(),
            "picture: expected 12 values (count 1, height 2, width 2, channels 3), got 11"
        );
        let message = Picture::new(2, 2, 4, vec![0; 16]).unwrap_err().to_string();
        assert!(message.starts_with("picture: 2x2 with 4 channels cannot be drawn"), "{message}");
        assert!(Picture::new(0, 2, 1, vec![]).is_err());
    }

    #[test]
    fn brightness_of_the_ends_and_the_middle() {
        let expected = [(-1.0, 0), (1.0, 255), (0.0, 128), (-7.0, 0), (7.0, 255), (-0.5, 64), (0.5, 191)];
        for (value, byte) in expected {
            assert_eq!(brightness(value), byte, "{value}");
        }
        assert_eq!(brightness(f32::NAN), 0);
    }
}
