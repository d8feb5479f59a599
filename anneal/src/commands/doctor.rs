//! `doctor`: what this machine offers.

use std::process::ExitCode;

use anneal_device::cpu;
use anneal_train::report::summary::{self, Align, Table};
use anyhow::Result;

use crate::cli::Doctor;

pub fn doctor(arguments: &Doctor) -> Result<ExitCode> {
    let facts = facts();
    if arguments.json {
        let map: serde_json::Map<String, serde_json::Value> =
            facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into())).collect();
        println!("{}", serde_json::to_string_pretty(&map)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new([("anneal", Align::Left), (env!("CARGO_PKG_VERSION"), Align::Left)]);
    for (name, value) in facts {
        table.row([name, &value]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn facts() -> Vec<(&'static str, String)> {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let processor = proc_value("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into());
    let memory = |key: &str| {
        let kilobytes = proc_value("/proc/meminfo", key)?.split(' ').next()?.parse::<u64>().ok()?;
        Some(summary::bytes(kilobytes * 1024))
    };
    vec![
        ("processor", processor),
        ("threads", format!("{threads} (device cpu uses all; cpu:N uses N)")),
        ("vector kernels", cpu::vector_unit().to_owned()),
        ("memory", memory("MemTotal").unwrap_or_else(|| "unknown".into())),
        ("memory free", memory("MemAvailable").unwrap_or_else(|| "unknown".into())),
        ("operating system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("GPU", "not used by this version: training and sampling run on the CPU".into()),
    ]
}

/// The value of a `key : value` line.
fn proc_value(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
