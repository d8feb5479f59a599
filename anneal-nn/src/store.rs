//! Where parameters live.
//!
//! A [`ParamStore`] gives values and gradient sinks inside a scope. Weights lie in flat chunk
//! buffers in the compute dtype; gradients lie in f32 chunks of the same layout, and backward
//! writes into them directly. Here is the store that keeps everything resident on one device;
//! stores that shard or offload implement the same trait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anneal_tensor::{DType, Device, Phase, Purpose, Result, Sink, Tensor, TensorError, ops};

use crate::{ChunkLayout, Init, ParamId, Parameters, ScopeId};

/// Flat memory of weights and, if it is trained, of gradients.
#[derive(Clone)]
pub struct Chunk {
    /// `[elements]` in the compute dtype.
    pub weights: Tensor,
    /// `[elements]` in f32.
    pub gradients: Option<Tensor>,
}

/// Decides where the bytes of each parameter live.
pub trait ParamStore: Send + Sync {
    fn parameters(&self) -> &Arc<Parameters>;
    fn layout(&self) -> &ChunkLayout;
    fn device(&self) -> &Device;
    /// The dtype of weights and activations.
    fn compute_dtype(&self) -> DType;

    /// Brings the parameters of a scope; called before its block runs.
    fn enter(&self, scope: ScopeId, phase: Phase) -> Result<()>;
    /// The parameters of a scope are no longer needed in this phase.
    fn exit(&self, scope: ScopeId, phase: Phase) -> Result<()>;

    /// A parameter's value, in its shape. Only inside its scope.
    fn value(&self, id: ParamId) -> Result<Tensor>;
    /// Where a parameter's gradient goes. The first write since [`Self::clear_gradients`] replaces.
    fn sink(&self, id: ParamId) -> Result<Sink>;

    /// Forgets all gradients; the next sinks overwrite.
    fn clear_gradients(&self);
    /// Zeroes the gradients of parameters that backward did not reach. Call before reading chunks.
    fn finish_gradients(&self) -> Result<()>;
    /// A chunk of [`Self::layout`], for the optimizer and for checkpoints.
    fn chunk(&self, index: usize) -> Result<Chunk>;

    /// A parameter's weights where they lie in their chunk, `[elements]` in the compute dtype.
    fn piece(&self, id: ParamId) -> Result<Tensor> {
        let slot = self.layout().slot(id);
        self.chunk(slot.chunk)?.weights.piece(slot.offset, &[slot.elements])
    }

    /// The present values of a parameter in f32.
    fn read(&self, id: ParamId) -> Result<Vec<f32>> {
        ops::cast(&self.piece(id)?, DType::F32)?.to_vec()
    }

    /// Replaces a parameter's values, rounding to the compute dtype.
    ///
    /// # Errors
    /// If the number of values is not the parameter's.
    fn write(&self, id: ParamId, values: &[f32]) -> Result<()> {
        let elements = self.layout().slot(id).elements;
        if values.len() != elements {
            let name = &self.parameters().spec(id).name;
            let message = format!("{} values for {name}, which has {elements}", values.len());
            return Err(TensorError::Store { message });
        }
        let values =
            ops::cast(&Tensor::from_slice(self.device(), values, &[values.len()])?, self.compute_dtype())?;
        ops::overwrite(&self.piece(id)?, &values)
    }
}

/// Sizes and types of a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    pub compute_dtype: DType,
    /// Fixed size of a chunk, in elements.
    pub chunk_elements: usize,
    /// Whether to hold gradients.
    pub train: bool,
}

/// Keeps every parameter and gradient on one device for its whole life.
///
/// The chunks follow each other in two buffers, of weights and of gradients, those that are trained first: so layers of
/// one size that are described one after the other lie at equal distances, whatever the size of a chunk, and
/// their products are one ([`ops::linear_stack`]).
pub struct ResidentStore {
    parameters: Arc<Parameters>,
    layout: ChunkLayout,
    device: Device,
    options: StoreOptions,
    chunks: Vec<Chunk>,
    /// Whether a gradient was written since the last clearing, by parameter.
    written: Vec<AtomicBool>,
    /// Depth of entered scopes, to catch a use outside.
    entered: Mutex<Vec<usize>>,
}

impl ResidentStore {
    /// Allocates all chunks; weights start at zero (see [`Self::initialise`]).
    pub fn new(parameters: Arc<Parameters>, device: &Device, options: StoreOptions) -> Result<Self> {
        let layout = ChunkLayout::new(&parameters, options.chunk_elements);
        let elements = |trainable: bool| -> usize {
            let of_kind = layout.chunks().iter().filter(|chunk| chunk.trainable == trainable);
            of_kind.map(|chunk| chunk.elements).sum()
        };
        let (trained, frozen) = (elements(true), elements(false));
        let weights =
            Tensor::zeros_for(device, &[trained + frozen], options.compute_dtype, Purpose::Weights)?;
        let gradients = (options.train && trained > 0)
            .then(|| Tensor::zeros_for(device, &[trained], DType::F32, Purpose::Gradients))
            .transpose()?;
        // Where the next chunk of frozen and of trained parameters starts.
        let mut starts = [trained, 0];
        let chunks = layout
            .chunks()
            .iter()
            .map(|chunk| {
                let start = &mut starts[usize::from(chunk.trainable)];
                let piece = |buffer: &Tensor| buffer.piece(*start, &[chunk.elements]);
                let gradients = gradients.as_ref().filter(|_| chunk.trainable).map(piece).transpose()?;
                let weights = piece(&weights)?;
                *start += chunk.elements;
                Ok(Chunk { weights, gradients })
            })
            .collect::<Result<Vec<Chunk>>>()?;
        let written = (0..parameters.len()).map(|_| AtomicBool::new(false)).collect();
        let entered = Mutex::new(vec![0; parameters.scopes().len()]);
        Ok(Self { parameters, layout, device: device.clone(), options, chunks, written, entered })
    }

    /// Draws every parameter from its initialiser.
    pub fn initialise(&self, seed: u64) -> Result<()> {
        for (id, spec) in self.parameters.iter() {
            match &spec.init {
                Init::Zeros => self.write_zeros(&self.chunks[self.layout.slot(id).chunk].weights, id)?,
                drawn => self.write(id, &drawn.values(seed, id, spec))?,
            }
        }
        Ok(())
    }

    /// Zeroes a parameter's part of a chunk.
    fn write_zeros(&self, chunk: &Tensor, id: ParamId) -> Result<()> {
        let slot = self.layout.slot(id);
        let zeros = Tensor::zeros(&self.device, &[slot.elements], chunk.dtype())?;
        ops::overwrite(&chunk.piece(slot.offset, &[slot.elements])?, &zeros)
    }

    fn scope_depth(&self, scope: ScopeId, change: isize) -> Result<()> {
        let mut entered = self.entered.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match entered[scope.0].checked_add_signed(change) {
            Some(depth) => {
                entered[scope.0] = depth;
                Ok(())
            }
            None => {
                let message =
                    format!("scope {} was left before it was entered", self.parameters.scopes()[scope.0]);
                Err(TensorError::Store { message })
            }
        }
    }

    fn check_inside(&self, id: ParamId) -> Result<()> {
        let spec = self.parameters.spec(id);
        let entered = self.entered.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if entered[spec.scope.0] == 0 {
            let scope = &self.parameters.scopes()[spec.scope.0];
            let message = format!("{} was used outside its scope {scope}", spec.name);
            return Err(TensorError::Store { message });
        }
        Ok(())
    }
}

impl ParamStore for ResidentStore {
    fn parameters(&self) -> &Arc<Parameters> {
        &self.parameters
    }

    fn layout(&self) -> &ChunkLayout {
        &self.layout
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn compute_dtype(&self) -> DType {
        self.options.compute_dtype
    }

    fn enter(&self, scope: ScopeId, _phase: Phase) -> Result<()> {
        self.scope_depth(scope, 1)
    }

    fn exit(&self, scope: ScopeId, _phase: Phase) -> Result<()> {
        self.scope_depth(scope, -1)
    }

    fn value(&self, id: ParamId) -> Result<Tensor> {
        self.check_inside(id)?;
        let slot = self.layout.slot(id);
        self.chunks[slot.chunk].weights.piece(slot.offset, &self.parameters.spec(id).shape)
    }

    fn sink(&self, id: ParamId) -> Result<Sink> {
        self.check_inside(id)?;
        let slot = self.layout.slot(id);
        let spec = self.parameters.spec(id);
        let gradients = self.chunks[slot.chunk].gradients.as_ref().ok_or_else(|| TensorError::Store {
            message: format!("{} has no gradient in this store", spec.name),
        })?;
        let accumulate = self.written[id.0].swap(true, Ordering::Relaxed);
        Ok(Sink { gradient: gradients.piece(slot.offset, &spec.shape)?, accumulate })
    }

    fn clear_gradients(&self) {
        self.written.iter().for_each(|written| written.store(false, Ordering::Relaxed));
    }

    fn finish_gradients(&self) -> Result<()> {
        for (id, spec) in self.parameters.iter() {
            if spec.trainable && self.options.train && !self.written[id.0].swap(true, Ordering::Relaxed) {
                let chunk = &self.chunks[self.layout.slot(id).chunk];
                let gradients = chunk.gradients.as_ref().expect("trainable chunks have gradients");
                self.write_zeros(gradients, id)?;
            }
        }
        Ok(())
    }

    fn chunk(&self, index: usize) -> Result<Chunk> {
        Ok(self.chunks[index].clone())
    }
}
