//! How fast bytes get to a device: from the host's pinned memory, and from other devices.
//!
//! For people who look at a machine ([`Link`] is a row of `anneal doctor`); nothing else calls this.

use cudarc::driver::sys;

use super::driver::{check, properties};
use super::transfer::{Event, Pinned};
use crate::DeviceError;

/// Bytes of one measured copy, and how many are timed after one that warms up.
const BYTES: usize = 256 << 20;
const COPIES: usize = 4;

/// One way between two places.
#[derive(Clone, Debug)]
pub struct Link {
    /// `host` or `cuda:INDEX`.
    pub from: String,
    pub to: String,
    /// Whether the devices reach each other's memory without the host; always so for the host's own links.
    pub direct: bool,
    /// Measured, in GB/s.
    pub bandwidth: f64,
}

/// A device's context, held while this lives.
struct Context {
    ordinal: usize,
    handle: sys::CUcontext,
}

impl Context {
    fn new(ordinal: usize) -> Result<Self, DeviceError> {
        properties(ordinal)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver has started and the device exists.
        check("cuDevicePrimaryCtxRetain", ordinal, unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut handle, ordinal as i32)
        })?;
        let context = Self { ordinal, handle };
        context.bind()?;
        Ok(context)
    }

    fn bind(&self) -> Result<(), DeviceError> {
        super::CURRENT.set(self.handle as usize);
        // SAFETY: the context is held.
        check("cuCtxSetCurrent", self.ordinal, unsafe { sys::cuCtxSetCurrent(self.handle) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        super::CURRENT.set(0);
        // SAFETY: retained by `new`; whoever else uses the context holds it too.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.ordinal as i32) };
    }
}

/// Device memory outside of any slab.
struct Memory(u64);

impl Memory {
    fn new(context: &Context) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut address = 0;
        // SAFETY: the context is current.
        check("cuMemAlloc", context.ordinal, unsafe { sys::cuMemAlloc_v2(&mut address, BYTES) })?;
        Ok(Self(address))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and every copy has been waited for.
        unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Free bytes of a device at present.
///
/// # Errors
/// If the device is missing.
pub fn free_memory(ordinal: usize) -> Result<usize, DeviceError> {
    let _context = Context::new(ordinal)?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: the context is current.
    check("cuMemGetInfo", ordinal, unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok(free)
}

/// Every way to and between the first `count` devices, measured.
///
/// # Errors
/// If a device is missing, or has no memory left for the copies.
pub fn links(count: usize) -> Result<Vec<Link>, DeviceError> {
    let mut links = Vec::new();
    for to in 0..count {
        links.extend(host_links(to)?);
        for from in (0..count).filter(|from| *from != to) {
            links.push(device_link(from, to)?);
        }
    }
    Ok(links)
}

fn host_links(ordinal: usize) -> Result<[Link; 2], DeviceError> {
    let context = Context::new(ordinal)?;
    let (memory, host) = (Memory::new(&context)?, Pinned::new(ordinal, BYTES)?);
    let pointer: *mut std::ffi::c_void = host.pointer.cast();
    // SAFETY: both sides hold the bytes, and are kept until the copies have been waited for.
    let up = measure(&context, "cuMemcpyHtoDAsync", || unsafe {
        sys::cuMemcpyHtoDAsync_v2(memory.0, pointer, BYTES, std::ptr::null_mut())
    })?;
    // SAFETY: as above.
    let down = measure(&context, "cuMemcpyDtoHAsync", || unsafe {
        sys::cuMemcpyDtoHAsync_v2(pointer, memory.0, BYTES, std::ptr::null_mut())
    })?;
    let (host, device) = ("host".to_owned(), format!("cuda:{ordinal}"));
    Ok([
        Link { from: host.clone(), to: device.clone(), direct: true, bandwidth: up },
        Link { from: device, to: host, direct: true, bandwidth: down },
    ])
}

fn device_link(from: usize, to: usize) -> Result<Link, DeviceError> {
    let (source, target) = (Context::new(from)?, Context::new(to)?);
    let mut direct = 0;
    // SAFETY: both devices exist.
    check("cuDeviceCanAccessPeer", to, unsafe {
        sys::cuDeviceCanAccessPeer(&mut direct, to as i32, from as i32)
    })?;
    target.bind()?;
    if direct != 0 {
        // SAFETY: as above. That it is enabled already is no error here.
        unsafe { sys::cuCtxEnablePeerAccess(source.handle, 0) };
    }
    let (there, here) = (Memory::new(&source)?, Memory::new(&target)?);
    // SAFETY: both sides hold the bytes, and are kept until the copies have been waited for.
    let bandwidth = measure(&target, "cuMemcpyPeerAsync", || unsafe {
        sys::cuMemcpyPeerAsync(here.0, target.handle, there.0, source.handle, BYTES, std::ptr::null_mut())
    })?;
    Ok(Link { from: format!("cuda:{from}"), to: format!("cuda:{to}"), direct: direct != 0, bandwidth })
}

/// GB/s of a copy on the context's default stream.
fn measure(
    context: &Context,
    call: &'static str,
    copy: impl Fn() -> sys::CUresult,
) -> Result<f64, DeviceError> {
    let (ordinal, stream) = (context.ordinal, std::ptr::null_mut());
    context.bind()?;
    let (start, end) = (Event::new(ordinal, true)?, Event::new(ordinal, true)?);
    check(call, ordinal, copy())?;
    start.record(ordinal, stream)?;
    for _ in 0..COPIES {
        check(call, ordinal, copy())?;
    }
    end.record(ordinal, stream)?;
    end.wait(ordinal)?;
    Ok((COPIES * BYTES) as f64 / f64::from(end.milliseconds_since(ordinal, &start)?) / 1e6)
}
