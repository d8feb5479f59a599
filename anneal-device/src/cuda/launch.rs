//! Loading kernels and starting them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::hash::{Hash, Hasher};
use std::sync::Mutex;

use cudarc::driver::sys;
use smallvec::SmallVec;

use super::compiler::{Macros, Source, compile};
use super::driver::{Properties, check};
use crate::DeviceError;

/// A kernel on a device; cheap to copy.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub(crate) function: sys::CUfunction,
    pub(crate) name: &'static str,
}
// SAFETY: a handle of the driver, valid as long as the device.
unsafe impl Send for Kernel {}
unsafe impl Sync for Kernel {}

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: u32,
}

impl Launch {
    pub fn new(grid: impl Into<Size>, block: impl Into<Size>) -> Self {
        Self { grid: grid.into().0, block: block.into().0, shared: 0 }
    }

    /// One thread for each of `count` items, in blocks of `threads`, at most `most` blocks (the kernel
    /// strides over the rest).
    pub fn over(count: usize, threads: usize, most: usize) -> Self {
        Self::new(count.div_ceil(threads).clamp(1, most.max(1)), threads)
    }

    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes as u32;
        self
    }
}

/// One to three dimensions.
pub struct Size([u32; 3]);

impl From<usize> for Size {
    fn from(x: usize) -> Self {
        Self([x as u32, 1, 1])
    }
}
impl From<[usize; 2]> for Size {
    fn from([x, y]: [usize; 2]) -> Self {
        Self([x as u32, y as u32, 1])
    }
}
impl From<[usize; 3]> for Size {
    fn from([x, y, z]: [usize; 3]) -> Self {
        Self([x as u32, y as u32, z as u32])
    }
}

/// The arguments of a kernel, in order. Types must be those of its parameters.
#[derive(Clone, Default)]
pub struct Arguments {
    words: SmallVec<[u64; 32]>,
    offsets: SmallVec<[usize; 24]>,
}

impl Arguments {
    pub fn new() -> Self {
        Self::default()
    }

    /// Any plain value: a number, a device pointer, a `repr(C)` structure.
    pub fn with<T: Copy + 'static>(mut self, value: T) -> Self {
        self.push(value);
        self
    }

    pub fn push<T: Copy + 'static>(&mut self, value: T) {
        const { assert!(align_of::<T>() <= 8) };
        let start = self.words.len();
        self.offsets.push(start);
        self.words.resize(start + size_of::<T>().div_ceil(8), 0);
        // SAFETY: the words just added hold at least the value's bytes and are aligned for it.
        unsafe { self.words.as_mut_ptr().add(start).cast::<T>().write(value) };
    }

    pub(crate) fn hash_into(&self, hasher: &mut impl Hasher) {
        self.words.hash(hasher);
    }

    fn pointers(&mut self) -> SmallVec<[*mut c_void; 24]> {
        let base = self.words.as_mut_ptr();
        // SAFETY: offsets lie within the words.
        self.offsets.iter().map(|offset| unsafe { base.add(*offset) }.cast()).collect()
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    code: usize,
    name: &'static str,
    macros: Vec<(&'static str, String)>,
}

/// The kernels of one device that were asked for so far.
#[derive(Default)]
pub(crate) struct Kernels {
    loaded: Mutex<HashMap<Key, Kernel>>,
}

impl Kernels {
    pub(crate) fn get(
        &self,
        properties: &Properties,
        source: &Source,
        name: &'static str,
        macros: Macros,
    ) -> Result<Kernel, DeviceError> {
        let key = Key { code: source.code.as_ptr() as usize, name, macros: macros.to_vec() };
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match loaded.entry(key) {
            Entry::Occupied(entry) => Ok(*entry.get()),
            Entry::Vacant(entry) => Ok(*entry.insert(load(properties, source, name, macros)?)),
        }
    }
}

/// Modules live as long as the process: a captured step may hold their functions.
fn load(
    properties: &Properties,
    source: &Source,
    name: &'static str,
    macros: Macros,
) -> Result<Kernel, DeviceError> {
    let cubin = compile(source, macros, &properties.architecture())?;
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    let text = CString::new(name).expect("names of kernels are plain");
    let ordinal = properties.ordinal;
    // SAFETY: the context is current and the code is for this device.
    unsafe {
        check("cuModuleLoadData", ordinal, sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()))?;
        check(
            "cuModuleGetFunction",
            ordinal,
            sys::cuModuleGetFunction(&mut function, module, text.as_ptr()),
        )?;
        // A launch may then ask for as much dynamic shared memory as the static part leaves.
        let (mut fixed, shared) = (0, sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        check("cuFuncGetAttribute", ordinal, sys::cuFuncGetAttribute(&mut fixed, shared, function))?;
        let most = properties.shared_memory_per_block as i32 - fixed;
        let dynamic = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        check("cuFuncSetAttribute", ordinal, sys::cuFuncSetAttribute(function, dynamic, most))?;
    }
    Ok(Kernel { function, name })
}

/// How many clusters of `blocks` blocks of a kernel the device runs at once; 0 if it takes none.
pub(crate) fn clusters_at_once(
    ordinal: usize,
    kernel: Kernel,
    launch: Launch,
    blocks: usize,
) -> Result<usize, DeviceError> {
    let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
    let mut clusters = 0;
    // SAFETY: both structures are plain numbers and pointers, of which zeros are valid; the attribute outlives the call.
    let result = unsafe {
        let mut size: sys::CUlaunchAttribute = std::mem::zeroed();
        size.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        size.value.clusterDim.x = blocks as u32;
        (size.value.clusterDim.y, size.value.clusterDim.z) = (1, 1);
        let mut config: sys::CUlaunchConfig = std::mem::zeroed();
        (config.gridDimX, config.gridDimY, config.gridDimZ) = (x, y, z);
        (config.blockDimX, config.blockDimY, config.blockDimZ) = (bx, by, bz);
        (config.sharedMemBytes, config.attrs, config.numAttrs) = (launch.shared, &mut size, 1);
        sys::cuOccupancyMaxActiveClusters(&mut clusters, kernel.function, &config)
    };
    check("cuOccupancyMaxActiveClusters", ordinal, result)?;
    Ok(clusters as usize)
}

/// # Safety
/// The arguments are those of the kernel, and the memory behind them is valid on the stream.
pub(crate) unsafe fn start(
    ordinal: usize,
    stream: sys::CUstream,
    kernel: Kernel,
    launch: Launch,
    arguments: &mut Arguments,
) -> Result<(), DeviceError> {
    let mut pointers = arguments.pointers();
    let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
    let (shared, extra) = (launch.shared, std::ptr::null_mut());
    // SAFETY: the caller's promise.
    let result = unsafe {
        sys::cuLaunchKernel(
            kernel.function,
            gx,
            gy,
            gz,
            bx,
            by,
            bz,
            shared,
            stream,
            pointers.as_mut_ptr(),
            extra,
        )
    };
    check(kernel.name, ordinal, result)
}
