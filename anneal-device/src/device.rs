//! The handle that says where memory lives and who computes on it.

use std::fmt;
use std::sync::Arc;

use crate::memory::Allocator;
use crate::{Buffer, CudaDevice, DeviceError, MemoryStatistics, Purpose, ThreadPool};

/// The most threads of a CPU that a name may ask for: the operating system refuses far more, when many are made already.
const MOST_THREADS: usize = 1024;

/// A device; clones are the same device.
#[derive(Clone)]
pub enum Device {
    Cpu(Arc<CpuDevice>),
    Cuda(Arc<CudaDevice>),
}

/// The host processor: a thread pool and a cache of memory.
pub struct CpuDevice {
    pub pool: ThreadPool,
    allocator: Arc<Allocator>,
}

impl Device {
    /// The CPU with `threads` compute threads (default: all that the process may use) and an
    /// optional limit in bytes on the memory in use.
    pub fn cpu(threads: Option<usize>, memory_limit: Option<usize>) -> Self {
        let threads =
            threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |count| count.get()));
        Device::Cpu(Arc::new(CpuDevice {
            pool: ThreadPool::new(threads),
            allocator: Arc::new(Allocator::new("cpu".into(), memory_limit)),
        }))
    }

    /// A GPU, with an optional limit in bytes on the memory in use.
    ///
    /// # Errors
    /// If a library that it needs is missing, with where it was looked for.
    pub fn cuda(index: usize, memory_limit: Option<usize>) -> Result<Self, DeviceError> {
        Ok(Device::Cuda(Arc::new(CudaDevice::new(index, memory_limit)?)))
    }

    /// Reads `cpu`, `cpu:THREADS`, `cuda` or `cuda:INDEX`.
    ///
    /// # Errors
    /// If it is none of these, asks for more than 1024 threads, or names a GPU that cannot be used.
    pub fn parse(name: &str, memory_limit: Option<usize>) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::UnknownDevice { name: name.into() };
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::cpu(None, memory_limit)),
            None if name == "cuda" => Self::cuda(0, memory_limit),
            Some(("cuda", index)) => Self::cuda(index.parse().map_err(|_| unknown())?, memory_limit),
            Some(("cpu", threads)) => match threads.parse::<usize>() {
                Ok(threads) if threads > MOST_THREADS => {
                    Err(DeviceError::TooManyThreads { threads, most: MOST_THREADS })
                }
                Ok(threads) if threads > 0 => Ok(Self::cpu(Some(threads), memory_limit)),
                _ => Err(unknown()),
            },
            _ => Err(unknown()),
        }
    }

    /// A block of at least `bytes`; contents unspecified.
    pub fn allocate(&self, bytes: usize, purpose: Purpose) -> Result<Buffer, DeviceError> {
        match self {
            Device::Cpu(cpu) => cpu.allocator.allocate(bytes, purpose),
            Device::Cuda(cuda) => cuda.allocate(bytes, purpose),
        }
    }

    pub fn memory(&self) -> MemoryStatistics {
        match self {
            Device::Cpu(cpu) => cpu.allocator.statistics(),
            Device::Cuda(cuda) => cuda.memory(),
        }
    }

    /// Starts the peak figures anew from what is in use.
    pub fn reset_peak_memory(&self) {
        match self {
            Device::Cpu(cpu) => cpu.allocator.reset_peak(),
            Device::Cuda(cuda) => cuda.reset_peak(),
        }
    }

    /// Waits until all work so far is done; on the CPU it is done already.
    ///
    /// # Errors
    /// What went wrong in work that was queued.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        match self {
            Device::Cpu(_) => Ok(()),
            Device::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// Whether two handles are the same device.
    pub fn same(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(a), Device::Cpu(b)) => Arc::ptr_eq(a, b),
            (Device::Cuda(a), Device::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(cpu) => write!(formatter, "cpu:{}", cpu.pool.threads()),
            Device::Cuda(cuda) => write!(formatter, "cuda:{}", cuda.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}
