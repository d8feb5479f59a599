//! Many images in one picture.
//!
//! Contract: images are enlarged by a whole factor, each pixel to a square, so that nothing is invented; cells
//! stand a thin gap apart, row after row, and may have a label at the left of each row. One channel is grey and
//! three are RGB, in [-1, 1] for floats. Any other number of float channels is taken for latents, of which the
//! first three are stretched to the range of three standard deviations around their mean; the picture's text says
//! so, and says how many values were not finite (they are black).

use super::ReportError;
use super::canvas::{Canvas, Color, Font};
use super::picture::{Picture, brightness};

/// The pixels of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// `[count, height, width, channels]`, 1 or 3 channels.
    Bytes(&'a [u8]),
    /// `[count, channels, height, width]`, in [-1, 1] for 1 or 3 channels.
    Floats(&'a [f32]),
}

/// A batch of images of one size.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    pub pixels: Pixels<'a>,
    pub count: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

/// How a grid is laid out.
#[derive(Clone, Debug)]
pub struct GridOptions {
    /// Images a row. By default one row per label, or a grid as wide as high.
    pub columns: Option<usize>,
    /// Pixels of the grid per pixel of an image. By default such that the shorter side of a cell has at least
    /// [`SMALLEST_CELL`].
    pub enlarge: Option<usize>,
    /// Pixels between cells and around them.
    pub gap: usize,
    /// At the left of each row, from the top; may be empty.
    pub row_labels: Vec<String>,
}

/// Below this many pixels a cell is hard to see.
pub const SMALLEST_CELL: usize = 48;

/// A picture larger than this opens in few viewers.
const MOST_PIXELS: usize = 1 << 28;

impl Default for GridOptions {
    fn default() -> Self {
        Self { columns: None, enlarge: None, gap: 2, row_labels: Vec::new() }
    }
}

const BACKGROUND: Color = Color(255, 255, 255);
const INK: Color = Color(38, 43, 51);

/// Draws all images of a batch in one RGB picture.
///
/// # Errors
/// If the sizes do not fit the pixels, or the labels do not fit the rows.
pub fn grid(batch: &Batch, options: &GridOptions) -> Result<Picture, ReportError> {
    let images = Images::new(batch, "sample grid")?;
    let columns = columns(batch.count, options);
    let rows = batch.count.div_ceil(columns);
    if !options.row_labels.is_empty() && options.row_labels.len() != rows {
        return Err(ReportError::Picture {
            what: "sample grid",
            reason: format!("{} row labels for {rows} rows of {columns} images", options.row_labels.len()),
        });
    }
    let enlarge =
        options.enlarge.unwrap_or_else(|| SMALLEST_CELL.div_ceil(batch.height.min(batch.width))).max(1);
    let (cell_width, cell_height) = (batch.width * enlarge, batch.height * enlarge);
    let label_width = options.row_labels.iter().map(|label| Font::Body.width(label) + 10).max().unwrap_or(0);

    let gap = options.gap;
    let left = label_width as usize + gap;
    let width = left + columns * (cell_width + gap);
    let height = gap + rows * (cell_height + gap);
    if width.saturating_mul(height) > MOST_PIXELS {
        return Err(ReportError::Picture {
            what: "sample grid",
            reason: format!(
                "{} images of {cell_height}x{cell_width} pixels are too many for one picture; draw fewer, or write \
                 single files",
                batch.count
            ),
        });
    }
    let mut canvas = Canvas::new(width as i32, height as i32, BACKGROUND);
    for index in 0..batch.count {
        let x = left + index % columns * (cell_width + gap);
        let y = gap + index / columns * (cell_height + gap);
        draw_image(&mut canvas, &images, index, (x, y), enlarge);
    }
    for (row, label) in options.row_labels.iter().enumerate() {
        let middle = gap + row * (cell_height + gap) + cell_height / 2;
        let x = label_width - 8 - Font::Body.width(label);
        canvas.text(x, middle as i32 - 8, label, Font::Body, INK);
    }
    Ok(images.noted(canvas.into_picture()))
}

fn columns(count: usize, options: &GridOptions) -> usize {
    let wanted = match (options.columns, options.row_labels.len()) {
        (Some(columns), _) => columns,
        (None, 0) => (count as f64).sqrt().ceil() as usize,
        (None, rows) => count.div_ceil(rows),
    };
    wanted.clamp(1, count)
}

fn draw_image(canvas: &mut Canvas, images: &Images, index: usize, corner: (usize, usize), enlarge: usize) {
    let size = enlarge as i32;
    for y in 0..images.batch.height {
        for x in 0..images.batch.width {
            let (left, top) = (corner.0 + x * enlarge, corner.1 + y * enlarge);
            canvas.rectangle(left as i32, top as i32, size, size, images.color(index, y, x));
        }
    }
}

/// One picture per image, of its own size: grey for one channel, else RGB.
///
/// # Errors
/// If the sizes do not fit the pixels.
pub fn singles(batch: &Batch) -> Result<Vec<Picture>, ReportError> {
    let images = Images::new(batch, "images")?;
    let channels = if batch.channels == 1 { 1 } else { 3 };
    (0..batch.count)
        .map(|index| {
            let mut pixels = Vec::with_capacity(batch.height * batch.width * channels);
            for y in 0..batch.height {
                for x in 0..batch.width {
                    let Color(red, green, blue) = images.color(index, y, x);
                    pixels.extend_from_slice(&[red, green, blue][..channels]);
                }
            }
            Ok(images.noted(Picture::new(batch.width, batch.height, channels, pixels)?))
        })
        .collect()
}

/// A checked batch, with what turns its values into colours.
struct Images<'a> {
    batch: &'a Batch<'a>,
    /// Per shown channel, what maps a value to [-1, 1]: subtract the first, multiply by the second.
    stretch: Option<[(f32, f32); 3]>,
    nonfinite: usize,
}

impl<'a> Images<'a> {
    fn new(batch: &'a Batch, what: &'static str) -> Result<Self, ReportError> {
        let Batch { count, height, width, channels, .. } = *batch;
        let expected = count * height * width * channels;
        let actual = match batch.pixels {
            Pixels::Bytes(bytes) => bytes.len(),
            Pixels::Floats(floats) => floats.len(),
        };
        if actual != expected {
            return Err(ReportError::PixelCount { what, count, height, width, channels, expected, actual });
        }
        if expected == 0 {
            return Err(ReportError::Picture { what, reason: "there is no image to draw".into() });
        }
        let (stretch, nonfinite) = match batch.pixels {
            Pixels::Bytes(_) if channels != 1 && channels != 3 => {
                let reason = format!("8-bit images have 1 or 3 channels, not {channels}");
                return Err(ReportError::Picture { what, reason });
            }
            Pixels::Bytes(_) => (None, 0),
            Pixels::Floats(floats) => {
                let nonfinite = floats.iter().filter(|value| !value.is_finite()).count();
                let latents = channels != 1 && channels != 3;
                (latents.then(|| latent_stretch(batch, floats)), nonfinite)
            }
        };
        Ok(Self { batch, stretch, nonfinite })
    }

    fn color(&self, index: usize, y: usize, x: usize) -> Color {
        let Batch { height, width, channels, .. } = *self.batch;
        let channel = |channel: usize| match self.batch.pixels {
            Pixels::Bytes(bytes) => bytes[((index * height + y) * width + x) * channels + channel],
            Pixels::Floats(floats) => {
                let value = floats[((index * channels + channel) * height + y) * width + x];
                let value =
                    self.stretch.map_or(value, |stretch| (value - stretch[channel].0) * stretch[channel].1);
                if value.is_finite() { brightness(value) } else { 0 }
            }
        };
        match channels {
            1 => Color(channel(0), channel(0), channel(0)),
            2 => Color(channel(0), channel(1), 0),
            _ => Color(channel(0), channel(1), channel(2)),
        }
    }

    /// Adds to the picture's text what a viewer must know to read it.
    fn noted(&self, mut picture: Picture) -> Picture {
        if self.stretch.is_some() {
            let note = format!(
                "latents: the first {} of {} channels, each stretched to three standard deviations",
                self.batch.channels.min(3),
                self.batch.channels
            );
            picture = picture.with_text("Comment", note);
        }
        if self.nonfinite > 0 {
            picture = picture
                .with_text("Warning", format!("{} values are not finite, shown black", self.nonfinite));
        }
        picture
    }
}

/// Over all finite values of each of the first three channels.
fn latent_stretch(batch: &Batch, floats: &[f32]) -> [(f32, f32); 3] {
    let plane = batch.height * batch.width;
    std::array::from_fn(|channel| {
        let values = floats
            .chunks_exact(plane)
            .skip(channel)
            .step_by(batch.channels)
            .flatten()
            .filter(|value| value.is_finite())
            .map(|value| f64::from(*value));
        let (count, sum) = values.clone().fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value));
        let mean = sum / f64::max(count, 1.0);
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / f64::max(count, 1.0);
        (mean as f32, (1.0 / (3.0 * variance.sqrt()).max(1e-6)) as f32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(pixels: &[u8], count: usize, height: usize, width: usize, channels: usize) -> Batch<'_> {
        Batch { pixels: Pixels::Bytes(pixels), count, height, width, channels }
    }

    fn floats(pixels: &[f32], count: usize, height: usize, width: usize, channels: usize) -> Batch<'_> {
        Batch { pixels: Pixels::Floats(pixels), count, height, width, channels }
    }

    #[test]
    fn each_pixel_is_where_it_belongs() {
        // Five images of 2x3, each pixel with a value of its own.
        let pixels: Vec<u8> = (0..5 * 2 * 3).map(|value| value * 8).collect();
        let options = GridOptions { columns: Some(2), enlarge: Some(4), gap: 1, row_labels: vec![] };
        let picture = grid(&bytes(&pixels, 5, 2, 3, 1), &options).unwrap();
        assert_eq!((picture.width(), picture.height()), (1 + 2 * 13, 1 + 3 * 9));
        for y in 0..picture.height() {
            for x in 0..picture.width() {
                // Column 0 and row 0 are gap; then 12 (or 8) pixels of image and 1 of gap, again and again.
                let (cell_x, inner_x) = ((x.wrapping_sub(1)) / 13, (x.wrapping_sub(1)) % 13);
                let (cell_y, inner_y) = ((y.wrapping_sub(1)) / 9, (y.wrapping_sub(1)) % 9);
                let image = cell_y * 2 + cell_x;
                let inside = x > 0 && y > 0 && inner_x < 12 && inner_y < 8 && image < 5;
                let expected = match inside {
                    true => (image * 6 + inner_y / 4 * 3 + inner_x / 4) as u8 * 8,
                    false => 255,
                };
                assert_eq!(picture.pixel(x, y), [expected; 3], "({x}, {y})");
            }
        }
    }

    #[test]
    fn floats_and_bytes_draw_the_same() {
        // Two RGB images of 2x2 in both layouts.
        let nhwc: Vec<u8> = (0..24).map(|value| value * 10).collect();
        let mut nchw = vec![0.0; 24];
        for (index, byte) in nhwc.iter().enumerate() {
            let (image, pixel, channel) = (index / 12, index % 12 / 3, index % 3);
            nchw[(image * 3 + channel) * 4 + pixel] = f32::from(*byte) / 127.5 - 1.0;
        }
        let options = GridOptions::default();
        let from_bytes = grid(&bytes(&nhwc, 2, 2, 2, 3), &options).unwrap();
        assert_eq!(from_bytes, grid(&floats(&nchw, 2, 2, 2, 3), &options).unwrap());
        let single = &singles(&floats(&nchw, 2, 2, 2, 3)).unwrap()[1];
        assert_eq!((single.width(), single.channels()), (2, 3));
        assert_eq!(single.pixels(), &nhwc[12..]);
    }

    #[test]
    fn small_images_are_enlarged_and_large_ones_not() {
        let options = GridOptions { gap: 0, ..Default::default() };
        let side =
            |size: usize| grid(&bytes(&vec![0; size * size], 1, size, size, 1), &options).unwrap().width();
        assert_eq!((side(8), side(28), side(48), side(256)), (48, 56, 48, 256));
    }

    #[test]
    fn rows_follow_the_labels() {
        let pixels = [0; 12];
        let options = GridOptions { row_labels: vec!["0".into(), "nine".into()], ..Default::default() };
        let picture = grid(&bytes(&pixels, 12, 1, 1, 1), &options).unwrap();
        let label_width = 4 * Font::Body.width("9") as usize + 10;
        assert_eq!((picture.width(), picture.height()), (label_width + 2 + 6 * 50, 2 + 2 * 50));
        let ink = |rows: std::ops::Range<usize>| {
            rows.flat_map(|y| (0..label_width).map(move |x| (x, y)))
                .filter(|(x, y)| picture.pixel(*x, *y)[0] < 128)
                .count()
        };
        assert!(ink(2..50) > 10 && ink(52..100) > 2 * ink(2..50), "one digit, then four letters");
        let wrong = GridOptions { row_labels: vec!["0".into()], columns: Some(6), ..Default::default() };
        assert_eq!(
            grid(&bytes(&pixels, 12, 1, 1, 1), &wrong).unwrap_err().to_string(),
            "sample grid: 1 row labels for 2 rows of 6 images"
        );
    }

    #[test]
    fn latents_are_stretched_and_said_to_be() {
        // Channel c of four holds c + 10 and c - 10: mean c, deviation 10.
        let values = [10.0, -10.0, 11.0, -9.0, 12.0, -8.0, 13.0, -7.0];
        let picture = &singles(&floats(&values, 1, 1, 2, 4)).unwrap()[0];
        let (bright, dark) = (brightness(1.0 / 3.0), brightness(-1.0 / 3.0));
        assert_eq!(picture.pixels(), [bright, bright, bright, dark, dark, dark]);
        let note = "latents: the first 3 of 4 channels, each stretched to three standard deviations";
        assert_eq!(picture.text(), [("Comment".into(), note.into())]);
        let constant = &singles(&floats(&[5.0; 16], 1, 2, 2, 4)).unwrap()[0];
        assert_eq!(constant.pixels(), [128; 12]);
    }

    #[test]
    fn what_is_not_finite_is_black_and_counted() {
        let values = [f32::NAN, f32::INFINITY, 1.0, -1.0];
        let picture = &singles(&floats(&values, 1, 2, 2, 1)).unwrap()[0];
        assert_eq!((picture.channels(), picture.pixels()), (1, [0, 0, 255, 0].as_slice()));
        assert_eq!(picture.text(), [("Warning".into(), "2 values are not finite, shown black".into())]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        assert_eq!(
            grid(&bytes(&[0; 11], 1, 2, 2, 3), &GridOptions::default()).unwrap_err().to_string(),
            "sample grid: expected 12 values (count 1, height 2, width 2, channels 3), got 11"
        );
        assert_eq!(
            singles(&bytes(&[0; 16], 1, 2, 2, 4)).unwrap_err().to_string(),
            "images: 8-bit images have 1 or 3 channels, not 4"
        );
        assert_eq!(
            grid(&bytes(&[], 0, 2, 2, 3), &GridOptions::default()).unwrap_err().to_string(),
            "sample grid: there is no image to draw"
        );
        let many = GridOptions { enlarge: Some(10_000), ..Default::default() };
        assert_eq!(
            grid(&bytes(&[0; 8], 2, 2, 2, 1), &many).unwrap_err().to_string(),
            "sample grid: 2 images of 20000x20000 pixels are too many for one picture; draw fewer, or write single files"
        );
    }
}
