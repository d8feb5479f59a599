//! A caching allocator: freed blocks are kept and handed out again.
//!
//! Contract: blocks are aligned to 64 bytes, their contents are unspecified, and a
//! repeated sequence of requests (a training step) is served from the cache without
//! the operating system, so that the steady state has no page faults.
//! Statistics are kept by [`Purpose`]; an optional limit is enforced on what is in use.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use crate::DeviceError;

/// What memory is used for; the rows of every memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    Weights,
    Gradients,
    Optimizer,
    Activations,
    Workspace,
}

impl Purpose {
    pub const ALL: [Purpose; 5] =
        [Purpose::Weights, Purpose::Gradients, Purpose::Optimizer, Purpose::Activations, Purpose::Workspace];

    pub fn name(self) -> &'static str {
        match self {
            Purpose::Weights => "weights",
            Purpose::Gradients => "gradients",
            Purpose::Optimizer => "optimizer",
            Purpose::Activations => "activations",
            Purpose::Workspace => "workspace",
        }
    }

    /// What helps where it does not fit.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Purpose::Weights => "choose a smaller model",
            Purpose::Gradients | Purpose::Optimizer => "choose a smaller model or fewer ema.rates",
            Purpose::Activations | Purpose::Workspace => {
                "use a smaller batch, or in training train.accumulate or model.checkpoint_activations=true"
            }
        }
    }
}

/// Begins what is to be done about a limit of this many bytes; [`Purpose::advice`] goes on.
pub(crate) fn limit_reached(limit: usize) -> String {
    format!("the memory limit is reached, {limit} bytes: raise it, or ")
}

/// Bytes by purpose, and what the allocator holds in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStatistics {
    /// In use now, in the order of [`Purpose::ALL`].
    pub in_use: [usize; 5],
    /// Highest use so far of each purpose (their peaks may fall at different times).
    pub peak: [usize; 5],
    /// Highest sum in use so far.
    pub peak_total: usize,
    /// Held from the operating system, cached blocks included.
    pub reserved: usize,
    /// Requests that the cache could not serve, since the start.
    pub cache_misses: usize,
}

impl MemoryStatistics {
    pub fn total(&self) -> usize {
        self.in_use.iter().sum()
    }

    pub(crate) fn take(&mut self, purpose: Purpose, size: usize) {
        let index = purpose as usize;
        self.in_use[index] += size;
        self.peak[index] = self.peak[index].max(self.in_use[index]);
        self.peak_total = self.peak_total.max(self.total());
    }

    pub(crate) fn give(&mut self, purpose: Purpose, size: usize) {
        self.in_use[purpose as usize] -= size;
    }

    pub(crate) fn reset_peak(&mut self) {
        self.peak = self.in_use;
        self.peak_total = self.total();
    }
}

/// The table that an out-of-memory error shows.
impl std::fmt::Display for MemoryStatistics {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Of small models, most would be 0.0 MiB.
        let (unit, size) = if self.peak_total < 16 << 20 { ("KiB", 1 << 10) } else { ("MiB", 1 << 20) };
        let in_units = |bytes: usize| bytes as f64 / f64::from(size);
        writeln!(out, "{:<12} {:>12} {:>12}", "memory", format!("now {unit}"), format!("peak {unit}"))?;
        for purpose in Purpose::ALL {
            let (now, peak) = (self.in_use[purpose as usize], self.peak[purpose as usize]);
            writeln!(out, "{:<12} {:>12.1} {:>12.1}", purpose.name(), in_units(now), in_units(peak))?;
        }
        write!(out, "{:<12} {:>12.1} {:>12.1}", "sum", in_units(self.total()), in_units(self.peak_total))
    }
}

/// Who gets a buffer's memory back.
pub(crate) trait Owner: Send + Sync {
    fn release(&self, pointer: NonNull<u8>, size: usize, purpose: Purpose);
}

const ALIGNMENT: usize = 64;
/// Blocks of at least this size are page aligned and advised to use huge pages.
const LARGE: usize = 1 << 21;
/// A cached block may be larger than the request by one part in this many.
const SLACK: usize = 8;

#[derive(Default)]
struct State {
    free: BTreeMap<usize, Vec<NonNull<u8>>>,
    statistics: MemoryStatistics,
}
// SAFETY: free blocks are owned by the state alone.
unsafe impl Send for State {}

/// The cache behind one device.
pub(crate) struct Allocator {
    state: Mutex<State>,
    limit: Option<usize>,
    device: String,
}

impl Allocator {
    pub(crate) fn new(device: String, limit: Option<usize>) -> Self {
        Self { state: Mutex::default(), limit, device }
    }

    pub(crate) fn statistics(&self) -> MemoryStatistics {
        self.lock().statistics.clone()
    }

    pub(crate) fn reset_peak(&self) {
        self.lock().statistics.reset_peak();
    }

    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize, purpose: Purpose) -> Result<Buffer, DeviceError> {
        let wanted = round_up(bytes);
        let mut state = self.lock();
        if let Some(limit) = self.limit.filter(|limit| state.statistics.total() + wanted > *limit) {
            return Err(self.out_of_memory(&state.statistics, wanted, purpose, &limit_reached(limit)));
        }
        let found = state
            .free
            .range_mut(wanted..=wanted + wanted / SLACK)
            .find_map(|(size, blocks)| blocks.pop().map(|block| (*size, block)));
        let (size, pointer) = match found {
            Some(found) => found,
            None => {
                let pointer = system_allocate(wanted).ok_or_else(|| {
                    self.out_of_memory(&state.statistics, wanted, purpose, "the machine has no more: ")
                })?;
                state.statistics.reserved += wanted;
                state.statistics.cache_misses += 1;
                (wanted, pointer)
            }
        };
        state.statistics.take(purpose, size);
        drop(state);
        Ok(Buffer { pointer, size, bytes, purpose, owner: self.clone() })
    }

    fn out_of_memory(
        &self,
        statistics: &MemoryStatistics,
        bytes: usize,
        purpose: Purpose,
        why: &str,
    ) -> DeviceError {
        DeviceError::OutOfMemory {
            device: self.device.clone(),
            bytes,
            purpose: purpose.name(),
            in_use: statistics.total(),
            hint: format!("; {why}{}\n{statistics}", purpose.advice()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Owner for Allocator {
    fn release(&self, pointer: NonNull<u8>, size: usize, purpose: Purpose) {
        let mut state = self.lock();
        state.statistics.give(purpose, size);
        state.free.entry(size).or_default().push(pointer);
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        for (size, blocks) in std::mem::take(&mut self.lock().free) {
            for block in blocks {
                // SAFETY: the block came from `system_allocate(size)` and is in no buffer.
                unsafe { std::alloc::dealloc(block.as_ptr(), layout(size)) };
            }
        }
    }
}

fn round_up(bytes: usize) -> usize {
    // Coarser steps for larger blocks let near-equal sizes share the cache.
    let step = if bytes >= LARGE { 1 << 16 } else { ALIGNMENT };
    bytes.max(1).next_multiple_of(step)
}

fn layout(size: usize) -> Layout {
    let alignment = if size >= LARGE { LARGE } else { ALIGNMENT };
    Layout::from_size_align(size, alignment).expect("block size overflows")
}

fn system_allocate(size: usize) -> Option<NonNull<u8>> {
    // SAFETY: the size is never zero.
    let pointer = NonNull::new(unsafe { std::alloc::alloc(layout(size)) })?;
    #[cfg(target_os = "linux")]
    if size >= LARGE {
        // SAFETY: the range was just allocated; the advice changes no contents.
        unsafe { libc::madvise(pointer.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
    }
    Some(pointer)
}

/// A block of memory, given back to its cache when dropped. Contents start unspecified.
pub struct Buffer {
    pub(crate) pointer: NonNull<u8>,
    /// Bytes of the block, at least those asked for.
    pub(crate) size: usize,
    pub(crate) bytes: usize,
    pub(crate) purpose: Purpose,
    pub(crate) owner: Arc<dyn Owner>,
}
// SAFETY: a buffer is plain memory; who may write it is the tensor layer's concern.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    /// First byte, aligned to 64; an address of the device's memory, which the host may not follow if
    /// the device is not the host.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// Bytes asked for.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.owner.release(self.pointer, self.size, self.purpose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_step_is_served_from_the_cache_and_the_limit_holds() {
        let allocator = Arc::new(Allocator::new("cpu".into(), Some(64 << 20)));
        let step = || {
            let held: Vec<Buffer> = [100, 5 << 20, 4096, 5 << 20]
                .iter()
                .map(|bytes| allocator.allocate(*bytes, Purpose::Activations).unwrap())
                .collect();
            assert!(held.iter().all(|buffer| (buffer.as_ptr() as usize).is_multiple_of(ALIGNMENT)));
        };
        step();
        let misses = allocator.statistics().cache_misses;
        (0..10).for_each(|_| step());
        assert_eq!(allocator.statistics().cache_misses, misses);
        assert_eq!(allocator.statistics().total(), 0);
        let error = allocator.allocate(65 << 20, Purpose::Weights).err().unwrap().to_string();
        assert!(error.contains("bytes of weights on cpu"), "{error}");
        let table = allocator.statistics().to_string();
        assert!(error.ends_with(&table) && table.contains("activations"), "{error}");
    }
}
