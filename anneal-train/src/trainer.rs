//! One training step, and everything that a step needs.
//!
//! Contract: the state after a step is a function of the recipe and the number of steps alone. Every
//! draw is keyed by (seed, purpose, step, row of the batch), so neither accumulation nor the
//! number of threads or workers changes it, and a run continued from a checkpoint has the same bits.

use std::sync::Arc;
use std::time::Instant;

use anneal_data::{Cursor, Loader};
use anneal_diffusion::{Objective, TimeDensity, draw_label_drops, draw_timesteps};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_optim::{AdamW, LearningRate};
use anneal_recipe::{Model, Recipe};
use anneal_tensor::{Device, Tape, Tensor, ops};

use crate::error::{Result, TrainError};
use crate::settings;

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
    /// Steps done, skipped ones included.
    pub(crate) step: u64,
    /// Steps skipped because a gradient was not finite: in all, and since the last good one.
    pub(crate) skipped: u64,
    pub(crate) skipped_in_a_row: u64,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// The step's number, from 1.
    pub step: u64,
    /// Mean loss of the batch before the step.
    pub loss: f64,
    pub gradient_norm: f64,
    pub learning_rate: f64,
    /// The gradient was not finite and nothing changed.
    pub skipped: bool,
    pub seconds: f64,
}

impl Trainer {
    /// Opens the data and makes the model with freshly drawn weights, on the recipe's device.
    pub fn new(recipe: &Recipe) -> Result<Self> {
        let device = Device::parse(&recipe.device, None)?;
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
        check_data(recipe, model.config(), &loader)?;
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
            skipped: 0,
            skipped_in_a_row: 0,
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

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Steps skipped because a gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// What the loader has to say about bad samples since the last call.
    pub fn take_warnings(&mut self) -> Vec<String> {
        self.loader.take_warnings()
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

    /// The next step.
    ///
    /// # Errors
    /// Unusable data; memory; or too many steps in a row without a finite gradient.
    pub fn step(&mut self) -> Result<StepOutcome> {
        let start = Instant::now();
        let total = self.recipe.train.batch;
        let part = total / self.recipe.train.accumulate;
        let batch = self.loader.next_batch()?;
        let (images, labels) = (batch.images.clone(), batch.labels.clone());
        let mut loss = 0.0;
        for first in (0..total).step_by(part) {
            loss += self.accumulate(&images, &labels, first..first + part)? / total as f64;
        }
        let learning_rate = self.learning_rate.at(self.step);
        let report = self.optimizer.step(&*self.store, learning_rate)?;
        self.step += 1;
        self.count_skipped(report.skipped)?;
        Ok(StepOutcome {
            step: self.step,
            loss,
            gradient_norm: report.gradient_norm,
            learning_rate,
            skipped: report.skipped,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn count_skipped(&mut self, skipped: bool) -> Result<()> {
        if !skipped {
            self.skipped_in_a_row = 0;
            return Ok(());
        }
        self.skipped += 1;
        self.skipped_in_a_row += 1;
        let limit = self.recipe.train.nonfinite_limit;
        if self.skipped_in_a_row >= limit as u64 {
            return Err(TrainError::Diverged { limit, step: self.step });
        }
        Ok(())
    }

    /// Adds the gradient of some rows of the batch; their summed loss.
    fn accumulate(&self, images: &[f32], labels: &[i64], rows: std::ops::Range<usize>) -> Result<f64> {
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
        let tape = Tape::new();
        let forward =
            Forward::new(self.store.clone()).recording(&tape).checkpoint_blocks(dit.checkpoint_activations);
        let conditioning = Conditioning { labels: &labels };
        let output = self.model.forward(&forward, &noised, &model_timesteps, &conditioning)?;
        drop(noised);
        let losses = self.objective.loss(&output, &clean, &noise, &timesteps)?;
        drop((output, clean, noise));
        let mean = ops::mean(&losses.total, &[0], false)?;
        tape.backward_scaled(&mean, rows.len() as f32 / self.recipe.train.batch as f32)?;
        let values = losses.total.to_vec::<f32>()?;
        Ok(values.into_iter().map(f64::from).sum())
    }
}

/// A loader of the recipe's data from a cursor on.
pub(crate) fn open_loader(recipe: &Recipe, cursor: Cursor) -> Result<Loader> {
    let dataset = anneal_data::open(&settings::data_source(recipe))?;
    Ok(Loader::new(dataset, &settings::loader(recipe), cursor)?)
}

fn check_data(recipe: &Recipe, config: &DitConfig, loader: &Loader) -> Result<()> {
    let [height, width] = config.image_size;
    let expected = [config.channels, height, width];
    if loader.shape() != expected {
        let message = format!(
            "the model sees images of {expected:?} (channels, height, width), but the data gives {:?}: set data.image_size and data.channels, or model.image_size and model.channels",
            loader.shape()
        );
        return Err(TrainError::Settings { message });
    }
    if !recipe.train.batch.is_multiple_of(recipe.train.accumulate) {
        let message = format!(
            "train.batch {} is not a multiple of train.accumulate {}",
            recipe.train.batch, recipe.train.accumulate
        );
        return Err(TrainError::Settings { message });
    }
    Ok(())
}
