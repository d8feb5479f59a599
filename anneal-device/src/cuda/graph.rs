//! Captured steps: the device's work of a step as one CUDA graph.
//!
//! A step is captured by running its ordinary code once while the stream records. To run it
//! again, the same code runs with the device in replay: memory requests get the recorded addresses,
//! uploads go to the recorded places, launches are compared with the recorded ones and left out, and
//! at the end the graph is started. So the code above knows nothing of capturing, new inputs
//! (images, timesteps, learning rate) reach the graph as uploads, and a step that no longer does
//! what was recorded is an error instead of a wrong result: every launch is compared by kernel,
//! geometry and argument values.
//! Inside a captured step nothing may be read back, and no number that changes from step to step may be an
//! argument of a kernel: it must be uploaded.

use std::hash::{DefaultHasher, Hasher};
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::check;
use super::slab::{Block, SlabReservation};
use crate::DeviceError;
use crate::memory::{Buffer, Owner, Purpose};

/// What the device does with work that it is given.
#[derive(Default)]
pub(crate) enum Mode {
    #[default]
    Eager,
    Capture(Recording),
    Replay(Arc<Recording>, Cursor),
}

/// What happened while a step was captured, in order.
#[derive(Default)]
pub(crate) struct Recording {
    /// A hash of each launch, with its name.
    launches: Vec<(u64, &'static str)>,
    uploads: Vec<Upload>,
    allocations: Vec<Block>,
    reservation: Option<SlabReservation>,
}

struct Upload {
    buffer: Buffer,
    bytes: usize,
    /// The values at capture; taken when they are sent.
    values: Vec<u8>,
}

/// How far a replay has come.
#[derive(Default)]
pub(crate) struct Cursor {
    launches: usize,
    uploads: usize,
    allocations: usize,
}

/// The owner of a buffer whose memory belongs to a recording, which it keeps alive.
struct Kept {
    _recording: Option<Arc<Recording>>,
}

impl Owner for Kept {
    fn release(&self, _: NonNull<u8>, _: usize, _: Purpose) {}
}

fn alias(pointer: NonNull<u8>, bytes: usize, recording: Option<Arc<Recording>>) -> Buffer {
    let owner = Arc::new(Kept { _recording: recording });
    Buffer { pointer, size: bytes, bytes, purpose: Purpose::Activations, owner }
}

fn diverged(message: String) -> DeviceError {
    DeviceError::Capture { message: format!("it no longer does what was recorded: {message}") }
}

impl Mode {
    /// Whether the work is to be sent to the stream; compares it with the recording in replay.
    pub(crate) fn admit(
        &mut self,
        name: &'static str,
        hash: impl FnOnce(&mut DefaultHasher),
    ) -> Result<bool, DeviceError> {
        let hashed = |hash: &mut dyn FnMut(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            hash(&mut hasher);
            hasher.finish()
        };
        let mut hash = Some(hash);
        let mut once = |hasher: &mut DefaultHasher| (hash.take().expect("called once"))(hasher);
        match self {
            Mode::Eager => Ok(true),
            Mode::Capture(recording) => {
                recording.launches.push((hashed(&mut once), name));
                Ok(true)
            }
            Mode::Replay(recording, cursor) => {
                let index = cursor.launches;
                cursor.launches += 1;
                match recording.launches.get(index) {
                    Some((known, _)) if *known == hashed(&mut once) => Ok(false),
                    Some((_, known)) => Err(diverged(format!(
                        "launch {index} is {name}, recorded was {known}, or its arguments differ"
                    ))),
                    None => {
                        Err(diverged(format!("{name} comes after the last of {index} recorded launches")))
                    }
                }
            }
        }
    }

    pub(crate) fn is_eager(&self) -> bool {
        matches!(self, Mode::Eager)
    }
}

struct Executable(sys::CUgraphExec);

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: made by the driver for this process; the driver finishes a running one first.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}

/// A captured step.
pub struct Graph {
    executable: Executable,
    recording: Arc<Recording>,
    device: Arc<CudaDevice>,
}
// SAFETY: a handle of the driver.
unsafe impl Send for Graph {}
unsafe impl Sync for Graph {}

impl Graph {
    /// Number of launches inside.
    pub fn launches(&self) -> usize {
        self.recording.launches.len()
    }
}

impl CudaDevice {
    /// Memory for `bytes`: from the slab, or in replay where it was when the step was captured.
    pub(crate) fn allocate(&self, bytes: usize, purpose: Purpose) -> Result<Buffer, DeviceError> {
        self.bind()?;
        if let Mode::Replay(recording, cursor) = &mut *self.mode() {
            let index = cursor.allocations;
            cursor.allocations += 1;
            return match recording.allocations.get(index) {
                Some((offset, size)) if *size >= bytes => {
                    Ok(alias(self.slab().pointer(*offset), bytes, Some(recording.clone())))
                }
                _ => Err(diverged(format!("memory request {index} of {bytes} bytes is new"))),
            };
        }
        self.slab().allocate(bytes, purpose)
    }

    /// Device memory with a copy of the bytes, in the order of the stream.
    pub fn upload(&self, bytes: &[u8], purpose: Purpose) -> Result<Buffer, DeviceError> {
        self.bind()?;
        let mut mode = self.mode();
        match &mut *mode {
            Mode::Eager => {
                drop(mode);
                let buffer = self.allocate(bytes.len(), purpose)?;
                self.send(bytes, buffer.as_ptr())?;
                Ok(buffer)
            }
            Mode::Capture(recording) => {
                // Sent before the graph starts: no work inside may have used that memory before.
                let buffer = self.slab().allocate_untouched(bytes.len(), purpose)?;
                let handle = alias(buffer.pointer, bytes.len(), None);
                recording.uploads.push(Upload { buffer, bytes: bytes.len(), values: bytes.to_vec() });
                Ok(handle)
            }
            Mode::Replay(recording, cursor) => {
                let index = cursor.uploads;
                cursor.uploads += 1;
                // Uploads were noted among the allocations too.
                cursor.allocations += 1;
                let recording = recording.clone();
                drop(mode);
                match recording.uploads.get(index).filter(|upload| upload.bytes == bytes.len()) {
                    Some(upload) => {
                        self.send(bytes, upload.buffer.as_ptr())?;
                        Ok(alias(upload.buffer.pointer, bytes.len(), Some(recording)))
                    }
                    None => Err(diverged(format!("upload {index} of {} bytes is new", bytes.len()))),
                }
            }
        }
    }

    /// Captures the work of `step` and runs it once.
    ///
    /// # Errors
    /// Those of the step; a step that reads values back on the host.
    pub fn capture<T, E: From<DeviceError>>(
        self: &Arc<Self>,
        step: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Graph), E> {
        self.bind()?;
        if !self.mode().is_eager() {
            let message = "captured steps cannot be nested".into();
            return Err(DeviceError::Capture { message }.into());
        }
        self.prepare_products();
        let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream belongs to the current context.
        check("cuStreamBeginCapture", self.ordinal(), unsafe {
            sys::cuStreamBeginCapture_v2(self.stream(), relaxed)
        })?;
        self.slab().begin_capture();
        *self.mode() = Mode::Capture(Recording::default());
        let result = step();
        let Mode::Capture(mut recording) = std::mem::take(&mut *self.mode()) else {
            unreachable!("only this function ends a capture")
        };
        let (allocations, reservation) = self.slab().end_capture();
        (recording.allocations, recording.reservation) = (allocations, Some(reservation));
        let executable = self.end_stream_capture();
        let value = result?;
        let executable = executable?;
        for upload in &mut recording.uploads {
            self.send(&std::mem::take(&mut upload.values), upload.buffer.as_ptr())?;
        }
        let graph = Graph { executable, recording: Arc::new(recording), device: self.clone() };
        self.start_graph(&graph)?;
        Ok((value, graph))
    }

    fn end_stream_capture(&self) -> Result<Executable, DeviceError> {
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream is being captured; the graph is not used after it was made executable.
        unsafe {
            check("cuStreamEndCapture", self.ordinal(), sys::cuStreamEndCapture(self.stream(), &mut graph))?;
            let result = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0);
            sys::cuGraphDestroy(graph);
            check("cuGraphInstantiate", self.ordinal(), result)?;
        }
        Ok(Executable(executable))
    }

    /// Runs a captured step with the inputs that `step` uploads now. What `step` returns lies where the
    /// captured step's result lay, and is overwritten by the next replay.
    ///
    /// # Errors
    /// If `step` does not do what was recorded; nothing has run then.
    pub fn replay<T, E: From<DeviceError>>(
        self: &Arc<Self>,
        graph: &Graph,
        step: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        self.bind()?;
        assert!(Arc::ptr_eq(self, &graph.device), "a captured step belongs to its device");
        if !self.mode().is_eager() {
            let message = "captured steps cannot be nested".into();
            return Err(DeviceError::Capture { message }.into());
        }
        *self.mode() = Mode::Replay(graph.recording.clone(), Cursor::default());
        let result = step();
        let Mode::Replay(recording, cursor) = std::mem::take(&mut *self.mode()) else {
            unreachable!("only this function ends a replay")
        };
        let value = result?;
        if cursor.launches != recording.launches.len() {
            let message = format!("{} launches instead of {}", cursor.launches, recording.launches.len());
            return Err(diverged(message).into());
        }
        if cursor.uploads != recording.uploads.len() {
            let message = format!("{} uploads instead of {}", cursor.uploads, recording.uploads.len());
            return Err(diverged(message).into());
        }
        self.start_graph(graph)?;
        Ok(value)
    }

    /// Runs a captured step again with the inputs that it last had; for measuring.
    ///
    /// # Errors
    /// If the driver cannot start it.
    pub fn repeat(&self, graph: &Graph) -> Result<(), DeviceError> {
        self.bind()?;
        self.start_graph(graph)
    }

    fn start_graph(&self, graph: &Graph) -> Result<(), DeviceError> {
        self.count_launch();
        // SAFETY: the graph was made for this stream's context, and its memory is reserved.
        check("cuGraphLaunch", self.ordinal(), unsafe {
            sys::cuGraphLaunch(graph.executable.0, self.stream())
        })
    }
}
