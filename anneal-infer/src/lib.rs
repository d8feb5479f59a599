//! Pipelines: from weights and a request to samples.
//!
//! Contract: a sample depends on its own seed, its label and the settings, not on how many are
//! drawn together (within the rounding of matrix products, which here does not depend on the batch).
//! Deliberately absent: files, optimizers, HTTP.

mod calls;

use std::ops::ControlFlow;
use std::sync::Arc;

use anneal_diffusion::{
    Branch, DiffusionError, Guidance, Objective, Sampler, SamplerOptions, SeededNoise, draw_latents,
};
use anneal_models::Denoiser;
use anneal_nn::{Forward, ParamStore};
use anneal_tensor::{Tensor, TensorError};

use calls::ModelCalls;

/// What can go wrong while sampling.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    #[error(transparent)]
    Diffusion(#[from] DiffusionError),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("{message}")]
    Request { message: String },
}

pub type Result<T, E = InferError> = std::result::Result<T, E>;

/// A model with its weights, and what it was trained to predict.
#[derive(Clone)]
pub struct Pipeline {
    pub model: Arc<dyn Denoiser>,
    pub store: Arc<dyn ParamStore>,
    pub objective: Objective,
}

/// Which samples to draw, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A class for each sample; the model's null label for none.
    pub labels: Vec<i64>,
    /// A seed for each sample.
    pub seeds: Vec<u64>,
    /// Starting noise `[N, C, H, W]` in place of the noise drawn from the seeds.
    pub latents: Option<Vec<f32>>,
    pub sampler: SamplerOptions,
    pub guidance: Guidance,
    /// Samples computed together.
    pub batch: usize,
}

/// Samples in f32, as the model sees images.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// `[N, C, H, W]` in row-major order.
    pub values: Vec<f32>,
    /// `[C, H, W]` of one sample.
    pub shape: [usize; 3],
    pub labels: Vec<i64>,
    /// What went otherwise than it should, though the samples are right.
    pub warnings: Vec<String>,
}

impl Pipeline {
    /// Draws the samples; `progress` is told after every model call how many of all are done, and may stop.
    ///
    /// # Errors
    /// If the request does not fit the model, or the run was stopped.
    pub fn sample(
        &self,
        request: &Request,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Samples> {
        self.check(request)?;
        let sampler = Sampler::new(self.objective.process(), &request.sampler)?;
        let shape = self.model.image_shape();
        let mut values = Vec::with_capacity(request.labels.len() * shape.iter().product::<usize>());
        let batches = request.labels.len().div_ceil(request.batch);
        let mut calls = ModelCalls::new(&*self.model, Forward::new(self.store.clone()));
        for index in 0..batches {
            let first = index * request.batch;
            let rows = first..(first + request.batch).min(request.labels.len());
            let mut report =
                |done: usize| progress(index * sampler.calls() + done, batches * sampler.calls());
            values.extend(self.sample_batch(request, &sampler, &mut calls, rows, &mut report)?);
        }
        Ok(Samples { values, shape, labels: request.labels.clone(), warnings: calls.take_warnings() })
    }

    fn sample_batch(
        &self,
        request: &Request,
        sampler: &Sampler,
        calls: &mut ModelCalls,
        rows: std::ops::Range<usize>,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        let shape = self.model.image_shape();
        let device = self.store.device();
        let seeds = request.seeds[rows.clone()].to_vec();
        let latent = match &request.latents {
            None => draw_latents(device, &shape, &seeds)?,
            Some(latents) => {
                let size: usize = shape.iter().product();
                let dims = [rows.len(), shape[0], shape[1], shape[2]];
                Tensor::from_slice(device, &latents[rows.start * size..rows.end * size], &dims)?
            }
        };
        let labels = &request.labels[rows];
        let mut model = request.guidance.guide(self.objective.process(), |x, timesteps, branches| {
            let labels: Vec<i64> = branches
                .iter()
                .map(|branch| match branch {
                    Branch::Conditional(row) => labels[*row],
                    Branch::Unconditional(_) => self.model.null_label(),
                })
                .collect();
            let timesteps: Vec<f32> = timesteps.iter().map(|timestep| *timestep as f32).collect();
            Ok::<_, InferError>(calls.call(x, &timesteps, &labels)?)
        });
        let mut report = |state: &anneal_diffusion::SamplerState| progress(state.done());
        let sample = sampler.sample(&mut model, &latent, &mut SeededNoise { seeds }, &mut report)?;
        Ok(sample.to_vec()?)
    }

    fn check(&self, request: &Request) -> Result<()> {
        let fail = |message: String| Err(InferError::Request { message });
        let count = request.labels.len();
        if count == 0 || request.batch == 0 {
            return fail("at least one sample, computed at least one at a time, must be asked for".into());
        }
        if request.seeds.len() != count {
            return fail(format!("{count} samples were asked for with {} seeds", request.seeds.len()));
        }
        let null = self.model.null_label();
        if let Some(label) = request.labels.iter().find(|label| !(0..=null).contains(*label)) {
            return fail(format!("class {label} does not exist: this model knows 0 to {}", null - 1));
        }
        let size: usize = self.model.image_shape().iter().product();
        if let Some(latents) = request.latents.as_ref().filter(|latents| latents.len() != count * size) {
            let [c, h, w] = self.model.image_shape();
            return fail(format!(
                "the latents hold {} numbers; {count} samples of [{c}, {h}, {w}] need {}",
                latents.len(),
                count * size
            ));
        }
        Ok(())
    }
}
