//! The samplers, all with one signature.
//!
//! Contract: a [`Sampler`] is made from options alone and holds numbers; [`Sampler::sample`] takes
//! the model as a callable and the noise from a [`NoiseSource`]. Step-wise use (serving joins
//! requests at model calls) goes through [`SamplerState`], which holds everything that one request
//! needs between two calls. The first sample is standard normal whatever the method.
//! Sources are named in each file.

mod ancestral;
mod multistep;
mod ode;
mod plan;
mod state;
mod timesteps;

use std::ops::ControlFlow;
use std::sync::Arc;

use anneal_tensor::Tensor;

pub use state::SamplerState;
pub use timesteps::{Spacing, Steps};

use crate::error::{DiffusionError, Result};
use crate::prediction::Prediction;
use crate::process::Process;
use plan::Plan;
use timesteps::Grid;

/// The variance of a DDPM step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepVariance {
    /// The posterior's, the smaller of the two fixed choices (DDPM section 3.2).
    Posterior,
    /// beta, the larger of the two.
    Beta,
    /// The model's own, between those two (improved DDPM eq. 15); its output has 2C channels.
    LearnedRange,
}

/// The samplers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    Ddpm {
        variance: StepVariance,
    },
    /// `eta` 0 adds no noise, 1 as much as DDPM.
    Ddim {
        eta: f64,
    },
    DpmSolver2m {
        /// Karras et al.'s noise levels in place of the chain's own.
        karras: bool,
    },
    UniPc,
    Euler,
    Heun,
    /// For models trained by flow matching, whatever their output means.
    FlowEuler {
        /// Above 1 spends more steps at the noisy end.
        shift: f64,
    },
}

impl Method {
    /// The name that recipes and the command line use.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ddpm { .. } => "ddpm",
            Self::Ddim { .. } => "ddim",
            Self::DpmSolver2m { karras: false } => "dpm_solver_2m",
            Self::DpmSolver2m { karras: true } => "dpm_solver_2m_karras",
            Self::UniPc => "unipc",
            Self::Euler => "euler",
            Self::Heun => "heun",
            Self::FlowEuler { .. } => "flow_euler",
        }
    }

    /// How a plain count of steps is spread; `None` for respacing over the whole chain.
    fn usual_spacing(&self) -> Option<Spacing> {
        match self {
            Self::Ddpm { .. } => None,
            Self::Ddim { .. } => Some(Spacing::Leading),
            _ => Some(Spacing::Linspace),
        }
    }

    fn grid(&self) -> Grid {
        match self {
            Self::Ddpm { .. } | Self::Ddim { .. } => Grid::Points,
            Self::DpmSolver2m { .. } | Self::UniPc => Grid::Intervals,
            Self::Euler | Self::Heun | Self::FlowEuler { .. } => Grid::Fractional,
        }
    }
}

/// What is chosen when sampling.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    pub method: Method,
    pub steps: Steps,
    /// What the model's output means.
    pub prediction: Prediction,
    /// Clamps every estimate of x_0 to plus or minus this; for pixels in -1..1, not for latents.
    pub clip: Option<f64>,
}

/// A denoising model: (x [B, C, ...], one timestep a row) to its output [B, C or 2C, ...].
pub type Model<'a, E> = dyn FnMut(&Tensor, &[f64]) -> Result<Tensor, E> + 'a;

/// Where a sampler's fresh noise comes from.
pub trait NoiseSource {
    /// Standard normal noise of the shape of `like`, f32, for model call `step` (from 0).
    fn noise(&mut self, step: usize, like: &Tensor) -> anneal_tensor::Result<Tensor>;
}

/// A method with its schedule worked out.
#[derive(Clone, Debug)]
pub struct Sampler {
    plan: Arc<Plan>,
    clip: Option<f64>,
}

impl Sampler {
    /// # Errors
    /// If the method does not fit the process, or the steps do not fit the chain.
    pub fn new(process: &Process, options: &SamplerOptions) -> Result<Self> {
        let method = options.method;
        let error = |reason: String| DiffusionError::Sampler { method: method.name(), reason };
        if let Some(clip) = options.clip.filter(|clip| !crate::is_positive(*clip)) {
            return Err(error(format!("the clipping range must be positive, not {clip}")));
        }
        let plan = match (method, process) {
            (Method::FlowEuler { shift }, Process::Flow) => ode::flow_euler(options, shift)?,
            (Method::FlowEuler { .. }, Process::Diffusion(_)) => {
                return Err(error(
                    "this model was trained on a noise schedule, not by flow matching; choose ddim".into(),
                ));
            }
            (_, Process::Flow) => {
                return Err(error("this model was trained by flow matching; choose flow_euler".into()));
            }
            (Method::Ddpm { variance }, Process::Diffusion(schedule)) => {
                ancestral::ddpm(schedule, options, variance)?
            }
            (Method::Ddim { eta }, Process::Diffusion(schedule)) => {
                if !(0.0..=1.0).contains(&eta) {
                    return Err(error(format!("eta must lie between 0 and 1, not {eta}")));
                }
                ancestral::ddim(schedule, options, eta)?
            }
            (Method::DpmSolver2m { karras }, Process::Diffusion(schedule)) => {
                multistep::dpm_solver(schedule, options, karras)?
            }
            (Method::UniPc, Process::Diffusion(schedule)) => multistep::unipc(schedule, options)?,
            (Method::Euler, Process::Diffusion(schedule)) => ode::euler(schedule, options)?,
            (Method::Heun, Process::Diffusion(schedule)) => ode::heun(schedule, options)?,
        };
        if !plan.is_finite() {
            let prediction = options.prediction.name();
            return Err(error(format!(
                "no signal is left where it starts, and it cannot find x_0 from {prediction} there; \
                 ddim and flow_euler can, with a model that predicts v, x0 or flow"
            )));
        }
        Ok(Self { plan: Arc::new(plan), clip: options.clip })
    }

    /// Number of model calls.
    pub fn calls(&self) -> usize {
        self.plan.steps.len()
    }

    /// The timestep of each model call.
    pub fn timesteps(&self) -> Vec<f64> {
        self.plan.steps.iter().map(|step| step.timestep).collect()
    }

    /// Begins with `latent`, standard normal noise [B, C, ...].
    ///
    /// # Errors
    /// If the latent has fewer than two dimensions.
    pub fn start(&self, latent: &Tensor) -> Result<SamplerState> {
        SamplerState::new(self.plan.clone(), self.clip, latent)
    }

    /// Runs all model calls: from `latent` (standard normal, f32 [B, C, ...]) to the sample.
    ///
    /// The second half of an output of 2C channels is used by DDPM with a learned range alone.
    /// `progress` is called after every model call and may stop the run.
    ///
    /// # Errors
    /// Those of the model and of the noise source; a wrong shape of output; [`DiffusionError::Stopped`].
    pub fn sample<E: From<DiffusionError>>(
        &self,
        model: &mut Model<'_, E>,
        latent: &Tensor,
        noise: &mut dyn NoiseSource,
        progress: &mut dyn FnMut(&SamplerState) -> ControlFlow<()>,
    ) -> Result<Tensor, E> {
        let mut state = self.start(latent)?;
        while let Some(timestep) = state.timestep() {
            let timesteps = vec![timestep; latent.size(0)];
            let output = model(&state.model_input()?, &timesteps)?;
            let fresh = match state.needs_noise() {
                true => Some(noise.noise(state.done(), state.sample()).map_err(DiffusionError::from)?),
                false => None,
            };
            state.step(&output, fresh.as_ref())?;
            if progress(&state).is_break() && state.timestep().is_some() {
                return Err(DiffusionError::Stopped { done: state.done(), steps: self.calls() }.into());
            }
        }
        Ok(state.into_sample())
    }
}
