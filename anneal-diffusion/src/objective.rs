//! What training minimises: the noised sample, and the loss with its weights.
//!
//! Source: DDPM eq. 4 and 14 (arXiv 2006.11239); the hybrid objective of improved DDPM (2102.09672)
//! eq. 16, whose weight 0.001 of a sum over T steps is T / 1000 of the one step that is drawn;
//! min-SNR weighting (2303.09556) section 3.4; flow matching (2210.02747) with rectified flow's
//! target (2209.03003 eq. 1). The arithmetic on elements is [`anneal_tensor::ops::diffusion_loss`].

use anneal_tensor::ops::{DiffusionLoss, DiffusionLossRow, VariationalRow, diffusion_loss};
use anneal_tensor::{Tensor, ops};

use crate::draws::noise_streams;
use crate::error::{DiffusionError, Result};
use crate::prediction::Prediction;
use crate::process::{NoiseLevel, Process};
use crate::schedule::Schedule;

/// A process with what the model predicts of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    process: Process,
    prediction: Prediction,
    learned_variance: bool,
    min_snr_gamma: Option<f64>,
}

impl Objective {
    /// `learned_variance`: the model's output has 2C channels, the second half for the variance.
    /// `min_snr_gamma`: min-SNR weighting with this gamma (5 is usual); `None` weighs all alike.
    ///
    /// # Errors
    /// If a variance is to be learned on a flow, gamma is not positive, or epsilon is to be predicted
    /// on a chain with zero terminal SNR.
    pub fn new(
        process: Process,
        prediction: Prediction,
        learned_variance: bool,
        min_snr_gamma: Option<f64>,
    ) -> Result<Self> {
        if learned_variance && process == Process::Flow {
            let message = "a flow has no variance to learn; set learn_sigma to false";
            return Err(DiffusionError::Objective(message.into()));
        }
        if let Some(gamma) = min_snr_gamma.filter(|gamma| !crate::is_positive(*gamma)) {
            let message = format!("min_snr_gamma must be positive, not {gamma}");
            return Err(DiffusionError::Objective(message));
        }
        let no_signal = match &process {
            Process::Diffusion(schedule) => schedule.alphas_cumprod.last() == Some(&0.0),
            Process::Flow => false,
        };
        if no_signal && prediction == Prediction::Epsilon {
            let message = "where no signal is left, epsilon says nothing of the data; predict v or x0";
            return Err(DiffusionError::Objective(message.into()));
        }
        Ok(Self { process, prediction, learned_variance, min_snr_gamma })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    pub fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    /// A draw of q(x_t | x_0): `clean` and `noise` f32 [B, C, ...], one timestep a row.
    ///
    /// # Errors
    /// If a timestep is outside the process, or shapes disagree.
    pub fn noised(&self, clean: &Tensor, noise: &Tensor, timesteps: &[f64]) -> Result<Tensor> {
        let (alphas, sigmas) = self.coefficients(timesteps)?;
        Ok(ops::linear_combination_per_sample(&[(&alphas, clean), (&sigmas, noise)])?)
    }

    /// Training noise as by [`draw_noise`](crate::draw_noise), and the [`noised`](Self::noised) samples that it
    /// makes of `clean` f32 [B, C, ...]: both f32 in its shape, on a GPU in one pass.
    ///
    /// # Errors
    /// If a timestep is outside the process, or there is not one timestep and index for each sample.
    pub fn draw_noised(
        &self,
        clean: &Tensor,
        timesteps: &[f64],
        seed: u64,
        step: u64,
        samples: &[u64],
    ) -> Result<(Tensor, Tensor)> {
        let (alphas, sigmas) = self.coefficients(timesteps)?;
        Ok(ops::noised(clean, &noise_streams(seed, step, samples), &alphas, &sigmas)?)
    }

    /// What multiplies signal and noise of each sample.
    fn coefficients(&self, timesteps: &[f64]) -> Result<(Vec<f32>, Vec<f32>)> {
        let levels = self.levels(timesteps)?;
        Ok(levels.iter().map(|level| (level.alpha as f32, level.sigma as f32)).unzip())
    }

    /// The loss of the model's `output` [B, C or 2C, ...] for x_t made of `clean` and `noise`.
    ///
    /// # Errors
    /// If a timestep is outside the process (or not whole where a variance is learned), or shapes
    /// disagree.
    pub fn loss(
        &self,
        output: &Tensor,
        clean: &Tensor,
        noise: &Tensor,
        timesteps: &[f64],
    ) -> Result<DiffusionLoss> {
        Ok(diffusion_loss(output, clean, noise, &self.rows(timesteps)?)?)
    }

    /// The coefficients of each sample's loss.
    ///
    /// # Errors
    /// As [`Objective::loss`], but for the shapes.
    pub fn rows(&self, timesteps: &[f64]) -> Result<Vec<DiffusionLossRow>> {
        let levels = self.levels(timesteps)?;
        levels
            .into_iter()
            .map(|level| {
                let target = self.prediction.target(level);
                let variational = match (&self.process, self.learned_variance) {
                    (Process::Diffusion(schedule), true) => Some(self.variational(schedule, level)?),
                    _ => None,
                };
                Ok(DiffusionLossRow {
                    target_clean: target.first,
                    target_noise: target.second,
                    error_weight: self.weight(level),
                    variational,
                })
            })
            .collect()
    }

    /// min-SNR: the squared error of x_0 is weighted by min(SNR, gamma). An output that is off by d
    /// moves x_0 by slope * d, so for every prediction the weight is min(SNR, gamma) * slope^2:
    /// min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, times sigma^2 for a flow's velocity.
    fn weight(&self, level: NoiseLevel) -> f64 {
        let Some(gamma) = self.min_snr_gamma else { return 1.0 };
        let slope = self.prediction.clean(level).second;
        level.signal_to_noise().min(gamma) * slope * slope
    }

    fn variational(&self, schedule: &Schedule, level: NoiseLevel) -> Result<VariationalRow> {
        let index = level.timestep as usize;
        if level.timestep.fract() != 0.0 {
            let message = format!("a learned variance needs whole timesteps, not {}", level.timestep);
            return Err(DiffusionError::Objective(message));
        }
        let low = schedule.posterior_log_variance_clipped[index];
        Ok(VariationalRow {
            weight: schedule.len() as f64 / 1000.0,
            mean_slope: schedule.posterior_mean_clean[index] * self.prediction.clean(level).second,
            log_variance_low: low,
            log_variance_range: schedule.betas[index].ln() - low,
            decoder: index == 0,
        })
    }

    fn levels(&self, timesteps: &[f64]) -> Result<Vec<NoiseLevel>> {
        timesteps.iter().map(|timestep| self.process.level(*timestep)).collect()
    }
}
