//! The random draws of training and sampling, each keyed so that topology does not matter.
//!
//! Contract: a training draw depends on (seed, purpose, step, index of the sample in the global
//! batch); a sampling draw on (the sample's own seed, purpose, model call). So neither the number
//! of devices nor the company in a batch changes anything.
//! Source of the logit-normal density: SD3 (arXiv 2403.03206) eq. 19.

use anneal_tensor::ops::normal_rows;
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{Device, Tensor};

use crate::error::{DiffusionError, Result};
use crate::process::{FLOW_TIMESTEP_SCALE, Process};
use crate::sampler::NoiseSource;

/// How training draws its times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimeDensity {
    Uniform,
    /// The logistic function of a normal draw; for flows.
    LogitNormal {
        mean: f64,
        standard_deviation: f64,
    },
}

/// A timestep for each sample: whole and uniform over the chain, or anywhere in a flow.
///
/// # Errors
/// If a chain is to be drawn from otherwise than uniformly, or the deviation is negative.
pub fn draw_timesteps(
    process: &Process,
    density: TimeDensity,
    seed: u64,
    step: u64,
    samples: &[u64],
) -> Result<Vec<f64>> {
    let error = |message: &str| Err(DiffusionError::Objective(message.into()));
    match (process, density) {
        (Process::Diffusion(_), TimeDensity::LogitNormal { .. }) => {
            return error("a noise schedule draws its timesteps uniformly; logit-normal is for flows");
        }
        (_, TimeDensity::LogitNormal { mean, standard_deviation })
            if !(crate::is_positive(standard_deviation) && mean.is_finite()) =>
        {
            return error("the logit-normal density needs a finite mean and a positive deviation");
        }
        _ => {}
    }
    let draw = |sample: &u64| {
        let mut stream = Stream::new(seed, Purpose::Timestep, step, *sample);
        match (process, density) {
            (Process::Diffusion(schedule), _) => stream.below(schedule.len() as u64) as f64,
            (Process::Flow, TimeDensity::Uniform) => stream.uniform() * FLOW_TIMESTEP_SCALE,
            (Process::Flow, TimeDensity::LogitNormal { mean, standard_deviation }) => {
                let logit = mean + standard_deviation * stream.normal();
                FLOW_TIMESTEP_SCALE / (1.0 + (-logit).exp())
            }
        }
    };
    Ok(samples.iter().map(draw).collect())
}

/// Whether each sample's condition is dropped in training, with this probability.
pub fn draw_label_drops(probability: f64, seed: u64, step: u64, samples: &[u64]) -> Vec<bool> {
    let draw = |sample: &u64| Stream::new(seed, Purpose::LabelDrop, step, *sample).uniform() < probability;
    samples.iter().map(draw).collect()
}

/// Training noise, f32 [B, sizes...], a row for each sample.
///
/// # Errors
/// If memory runs out.
pub fn draw_noise(device: &Device, sizes: &[usize], seed: u64, step: u64, samples: &[u64]) -> Result<Tensor> {
    Ok(normal_rows(device, sizes, &noise_streams(seed, step, samples))?)
}

/// The streams that the noise of these samples comes from.
pub(crate) fn noise_streams(seed: u64, step: u64, samples: &[u64]) -> Vec<Stream> {
    samples.iter().map(|sample| Stream::new(seed, Purpose::Noise, step, *sample)).collect()
}

/// The first noise of samples with these seeds, f32 [B, sizes...].
///
/// # Errors
/// If memory runs out.
pub fn draw_latents(device: &Device, sizes: &[usize], seeds: &[u64]) -> Result<Tensor> {
    let streams = seeds.iter().map(|seed| Stream::new(*seed, Purpose::SampleLatent, 0, 0));
    Ok(normal_rows(device, sizes, &streams.collect::<Vec<Stream>>())?)
}

/// Sampler noise from each sample's own seed.
#[derive(Clone, Debug)]
pub struct SeededNoise {
    /// One a row.
    pub seeds: Vec<u64>,
}

impl NoiseSource for SeededNoise {
    fn noise(&mut self, step: usize, like: &Tensor) -> anneal_tensor::Result<Tensor> {
        let streams = self.seeds.iter().map(|seed| Stream::new(*seed, Purpose::SamplerNoise, step as u64, 0));
        normal_rows(like.device(), &like.dims()[1..], &streams.collect::<Vec<Stream>>())
    }
}
