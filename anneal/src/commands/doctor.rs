//! `doctor`: what this machine offers: the CPU, NVIDIA's libraries, GPUs and their links.
//!
//! Never fails for what is missing; it says so, and how to get it.

use std::path::Path;
use std::process::ExitCode;

use anneal_device::cpu;
use anneal_device::cuda::{self, Libraries, Library, Link, Properties};
use anneal_train::report::summary::{self, Align, Table};
use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::Doctor;
use crate::machine::{proc_memory, proc_value};

pub fn doctor(arguments: &Doctor) -> Result<ExitCode> {
    let machine = Machine::examine();
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&machine.json())?);
    } else {
        machine.print();
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything that is reported.
struct Machine {
    processor: Processor,
    libraries: Vec<LibraryFacts>,
    /// As its maker numbers it, for example 580.65.06.
    driver: Option<String>,
    devices: Vec<DeviceFacts>,
    links: Vec<Link>,
    /// Why GPUs, or some of what is asked of them, are not there.
    problems: Vec<String>,
    cache: Option<Cache>,
}

struct Processor {
    name: String,
    threads: usize,
    memory: Option<u64>,
    memory_free: Option<u64>,
}

struct LibraryFacts {
    library: Library,
    version: Option<String>,
    /// `None` if it was not found.
    file: Option<String>,
}

struct DeviceFacts {
    properties: Properties,
    memory_free: Option<usize>,
}

struct Cache {
    folder: String,
    files: u64,
    bytes: u64,
}

impl Machine {
    fn examine() -> Self {
        let mut problems = Vec::new();
        let (mut devices, mut links) = (Vec::new(), Vec::new());
        // Where libraries were looked for, an error's later lines, is said once for all of them.
        let first_line = |error: anneal_device::DeviceError| {
            error.to_string().lines().next().unwrap_or_default().to_owned()
        };
        match cuda::device_count() {
            Err(error) => problems.push(first_line(error)),
            Ok(count) => {
                for ordinal in 0..count {
                    match cuda::properties(ordinal) {
                        Ok(properties) => devices
                            .push(DeviceFacts { properties, memory_free: cuda::free_memory(ordinal).ok() }),
                        Err(error) => problems.push(first_line(error)),
                    }
                }
                match cuda::links(count) {
                    Ok(found) => links = found,
                    Err(error) => problems.push(format!("links were not measured: {}", first_line(error))),
                }
            }
        }
        let fact = |library| LibraryFacts {
            library,
            version: cuda::library_version(library),
            file: cuda::library_file(library).map(|path| path.display().to_string()),
        };
        Self {
            processor: Processor::examine(),
            libraries: Library::ALL.map(fact).into(),
            driver: driver_release(),
            devices,
            links,
            problems,
            cache: Cache::examine(),
        }
    }

    /// Libraries without which a device is of no use.
    fn missing(&self) -> Vec<Library> {
        let missing = self.libraries.iter().filter(|facts| facts.file.is_none());
        missing.map(|facts| facts.library).filter(|library| !library.is_optional()).collect()
    }

    fn verdict(&self) -> String {
        let missing: Vec<&str> = self.missing().into_iter().map(Library::name).collect();
        match (self.devices.is_empty(), missing.is_empty()) {
            (false, true) => "usable: device=cuda in a recipe, or --device cuda".into(),
            (false, false) => format!("not usable: {} not found, see below", missing.join(", ")),
            (true, _) => "none that can be used: everything runs on the CPU".into(),
        }
    }

    fn print(&self) {
        self.processor.print();
        println!();
        self.print_devices();
        println!();
        self.print_libraries();
        if let Some(Cache { folder, files, bytes }) = &self.cache {
            println!();
            println!(
                "cache of compiled kernels: {folder} ({}, {})",
                summary::plural(*files, "file"),
                summary::bytes(*bytes)
            );
        }
    }

    fn print_devices(&self) {
        let mut table = Table::new([("GPU", Align::Left), (&self.verdict(), Align::Left)]);
        if let Some(driver) = &self.driver {
            table.row(["driver", driver]);
        }
        print!("{table}");
        for problem in &self.problems {
            println!("{problem}");
        }
        if self.devices.is_empty() {
            return;
        }
        println!();
        let mut table = Table::new([
            ("device", Align::Left),
            ("name", Align::Left),
            ("compute", Align::Right),
            ("multiprocessors", Align::Right),
            ("memory", Align::Right),
            ("free", Align::Right),
            ("bandwidth", Align::Right),
        ]);
        for DeviceFacts { properties, memory_free } in &self.devices {
            let (major, minor) = properties.compute;
            table.row([
                format!("cuda:{}", properties.ordinal),
                properties.name.clone(),
                format!("{major}.{minor}"),
                properties.multiprocessors.to_string(),
                summary::bytes(properties.total_memory as u64),
                memory_free.map_or("unknown".into(), |free| summary::bytes(free as u64)),
                rate((properties.bandwidth > 0.0).then_some(properties.bandwidth)),
            ]);
        }
        print!("{table}");
        self.print_links();
    }

    fn print_links(&self) {
        if self.links.is_empty() {
            return;
        }
        println!();
        let mut table = Table::new([
            ("from", Align::Left),
            ("to", Align::Left),
            ("measured", Align::Right),
            ("way", Align::Left),
        ]);
        for Link { from, to, direct, bandwidth } in &self.links {
            let way = if *direct { "direct" } else { "by way of the host" };
            table.row([from.clone(), to.clone(), rate(Some(*bandwidth)), way.to_owned()]);
        }
        print!("{table}");
    }

    fn print_libraries(&self) {
        let mut table = Table::new([
            ("library", Align::Left),
            ("version", Align::Left),
            ("for", Align::Left),
            ("where, or how to get it", Align::Left),
        ]);
        for LibraryFacts { library, version, file } in &self.libraries {
            let optional = if library.is_optional() { ", optional" } else { "" };
            table.row([
                library.name().to_owned(),
                version.clone().unwrap_or("-".into()),
                format!("{}{optional}", library.purpose()),
                file.clone().unwrap_or_else(|| format!("not found: {}", library.source())),
            ]);
        }
        print!("{table}");
        if self.libraries.iter().any(|facts| facts.file.is_none()) {
            println!("{}", Libraries::load().searched_text());
        }
    }

    fn json(&self) -> Value {
        let devices: Vec<Value> = self.devices.iter().map(DeviceFacts::json).collect();
        let links: Vec<Value> = self
            .links
            .iter()
            .map(|link| json!({"from": link.from, "to": link.to, "direct": link.direct, "gb_per_second": link.bandwidth}))
            .collect();
        let libraries: serde_json::Map<String, Value> = self
            .libraries
            .iter()
            .map(|facts| {
                let value = json!({
                    "version": facts.version,
                    "file": facts.file,
                    "for": facts.library.purpose(),
                    "from": facts.library.source(),
                    "optional": facts.library.is_optional(),
                });
                (facts.library.name().to_owned(), value)
            })
            .collect();
        json!({
            "anneal": env!("CARGO_PKG_VERSION"),
            "cpu": self.processor.json(),
            "gpu": {
                "usable": !self.devices.is_empty() && self.missing().is_empty(),
                "driver": self.driver,
                "devices": devices,
                "links": links,
                "problems": self.problems,
            },
            "libraries": libraries,
            "searched": Libraries::load().searched,
            "cache": self.cache.as_ref().map(|cache| json!({
                "folder": cache.folder, "files": cache.files, "bytes": cache.bytes,
            })),
        })
    }
}

impl Processor {
    fn examine() -> Self {
        Self {
            name: proc_value("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into()),
            threads: std::thread::available_parallelism().map_or(1, |count| count.get()),
            memory: proc_memory("MemTotal"),
            memory_free: proc_memory("MemAvailable"),
        }
    }

    fn print(&self) {
        let size = |bytes: Option<u64>| bytes.map_or("unknown".into(), summary::bytes);
        let mut table = Table::new([("anneal", Align::Left), (env!("CARGO_PKG_VERSION"), Align::Left)]);
        table.row(["processor", &self.name]);
        table.row(["threads", &format!("{} (device cpu uses all; cpu:N uses N)", self.threads)]);
        table.row(["vector kernels", cpu::vector_unit()]);
        table.row(["memory", &size(self.memory)]);
        table.row(["memory free", &size(self.memory_free)]);
        table.row(["operating system", &format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)]);
        print!("{table}");
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "threads": self.threads,
            "vector_kernels": cpu::vector_unit(),
            "memory_bytes": self.memory,
            "memory_free_bytes": self.memory_free,
            "operating_system": std::env::consts::OS,
            "architecture": std::env::consts::ARCH,
        })
    }
}

impl DeviceFacts {
    fn json(&self) -> Value {
        let properties = &self.properties;
        json!({
            "device": format!("cuda:{}", properties.ordinal),
            "name": properties.name,
            "compute": [properties.compute.0, properties.compute.1],
            "architecture": properties.architecture(),
            "multiprocessors": properties.multiprocessors,
            "memory_bytes": properties.total_memory,
            "memory_free_bytes": self.memory_free,
            "bandwidth_gb_per_second": properties.bandwidth,
            "l2_bytes": properties.l2_bytes,
            "shared_memory_per_block_bytes": properties.shared_memory_per_block,
        })
    }
}

impl Cache {
    fn examine() -> Option<Self> {
        let folder = cuda::cache_folder()?;
        let (files, bytes) = count_files(&folder);
        Some(Self { folder: folder.display().to_string(), files, bytes })
    }
}

/// Files below a folder and their bytes; what cannot be read is left out.
fn count_files(folder: &Path) -> (u64, u64) {
    let Ok(entries) = std::fs::read_dir(folder) else { return (0, 0) };
    entries.flatten().fold((0, 0), |(files, bytes), entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            let (more, size) = count_files(&entry.path());
            (files + more, bytes + size)
        }
        Ok(metadata) => (files + 1, bytes + metadata.len()),
        Err(_) => (files, bytes),
    })
}

/// `25.3 GB/s`, `4.80 TB/s`: decimal units, as links are sold.
fn rate(gigabytes: Option<f64>) -> String {
    match gigabytes {
        None => "unknown".into(),
        Some(value) if value >= 1000.0 => format!("{:.2} TB/s", value / 1000.0),
        Some(value) => format!("{value:.1} GB/s"),
    }
}

/// The release of the kernel's driver, from a line such as `NVRM version: ... Kernel Module  580.65.06  Release Build`.
fn driver_release() -> Option<String> {
    release_in(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

fn release_in(text: &str) -> Option<String> {
    let is_release = |word: &&str| {
        word.contains('.') && word.chars().all(|letter| letter.is_ascii_digit() || letter == '.')
    };
    text.lines().next()?.split_whitespace().find(is_release).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_release_is_found_in_its_line() {
        let old = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0\n";
        assert_eq!(release_in(old).unwrap(), "535.54.03");
        assert_eq!(release_in(open).unwrap(), "580.65.06");
        assert_eq!(release_in("nothing"), None);
    }

    #[test]
    fn rates_are_in_decimal_units() {
        assert_eq!(rate(Some(4917.2)), "4.92 TB/s");
        assert_eq!(rate(Some(25.31)), "25.3 GB/s");
    }
}
