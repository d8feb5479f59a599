//! NVIDIA GPUs: one context, one stream and one slab of memory a device.
//!
//! Contract: all work of a device is sent to its one stream and so happens in the order of the
//! calls; memory may be given back while work that uses it is still under way. The host waits for the
//! device where values are read, in [`CudaDevice::synchronize`], where candidates or a profile are timed, and in an
//! upload when the ring of pinned memory is full; each wait is counted.
//! This is the only place that touches the CUDA bindings.

mod blas;
mod compiler;
mod dnn;
mod driver;
mod graph;
mod launch;
mod libraries;
mod links;
mod profile;
mod repeated;
mod slab;
mod tensor_map;
mod transfer;
mod versions;

use std::cell::Cell;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys;

pub use blas::{Batch, Epilogue, Operand, Output, Product, variants as kernel_variants};
pub use compiler::{Macros, Source, Variant, cache_folder, compile, revision, version as compiler_version};
pub use dnn::{
    AttentionBackend, AttentionElement, AttentionKey, AttentionPass, AttentionPlan, AttentionStrides,
    AttentionTensors, dnn_version,
};
pub use driver::{Properties, device_count, properties};
pub use graph::Graph;
pub use launch::{Arguments, Kernel, Launch};
pub use libraries::{Found, Libraries, Library};
pub use links::{Link, free_memory, links};
pub use profile::{Mark, ProfileRow};
pub use repeated::RepeatedWork;
pub use tensor_map::{Boxes, TensorMap};
pub use transfer::PendingRead;
pub use versions::{library_file, library_version};

use crate::DeviceError;
use crate::memory::MemoryStatistics;
use dnn::Dnn;
use driver::check;
use graph::Mode;
use launch::Kernels;
use profile::Profile;
use slab::Slab;
use transfer::{Pinned, Staging};

/// Ampere: the first with bf16 in its matrix units and asynchronous copies to shared memory.
const OLDEST_COMPUTE: (usize, usize) = (8, 0);

thread_local! {
    /// The context that this thread last made current.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// One GPU.
pub struct CudaDevice {
    properties: Properties,
    context: sys::CUcontext,
    stream: sys::CUstream,
    slab: Arc<Slab>,
    kernels: Kernels,
    dnn: Dnn,
    staging: Mutex<Staging>,
    pinned: Mutex<Vec<Pinned>>,
    mode: Mutex<Mode>,
    profile: Mutex<Option<Profile>>,
    products: blas::Products,
    launches: AtomicU64,
    waits: AtomicU64,
}
// SAFETY: handles of the driver, which is thread safe; the rest is behind locks.
unsafe impl Send for CudaDevice {}
unsafe impl Sync for CudaDevice {}

impl CudaDevice {
    /// # Errors
    /// If the driver or the device is missing or too old, or a library that every run needs is missing.
    pub fn new(ordinal: usize, memory_limit: Option<usize>) -> Result<Self, DeviceError> {
        let properties = properties(ordinal)?;
        if properties.compute < OLDEST_COMPUTE {
            let (major, minor) = properties.compute;
            let reason =
                format!("{} has compute capability {major}.{minor}: 8.0 or newer is needed", properties.name);
            return Err(DeviceError::NoCuda { reason, searched: Libraries::load().searched_text() });
        }
        // Every run needs these, beside the driver.
        Libraries::load().require(&[Library::Nvrtc, Library::CublasLt])?;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver has started and the device exists.
        unsafe {
            check(
                "cuDevicePrimaryCtxRetain",
                ordinal,
                sys::cuDevicePrimaryCtxRetain(&mut context, ordinal as i32),
            )?;
            check("cuCtxSetCurrent", ordinal, sys::cuCtxSetCurrent(context))?;
            let flag = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("cuStreamCreate", ordinal, sys::cuStreamCreate(&mut stream, flag))?;
        }
        let slab = Arc::new(Slab::new(ordinal, context, properties.total_memory, memory_limit)?);
        Ok(Self {
            properties,
            context,
            stream,
            slab,
            kernels: Kernels::default(),
            dnn: Dnn::new()?,
            staging: Mutex::default(),
            pinned: Mutex::default(),
            mode: Mutex::default(),
            profile: Mutex::default(),
            products: blas::Products::default(),
            launches: AtomicU64::new(0),
            waits: AtomicU64::new(0),
        })
    }

    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    pub fn ordinal(&self) -> usize {
        self.properties.ordinal
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    pub(crate) fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    pub(crate) fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether a step is being captured or replayed, so that nothing can be measured or read.
    pub fn in_captured_step(&self) -> bool {
        !self.mode().is_eager()
    }

    pub(crate) fn memory(&self) -> MemoryStatistics {
        self.slab.statistics()
    }

    pub(crate) fn reset_peak(&self) {
        self.slab.reset_peak();
    }

    /// Makes the device's context current on this thread.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        let context = self.context as usize;
        if CURRENT.get() != context {
            // SAFETY: the context lives as long as the device.
            check("cuCtxSetCurrent", self.ordinal(), unsafe { sys::cuCtxSetCurrent(self.context) })?;
            CURRENT.set(context);
        }
        Ok(())
    }

    /// A kernel of a source, compiled with these macros.
    ///
    /// # Errors
    /// If NVRTC is missing, or the source does not compile.
    pub fn kernel(&self, source: &Source, name: &'static str, macros: Macros) -> Result<Kernel, DeviceError> {
        self.bind()?;
        self.kernels.get(&self.properties, source, name, macros)
    }

    /// How many clusters of `blocks` blocks of such a launch run at once: those of a cluster share a group of multiprocessors,
    /// which may leave some idle. The grid must be a multiple of the cluster; 0 if the device takes none.
    pub fn clusters_at_once(
        &self,
        kernel: Kernel,
        launch: Launch,
        blocks: usize,
    ) -> Result<usize, DeviceError> {
        self.bind()?;
        launch::clusters_at_once(self.ordinal(), kernel, launch, blocks)
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and the memory behind them is large enough and alive.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        mut arguments: Arguments,
    ) -> Result<(), DeviceError> {
        let hash = |hasher: &mut std::hash::DefaultHasher| {
            (kernel.function as usize).hash(hasher);
            launch.hash(hasher);
            arguments.hash_into(hasher);
        };
        if !self.admit(kernel.name, hash)? {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { launch::start(self.ordinal(), self.stream, kernel, launch, &mut arguments) }
    }

    /// Whether work is to be sent; counts it, and notes it where a step is captured or profiled. What
    /// is hashed must tell apart everything that the work depends on.
    pub(crate) fn admit(
        &self,
        name: &'static str,
        hash: impl FnOnce(&mut std::hash::DefaultHasher),
    ) -> Result<bool, DeviceError> {
        self.bind()?;
        let send = self.mode().admit(name, hash)?;
        if send {
            self.count_launch();
            let mut profile = self.profile.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Some(profile) = &mut *profile {
                profile.mark(self, name)?;
            }
        }
        Ok(send)
    }

    /// Sets bytes, in the order of the stream.
    ///
    /// # Safety
    /// The memory has as many bytes and is not read at the same time.
    pub unsafe fn fill_bytes(&self, target: *mut u8, value: u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 || !self.admit("fill", |hasher| (target as usize, value, bytes).hash(hasher))? {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemsetD8Async(target as u64, value, bytes, self.stream) };
        check("cuMemsetD8Async", self.ordinal(), result)
    }

    /// Sets 32-bit words, in the order of the stream.
    ///
    /// # Safety
    /// As [`Self::fill_bytes`]; the target is aligned to 4.
    pub unsafe fn fill_words(&self, target: *mut u8, value: u32, words: usize) -> Result<(), DeviceError> {
        if words == 0 || !self.admit("fill", |hasher| (target as usize, value, words).hash(hasher))? {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemsetD32Async(target as u64, value, words, self.stream) };
        check("cuMemsetD32Async", self.ordinal(), result)
    }

    /// Copies device memory, in the order of the stream.
    ///
    /// # Safety
    /// Both sides have as many bytes and do not overlap.
    pub unsafe fn copy(&self, source: *const u8, target: *mut u8, bytes: usize) -> Result<(), DeviceError> {
        let hash =
            |hasher: &mut std::hash::DefaultHasher| (source as usize, target as usize, bytes).hash(hasher);
        if bytes == 0 || !self.admit("copy", hash)? {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(target as u64, source as u64, bytes, self.stream) };
        check("cuMemcpyDtoDAsync", self.ordinal(), result)
    }

    /// Queues a copy of host bytes; not for use inside a captured step (see [`Self::upload`]).
    pub(crate) fn send(&self, bytes: &[u8], target: *mut u8) -> Result<(), DeviceError> {
        let mut staging = self.staging.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the target is a buffer of this size.
        unsafe { staging.upload(self, bytes, target as u64) }
    }

    /// Bytes of device memory; waits for all work so far.
    ///
    /// # Safety
    /// The source has as many bytes.
    pub unsafe fn read(self: &Arc<Self>, source: *const u8, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { self.read_later(source, bytes) }?.wait()
    }

    /// The same without waiting.
    ///
    /// # Safety
    /// The source has as many bytes, and stays allocated until they are there.
    pub unsafe fn read_later(
        self: &Arc<Self>,
        source: *const u8,
        bytes: usize,
    ) -> Result<PendingRead, DeviceError> {
        self.bind()?;
        if self.in_captured_step() {
            let message = "a value was read on the host inside it".into();
            return Err(DeviceError::Capture { message });
        }
        PendingRead::start(self, source as u64, bytes)
    }

    /// Waits for all work so far, and reports what went wrong in it.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.bind()?;
        self.count_wait();
        // SAFETY: the stream exists.
        check("cuStreamSynchronize", self.ordinal(), unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Pinned memory of at least `bytes`, used before if there is some.
    pub(crate) fn pinned(&self, bytes: usize) -> Result<Pinned, DeviceError> {
        let mut free = self.pinned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fitting = |block: &Pinned| block.size >= bytes && block.size <= 4 * bytes.max(1 << 12);
        match free.iter().position(fitting) {
            Some(index) => Ok(free.swap_remove(index)),
            None => Pinned::new(self.ordinal(), bytes.max(1 << 12)),
        }
    }

    pub(crate) fn give_pinned(&self, block: Pinned) {
        /// Larger blocks are made again: checkpoints read everything once, and pinned memory is scarce.
        const KEPT: usize = 16 << 20;
        if block.size <= KEPT {
            self.pinned.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(block);
        }
    }

    pub(crate) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Work sent so far; a captured step counts once.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Times that the host waited for the device.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// From here on every piece of work is timed. Steps must not be captured meanwhile: a captured step is
    /// one piece of work.
    pub fn start_profile(&self) -> Result<(), DeviceError> {
        self.bind()?;
        *self.profile.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Profile::default());
        Ok(())
    }

    /// The times since [`Self::start_profile`] by name, longest first.
    pub fn finish_profile(&self) -> Result<Vec<ProfileRow>, DeviceError> {
        self.bind()?;
        let profile = self.profile.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        profile.map_or(Ok(Vec::new()), |profile| profile.finish(self))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // SAFETY: nothing uses the stream any more.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            self.dnn.close();
            sys::cuStreamDestroy_v2(self.stream);
        }
        CURRENT.set(0);
    }
}
