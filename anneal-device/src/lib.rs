//! Devices, memory and the ground floor of the kernels.
//!
//! What lives here: [`Device`] (a handle that every tensor carries), its caching
//! allocator with statistics by [`Purpose`], the thread pool, `cpu`: the
//! matrix multiply and SIMD dispatch on which CPU ops are built, and `cuda`: NVIDIA's libraries,
//! memory, kernels, captured steps, matrix products and attention on GPUs.
//! This crate knows nothing of shapes or gradients.

pub mod cpu;
pub mod cuda;
mod device;
mod error;
mod memory;
mod pool;

pub use cuda::CudaDevice;
pub use device::{CpuDevice, Device};
pub use error::DeviceError;
pub use memory::{Buffer, MemoryStatistics, Purpose};
pub use pool::ThreadPool;
