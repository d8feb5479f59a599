//! The discrete Gaussian diffusion: betas, the constants of its posterior, and respacing.
//!
//! Contract: everything is f64 and computed once; index t counts from 0 (nearly clean) upwards,
//! so the paper's step t is our t + 1.
//! Source: DDPM (arXiv 2006.11239), improved DDPM (2102.09672), zero terminal SNR (2305.08891).
//! Not done: learned schedules.

use crate::error::{DiffusionError, Result};
use crate::process::NoiseLevel;

/// How beta grows over the chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BetaSchedule {
    /// Evenly spaced from `start` to `end` (DDPM, section 4: 1e-4 to 0.02 over 1000 steps).
    Linear { start: f64, end: f64 },
    /// The squared cosine of improved DDPM, eq. 17, with beta at most 0.999.
    SquaredCosine,
}

impl BetaSchedule {
    /// DDPM's linear schedule, scaled so that a chain of any length ends at the same noise level.
    pub fn linear(steps: usize) -> Self {
        let scale = 1000.0 / steps as f64;
        Self::Linear { start: scale * 1e-4, end: scale * 0.02 }
    }

    /// The betas of a chain of `steps` steps.
    pub fn betas(self, steps: usize) -> Vec<f64> {
        match self {
            Self::Linear { start, end } => linspace(start, end, steps),
            Self::SquaredCosine => {
                let signal = |time: f64| ((time + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
                (0..steps)
                    .map(|index| {
                        let (now, next) = (index as f64 / steps as f64, (index + 1) as f64 / steps as f64);
                        (1.0 - signal(next) / signal(now)).min(0.999)
                    })
                    .collect()
            }
        }
    }
}

/// `count` evenly spaced values from `start` to `end`, both included; one value is `start`.
pub(crate) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    if count < 2 {
        return vec![start; count];
    }
    let stride = (end - start) / (count - 1) as f64;
    let mut values: Vec<f64> = (0..count).map(|index| index as f64 * stride + start).collect();
    values[count - 1] = end;
    values
}

/// A chain with its constants; every vector has one entry a step.
///
/// The names are those of the papers: alpha = 1 - beta, and `alphas_cumprod` is alpha-bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The timestep that the model sees at each step: 0, 1, 2, ... unless respaced. Ascending.
    pub timesteps: Vec<usize>,
    /// The length of the chain that the model was trained on.
    pub training_steps: usize,
    pub betas: Vec<f64>,
    /// DDPM, below eq. 3.
    pub alphas_cumprod: Vec<f64>,
    /// alpha-bar one step nearer to the data; 1 at index 0.
    pub alphas_cumprod_previous: Vec<f64>,
    /// The variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7; 0 at index 0.
    pub posterior_variance: Vec<f64>,
    /// Its logarithm, with index 0 taking index 1's value because its own is minus infinity.
    pub posterior_log_variance_clipped: Vec<f64>,
    /// What multiplies x_0 in the posterior's mean, DDPM eq. 7.
    pub posterior_mean_clean: Vec<f64>,
    /// What multiplies x_t in the posterior's mean, DDPM eq. 7.
    pub posterior_mean_sample: Vec<f64>,
}

impl Schedule {
    /// A chain of `steps` steps.
    ///
    /// # Errors
    /// If there are no steps or a beta is outside (0, 1).
    pub fn new(kind: BetaSchedule, steps: usize) -> Result<Self> {
        Self::from_betas(kind.betas(steps), (0..steps).collect(), steps)
    }

    fn from_betas(betas: Vec<f64>, timesteps: Vec<usize>, training_steps: usize) -> Result<Self> {
        if betas.is_empty() {
            return Err(DiffusionError::Schedule("a chain needs at least one step".into()));
        }
        if let Some(index) = betas.iter().position(|beta| !(*beta > 0.0 && *beta <= 1.0)) {
            let message = format!("beta at step {index} is {}; it must lie between 0 and 1", betas[index]);
            return Err(DiffusionError::Schedule(message));
        }
        let mut product = 1.0;
        let alphas_cumprod: Vec<f64> = betas
            .iter()
            .map(|beta| {
                product *= 1.0 - beta;
                product
            })
            .collect();
        let mut alphas_cumprod_previous = vec![1.0];
        alphas_cumprod_previous.extend(&alphas_cumprod[..betas.len() - 1]);
        let of_each = |formula: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> {
            (0..betas.len())
                .map(|index| formula(betas[index], alphas_cumprod[index], alphas_cumprod_previous[index]))
                .collect()
        };
        let posterior_variance = of_each(&|beta, now, previous| beta * (1.0 - previous) / (1.0 - now));
        let first = posterior_variance[1.min(betas.len() - 1)];
        let posterior_log_variance_clipped =
            std::iter::once(&first).chain(&posterior_variance[1..]).map(|variance| variance.ln()).collect();
        Ok(Self {
            posterior_mean_clean: of_each(&|beta, now, previous| beta * previous.sqrt() / (1.0 - now)),
            posterior_mean_sample: of_each(&|beta, now, previous| {
                (1.0 - previous) * (1.0 - beta).sqrt() / (1.0 - now)
            }),
            posterior_variance,
            posterior_log_variance_clipped,
            timesteps,
            training_steps,
            betas,
            alphas_cumprod,
            alphas_cumprod_previous,
        })
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// Never: a chain has at least one step.
    pub fn is_empty(&self) -> bool {
        self.betas.is_empty()
    }

    /// The chain that visits only `steps` (indices into this one, ascending), with betas that
    /// give the same alpha-bar at each of them (improved DDPM, eq. 19).
    ///
    /// # Errors
    /// If `steps` is empty, not ascending, or reaches past the end.
    pub fn respaced(&self, steps: &[usize]) -> Result<Self> {
        let ascending = steps.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || steps.last().is_none_or(|last| *last >= self.len()) {
            let message = format!("{steps:?} are not ascending steps of a chain of {}", self.len());
            return Err(DiffusionError::Schedule(message));
        }
        let mut previous = 1.0;
        let betas = steps
            .iter()
            .map(|step| {
                let beta = 1.0 - self.alphas_cumprod[*step] / previous;
                previous = self.alphas_cumprod[*step];
                beta
            })
            .collect();
        let timesteps = steps.iter().map(|step| self.timesteps[*step]).collect();
        Self::from_betas(betas, timesteps, self.training_steps)
    }

    /// The same chain stretched so that its last step holds no signal at all: "Common diffusion
    /// noise schedules and sample steps are flawed" (arXiv 2305.08891), algorithm 1. Such a chain
    /// needs a model that predicts v or x_0, and samplers that start from pure noise (DDPM, DDIM).
    ///
    /// # Errors
    /// If the chain has a single step.
    pub fn with_zero_terminal_snr(&self) -> Result<Self> {
        let root = |index: usize| self.alphas_cumprod[index].sqrt();
        let (first, last) = (root(0), root(self.len() - 1));
        let mut previous = 1.0;
        let betas = (0..self.len())
            .map(|index| {
                let signal = ((root(index) - last) * first / (first - last)).powi(2);
                let beta = 1.0 - signal / previous;
                previous = signal;
                beta
            })
            .collect();
        Self::from_betas(betas, self.timesteps.clone(), self.training_steps)
    }

    /// The ratio sigma / alpha of noise to signal at a timestep, interpolated between whole ones.
    ///
    /// It is taken from alpha-bar in single precision, as the published numbers of the samplers
    /// that work on this ratio are: at timestep 0, where alpha-bar is nearly 1, that moves it by
    /// 8e-5 of itself.
    ///
    /// # Errors
    /// If the timestep is not between 0 and the last.
    pub fn noise_to_signal(&self, timestep: f64) -> Result<f64> {
        let last = self.len() - 1;
        if !(timestep >= 0.0 && timestep <= last as f64) {
            return Err(DiffusionError::Timestep { timestep, low: 0.0, high: last as f64 });
        }
        let ratio = |index: usize| {
            let signal = f64::from(self.alphas_cumprod[index] as f32);
            ((1.0 - signal) / signal).sqrt()
        };
        let below = timestep.floor() as usize;
        if below as f64 == timestep {
            return Ok(ratio(below));
        }
        Ok(ratio(below) + (timestep - below as f64) * (ratio(below + 1) - ratio(below)))
    }

    /// The level at a timestep; between whole ones [`Schedule::noise_to_signal`] says which.
    ///
    /// # Errors
    /// If the timestep is not between 0 and the last.
    pub fn level(&self, timestep: f64) -> Result<NoiseLevel> {
        let ratio = self.noise_to_signal(timestep)?;
        if timestep.fract() != 0.0 {
            return Ok(NoiseLevel::variance_preserving(timestep, ratio));
        }
        let signal = self.alphas_cumprod[timestep as usize];
        Ok(NoiseLevel { timestep, alpha: signal.sqrt(), sigma: (1.0 - signal).sqrt() })
    }
}

/// Which steps of a chain are visited, as improved DDPM's sampling writes it.
///
/// `"250"`: evenly over the whole chain. `"10,15,20"`: the chain in equal sections, each with its
/// own count. `"ddim50"`: a whole stride, as DDIM (section 4.2) takes it.
///
/// # Errors
/// If the text has another form or asks for more steps than there are.
pub fn respaced_steps(chain: usize, specification: &str) -> Result<Vec<usize>> {
    let error = |reason: String| DiffusionError::Respacing { specification: specification.into(), reason };
    let count = |text: &str| {
        text.trim().parse::<usize>().ok().filter(|count| *count > 0).ok_or_else(|| {
            error(format!("'{text}' is not a count; write \"250\", \"10,15,20\" or \"ddim50\""))
        })
    };
    if let Some(text) = specification.strip_prefix("ddim") {
        let wanted = count(text)?;
        let stride = (1..=chain).find(|stride| chain.div_ceil(*stride) == wanted).ok_or_else(|| {
            error(format!("no whole stride visits exactly {wanted} steps of a chain of {chain}"))
        })?;
        return Ok((0..chain).step_by(stride).collect());
    }
    let counts = specification.split(',').map(count).collect::<Result<Vec<usize>>>()?;
    let (size, extra) = (chain / counts.len(), chain % counts.len());
    let mut steps = Vec::new();
    let mut start = 0;
    for (section, wanted) in counts.iter().enumerate() {
        let size = size + usize::from(section < extra);
        if size < *wanted {
            return Err(error(format!("a section of {size} steps cannot be visited {wanted} times")));
        }
        let stride = if *wanted == 1 { 1.0 } else { (size - 1) as f64 / (wanted - 1) as f64 };
        // Accumulated, not multiplied: which way a tie falls is part of the published numbers.
        let mut position = 0.0f64;
        for _ in 0..*wanted {
            steps.push(start + position.round_ties_even() as usize);
            position += stride;
        }
        start += size;
    }
    Ok(steps)
}
