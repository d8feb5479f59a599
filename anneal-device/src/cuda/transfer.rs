//! Between host and device memory, without stalling either.
//!
//! Uploads go through a ring of pinned memory: the bytes are copied there, the device fetches them in the
//! order of its stream, and a part of the ring is used again when its fetch is done. Downloads either
//! wait ([`super::CudaDevice::read`]) or are asked for later ([`PendingRead`]).

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::CudaDevice;
use super::driver::check;
use crate::DeviceError;

/// Bytes of the upload ring.
const RING: usize = 32 << 20;
const ALIGNMENT: usize = 64;

/// Pinned host memory.
pub(crate) struct Pinned {
    pub pointer: *mut u8,
    pub size: usize,
}
// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(crate) fn new(ordinal: usize, size: usize) -> Result<Self, DeviceError> {
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // SAFETY: the context is current.
        check("cuMemHostAlloc", ordinal, unsafe { sys::cuMemHostAlloc(&mut pointer, size, 0) })?;
        Ok(Self { pointer: pointer.cast(), size })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and no transfer uses it any more.
        unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
    }
}

/// A point in the device's stream.
pub(crate) struct Event(pub sys::CUevent);
// SAFETY: a handle of the driver.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(ordinal: usize, timing: bool) -> Result<Self, DeviceError> {
        let flag = match timing {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let mut event = std::ptr::null_mut();
        // SAFETY: the context is current.
        check("cuEventCreate", ordinal, unsafe { sys::cuEventCreate(&mut event, flag as u32) })?;
        Ok(Self(event))
    }

    pub(crate) fn record(&self, ordinal: usize, stream: sys::CUstream) -> Result<(), DeviceError> {
        // SAFETY: both belong to the current context.
        check("cuEventRecord", ordinal, unsafe { sys::cuEventRecord(self.0, stream) })
    }

    /// Whether the stream has passed it.
    pub(crate) fn passed(&self, ordinal: usize) -> Result<bool, DeviceError> {
        // SAFETY: the event exists.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", ordinal, other).map(|()| true),
        }
    }

    pub(crate) fn wait(&self, ordinal: usize) -> Result<(), DeviceError> {
        // SAFETY: the event exists.
        check("cuEventSynchronize", ordinal, unsafe { sys::cuEventSynchronize(self.0) })
    }

    /// The device's time between two events with timing that have both passed.
    pub(crate) fn milliseconds_since(&self, ordinal: usize, earlier: &Event) -> Result<f32, DeviceError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events exist.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.0, self.0) };
        check("cuEventElapsedTime", ordinal, result)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the driver keeps it until it has passed.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// The upload ring.
#[derive(Default)]
pub(crate) struct Staging {
    ring: Option<Pinned>,
    head: usize,
    /// Parts that the device may still fetch from, oldest first.
    in_flight: VecDeque<(usize, usize, Event)>,
}

impl Staging {
    /// Queues a copy of `bytes` to device memory at `target`.
    ///
    /// # Safety
    /// The target has room for the bytes, and nothing on the stream before this still needs its contents.
    pub(crate) unsafe fn upload(
        &mut self,
        device: &CudaDevice,
        bytes: &[u8],
        target: u64,
    ) -> Result<(), DeviceError> {
        let ordinal = device.ordinal();
        for (index, piece) in bytes.chunks(RING / 4).enumerate() {
            let start = self.claim(device, piece.len())?;
            let ring = self.ring.as_ref().expect("claimed");
            // SAFETY: the part was claimed, so nothing reads or writes it; the target is the caller's promise.
            unsafe {
                let from = ring.pointer.add(start);
                std::ptr::copy_nonoverlapping(piece.as_ptr(), from, piece.len());
                let to = target + (index * (RING / 4)) as u64;
                let result = sys::cuMemcpyHtoDAsync_v2(to, from.cast(), piece.len(), device.stream());
                check("cuMemcpyHtoDAsync", ordinal, result)?;
            }
            let event = Event::new(ordinal, false)?;
            event.record(ordinal, device.stream())?;
            self.in_flight.push_back((start, start + piece.len(), event));
        }
        Ok(())
    }

    /// A part of the ring that nobody uses; waits for old fetches where it must.
    fn claim(&mut self, device: &CudaDevice, size: usize) -> Result<usize, DeviceError> {
        let ordinal = device.ordinal();
        if self.ring.is_none() {
            self.ring = Some(Pinned::new(ordinal, RING)?);
        }
        let start = if self.head + size > RING { 0 } else { self.head };
        let end = start + size;
        let parts = self.in_flight.iter().map(|(from, to, _)| (*from, *to));
        if let Some(last) = last_overlap(parts, start, end) {
            // The stream fetches in order: what came before the last of them has been fetched with it.
            let (_, _, event) = &self.in_flight[last];
            if !event.passed(ordinal)? {
                device.count_wait();
                event.wait(ordinal)?;
            }
            self.in_flight.drain(..=last);
        }
        while let Some((_, _, event)) = self.in_flight.front() {
            if !event.passed(ordinal)? {
                break;
            }
            self.in_flight.pop_front();
        }
        self.head = end.next_multiple_of(ALIGNMENT);
        Ok(start)
    }
}

/// The last part that shares bytes with `start..end`. Not only the oldest one can: where the end of the ring was left
/// unused, parts that lie there are older than those at its beginning.
fn last_overlap(
    parts: impl DoubleEndedIterator<Item = (usize, usize)> + ExactSizeIterator,
    start: usize,
    end: usize,
) -> Option<usize> {
    parts.enumerate().rev().find(|(_, (from, to))| *from < end && start < *to).map(|(index, _)| index)
}

/// Bytes on their way from the device; see [`CudaDevice::read_later`].
pub struct PendingRead {
    device: Arc<CudaDevice>,
    memory: Option<Pinned>,
    bytes: usize,
    event: Event,
}

impl PendingRead {
    pub(crate) fn start(device: &Arc<CudaDevice>, source: u64, bytes: usize) -> Result<Self, DeviceError> {
        let ordinal = device.ordinal();
        let memory = device.pinned(bytes)?;
        let event = Event::new(ordinal, false)?;
        // SAFETY: the pinned block holds the bytes and is kept until the event has passed.
        unsafe {
            let result = sys::cuMemcpyDtoHAsync_v2(memory.pointer.cast(), source, bytes, device.stream());
            check("cuMemcpyDtoHAsync", ordinal, result)?;
        }
        event.record(ordinal, device.stream())?;
        Ok(Self { device: device.clone(), memory: Some(memory), bytes, event })
    }

    /// Whether the bytes are there, so that [`Self::wait`] does not wait.
    pub fn ready(&self) -> Result<bool, DeviceError> {
        self.device.bind()?;
        self.event.passed(self.device.ordinal())
    }

    /// The bytes.
    pub fn wait(mut self) -> Result<Vec<u8>, DeviceError> {
        if !self.ready()? {
            self.device.count_wait();
            self.event.wait(self.device.ordinal())?;
        }
        let memory = self.memory.take().expect("taken once");
        // SAFETY: the transfer is done.
        let bytes = unsafe { std::slice::from_raw_parts(memory.pointer, self.bytes) }.to_vec();
        self.device.give_pinned(memory);
        Ok(bytes)
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The device may still write there.
            let _ = self.device.bind().and_then(|()| self.event.wait(self.device.ordinal()));
            self.device.give_pinned(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::last_overlap;

    #[test]
    fn parts_behind_an_older_one_elsewhere_are_seen() {
        let in_flight = [(27, 31), (0, 8), (8, 16), (16, 24), (24, 26)];
        assert_eq!(last_overlap(in_flight.into_iter(), 0, 8), Some(1));
        assert_eq!(last_overlap(in_flight.into_iter(), 26, 28), Some(0));
        assert_eq!(last_overlap(in_flight.into_iter(), 7, 20), Some(3));
        assert_eq!(last_overlap(in_flight.into_iter(), 31, 32), None);
    }
}
