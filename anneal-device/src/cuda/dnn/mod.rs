//! Attention by cuDNN, through its backend interface.
//!
//! Contract: a plan is made once for each shape, layout and pass, and kept in memory; its machine
//! code is kept on disk too (folder `dnn` of the cache), because compiling takes about half a second.
//! Runs go through the device's stream and can be captured. `log_sums` are natural logarithms,
//! `[B, H, N]` f32, as our own kernels have them.
//! Not done: bias, masks, dropout, causal attention: our own kernels serve what is needed of those.

mod attention;
mod backend;
mod graph;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::cudnn::sys::{self, cudnnBackendAttributeName_t as Name};
use sha2::{Digest, Sha256};

pub use attention::{AttentionElement, AttentionKey, AttentionPass, AttentionStrides, AttentionTensors};

use super::CudaDevice;
use super::compiler::{cache_folder, write_cached};
use super::libraries::{Libraries, Library};
use crate::{DeviceError, Purpose};
use attention::AttentionGraph;
use backend::{Descriptor, Target, check};
use graph::Id;

/// Bytes to which the parts of a workspace are aligned.
const ALIGNMENT: usize = 256;

/// Forward as one operation exists from here on.
const SINGLE_FORWARD: usize = 91_301;

/// Version of cuDNN: 91900 is 9.19.0; `None` if it is not installed.
pub fn dnn_version() -> Option<usize> {
    Libraries::load().get(Library::Cudnn)?;
    // SAFETY: the library is there.
    Some(unsafe { sys::cudnnGetVersion() })
}

/// Which attention a device uses where our own kernels and cuDNN can both serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBackend {
    Own,
    Dnn,
}

/// A compiled pass of attention.
pub struct AttentionPlan {
    plan: Descriptor,
    key: AttentionKey,
    graph: AttentionGraph,
    workspace: usize,
}

/// cuDNN on one device.
pub(crate) struct Dnn {
    state: Mutex<State>,
    backend: Mutex<Option<AttentionBackend>>,
}

#[derive(Default)]
struct State {
    handle: Option<Handle>,
    plans: HashMap<AttentionKey, Result<Arc<AttentionPlan>, String>>,
}

struct Handle(sys::cudnnHandle_t);
// SAFETY: used under the lock only.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `cudnnCreate`; its context is current.
        unsafe { sys::cudnnDestroy(self.0) };
    }
}

impl Dnn {
    /// Takes the choice of backend from the variable `ANNEAL_ATTENTION`.
    ///
    /// # Errors
    /// If the variable is neither `own` nor `cudnn`.
    pub(super) fn new() -> Result<Self, DeviceError> {
        let backend = match std::env::var("ANNEAL_ATTENTION").as_deref().unwrap_or("") {
            "" => None,
            "own" => Some(AttentionBackend::Own),
            "cudnn" => Some(AttentionBackend::Dnn),
            other => {
                let code = format!("'{other}' is neither 'own' nor 'cudnn'");
                return Err(DeviceError::Cuda { call: "ANNEAL_ATTENTION", device: "cuda".into(), code });
            }
        };
        Ok(Self { state: Mutex::default(), backend: Mutex::new(backend) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Gives back what the library holds; the device's context is current.
    pub(super) fn close(&self) {
        *self.lock() = State::default();
    }
}

impl State {
    fn handle(&mut self, device: &CudaDevice) -> Result<sys::cudnnHandle_t, DeviceError> {
        if let Some(handle) = &self.handle {
            return Ok(handle.0);
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: the library is there and the context current; the stream belongs to the context.
        unsafe {
            check("cudnnCreate", sys::cudnnCreate(&mut handle))?;
            let handle = Handle(handle);
            check("cudnnSetStream", sys::cudnnSetStream(handle.0, device.stream().cast()))?;
            Ok(self.handle.insert(handle).0)
        }
    }
}

impl CudaDevice {
    /// The backend that attention is bound to; `None` where the faster one is taken. At first it is what
    /// the variable `ANNEAL_ATTENTION` says (`own` or `cudnn`).
    pub fn attention_backend(&self) -> Option<AttentionBackend> {
        *self.dnn.backend.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Binds attention to a backend, for tests and benchmarks.
    pub fn set_attention_backend(&self, backend: Option<AttentionBackend>) {
        *self.dnn.backend.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = backend;
    }

    /// The plan for a pass of attention, made where it is asked for for the first time.
    ///
    /// # Errors
    /// If cuDNN is not installed or cannot serve this; asked again, it gives the same answer at once.
    pub fn dnn_attention_plan(&self, key: &AttentionKey) -> Result<Arc<AttentionPlan>, DeviceError> {
        self.bind()?;
        let mut state = self.dnn.lock();
        let refused = |code: &str| DeviceError::Cuda {
            call: "attention by cuDNN",
            device: format!("cuda:{}", self.ordinal()),
            code: code.into(),
        };
        if let Some(known) = state.plans.get(key) {
            return known.clone().map_err(|code| refused(&code));
        }
        Libraries::load().require(&[Library::Cudnn])?;
        let version = dnn_version().expect("the library is there");
        let made = match key.unsupported(version) {
            Some(reason) => Err(reason),
            None => {
                let target = Target::Device(state.handle(self)?);
                let major = self.properties().compute.0;
                let cached = self.dnn_cache_path(key, version);
                make(&target, key, version, major, cached.as_deref())
                    .map(Arc::new)
                    .map_err(|error| error.to_string())
            }
        };
        state.plans.insert(*key, made.clone());
        made.map_err(|code| refused(&code))
    }

    fn dnn_cache_path(&self, key: &AttentionKey, version: usize) -> Option<PathBuf> {
        let properties = self.properties();
        let text = format!(
            "{key:?} cudnn {version} driver {} on {} ({} multiprocessors)",
            properties.driver_version, properties.name, properties.multiprocessors
        );
        let name: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Some(cache_folder()?.join("dnn").join(name))
    }

    /// Runs a plan: reads and writes `tensors` and `log_sums` (`[B, H, N]` f32, read by backward).
    ///
    /// # Errors
    /// If there is no memory for its workspace, or cuDNN fails.
    ///
    /// # Safety
    /// The addresses are of device memory as the plan's key describes it, aligned to 16 bytes.
    pub unsafe fn dnn_attention(
        &self,
        plan: &AttentionPlan,
        tensors: &AttentionTensors<usize>,
        log_sums: usize,
        scale: f32,
    ) -> Result<(), DeviceError> {
        let memory = self.allocate(plan.scratch_bytes(), Purpose::Workspace)?;
        let base = memory.as_ptr() as usize;
        let name = match plan.key.pass {
            AttentionPass::Forward => "cudnn_attention_forward",
            AttentionPass::Backward | AttentionPass::BackwardDeterministic => "cudnn_attention_backward",
        };
        let hash = |hasher: &mut std::hash::DefaultHasher| {
            (plan.key, *tensors, log_sums, scale.to_bits(), base).hash(hasher);
        };
        if !self.admit(name, hash)? {
            return Ok(());
        }
        let one = 1.0f32;
        let pack = plan.pack(tensors, log_sums, [&scale, &one], base)?;
        let mut state = self.dnn.lock();
        let handle = state.handle(self)?;
        // SAFETY: the caller's promise; the two numbers live through the call, which reads them.
        check("cudnnBackendExecute", unsafe { sys::cudnnBackendExecute(handle, plan.plan.raw(), pack.raw()) })
    }
}

impl AttentionPlan {
    /// The workspace, then the f32 memory that the graph wants.
    fn scratch_bytes(&self) -> usize {
        let scratch =
            self.graph.scratch.iter().map(|(_, elements)| (elements * 4).next_multiple_of(ALIGNMENT));
        self.workspace.next_multiple_of(ALIGNMENT) + scratch.sum::<usize>()
    }

    fn pack(
        &self,
        tensors: &AttentionTensors<usize>,
        log_sums: usize,
        [scale, one]: [&f32; 2],
        memory: usize,
    ) -> Result<Descriptor, DeviceError> {
        let address = |address: usize| address as *mut c_void;
        let host = |number: &f32| std::ptr::from_ref(number).cast_mut().cast::<c_void>();
        let pass = self.key.pass;
        let rows = self.graph.tensors.of_pass(pass).into_iter().zip(tensors.of_pass(pass));
        let mut all: Vec<(Id, *mut c_void)> =
            rows.map(|(id, place)| (id.expect("every tensor of the pass"), address(place))).collect();
        all.push((self.graph.log_sums, address(log_sums)));
        all.push((self.graph.scale, host(scale)));
        all.extend(self.graph.one.map(|id| (id, host(one))));
        let mut position = memory + self.workspace.next_multiple_of(ALIGNMENT);
        for (id, elements) in &self.graph.scratch {
            all.push((*id, address(position)));
            position += (elements * 4).next_multiple_of(ALIGNMENT);
        }
        let (ids, pointers): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        backend::variant_pack(&ids, &pointers, address(memory))
    }
}

/// From the cache, else compiled. `major` is the device's compute capability; `cached` a path that others
/// are made of.
fn make(
    target: &Target,
    key: &AttentionKey,
    version: usize,
    major: usize,
    cached: Option<&Path>,
) -> Result<AttentionPlan, DeviceError> {
    let make = |single: bool| {
        let graph = key.graph(single);
        let form = if single { "single.json" } else { "json" };
        let cached = cached.map(|path| path.with_extension(form));
        let plan = compiled(target, &graph, major, cached.as_deref())?;
        let workspace = plan.number(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)? as usize;
        Ok(AttentionPlan { plan, key: *key, graph, workspace })
    };
    if key.pass == AttentionPass::Forward
        && version >= SINGLE_FORWARD
        && let Ok(plan) = make(true)
    {
        return Ok(plan);
    }
    make(false)
}

fn compiled(
    target: &Target,
    graph: &AttentionGraph,
    major: usize,
    cached: Option<&Path>,
) -> Result<Descriptor, DeviceError> {
    let text = cached.and_then(|path| std::fs::read(path).ok());
    if let Some(plan) = text.and_then(|text| backend::plan_of_text(target, &text).ok()) {
        return Ok(plan);
    }
    let graph = backend::Graph::new(target, &graph.spec)?;
    let mut result = Err(refusal("it knows no way to run this"));
    for configuration in graph.configurations(target)? {
        result = backend::plan(target, &configuration).and_then(|plan| {
            let text = backend::plan_text(&plan)?;
            if !made_for(&text, major) {
                return Err(refusal("it has only kernels of an older architecture for this"));
            }
            if let Some(path) = cached {
                write_cached(path, &text);
            }
            Ok(plan)
        });
        if result.is_ok() {
            break;
        }
    }
    result
}

fn refusal(code: &str) -> DeviceError {
    DeviceError::Cuda { call: "plan of attention", device: "cuDNN".into(), code: code.into() }
}

/// Whether a plan's kernels are of the device's own generation: the kernels of sm_80 that the library
/// falls back to on Hopper reach less than half the speed there.
fn made_for(plan: &[u8], major: usize) -> bool {
    let older = b"sm80_";
    major < 9 || !plan.windows(older.len()).any(|part| part == older)
}
