//! The driver's calls with our errors, and the properties of a device.

use std::ffi::{CStr, c_int};

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use super::libraries::{Libraries, Library};
use crate::DeviceError;

/// What a device is.
#[derive(Clone, Debug)]
pub struct Properties {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, for example (9, 0).
    pub compute: (usize, usize),
    pub multiprocessors: usize,
    /// Bytes of shared memory that one block may ask for.
    pub shared_memory_per_block: usize,
    pub l2_bytes: usize,
    pub total_memory: usize,
    /// Of memory, in GB/s, by its clock and width.
    pub bandwidth: f64,
    /// As the driver counts: 13000 is 13.0.
    pub driver_version: usize,
}

impl Properties {
    /// The name of the instruction set for the compiler: `sm_90a`, `sm_80`.
    pub fn architecture(&self) -> String {
        let (major, minor) = self.compute;
        // From Hopper on, the letter opens the instructions of that generation alone.
        let suffix = if major >= 9 { "a" } else { "" };
        format!("sm_{major}{minor}{suffix}")
    }
}

/// An error unless the call succeeded; `call` names it.
pub(crate) fn check(call: &'static str, ordinal: usize, result: CUresult) -> Result<(), DeviceError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(DeviceError::Cuda { call, device: format!("cuda:{ordinal}"), code: describe(result) })
}

fn describe(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded, since it gave this result; it owns the text.
    let known =
        unsafe { sys::cuGetErrorString(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    match known {
        true => format!("{} ({})", unsafe { CStr::from_ptr(text) }.to_string_lossy(), result as u32),
        false => format!("error {}", result as u32),
    }
}

fn no_cuda(reason: String) -> DeviceError {
    DeviceError::NoCuda { reason, searched: Libraries::load().searched_text() }
}

/// The driver of CUDA 12.8 is the first with all the calls that are made here.
const OLDEST_DRIVER: c_int = 12_080;

/// Starts the driver; the number of devices.
///
/// # Errors
/// If the driver is missing or does not start.
pub fn device_count() -> Result<usize, DeviceError> {
    let libraries = Libraries::load();
    if libraries.get(Library::Driver).is_none() {
        // No Python package and no CUDA_HOME holds it, so where else was looked would mislead.
        let reason = "NVIDIA's driver (libcuda) is not installed".into();
        let searched = "install NVIDIA's driver, or leave the device at cpu".into();
        return Err(DeviceError::NoCuda { reason, searched });
    }
    let mut count: c_int = 0;
    // SAFETY: the library is there.
    unsafe {
        let started = sys::cuInit(0);
        if started != CUresult::CUDA_SUCCESS {
            return Err(no_cuda(format!("the driver does not start: {}", describe(started))));
        }
        check("cuDeviceGetCount", 0, sys::cuDeviceGetCount(&mut count))?;
        let mut version = 0;
        check("cuDriverGetVersion", 0, sys::cuDriverGetVersion(&mut version))?;
        if version < OLDEST_DRIVER {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return Err(no_cuda(format!(
                "the driver is of CUDA {major}.{minor}: 12.8 (release 570) or newer is needed"
            )));
        }
    }
    if count == 0 {
        return Err(no_cuda("the driver sees no device".into()));
    }
    Ok(count as usize)
}

/// The properties of one device.
///
/// # Errors
/// If there is no such device.
pub fn properties(ordinal: usize) -> Result<Properties, DeviceError> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(no_cuda(format!("cuda:{ordinal} does not exist: the driver sees {count} device(s)")));
    }
    let attribute = |attribute| -> Result<usize, DeviceError> {
        let mut value = 0;
        // SAFETY: the driver has started and the device exists.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, ordinal as c_int) };
        check("cuDeviceGetAttribute", ordinal, result)?;
        Ok(value as usize)
    };
    let (mut name, mut total, mut version) = ([0i8; 256], 0, 0);
    // SAFETY: as above; the name is cut to the length given.
    unsafe {
        check(
            "cuDeviceGetName",
            ordinal,
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, ordinal as c_int),
        )?;
        check("cuDeviceTotalMem", ordinal, sys::cuDeviceTotalMem_v2(&mut total, ordinal as c_int))?;
        check("cuDriverGetVersion", ordinal, sys::cuDriverGetVersion(&mut version))?;
    }
    // SAFETY: the driver ends the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr().cast()) }.to_string_lossy().into_owned();
    let clock = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)? as f64 * 1e3;
    let width = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)? as f64 / 8.0;
    Ok(Properties {
        ordinal,
        name,
        compute: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        total_memory: total,
        bandwidth: 2.0 * clock * width / 1e9,
        driver_version: version as usize,
    })
}
