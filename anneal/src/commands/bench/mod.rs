//! `bench`: speed and memory of what users run, on random data.
//!
//! Training steps are those of the trainer itself, over its own data pipeline, and samples those of the
//! pipeline that `sample` uses; on a GPU both are captured and replayed. Figures are medians; for a claim,
//! compare side by side in one run (see benchmarks/README.md).

mod cases;
mod clock;
mod data;
mod model;
mod ops;
mod sampling;

use std::process::ExitCode;

use anneal_device::Purpose;
use anneal_device::cuda::ProfileRow;
use anneal_tensor::Device;
use anneal_train::report::summary::{self, Align, Table};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::cli::{Bench, BenchWhat};
use crate::scratch::ScratchFolder;
use clock::Timed;

pub fn bench(arguments: &Bench) -> Result<ExitCode> {
    match &arguments.what {
        BenchWhat::Op(arguments) => ops::ops(arguments)?,
        BenchWhat::Block(arguments) => model::block(arguments)?,
        BenchWhat::Step(arguments) => model::step(arguments)?,
        BenchWhat::Forward(arguments) => model::forward(arguments)?,
        BenchWhat::Sample(arguments) => sampling::sample(arguments)?,
        BenchWhat::Data(arguments) => data::data(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A folder for random data.
fn scratch() -> Result<ScratchFolder> {
    ScratchFolder::temporary("anneal-bench-").context("no temporary folder for random data")
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

/// What the device is: a GPU's name, or the handle.
fn device_name(device: &Device) -> String {
    match device {
        Device::Cuda(cuda) => cuda.properties().name.clone(),
        Device::Cpu(_) => device.to_string(),
    }
}

/// Among the further figures, the loss of the last timed step: a sign that the steps compute sense.
const LAST_LOSS: &str = "last_loss";

/// One measured thing: what it was, where, its times, how many images a run covers, and further figures.
struct Measured {
    what: String,
    device: Device,
    timed: Timed,
    images: usize,
    /// Operations of a run; multiply-adds count as two.
    operations: f64,
    extra: Map<String, Value>,
}

impl Measured {
    fn print(&self, as_json: bool) {
        let milliseconds = &self.timed.milliseconds;
        let median_ms = median(milliseconds);
        let images_per_second = self.images as f64 / median_ms * 1e3;
        let memory = self.device.memory();
        if as_json {
            // One line, so that a script can take the last line that begins with a brace.
            let value = json!({
                "what": self.what,
                "device": self.device.to_string(),
                "device_name": device_name(&self.device),
                "median_ms": median_ms,
                "step_ms": milliseconds,
                "images_per_second": images_per_second,
                "peak_memory_bytes": memory.peak_total,
                "reserved_memory_bytes": memory.reserved,
                "first_step_seconds": self.timed.first_run_seconds,
                "details": self.details(median_ms),
            });
            println!("{value}");
            return;
        }
        let spread = |pick: fn(f64, f64) -> f64, start| milliseconds.iter().copied().fold(start, pick);
        let mut table = Table::new([("measured", Align::Left), (&self.what, Align::Left)]);
        table.row(["on".to_owned(), device_name(&self.device)]);
        table.row(["median".to_owned(), format!("{median_ms:.2} ms")]);
        let (low, high) = (spread(f64::min, f64::INFINITY), spread(f64::max, 0.0));
        table.row([
            "range".to_owned(),
            format!("{low:.2} to {high:.2} ms over {}", summary::plural(milliseconds.len() as u64, "run")),
        ]);
        table.row(["images/s".to_owned(), summary::number(images_per_second)]);
        let rate = floating_operations(self.operations / median_ms * 1e3);
        table.row([
            "arithmetic".to_owned(),
            format!("{rate}/s, {} a run", floating_operations(self.operations)),
        ]);
        table.row(["peak memory".to_owned(), summary::bytes(memory.peak_total as u64)]);
        for (purpose, peak) in Purpose::ALL.iter().zip(memory.peak).filter(|(_, peak)| *peak > 0) {
            table.row([format!("  {}", purpose.name()), summary::bytes(peak as u64)]);
        }
        table.row(["memory held".to_owned(), summary::bytes(memory.reserved as u64)]);
        if let Some(seconds) = self.timed.first_run_seconds {
            table.row(["from start to first".to_owned(), format!("{seconds:.2} s")]);
        }
        if matches!(self.device, Device::Cuda(_)) {
            let Timed { launches, waits, .. } = &self.timed;
            table.row(["launches a run".to_owned(), one_decimal(*launches)]);
            table.row(["host waits a run".to_owned(), one_decimal(*waits)]);
        }
        if let Some(loss) = self.extra.get(LAST_LOSS) {
            // JSON has no other numbers.
            let loss = loss.as_f64().map_or("not finite".to_owned(), |loss| format!("{loss:.4}"));
            table.row(["last loss".to_owned(), loss]);
        }
        print!("{table}");
    }

    fn details(&self, median_ms: f64) -> Map<String, Value> {
        let memory = self.device.memory();
        let purposes: Map<String, Value> = Purpose::ALL
            .iter()
            .zip(memory.peak)
            .map(|(purpose, bytes)| (purpose.name().to_owned(), bytes.into()))
            .collect();
        let mut details = Map::new();
        let mut add = |name: &str, value: Value| details.insert(name.to_owned(), value);
        add("gflop_per_second", (self.operations / median_ms / 1e6).into());
        add("gflop_per_run", (self.operations / 1e9).into());
        add("peak_bytes_by_purpose", purposes.into());
        add("allocator_misses", memory.cache_misses.into());
        if matches!(self.device, Device::Cuda(_)) {
            add("launches_per_run", self.timed.launches.into());
            add("host_waits_per_run", self.timed.waits.into());
        }
        details.extend(self.extra.clone());
        details
    }
}

/// `6.068 GFLOP`.
fn floating_operations(count: f64) -> String {
    const UNITS: [(&str, f64); 5] = [("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    let (unit, size) = UNITS.into_iter().find(|(_, size)| count >= *size).unwrap_or(("", 1.0));
    format!("{} {unit}FLOP", summary::number(count / size))
}

/// `57`, `3.3`.
fn one_decimal(value: f64) -> String {
    ((value * 10.0).round() / 10.0).to_string()
}

/// Prints where a GPU's time goes; the rows are sums over `runs`.
fn print_profile(what: &str, device: &Device, rows: &[ProfileRow], runs: usize, as_json: bool) {
    let runs = runs as f64;
    let total: f64 = rows.iter().map(|row| row.milliseconds).sum::<f64>() / runs;
    let figures = rows.iter().map(|row| {
        let milliseconds = row.milliseconds / runs;
        (row.name, milliseconds, milliseconds / total, row.count as f64 / runs)
    });
    if as_json {
        let kernels: Vec<Value> = figures
            .map(|(name, milliseconds, share, count)| {
                json!({"name": name, "ms": milliseconds, "share": share, "count": count})
            })
            .collect();
        println!(
            "{}",
            json!({"what": what, "device_name": device_name(device), "ms": total, "kernels": kernels})
        );
        return;
    }
    println!("{what}, on {}: {total:.2} ms by kernel, gaps included", device_name(device));
    let mut table = Table::new([
        ("kernel", Align::Left),
        ("ms", Align::Right),
        ("share", Align::Right),
        ("count", Align::Right),
    ]);
    for (name, milliseconds, share, count) in figures {
        table.row([
            name.to_owned(),
            format!("{milliseconds:.3}"),
            format!("{:.1} %", share * 100.0),
            one_decimal(count),
        ]);
    }
    print!("{table}");
}
