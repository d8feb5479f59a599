//! How far a long task is, on standard error.
//!
//! Contract: on a terminal one bar that stays at the bottom; elsewhere (a log file, a batch job) one plain line
//! every [`LINE_INTERVAL`]; or nothing. Other output of the process goes through [`Screen::suspend`],
//! [`Screen::println`] or [`Screen::tell`], so that it never runs into the bar. Handles are cheap to clone, may be used from any
//! thread, and never fail: a closed standard error is no reason to stop a training run. A bar that is dropped
//! takes itself off the screen.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::summary;

/// Between two lines where there is no terminal.
pub const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// What the user asked to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Show {
    /// A bar on a terminal, lines elsewhere.
    #[default]
    Auto,
    /// Lines also on a terminal.
    Lines,
    Nothing,
}

/// Where progress appears.
#[derive(Clone)]
pub struct Screen(Kind);

#[derive(Clone)]
enum Kind {
    Bar(ProgressBar),
    Lines(Arc<Mutex<Lines>>),
    Nothing,
}

struct Lines {
    out: Box<dyn Write + Send>,
    last: Instant,
}

impl Screen {
    fn new(show: Show, total: Option<u64>) -> Self {
        let terminal =
            std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        match show {
            Show::Nothing => Self(Kind::Nothing),
            Show::Auto if terminal => Self::bar(total, ProgressDrawTarget::stderr()),
            Show::Auto | Show::Lines => Self::lines(Box::new(std::io::stderr()), Instant::now()),
        }
    }

    fn bar(total: Option<u64>, target: ProgressDrawTarget) -> Self {
        let template = match total {
            Some(_) => "{prefix} {bar:12.cyan/bright.black} {human_pos}/{human_len}  {wide_msg}",
            None => "{prefix} {human_pos}  {wide_msg}",
        };
        let style = ProgressStyle::with_template(template).expect("a fixed template").progress_chars("━╸━");
        Self(Kind::Bar(ProgressBar::with_draw_target(total, target).with_style(style)))
    }

    fn lines(out: Box<dyn Write + Send>, now: Instant) -> Self {
        Self(Kind::Lines(Arc::new(Mutex::new(Lines { out, last: now }))))
    }

    /// Prints a line above the bar, unless the user asked to see nothing.
    pub fn println(&self, line: &str) {
        match &self.0 {
            Kind::Bar(bar) => bar.println(line),
            Kind::Lines(lines) => lock(lines).print(line),
            Kind::Nothing => {}
        }
    }

    /// Takes the bar off the screen while `print` writes whatever it likes, also where nothing is shown: for
    /// warnings. `print` must not use the same progress.
    pub fn suspend<Output>(&self, print: impl FnOnce() -> Output) -> Output {
        match &self.0 {
            Kind::Bar(bar) => bar.suspend(print),
            Kind::Lines(_) | Kind::Nothing => print(),
        }
    }

    /// Writes a line to standard error, above the bar, also where nothing is shown: a warning.
    pub fn tell(&self, line: &str) {
        self.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }

    fn clear(&self) {
        if let Kind::Bar(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }

    /// Shows a position: the message beside the bar, or the line if one is due.
    fn show(&self, now: Instant, due: bool, position: u64, text: impl FnOnce(&Kind) -> String) {
        match &self.0 {
            Kind::Bar(bar) => {
                bar.set_message(text(&self.0));
                bar.set_position(position);
            }
            Kind::Lines(lines) => {
                let mut lines = lock(lines);
                if due || now.saturating_duration_since(lines.last) >= LINE_INTERVAL {
                    lines.last = now;
                    lines.print(&text(&self.0));
                }
            }
            Kind::Nothing => {}
        }
    }
}

impl Lines {
    fn print(&mut self, line: &str) {
        // Nobody is left to read it if this fails.
        let _ = writeln!(self.out, "{line}");
    }
}

/// A thread that panicked while it printed has spoiled nothing.
fn lock<Value>(mutex: &Mutex<Value>) -> MutexGuard<'_, Value> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How fast a count grows, over about the last half minute, pauses included unless they are skipped.
#[derive(Clone, Copy, Debug)]
struct Speed {
    last: Instant,
    position: u64,
    counted: f64,
    seconds: f64,
}

impl Speed {
    const MEMORY_SECONDS: f64 = 30.0;

    fn new(now: Instant, position: u64) -> Self {
        Self { last: now, position, counted: 0.0, seconds: 0.0 }
    }

    fn update(&mut self, now: Instant, position: u64) {
        let elapsed = now.saturating_duration_since(self.last).as_secs_f64();
        let keep = (-elapsed / Self::MEMORY_SECONDS).exp();
        self.counted = self.counted * keep + position.saturating_sub(self.position) as f64;
        self.seconds = self.seconds * keep + elapsed;
        (self.last, self.position) = (now, position);
    }

    fn per_second(&self) -> Option<f64> {
        (self.seconds > 0.0 && self.counted > 0.0).then(|| self.counted / self.seconds)
    }

    /// Leaves out time that was spent on something else.
    fn skip(&mut self, time: Duration) {
        self.last += time;
    }

    fn left(&self, total: u64) -> Option<Duration> {
        let seconds = total.saturating_sub(self.position) as f64 / self.per_second()?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// One training step's figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainStatus {
    /// Steps done.
    pub step: u64,
    pub loss: f32,
    pub grad_norm: f32,
    pub images_per_second: f64,
    pub memory_bytes: u64,
    /// Steps skipped because their gradient was not finite.
    pub nonfinite_skipped: u64,
}

/// The progress of a training run. Samples drawn on the way are shown, are no part of the speed of steps, and count
/// to the time left as often as they will be drawn.
pub struct TrainProgress {
    screen: Screen,
    total: u64,
    first: u64,
    speed: Speed,
    loss: RunningMean,
    drawings: Drawings,
}

/// Samples drawn every so many steps, and at the end.
#[derive(Clone, Copy, Debug, Default)]
struct Drawings {
    /// 0 for never.
    every: u64,
    begun: Option<Instant>,
    /// What the last one took.
    each: Duration,
}

impl Drawings {
    /// The time of those after a step; of none before the first is known.
    fn left(&self, step: u64, total: u64) -> Duration {
        if self.every == 0 || step >= total {
            return Duration::ZERO;
        }
        // The last step's is drawn whether it is due or not.
        let count = (total - 1) / self.every - step / self.every + 1;
        self.each.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
    }
}

impl TrainProgress {
    /// For a run of `total` steps that goes on after `done` of them, and draws samples every `draw_every` (0: never).
    pub fn new(show: Show, total: u64, done: u64, draw_every: u64) -> Self {
        let mut progress = Self::on(Screen::new(show, Some(total)), total, done, Instant::now());
        progress.drawings.every = draw_every;
        progress
    }

    fn on(screen: Screen, total: u64, done: u64, now: Instant) -> Self {
        if let Kind::Bar(bar) = &screen.0 {
            bar.set_prefix("train");
            bar.set_position(done);
        }
        Self {
            screen,
            total,
            first: done + 1,
            speed: Speed::new(now, done),
            loss: RunningMean::default(),
            drawings: Drawings::default(),
        }
    }

    /// Call after each step; it costs a few microseconds. The loss shown is a running mean.
    pub fn update(&mut self, status: &TrainStatus) {
        self.update_at(status, Instant::now());
    }

    fn update_at(&mut self, status: &TrainStatus, now: Instant) {
        self.speed.update(now, status.step);
        self.loss.add(status.loss);
        let due = status.step == self.first || status.step == self.total;
        let drawings = self.drawings.left(status.step, self.total);
        let (loss, left) = (self.loss.value(), self.speed.left(self.total).map(|left| left + drawings));
        let total = self.total;
        self.screen.show(now, due, status.step, |kind| match kind {
            Kind::Bar(_) => train_text(status, loss, left),
            _ => format!("{}  {}", position_text("step", status.step, total), train_text(status, loss, left)),
        });
    }

    /// Samples begin to be drawn; [`Self::drawn`] ends it.
    pub fn begin_drawing(&mut self) {
        self.begin_drawing_at(Instant::now());
    }

    fn begin_drawing_at(&mut self, now: Instant) {
        self.drawings.begun = Some(now);
    }

    /// Call when `done` of `all` parts of the samples' work are done.
    pub fn drawing(&self, done: usize, all: usize) {
        self.drawing_at(done, all, Instant::now());
    }

    fn drawing_at(&self, done: usize, all: usize, now: Instant) {
        self.screen.show(now, false, self.speed.position, |kind| {
            let text = position_text("drawing samples", done as u64, all as u64);
            match kind {
                Kind::Bar(_) => text,
                _ => format!("{}  {text}", position_text("step", self.speed.position, self.total)),
            }
        });
    }

    /// The samples are in `file`.
    pub fn drawn(&mut self, file: &Path) {
        self.drawn_at(file, Instant::now());
    }

    fn drawn_at(&mut self, file: &Path, now: Instant) {
        let Some(begun) = self.drawings.begun.take() else { return };
        self.drawings.each = now.saturating_duration_since(begun);
        self.speed.skip(self.drawings.each);
        let took = summary::duration(self.drawings.each);
        self.screen.println(&format!("samples in {}   (drawn in {took})", file.display()));
    }

    /// For the other output of the process.
    pub fn screen(&self) -> &Screen {
        &self.screen
    }

    /// Takes the bar off the screen.
    pub fn finish(self) {
        self.screen.clear();
    }
}

/// The most important first: a narrow terminal cuts the end.
fn train_text(status: &TrainStatus, loss: f64, left: Option<Duration>) -> String {
    let mut text = format!("loss {}  {} img/s", summary::number(loss), rate_text(status.images_per_second));
    if let Some(left) = left {
        text += &format!("  {} left", summary::duration(left));
    }
    text += &format!("  grad {}", summary::number(f64::from(status.grad_norm)));
    text += &format!("  {}", summary::bytes(status.memory_bytes));
    if status.nonfinite_skipped > 0 {
        text += &format!("  {} skipped", summary::plural(status.nonfinite_skipped, "step"));
    }
    text
}

fn position_text(unit: &str, position: u64, total: u64) -> String {
    let percent = 100.0 * position as f64 / total.max(1) as f64;
    format!("{unit} {}/{} ({percent:.0}%)", summary::count(position), summary::count(total))
}

fn rate_text(rate: f64) -> String {
    match rate {
        _ if rate < 9.95 => format!("{rate:.2}"),
        _ if rate < 99.5 => format!("{rate:.1}"),
        _ => summary::count(rate.round() as u64),
    }
}

/// A mean that forgets: of about the last fifty values, and from the first value on unbiased.
#[derive(Clone, Copy, Debug, Default)]
struct RunningMean {
    sum: f64,
    weight: f64,
}

impl RunningMean {
    const KEEP: f64 = 0.98;

    fn add(&mut self, value: f32) {
        if value.is_finite() {
            self.sum = self.sum * Self::KEEP + f64::from(value);
            self.weight = self.weight * Self::KEEP + 1.0;
        }
    }

    /// NaN before the first finite value.
    fn value(&self) -> f64 {
        self.sum / self.weight
    }
}

/// The progress of any other task: sampling, indexing a folder, hashing a checkpoint.
#[derive(Clone)]
pub struct Progress {
    screen: Screen,
    label: Arc<str>,
    total: Option<u64>,
    speed: Arc<Mutex<Speed>>,
}

impl Progress {
    /// `label` says what is done to what: `sampling images`. Without a `total`, only the count is shown.
    pub fn new(show: Show, label: &str, total: Option<u64>) -> Self {
        Self::on(Screen::new(show, total), label, total, Instant::now())
    }

    fn on(screen: Screen, label: &str, total: Option<u64>, now: Instant) -> Self {
        if let Kind::Bar(bar) = &screen.0 {
            bar.set_prefix(label.to_owned());
        }
        Self { screen, label: label.into(), total, speed: Arc::new(Mutex::new(Speed::new(now, 0))) }
    }

    /// Counts `count` more as done.
    pub fn add(&self, count: u64) {
        self.add_at(count, Instant::now());
    }

    fn add_at(&self, count: u64, now: Instant) {
        let mut speed = lock(&self.speed);
        let position = speed.position + count;
        speed.update(now, position);
        let speed = *speed;
        self.screen.show(now, false, position, |kind| {
            let mut text = match (kind, self.total) {
                (Kind::Bar(_), _) => String::new(),
                (_, Some(total)) => format!("{}  ", position_text(&self.label, position, total)),
                (_, None) => format!("{} {}  ", self.label, summary::count(position)),
            };
            if let Some(rate) = speed.per_second() {
                text += &format!("{}/s", rate_text(rate));
            }
            if let Some(left) = self.total.and_then(|total| speed.left(total)) {
                text += &format!("  {} left", summary::duration(left));
            }
            text.trim_end().to_owned()
        });
    }

    /// For the other output of the process.
    pub fn screen(&self) -> &Screen {
        &self.screen
    }

    /// Takes the bar off the screen.
    pub fn finish(self) {
        self.screen.clear();
    }
}

#[cfg(test)]
mod tests;
