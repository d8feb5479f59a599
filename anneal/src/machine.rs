//! What this machine has.

use anneal_device::cuda;
use anneal_train::report::summary;
use anyhow::{Result, bail};

/// Bytes of the processor's memory, or what a container leaves of it. None if the system does not say.
pub fn memory() -> Option<u64> {
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limits = limits.iter().filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok());
    proc_memory("MemTotal").map(|total| limits.fold(total, u64::min))
}

/// Bytes of memory of a recipe's device. None if it is not known, as that of a GPU of another machine.
pub fn memory_of(device: &str) -> Option<u64> {
    let ordinal = match device.split_once(':') {
        None if device == "cuda" => 0,
        Some(("cuda", ordinal)) => ordinal.parse().ok()?,
        _ => return memory(),
    };
    Some(cuda::properties(ordinal).ok()?.total_memory as u64)
}

/// Refuses f32 tensors that are more than this machine's memory: they are made before anything asks a device, and with a
/// panic where no list can be so long.
pub fn check_fits<'a>(what: &str, tensors: impl IntoIterator<Item = &'a [usize]>) -> Result<()> {
    let bytes_of =
        |sizes: &[usize]| sizes.iter().fold(size_of::<f32>(), |bytes, size| bytes.saturating_mul(*size));
    let bytes = tensors.into_iter().fold(0, |sum: usize, sizes| sum.saturating_add(bytes_of(sizes))) as u64;
    let there = memory().unwrap_or(isize::MAX as u64);
    if bytes > there {
        bail!(
            "{what} needs {}, and this machine has {}: choose less",
            summary::bytes(bytes),
            summary::bytes(there)
        );
    }
    Ok(())
}

/// Bytes by a name in `/proc/meminfo`.
pub fn proc_memory(key: &str) -> Option<u64> {
    let kilobytes = proc_value("/proc/meminfo", key)?.split(' ').next()?.parse::<u64>().ok()?;
    Some(kilobytes * 1024)
}

/// The first value of a key in a file of `key: value` lines.
pub fn proc_value(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
