//! AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) with averages of the weights.
//!
//! With gradient g clipped to a global norm (Pascanu et al., arXiv 1211.5063), at step t:
//! `p -= lr * decay * p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;`
//! `p -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`, then for each average of rate r
//! `e = r e + (1 - r) p`. All in one pass over flat chunks, in f32.
//! A step whose gradient norm is not finite changes nothing and is reported. For fp16 the loss is scaled
//! before backward (see [`LossScale`]); the optimizer divides the scale out.
//! On a GPU a step decides all of this there: nothing is read back, so that it may be captured.

mod cpu;
mod cuda;
mod loss_scale;
mod report;

pub use cuda::kernel_variants;
pub use loss_scale::LossScale;
pub use report::{DeviceReport, PendingReport, Progress, StepReport};

use anneal_device::{Device, ThreadPool};
use anneal_nn::{Chunk, ParamId, ParamStore};
use anneal_tensor::{DType, Purpose, Result, Tensor, ops};

use report::DeviceProgress;

/// Which parameters weight decay applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    All,
    /// Those of two dimensions or more.
    Matrices,
}

/// The optimizer's constants.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWOptions {
    pub betas: [f64; 2],
    pub epsilon: f64,
    pub weight_decay: f64,
    pub decay: Decay,
    /// Largest global gradient norm.
    pub clip: Option<f64>,
    /// A rate for each average of the weights.
    pub ema_rates: Vec<f64>,
    /// Whether step t (from 0) averages with at most (1 + t) / (10 + t).
    pub ema_warmup: bool,
    /// Whether the loss is scaled dynamically; for fp16.
    pub scale_loss: bool,
}

/// A part of the optimizer's state, one number for each weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The fp32 weights.
    Master,
    FirstMoment,
    SecondMoment,
    /// The average with this index among the rates.
    Average(usize),
}

/// Moments and averages of one chunk, each `[elements]` in f32.
struct ChunkState {
    chunk: usize,
    /// Only where the store computes in a narrower dtype; else the store's weights are the masters.
    master: Option<Tensor>,
    moments: [Tensor; 2],
    averages: Vec<Tensor>,
}

/// A range of a chunk that one thread updates.
#[derive(Clone, Copy)]
struct Task {
    state: usize,
    start: usize,
    elements: usize,
    decays: bool,
}

/// Elements of a task; a multiple of the slots' alignment, independent of the number of threads.
const TASK_ELEMENTS: usize = 1 << 14;

/// AdamW with the state of a store's trainable parameters.
pub struct AdamW {
    options: AdamWOptions,
    chunks: Vec<ChunkState>,
    tasks: Vec<Task>,
    progress: DeviceProgress,
    /// Of a GPU, once it has made a step.
    tables: Option<cuda::Tables>,
}

impl AdamW {
    /// Allocates the state. Masters and averages start as the store's present weights.
    pub fn new(store: &dyn ParamStore, options: AdamWOptions) -> Result<Self> {
        let device = store.device();
        let mut chunks = Vec::new();
        let mut tasks = Vec::new();
        for (index, spec) in store.layout().chunks().iter().enumerate().filter(|(_, spec)| spec.trainable) {
            let sizes = [spec.elements];
            let zeros = || Tensor::zeros_for(device, &sizes, DType::F32, Purpose::Optimizer);
            let state = ChunkState {
                chunk: index,
                master: (store.compute_dtype() != DType::F32).then(zeros).transpose()?,
                moments: [zeros()?, zeros()?],
                averages: options.ema_rates.iter().map(|_| zeros()).collect::<Result<_>>()?,
            };
            push_tasks(&mut tasks, chunks.len(), store, index, options.decay);
            chunks.push(state);
        }
        let progress = DeviceProgress::new(device)?;
        let loss_scale = if options.scale_loss { LossScale::START } else { LossScale::NONE };
        progress.write(Progress { steps: 0, loss_scale })?;
        let optimizer = Self { options, chunks, tasks, progress, tables: None };
        optimizer.restart_from_weights(store)?;
        Ok(optimizer)
    }

    /// Sets masters and averages to the store's present weights (after loading some).
    pub fn restart_from_weights(&self, store: &dyn ParamStore) -> Result<()> {
        for state in &self.chunks {
            let weights = ops::cast(&store.chunk(state.chunk)?.weights, DType::F32)?;
            for target in state.master.iter().chain(&state.averages) {
                ops::overwrite(target, &weights)?;
            }
        }
        Ok(())
    }

    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// How far it has come; waits for the device.
    pub fn progress(&self) -> Result<Progress> {
        self.progress.read()
    }

    /// Continues a saved state. Where the loss is not scaled, the saved scale is of no use.
    pub fn set_progress(&self, progress: Progress) -> Result<()> {
        let loss_scale = if self.options.scale_loss { progress.loss_scale } else { LossScale::NONE };
        self.progress.write(Progress { loss_scale, ..progress })
    }

    /// What the loss of the next step is to be multiplied by before backward, f32 []; where the step
    /// is computed, so that a captured step sees it change. `None` where the loss is not scaled.
    pub fn loss_scale(&self) -> Result<Option<Tensor>> {
        self.options.scale_loss.then(|| self.progress.loss_scale.piece(0, &[])).transpose()
    }

    /// Updates the weights from the store's gradients, and clears the gradients. Does not wait for a GPU.
    pub fn step(&mut self, store: &dyn ParamStore, learning_rate: f64) -> Result<DeviceReport> {
        store.finish_gradients()?;
        let chunks = self.chunks.iter().map(|state| store.chunk(state.chunk)).collect::<Result<Vec<_>>>()?;
        let report = match store.device() {
            Device::Cpu(cpu) => {
                let report = self.step_on_cpu(&cpu.pool, &chunks, learning_rate)?;
                DeviceReport::of(store.device(), report.gradient_norm, report.loss_scale)?
            }
            Device::Cuda(cuda) => {
                let what = (&self.options, &self.tasks[..], &self.chunks[..]);
                cuda::step(cuda, what, &mut self.tables, &self.progress, &chunks, learning_rate)?
            }
        };
        store.clear_gradients();
        Ok(report)
    }

    fn step_on_cpu(&self, pool: &ThreadPool, chunks: &[Chunk], learning_rate: f64) -> Result<StepReport> {
        let Progress { mut steps, loss_scale } = self.progress.read()?;
        let scale = f64::from(loss_scale.scale);
        let norm = cpu::squared_norm(pool, &self.tasks, chunks).sqrt() / scale;
        let finite = norm.is_finite();
        if finite {
            steps += 1;
            let constants = self.constants(learning_rate, steps, norm, scale);
            cpu::update(pool, &self.tasks, &self.chunks, chunks, &constants)?;
        }
        let loss_scale = if self.options.scale_loss { loss_scale.after(finite) } else { loss_scale };
        self.progress.write(Progress { steps, loss_scale })?;
        Ok(StepReport { gradient_norm: norm, skipped: !finite, loss_scale: scale })
    }

    fn constants(&self, learning_rate: f64, steps: u64, norm: f64, loss_scale: f64) -> Constants {
        let AdamWOptions { betas, epsilon, weight_decay, clip, ema_rates, ema_warmup, .. } = &self.options;
        let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
        let ramp = steps as f64 / (9.0 + steps as f64);
        let rate = |rate: &f64| if *ema_warmup { rate.min(ramp) } else { *rate };
        // The small number keeps a norm of zero harmless, as in the common implementations.
        let clipped = clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0));
        Constants {
            gradient_scale: (clipped / loss_scale) as f32,
            beta: betas.map(|beta| beta as f32),
            rest: betas.map(|beta| (1.0 - beta) as f32),
            keep: (1.0 - learning_rate * weight_decay) as f32,
            step_size: (learning_rate / correction(betas[0])) as f32,
            root_correction: (1.0 / correction(betas[1]).sqrt()) as f32,
            epsilon: *epsilon as f32,
            ema: ema_rates.iter().map(|r| [rate(r) as f32, (1.0 - rate(r)) as f32]).collect(),
        }
    }

    /// A parameter's part of the state, in its own order. `None` for a frozen parameter.
    pub fn read(&self, store: &dyn ParamStore, state: State, id: ParamId) -> Result<Option<Vec<f32>>> {
        self.piece(store, state, id)?.map(|piece| piece.to_vec()).transpose()
    }

    /// Replaces a parameter's part of the state. Writing masters leaves the store's weights alone.
    ///
    /// # Errors
    /// If the number of values is not the parameter's.
    pub fn write(&self, store: &dyn ParamStore, state: State, id: ParamId, values: &[f32]) -> Result<()> {
        match self.piece(store, state, id)? {
            Some(piece) => {
                ops::overwrite(&piece, &Tensor::from_slice(store.device(), values, &[values.len()])?)
            }
            None => Ok(()),
        }
    }

    /// Writes an average of the weights into another store of the same parameters on the same device, which
    /// the host does not wait for.
    pub fn copy_average(&self, store: &dyn ParamStore, rate: usize, target: &dyn ParamStore) -> Result<()> {
        for (id, _) in store.parameters().iter() {
            let average = match self.piece(store, State::Average(rate), id)? {
                Some(average) => average,
                None => store.piece(id)?,
            };
            ops::overwrite(&target.piece(id)?, &ops::cast(&average, target.compute_dtype())?)?;
        }
        Ok(())
    }

    fn piece(&self, store: &dyn ParamStore, state: State, id: ParamId) -> Result<Option<Tensor>> {
        let slot = store.layout().slot(id);
        let Some(chunk) = self.chunks.iter().find(|chunk| chunk.chunk == slot.chunk) else { return Ok(None) };
        let whole = match state {
            State::Master => match &chunk.master {
                Some(master) => master.clone(),
                None => store.chunk(slot.chunk)?.weights,
            },
            State::FirstMoment => chunk.moments[0].clone(),
            State::SecondMoment => chunk.moments[1].clone(),
            State::Average(rate) => chunk.averages[rate].clone(),
        };
        whole.piece(slot.offset, &[slot.elements]).map(Some)
    }
}

/// The numbers of one step.
struct Constants {
    gradient_scale: f32,
    beta: [f32; 2],
    rest: [f32; 2],
    keep: f32,
    step_size: f32,
    root_correction: f32,
    epsilon: f32,
    /// Rate and one minus rate of each average.
    ema: Vec<[f32; 2]>,
}

/// Cuts a chunk into tasks; neighbours that decay alike are cut together.
fn push_tasks(tasks: &mut Vec<Task>, state: usize, store: &dyn ParamStore, chunk: usize, decay: Decay) {
    let spec = &store.layout().chunks()[chunk];
    let mut runs: Vec<(usize, bool)> = Vec::new();
    for &id in &spec.parameters {
        let decays = decay == Decay::All || store.parameters().spec(id).shape.len() > 1;
        let start = store.layout().slot(id).offset;
        if runs.last().is_none_or(|(_, last)| *last != decays) {
            runs.push((start, decays));
        }
    }
    for (index, &(start, decays)) in runs.iter().enumerate() {
        let end = runs.get(index + 1).map_or(spec.elements, |(next, _)| *next);
        for start in (start..end).step_by(TASK_ELEMENTS) {
            tasks.push(Task { state, start, elements: TASK_ELEMENTS.min(end - start), decays });
        }
    }
}
