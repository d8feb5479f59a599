//! A small RGB drawing surface: rectangles, smooth lines, dots and text.
//!
//! Contract: x runs right and y runs down, in pixels; integer coordinates are pixel corners. What lies outside is
//! clipped. Text is Noto Sans Mono, carried as bitmaps by its crate, so no font is looked for at run time; a
//! character that it lacks is drawn as `?`.

use std::ops::Range;

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::picture::Picture;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Color(pub u8, pub u8, pub u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Font {
    Body,
    Bold,
    Title,
}

impl Font {
    fn face(self) -> (FontWeight, RasterHeight) {
        match self {
            Font::Body => (FontWeight::Regular, RasterHeight::Size16),
            Font::Bold => (FontWeight::Bold, RasterHeight::Size16),
            Font::Title => (FontWeight::Bold, RasterHeight::Size20),
        }
    }

    /// Width of `text` in pixels.
    pub fn width(self, text: &str) -> i32 {
        let (weight, height) = self.face();
        (text.chars().count() * get_raster_width(weight, height)) as i32
    }
}

/// How a line of points is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Stroke {
    pub color: Color,
    pub width: f32,
    /// 1 covers what is below.
    pub opacity: f32,
}

pub struct Canvas {
    width: i32,
    height: i32,
    pixels: Vec<Color>,
    /// Rows that lines and dots may touch.
    rows: Range<i32>,
}

impl Canvas {
    pub fn new(width: i32, height: i32, background: Color) -> Self {
        Self { width, height, pixels: vec![background; (width * height) as usize], rows: 0..height }
    }

    pub fn into_picture(self) -> Picture {
        let bytes = self.pixels.iter().flat_map(|color| [color.0, color.1, color.2]).collect();
        Picture::new(self.width as usize, self.height as usize, 3, bytes).expect("a canvas is a picture")
    }

    /// From now on, lines and dots stay within these rows.
    pub fn clip_rows(&mut self, rows: Range<i32>) {
        self.rows = rows.start.max(0)..rows.end.min(self.height);
    }

    fn blend(&mut self, x: i32, y: i32, color: Color, opacity: f32) {
        if !(0..self.width).contains(&x) || !(0..self.height).contains(&y) {
            return;
        }
        let pixel = &mut self.pixels[(y * self.width + x) as usize];
        let mix = |below: u8, above: u8| {
            (f32::from(below) + (f32::from(above) - f32::from(below)) * opacity).round() as u8
        };
        *pixel = Color(mix(pixel.0, color.0), mix(pixel.1, color.1), mix(pixel.2, color.2));
    }

    pub fn rectangle(&mut self, x: i32, y: i32, width: i32, height: i32, color: Color) {
        for row in y..y + height {
            for column in x..x + width {
                self.blend(column, row, color, 1.0);
            }
        }
    }

    /// Draws `text` with its box's top left corner at (x, y).
    pub fn text(&mut self, x: i32, y: i32, text: &str, font: Font, color: Color) {
        let (weight, height) = font.face();
        let mut left = x;
        for character in text.chars() {
            let glyph = get_raster(character, weight, height)
                .or_else(|| get_raster('?', weight, height))
                .expect("the font holds ASCII");
            for (row, intensities) in glyph.rows().enumerate() {
                for (column, intensity) in intensities.iter().enumerate() {
                    if *intensity > 0 {
                        self.blend(
                            left + column as i32,
                            y + row as i32,
                            color,
                            f32::from(*intensity) / 255.0,
                        );
                    }
                }
            }
            left += glyph.width() as i32;
        }
    }

    pub fn dot(&mut self, x: f32, y: f32, radius: f32, color: Color) {
        self.line(&[(x, y), (x, y)], Stroke { color, width: 2.0 * radius, opacity: 1.0 });
    }

    /// Draws a line through the points, with round joints and ends. A pixel is covered by its nearest segment
    /// only, so that a translucent line is even where it crosses itself.
    pub fn line(&mut self, points: &[(f32, f32)], stroke: Stroke) {
        let mut coverage = vec![0_u8; self.pixels.len()];
        for pair in points.windows(2) {
            self.cover(&mut coverage, pair[0], pair[1], stroke.width / 2.0);
        }
        for y in self.rows.clone() {
            for x in 0..self.width {
                let covered = coverage[(y * self.width + x) as usize];
                if covered > 0 {
                    self.blend(x, y, stroke.color, stroke.opacity * f32::from(covered) / 255.0);
                }
            }
        }
    }

    /// Raises the coverage of the pixels within `radius` of a segment, fading over the pixel at its rim.
    fn cover(&self, coverage: &mut [u8], from: (f32, f32), to: (f32, f32), radius: f32) {
        let reach = radius + 1.0;
        let span = |a: f32, b: f32, within: Range<i32>| {
            let low = (a.min(b) - reach).floor() as i32;
            let high = (a.max(b) + reach).ceil() as i32;
            low.max(within.start)..high.min(within.end)
        };
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let squared_length = dx * dx + dy * dy;
        for y in span(from.1, to.1, self.rows.clone()) {
            for x in span(from.0, to.0, 0..self.width) {
                let (px, py) = (x as f32 + 0.5 - from.0, y as f32 + 0.5 - from.1);
                let along = match squared_length > 0.0 {
                    true => ((px * dx + py * dy) / squared_length).clamp(0.0, 1.0),
                    false => 0.0,
                };
                let distance = (px - along * dx).hypot(py - along * dy);
                let covered = (radius + 0.5 - distance).clamp(0.0, 1.0);
                let pixel = &mut coverage[(y * self.width + x) as usize];
                *pixel = (*pixel).max((covered * 255.0).round() as u8);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHITE: Color = Color(255, 255, 255);
    const BLACK: Color = Color(0, 0, 0);

    fn ink(canvas: &Canvas) -> f64 {
        canvas.pixels.iter().map(|color| f64::from(255 - color.0) / 255.0).sum()
    }

    #[test]
    fn a_line_covers_its_area() {
        let mut canvas = Canvas::new(60, 60, WHITE);
        canvas.line(&[(10.0, 30.0), (50.0, 30.0)], Stroke { color: BLACK, width: 4.0, opacity: 1.0 });
        // 40 x 4 and two half discs of radius 2.
        let area = 160.0 + std::f64::consts::PI * 4.0;
        assert!((ink(&canvas) / area - 1.0).abs() < 0.02, "{} against {area}", ink(&canvas));
        let mut diagonal = Canvas::new(60, 60, WHITE);
        diagonal.line(&[(16.0, 18.0), (48.0, 42.0)], Stroke { color: BLACK, width: 4.0, opacity: 1.0 });
        assert!((ink(&diagonal) / area - 1.0).abs() < 0.02, "{} against {area}", ink(&diagonal));
    }

    #[test]
    fn crossing_itself_adds_nothing() {
        let mut canvas = Canvas::new(20, 20, WHITE);
        let there_and_back = [(2.0, 10.0), (18.0, 10.0), (2.0, 10.0)];
        canvas.line(&there_and_back, Stroke { color: BLACK, width: 2.0, opacity: 0.5 });
        assert_eq!(canvas.pixels[10 * 20 + 10], Color(128, 128, 128));
    }

    #[test]
    fn lines_stay_within_the_rows() {
        let mut canvas = Canvas::new(20, 20, WHITE);
        canvas.clip_rows(5..12);
        canvas.line(&[(10.0, -40.0), (10.0, 90.0)], Stroke { color: BLACK, width: 2.0, opacity: 1.0 });
        for y in 0..20 {
            let drawn = canvas.pixels[y * 20 + 10] != WHITE;
            assert_eq!(drawn, (5..12).contains(&y), "row {y}");
        }
    }

    #[test]
    fn text_takes_its_box_and_is_clipped() {
        let mut canvas = Canvas::new(40, 20, WHITE);
        canvas.text(2, 2, "8", Font::Body, BLACK);
        assert!(ink(&canvas) > 10.0);
        let inside = |x: i32, y: i32| (2..2 + Font::Body.width("8")).contains(&x) && (2..18).contains(&y);
        for y in 0..20 {
            for x in 0..40 {
                assert!(inside(x, y) || canvas.pixels[(y * 40 + x) as usize] == WHITE, "ink at ({x}, {y})");
            }
        }
        canvas.text(-30, 15, "outside and over the edge 熊", Font::Title, BLACK);
    }
}
