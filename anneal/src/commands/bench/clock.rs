//! Times of repeated work, on the CPU by the wall clock and on a GPU by marks in its stream.

use std::time::Instant;

use anneal_device::cuda::{ProfileRow, RepeatedWork};
use anneal_tensor::Device;
use anyhow::{Context, Result};

use super::median;

/// Runs of captured work before it is measured: as it is, captured, replayed.
const CAPTURING_RUNS: usize = 3;
/// Repetitions of an op in one captured piece of work, so that no host time is in what is measured.
const GROUP: usize = 10;

/// What was measured of repeated runs.
pub struct Timed {
    /// Of each run.
    pub milliseconds: Vec<f64>,
    /// From the start of the process to the end of the first run, if the system tells.
    pub first_run_seconds: Option<f64>,
    /// On a GPU, of a run: pieces of work that were sent (a captured step is one), and times that the host waited.
    pub launches: f64,
    pub waits: f64,
}

/// The runs before measuring of work that a GPU captures on the way, asked for `warmup`.
pub fn capturing_warmup(device: &Device, warmup: usize) -> usize {
    if matches!(device, Device::Cuda(_)) { warmup.max(CAPTURING_RUNS) } else { warmup }
}

/// Times `count` runs after `warmup` others. A GPU's runs follow each other without a wait.
pub fn time(
    device: &Device,
    warmup: usize,
    count: usize,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Timed> {
    let mut first_run_seconds = None;
    let mut once = |first: bool| {
        run()?;
        if first {
            device.synchronize()?;
            first_run_seconds = seconds_since_start();
        }
        anyhow::Ok(())
    };
    for index in 0..warmup {
        once(index == 0)?;
    }
    let (milliseconds, launches, waits) = match device {
        Device::Cpu(_) => {
            let mut milliseconds = Vec::new();
            for index in 0..count {
                let start = Instant::now();
                once(warmup == 0 && index == 0)?;
                milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
            }
            (milliseconds, 0, 0)
        }
        Device::Cuda(cuda) => {
            cuda.synchronize()?;
            let (launches, waits) = (cuda.launches(), cuda.waits());
            let mut marks = vec![cuda.mark()?];
            for _ in 0..count {
                once(false)?;
                marks.push(cuda.mark()?);
            }
            let (launches, waits) = (cuda.launches() - launches, cuda.waits() - waits);
            (cuda.milliseconds_between(&marks)?, launches, waits)
        }
    };
    let of_a_run = |total: u64| total as f64 / count.max(1) as f64;
    Ok(Timed { milliseconds, first_run_seconds, launches: of_a_run(launches), waits: of_a_run(waits) })
}

/// Median milliseconds of one run of an op; on a GPU out of a captured group of runs.
pub fn time_op(device: &Device, warmup: usize, count: usize, run: impl Fn() -> Result<()>) -> Result<f64> {
    let Device::Cuda(cuda) = device else {
        return Ok(median(&time(device, warmup, count, run)?.milliseconds));
    };
    // What is compiled, tuned or made once comes before the capture.
    for _ in 0..warmup.max(1) {
        run()?;
    }
    let ((), graph) = cuda.capture(|| (0..GROUP).try_for_each(|_| run()))?;
    let mut marks = Vec::new();
    for _ in 0..=count {
        marks.push(cuda.mark()?);
        cuda.repeat(&graph)?;
    }
    // The first pair holds the end of the capture's own run.
    let times = cuda.milliseconds_between(&marks)?;
    Ok(median(&times[1.min(times.len() - 1)..]) / GROUP as f64)
}

/// The device's time by kernel over `count` runs after `warmup` others; sums over all of them.
///
/// # Errors
/// If the device is no GPU.
pub fn profile(
    device: &Device,
    warmup: usize,
    count: usize,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Vec<ProfileRow>> {
    let Device::Cuda(cuda) = device else {
        anyhow::bail!("--profile shows the kernels of a GPU: add --device cuda");
    };
    for _ in 0..warmup {
        run()?;
    }
    cuda.start_profile()?;
    for _ in 0..count {
        run()?;
    }
    Ok(cuda.finish_profile()?)
}

/// Work with a device, captured there unless it is to run piece by piece.
pub struct Repeated {
    pub device: Device,
    pub eager: bool,
    captured: RepeatedWork,
}

impl Repeated {
    pub fn new(device: &Device, eager: bool) -> Self {
        Self { device: device.clone(), eager, captured: RepeatedWork::default() }
    }

    pub fn run<T>(&mut self, mut work: impl FnMut() -> Result<T>) -> Result<()> {
        match &self.device {
            Device::Cuda(cuda) if !self.eager => self.captured.run(cuda, || work().map(drop))?,
            _ => drop(work()?),
        }
        match self.captured.take_problem() {
            Some(problem) => {
                Err(anyhow::anyhow!(problem).context("the work cannot be captured; try --eager"))
            }
            None => Ok(()),
        }
    }
}

/// Since the process was started, as the kernel counts.
fn seconds_since_start() -> Option<f64> {
    let read = |path| std::fs::read_to_string(path).ok();
    started_seconds_ago(&read("/proc/self/stat")?, &read("/proc/uptime")?).ok()
}

/// From a process's line of figures (proc(5): the 22nd is its start in hundredths of a second after the
/// system's) and the system's seconds.
fn started_seconds_ago(stat: &str, uptime: &str) -> Result<f64> {
    // The second figure is a name in brackets, which may hold spaces.
    let (_, after_name) = stat.rsplit_once(')').context("no name")?;
    let start: f64 = after_name.split_whitespace().nth(19).context("no start")?.parse()?;
    let now: f64 = uptime.split_whitespace().next().context("no seconds")?.parse()?;
    Ok(now - start / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processs_age_is_read_from_the_kernels_figures() {
        let stat = "12 (a b) c) S 1 12 12 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 3 0 4200 1000 50 184467";
        assert_eq!(started_seconds_ago(stat, "50.25 90.0\n").unwrap(), 8.25);
        assert!(started_seconds_ago("nothing", "1 1").is_err());
    }

    #[test]
    fn the_first_run_is_timed_from_the_processs_start() {
        let mut runs = 0;
        let timed = time(&Device::cpu(Some(1), None), 0, 3, || {
            runs += 1;
            Ok(())
        });
        let timed = timed.unwrap();
        assert_eq!((runs, timed.milliseconds.len()), (3, 3));
        assert!(timed.first_run_seconds.is_none_or(|seconds| (0.0..1e6).contains(&seconds)));
    }
}
