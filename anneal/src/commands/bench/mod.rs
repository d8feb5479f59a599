//! `bench`: speed and memory of what users run, on random data.
//!
//! Training steps are those of the trainer itself, over its own data pipeline. Figures are medians; for a claim,
//! compare side by side in one run (see benchmarks/README.md).

mod data;
mod model;
mod ops;

use std::process::ExitCode;
use std::time::Instant;

use anneal_train::report::summary::{self, Align, Table};
use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::{Bench, BenchWhat};

pub fn bench(arguments: &Bench) -> Result<ExitCode> {
    match &arguments.what {
        BenchWhat::Op(arguments) => ops::ops(arguments)?,
        BenchWhat::Block(arguments) => model::block(arguments)?,
        BenchWhat::Step(arguments) => model::step(arguments)?,
        BenchWhat::Sample(arguments) => model::sample(arguments)?,
        BenchWhat::Data(arguments) => data::data(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds of `count` runs after `warmup` others.
fn time(warmup: usize, count: usize, mut run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(count);
    for index in 0..warmup + count {
        let start = Instant::now();
        run()?;
        if index >= warmup {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

/// One measured thing: what it was, its times, how many images a run covers, and further figures.
struct Measured {
    what: String,
    milliseconds: Vec<f64>,
    images: usize,
    peak_bytes: usize,
    extra: Value,
}

impl Measured {
    fn print(&self, as_json: bool) {
        let median_ms = median(&self.milliseconds);
        let images_per_second = self.images as f64 / median_ms * 1e3;
        if as_json {
            // One line, so that a script can take the last line that begins with a brace.
            let value = json!({
                "what": self.what,
                "median_ms": median_ms,
                "step_ms": self.milliseconds,
                "images_per_second": images_per_second,
                "peak_memory_bytes": self.peak_bytes,
                "details": self.extra,
            });
            println!("{value}");
            return;
        }
        let spread = |pick: fn(f64, f64) -> f64, start| self.milliseconds.iter().copied().fold(start, pick);
        let mut table = Table::new([("measured", Align::Left), (&self.what, Align::Left)]);
        table.row(["median".to_owned(), format!("{median_ms:.2} ms")]);
        let (low, high) = (spread(f64::min, f64::INFINITY), spread(f64::max, 0.0));
        table.row([
            "range".to_owned(),
            format!("{low:.2} to {high:.2} ms over {} runs", self.milliseconds.len()),
        ]);
        table.row(["images/s".to_owned(), format!("{images_per_second:.2}")]);
        table.row(["peak memory".to_owned(), summary::bytes(self.peak_bytes as u64)]);
        print!("{table}");
        for (name, value) in self.extra.as_object().into_iter().flatten() {
            println!("{name}: {value}");
        }
    }
}
