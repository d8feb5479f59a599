//! The loss plot of a run, as a picture.
//!
//! Contract: draws whatever has been recorded so far, also nothing, one step or values that are not finite. The
//! recorded loss is light, its smoothed curve dark; the vertical axis is logarithmic where the values span a factor
//! of ten, and is said to be. Spikes are cut at the panel's edge instead of flattening the rest. The latest smoothed
//! value stands at the end of its curve. Steps whose loss was not finite are marked below.
//! Deliberately absent: interaction, themes, general charts.

mod axis;
mod curve;

use axis::{Scale, Tick};
use curve::Binned;

use super::canvas::{Canvas, Color, Font, Stroke};
use super::picture::Picture;
use super::summary;

const BACKGROUND: Color = Color(255, 255, 255);
const INK: Color = Color(38, 43, 51);
const FAINT_INK: Color = Color(112, 120, 132);
const GRID: Color = Color(231, 234, 238);
const MINOR_GRID: Color = Color(244, 245, 247);
const AXIS: Color = Color(150, 157, 168);
const BLUE: Color = Color(24, 90, 170);
const ORANGE: Color = Color(214, 96, 24);
const GREEN: Color = Color(36, 122, 87);
const RED: Color = Color(200, 30, 45);

const WIDTH: i32 = 1000;
const LEFT: i32 = 84;
const RIGHT: i32 = 88;
const TOP: i32 = 74;
const LOSS_HEIGHT: i32 = 360;
const NORM_HEIGHT: i32 = 130;
/// Between two panels; the lower one's heading stands in it.
const BETWEEN: i32 = 50;
const BOTTOM: i32 = 58;
const PLOT_WIDTH: i32 = WIDTH - LEFT - RIGHT;

/// What to draw; points are `(step, value)` in step order.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrainingCurves<'a> {
    pub title: &'a str,
    pub loss: &'a [(u64, f64)],
    /// Shares the loss's axis; drawn as recorded. May be empty.
    pub validation: &'a [(u64, f64)],
    /// Drawn in a panel of its own below. May be empty.
    pub gradient_norm: &'a [(u64, f64)],
}

impl TrainingCurves<'_> {
    /// Draws the picture: 1000 pixels wide, 492 high, or 672 with the gradient norm.
    pub fn draw(&self) -> Picture {
        let mut panels = vec![Panel::new("loss", LOSS_HEIGHT)];
        panels[0].add("loss", self.loss, BLUE, Drawn::RawAndSmooth);
        panels[0].add("validation", self.validation, ORANGE, Drawn::AsRecorded);
        if !self.gradient_norm.is_empty() {
            let mut panel = Panel::new("gradient norm", NORM_HEIGHT);
            panel.add("gradient norm", self.gradient_norm, GREEN, Drawn::RawAndSmooth);
            panels.push(panel);
        }
        let steps = [self.loss, self.validation, self.gradient_norm];
        let first = steps.iter().filter_map(|points| points.first()).map(|point| point.0).min().unwrap_or(0);
        let last = steps.iter().filter_map(|points| points.last()).map(|point| point.0).max().unwrap_or(1);

        let panel_heights: i32 = panels.iter().map(|panel| panel.height + BETWEEN).sum();
        let mut canvas = Canvas::new(WIDTH, TOP + panel_heights - BETWEEN + BOTTOM, BACKGROUND);
        canvas.text(LEFT, 16, &shortened(self.title), Font::Title, INK);
        let steps = Scale::of_steps(first, last);
        let mut top = TOP;
        for panel in &panels {
            panel.draw(&mut canvas, top, &steps);
            top += panel.height + BETWEEN;
        }
        draw_step_labels(&mut canvas, top - BETWEEN, &steps);
        canvas.into_picture()
    }
}

/// A title must leave the margins free.
fn shortened(title: &str) -> String {
    let fitting = ((WIDTH - LEFT - 20) / Font::Title.width("m")) as usize;
    match title.chars().count() <= fitting {
        true => title.to_owned(),
        false => title.chars().take(fitting - 3).chain("...".chars()).collect(),
    }
}

fn draw_step_labels(canvas: &mut Canvas, bottom: i32, steps: &Scale) {
    for tick in steps.step_ticks(8) {
        let x = LEFT + (steps.position(tick.value) * f64::from(PLOT_WIDTH)).round() as i32;
        canvas.rectangle(x, bottom, 1, 5, AXIS);
        canvas.text(x - Font::Body.width(&tick.label) / 2, bottom + 8, &tick.label, Font::Body, INK);
    }
    let x = LEFT + (PLOT_WIDTH - Font::Body.width("step")) / 2;
    canvas.text(x, bottom + 30, "step", Font::Body, FAINT_INK);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Drawn {
    RawAndSmooth,
    AsRecorded,
}

struct Curve {
    name: &'static str,
    color: Color,
    drawn: Drawn,
    points: Binned,
    /// The dark line.
    line: Vec<(f64, f64)>,
}

struct Panel {
    heading: &'static str,
    height: i32,
    curves: Vec<Curve>,
}

impl Panel {
    fn new(heading: &'static str, height: i32) -> Self {
        Self { heading, height, curves: Vec::new() }
    }

    fn add(&mut self, name: &'static str, points: &[(u64, f64)], color: Color, drawn: Drawn) {
        let points = curve::binned(points, PLOT_WIDTH as usize);
        if points.bins.is_empty() && points.nonfinite.is_empty() {
            return;
        }
        let line = match drawn {
            Drawn::RawAndSmooth => curve::smoothed(&points.bins),
            Drawn::AsRecorded => points.bins.iter().map(|bin| (bin.step, bin.mean)).collect(),
        };
        self.curves.push(Curve { name, color, drawn, points, line });
    }

    /// The dark lines whole, and the recorded values but for the most extreme hundredth on either side.
    fn scale(&self) -> Option<Scale> {
        let mut raw: Vec<f64> = self
            .curves
            .iter()
            .flat_map(|curve| &curve.points.bins)
            .flat_map(|bin| [bin.low, bin.high])
            .collect();
        if raw.is_empty() {
            return None;
        }
        raw.sort_by(f64::total_cmp);
        let lines = self.curves.iter().flat_map(|curve| &curve.line).map(|point| point.1);
        let (low, high) = lines
            .fold((curve::quantile(&raw, 0.01), curve::quantile(&raw, 0.99)), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        Some(Scale::of_values(low, high))
    }

    fn draw(&self, canvas: &mut Canvas, top: i32, steps: &Scale) {
        let bottom = top + self.height;
        let scale = self.scale();
        let logarithmic = scale.is_some_and(|scale| scale.is_logarithmic());
        canvas.text(LEFT, top - 24, self.heading, Font::Bold, INK);
        if logarithmic {
            let x = LEFT + Font::Bold.width(self.heading) + 8;
            canvas.text(x, top - 24, "log scale", Font::Body, FAINT_INK);
        }
        self.draw_legend(canvas, top - 24);
        let Some(scale) = scale else {
            let note = "no finite value yet";
            canvas.text(
                LEFT + (PLOT_WIDTH - Font::Body.width(note)) / 2,
                top + self.height / 2 - 8,
                note,
                Font::Body,
                FAINT_INK,
            );
            canvas.rectangle(LEFT, bottom, PLOT_WIDTH, 1, AXIS);
            self.draw_nonfinite(canvas, bottom, steps);
            return;
        };
        self.draw_grid(canvas, top, &scale, steps);
        let place = |step: f64, value: f64| {
            (
                LEFT as f32 + (steps.position(step) * f64::from(PLOT_WIDTH)) as f32,
                bottom as f32 - (scale.position(value) * f64::from(self.height)) as f32,
            )
        };
        canvas.clip_rows(top - 2..bottom + 2);
        self.draw_curves(canvas, place);
        canvas.clip_rows(0..i32::MAX);
        self.draw_nonfinite(canvas, bottom, steps);
        self.draw_latest(canvas, top, place);
    }

    fn draw_legend(&self, canvas: &mut Canvas, y: i32) {
        let mut entries: Vec<(&str, Color, f32)> = Vec::new();
        if self.curves.iter().any(|curve| !curve.points.nonfinite.is_empty()) {
            entries.push(("not finite", RED, 1.0));
        }
        for curve in self.curves.iter().rev() {
            if curve.drawn == Drawn::RawAndSmooth {
                entries.push(("smoothed", curve.color, 1.0));
                entries.push(("each step", curve.color, RAW_OPACITY));
            } else {
                entries.push((curve.name, curve.color, 1.0));
            }
        }
        let mut right = LEFT + PLOT_WIDTH;
        for (name, color, opacity) in entries {
            let x = right - Font::Body.width(name);
            canvas.text(x, y, name, Font::Body, INK);
            let line = [(x as f32 - 28.0, y as f32 + 8.5), (x as f32 - 9.0, y as f32 + 8.5)];
            canvas.line(&line, Stroke { color, width: 3.0, opacity });
            right = x - 48;
        }
    }

    fn draw_grid(&self, canvas: &mut Canvas, top: i32, scale: &Scale, steps: &Scale) {
        let bottom = top + self.height;
        for tick in steps.step_ticks(8) {
            let x = LEFT + (steps.position(tick.value) * f64::from(PLOT_WIDTH)).round() as i32;
            canvas.rectangle(x, top, 1, self.height, MINOR_GRID);
        }
        let ticks = scale.value_ticks((self.height / 40) as usize);
        let y_of =
            |tick: &Tick| bottom - (scale.position(tick.value) * f64::from(self.height)).round() as i32;
        let (labelled, minor): (Vec<_>, Vec<_>) = ticks.iter().partition(|tick| !tick.label.is_empty());
        for tick in minor {
            canvas.rectangle(LEFT, y_of(tick), PLOT_WIDTH, 1, MINOR_GRID);
        }
        for tick in labelled {
            canvas.rectangle(LEFT, y_of(tick), PLOT_WIDTH, 1, GRID);
            let x = LEFT - 10 - Font::Body.width(&tick.label);
            canvas.text(x, y_of(tick) - 8, &tick.label, Font::Body, INK);
        }
        canvas.rectangle(LEFT, bottom, PLOT_WIDTH, 1, AXIS);
    }

    fn draw_curves(&self, canvas: &mut Canvas, place: impl Fn(f64, f64) -> (f32, f32)) {
        for curve in self.curves.iter().filter(|curve| curve.drawn == Drawn::RawAndSmooth) {
            let raw: Vec<_> = curve
                .points
                .bins
                .iter()
                .flat_map(|bin| [place(bin.step, bin.low), place(bin.step, bin.high)])
                .collect();
            canvas.line(&raw, Stroke { color: curve.color, width: 1.2, opacity: RAW_OPACITY });
        }
        for curve in &self.curves {
            let line: Vec<_> = curve.line.iter().map(|(step, value)| place(*step, *value)).collect();
            canvas.line(&line, Stroke { color: curve.color, width: 2.4, opacity: 1.0 });
            if curve.drawn == Drawn::AsRecorded && line.len() <= 40 {
                line.iter().for_each(|(x, y)| canvas.dot(*x, *y, 3.5, curve.color));
            }
        }
    }

    fn draw_nonfinite(&self, canvas: &mut Canvas, bottom: i32, steps: &Scale) {
        for step in self.curves.iter().flat_map(|curve| &curve.points.nonfinite) {
            let x = LEFT + (steps.position(*step as f64) * f64::from(PLOT_WIDTH)).round() as i32;
            canvas.rectangle(x - 1, bottom - 9, 2, 9, RED);
        }
    }

    /// The latest value beside the end of each curve, moved apart where they would overlap.
    fn draw_latest(&self, canvas: &mut Canvas, top: i32, place: impl Fn(f64, f64) -> (f32, f32)) {
        let mut ends: Vec<(f32, f32, f64, Color)> = Vec::new();
        for curve in &self.curves {
            let Some((step, value)) = curve.line.last() else { continue };
            let (x, y) = place(*step, *value);
            ends.push((x, y.clamp(top as f32, (top + self.height) as f32), *value, curve.color));
        }
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut free = f32::MIN;
        for (x, y, value, color) in ends {
            canvas.dot(x, y, 4.0, color);
            let label_y = (y - 8.0).max(free);
            canvas.text(LEFT + PLOT_WIDTH + 12, label_y as i32, &summary::number(value), Font::Bold, color);
            free = label_y + 17.0;
        }
    }
}

const RAW_OPACITY: f32 = 0.32;

#[cfg(test)]
mod tests;
