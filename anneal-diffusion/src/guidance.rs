//! Classifier-free guidance: turns a conditional model into a guided one.
//!
//! Contract: guided = unconditional + scale * (conditional - unconditional), both from one call of
//! the model on twice the rows; where the scale is 1 in every row, one call on the rows alone.
//! Guidance acts on the prediction's channels; the rest of the output (a learned variance, or
//! channels left out by choice) is the conditional one's.
//! Source: arXiv 2207.12598 eq. 6 (its w is scale - 1); the limited interval 2404.07724; the
//! power-cosine scale of MDT (2303.14389); three channels as in the published DiT samples.

use anneal_tensor::{DType, Tensor, ops};

use crate::error::{DiffusionError, Result};
use crate::process::Process;

/// How the scale depends on the timestep; time is the timestep's share of the process, 1 at noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GuidanceShape {
    Constant,
    /// The scale while low <= time <= high, else 1. Time is monotone in the noise level, which the
    /// paper's interval is stated in.
    Interval {
        low: f64,
        high: f64,
    },
    /// From 1 at noise up to the scale at the data, by (1 - cos(pi (1 - time)^power)) / 2.
    PowerCosine {
        power: f64,
    },
}

/// Classifier-free guidance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    scale: f64,
    shape: GuidanceShape,
    channels: Option<usize>,
}

/// What a row of a model call is conditioned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// This sample's own condition.
    Conditional(usize),
    /// The null condition, for this sample.
    Unconditional(usize),
}

impl Guidance {
    /// `channels`: only the first so many are guided; `None` for all.
    ///
    /// # Errors
    /// If the scale is not finite, the interval is not within 0..1, the power is not positive, or
    /// no channel is guided.
    pub fn new(scale: f64, shape: GuidanceShape, channels: Option<usize>) -> Result<Self> {
        let error = |message: String| Err(DiffusionError::Guidance(message));
        if !scale.is_finite() {
            return error(format!("the scale must be a number, not {scale}"));
        }
        match shape {
            GuidanceShape::Interval { low, high } if !(0.0 <= low && low <= high && high <= 1.0) => {
                return error(format!("the interval {low} to {high} must ascend within 0 to 1"));
            }
            GuidanceShape::PowerCosine { power } if !crate::is_positive(power) => {
                return error(format!("the power must be positive, not {power}"));
            }
            _ => {}
        }
        if channels == Some(0) {
            return error("at least one channel must be guided".into());
        }
        Ok(Self { scale, shape, channels })
    }

    /// The scale at a timestep of a process.
    pub fn scale_at(&self, process: &Process, timestep: f64) -> f64 {
        let time = process.fraction(timestep);
        match self.shape {
            GuidanceShape::Constant => self.scale,
            GuidanceShape::Interval { low, high } if (low..=high).contains(&time) => self.scale,
            GuidanceShape::Interval { .. } => 1.0,
            GuidanceShape::PowerCosine { power } => {
                let angle = std::f64::consts::PI * (1.0 - time).max(0.0).powf(power);
                1.0 + (self.scale - 1.0) * (1.0 - angle.cos()) / 2.0
            }
        }
    }

    /// A model that is called on x [B, C, ...] and B timesteps, from one that is told for each row
    /// which sample's condition, or lack of it, to use.
    pub fn guide<'a, E: From<DiffusionError>>(
        self,
        process: &'a Process,
        mut model: impl FnMut(&Tensor, &[f64], &[Branch]) -> Result<Tensor, E> + 'a,
    ) -> impl FnMut(&Tensor, &[f64]) -> Result<Tensor, E> + 'a {
        move |x, timesteps| {
            let scales: Vec<f64> =
                timesteps.iter().map(|timestep| self.scale_at(process, *timestep)).collect();
            let rows = timesteps.len();
            let mut branches: Vec<Branch> = (0..rows).map(Branch::Conditional).collect();
            if scales.iter().all(|scale| *scale == 1.0) {
                return model(x, timesteps, &branches);
            }
            branches.extend((0..rows).map(Branch::Unconditional));
            let both = ops::concat(&[x, x], 0).map_err(DiffusionError::from)?;
            let output = model(&both, &timesteps.repeat(2), &branches)?;
            Ok(self.combine(&output, &scales, x.size(1))?)
        }
    }

    /// The guided output [B, ...], f32, of [2B, ...]: conditional rows, then unconditional ones.
    fn combine(&self, output: &Tensor, scales: &[f64], channels: usize) -> Result<Tensor> {
        let rows = scales.len();
        if output.rank() < 2 || output.size(0) != 2 * rows || output.size(1) < channels {
            let expected = format!("[{}, {channels} or more, ...]", 2 * rows);
            let got = output.dims().to_vec();
            return Err(DiffusionError::Shape { operation: "guidance", what: "the output", got, expected });
        }
        let guided = self.channels.map_or(channels, |wanted| wanted.min(channels));
        // In f32: the difference of two nearly equal bf16 outputs, scaled up, would show.
        let output = &ops::cast(output, DType::F32)?;
        let halves = ops::split(output, 0, &[rows, rows])?;
        let of_conditional: Vec<f32> = scales.iter().map(|scale| *scale as f32).collect();
        let of_unconditional: Vec<f32> = scales.iter().map(|scale| (1.0 - scale) as f32).collect();
        let conditional = ops::narrow(&halves[0], 1, 0, guided)?;
        let unconditional = ops::narrow(&halves[1], 1, 0, guided)?;
        let mixed = ops::linear_combination_per_sample(&[
            (&of_conditional, &conditional),
            (&of_unconditional, &unconditional),
        ])?;
        match output.size(1) - guided {
            0 => Ok(mixed),
            rest => Ok(ops::concat(&[&mixed, &ops::narrow(&halves[0], 1, guided, rest)?], 1)?),
        }
    }
}
