//! One training step, and everything that a step needs.
//!
//! Contract: the state after a step is a function of the recipe and the number of steps alone. Every
//! draw is keyed by (seed, purpose, step, row of the batch), so neither accumulation nor the
//! number of threads or workers changes it, and a run continued from a checkpoint has the same bits.
//! On a GPU a step is queued, not waited for, and from the third on replayed as one captured piece of work; so
//! everything that changes from step to step goes there as an upload, and nothing is read back inside a step.

use std::sync::Arc;
use std::time::Instant;

use anneal_data::{Cursor, Loader};
use anneal_device::cuda::RepeatedWork;
use anneal_diffusion::{Objective, TimeDensity, draw_label_drops, draw_timesteps};
use anneal_models::dit::Dit;
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_optim::{AdamW, LearningRate};
use anneal_recipe::{Model, Recipe};
use anneal_tensor::{Device, Tape, Tensor, ops};

use crate::data::{self, DataSummary, open_loader};
use crate::error::{Result, TrainError};
pub use crate::outcomes::StepOutcome;
use crate::outcomes::{DeviceFigures, Outcomes, PendingFigures, Started};
use crate::settings;

/// Steps that may be queued on a GPU: one that runs, and one that follows without a gap.
const STEPS_UNDER_WAY: usize = 2;

/// A model, its optimizer and its data, at some step.
pub struct Trainer {
    pub(crate) recipe: Recipe,
    device: Device,
    model: Arc<Dit>,
    pub(crate) store: Arc<ResidentStore>,
    pub(crate) optimizer: AdamW,
    objective: Objective,
    density: TimeDensity,
    learning_rate: LearningRate,
    pub(crate) loader: Loader,
    /// Steps begun, skipped ones included.
    pub(crate) step: u64,
    pub(crate) outcomes: Outcomes<PendingFigures>,
    /// The step as it is captured on a GPU.
    captured: RepeatedWork,
}

impl Trainer {
    /// Opens the data and makes the model with freshly drawn weights, on the recipe's device.
    pub fn new(recipe: &Recipe) -> Result<Self> {
        let device = settings::device(recipe)?;
        let (model, parameters) = Dit::new(&settings::model_config(recipe)?)?;
        let options = StoreOptions {
            compute_dtype: settings::compute_dtype(recipe),
            chunk_elements: recipe.train.chunk_size.bytes() / size_of::<f32>(),
            train: true,
        };
        let store = Arc::new(ResidentStore::new(Arc::new(parameters), &device, options)?);
        store.initialise(recipe.seed)?;
        let optimizer = AdamW::new(&*store, settings::optimizer(recipe))?;
        let loader = open_loader(recipe, Cursor::start(recipe.seed))?;
        data::check(recipe, model.config(), &loader)?;
        Ok(Self {
            recipe: recipe.clone(),
            device,
            model: Arc::new(model),
            store,
            optimizer,
            objective: settings::objective(recipe)?,
            density: settings::time_density(recipe),
            learning_rate: settings::learning_rate(recipe),
            loader,
            step: 0,
            outcomes: Outcomes::new(recipe.train.nonfinite_limit),
            captured: RepeatedWork::default(),
        })
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn model(&self) -> &Arc<Dit> {
        &self.model
    }

    pub fn store(&self) -> &Arc<ResidentStore> {
        &self.store
    }

    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// What it trains on.
    pub fn data(&self) -> DataSummary {
        DataSummary::new(&self.recipe, self.loader.dataset())
    }

    /// Steps begun; all of them are done once [`Self::finish_steps`] returns.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Steps skipped because a gradient was not finite, of those whose outcome has come.
    pub fn skipped(&self) -> u64 {
        self.outcomes.skipped.in_all
    }

    /// What the loader has to say about bad samples since the last call, and whether steps are no longer captured.
    pub fn take_warnings(&mut self) -> Vec<String> {
        let problem = self.captured.take_problem();
        let told = problem.map(|why| format!("steps are no longer captured, which costs time: {why}"));
        self.loader.take_warnings().into_iter().chain(told).collect()
    }

    /// Gives the memory of the captured step to others, such as sampling; the next step is captured anew.
    pub fn release_captured_step(&mut self) {
        self.captured.release();
    }

    /// A store with the weights to draw samples from: an average, or the weights themselves.
    pub fn sampling_store(&self, ema_rate: Option<f64>) -> Result<Arc<dyn ParamStore>> {
        let rates = &self.recipe.ema.rates;
        let Some(rate) = ema_rate else { return Ok(self.store.clone()) };
        let index = rates.iter().position(|known| *known == rate).ok_or_else(|| TrainError::Settings {
            message: format!("there is no average with rate {rate}; the recipe has ema.rates {rates:?}"),
        })?;
        let options = StoreOptions {
            compute_dtype: self.store.compute_dtype(),
            chunk_elements: self.recipe.train.chunk_size.bytes() / size_of::<f32>(),
            train: false,
        };
        let target = ResidentStore::new(self.store.parameters().clone(), &self.device, options)?;
        self.optimizer.copy_average(&*self.store, index, &target)?;
        Ok(Arc::new(target))
    }

    /// Begins the next step. Adds the outcomes that have come since the last call, in order: on the CPU this
    /// step's; on a GPU, which is not waited for, those of steps before it.
    ///
    /// # Errors
    /// Unusable data; memory; or too many steps in a row without a finite gradient. The outcomes of the steps
    /// before are added all the same.
    pub fn step(&mut self, outcomes: &mut Vec<StepOutcome>) -> Result<()> {
        if let Err(error) = self.begin_step() {
            self.finish_steps(outcomes)?;
            return Err(error);
        }
        self.outcomes.arrived(STEPS_UNDER_WAY, outcomes)
    }

    fn begin_step(&mut self) -> Result<()> {
        let begun = Instant::now();
        let batch = self.loader.next_batch()?;
        let (images, labels) = (batch.images.clone(), batch.labels.clone());
        let learning_rate = self.learning_rate.at(self.step);
        let figures = self.run_step(&images, &labels, learning_rate)?.read_later()?;
        self.step += 1;
        self.outcomes.push(Started { step: self.step, learning_rate, begun }, figures);
        Ok(())
    }

    /// Waits until all steps begun are done; adds the outcomes that [`Self::step`] has not.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn finish_steps(&mut self, outcomes: &mut Vec<StepOutcome>) -> Result<()> {
        self.outcomes.arrived(0, outcomes)
    }

    /// The step's work, captured where it can be.
    fn run_step(&mut self, images: &[f32], labels: &[i64], learning_rate: f64) -> Result<DeviceFigures> {
        match self.device.clone() {
            Device::Cuda(cuda) if self.recipe.train.capture_steps => {
                let mut captured = std::mem::take(&mut self.captured);
                let result = captured.run(&cuda, || self.compute_step(images, labels, learning_rate));
                self.captured = captured;
                result
            }
            _ => self.compute_step(images, labels, learning_rate),
        }
    }

    fn compute_step(&mut self, images: &[f32], labels: &[i64], learning_rate: f64) -> Result<DeviceFigures> {
        // A step that failed half way, as a capture may, has left gradients.
        self.store.clear_gradients();
        let total = self.recipe.train.batch;
        let part = total / self.recipe.train.accumulate;
        let passes = (0..total).step_by(part);
        let losses = passes
            .map(|first| self.accumulate(images, labels, first..first + part))
            .collect::<Result<Vec<Tensor>>>()?;
        let report = self.optimizer.step(&*self.store, learning_rate)?;
        Ok(DeviceFigures { losses, report })
    }

    /// Adds the gradient of some rows of the batch; the loss of each, f32 [rows].
    fn accumulate(&self, images: &[f32], labels: &[i64], rows: std::ops::Range<usize>) -> Result<Tensor> {
        let (seed, step) = (self.recipe.seed, self.step);
        let Model::Dit(dit) = &self.recipe.model;
        let samples: Vec<u64> = rows.clone().map(|row| row as u64).collect();
        let shape = self.model.image_shape();
        let size: usize = shape.iter().product();
        let dims = [rows.len(), shape[0], shape[1], shape[2]];
        let clean = Tensor::from_slice(&self.device, &images[rows.start * size..rows.end * size], &dims)?;
        let timesteps = draw_timesteps(self.objective.process(), self.density, seed, step, &samples)?;
        let drops = draw_label_drops(dit.label_dropout, seed, step, &samples);
        let null = self.model.null_label();
        let labels: Vec<i64> = labels[rows.clone()]
            .iter()
            .zip(&drops)
            .map(|(label, drop)| if *drop { null } else { *label })
            .collect();

        let (noise, noised) = self.objective.draw_noised(&clean, &timesteps, seed, step, &samples)?;
        let model_timesteps: Vec<f32> = timesteps.iter().map(|timestep| *timestep as f32).collect();
        let tape = Tape::new().with_remaking(settings::remaking(dit.recompute_norms));
        let forward =
            Forward::new(self.store.clone()).recording(&tape).checkpoint_blocks(dit.checkpoint_activations);
        let conditioning = Conditioning { labels: &labels };
        let output = self.model.forward(&forward, &noised, &model_timesteps, &conditioning)?;
        drop(noised);
        let losses = self.objective.loss(&output, &clean, &noise, &timesteps)?;
        drop((output, clean, noise));
        let mean = ops::mean(&losses.total, &[0], false)?;
        let share = rows.len() as f32 / self.recipe.train.batch as f32;
        match self.optimizer.loss_scale()? {
            None => tape.backward_scaled(&mean, share)?,
            Some(scale) => {
                let seed = ops::scale(&scale, share)?;
                tape.backward_from(vec![(mean, seed)])?;
            }
        }
        Ok(losses.total.detach())
    }
}
