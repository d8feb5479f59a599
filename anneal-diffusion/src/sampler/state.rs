//! One request between two model calls: the executor of every plan.

use std::sync::Arc;

use anneal_tensor::{DType, Tensor, ops};

use super::plan::{Operand, Plan, StepNoise, StepPlan};
use crate::error::{DiffusionError, Result};

/// How many earlier estimates of x_0 a plan may look back on.
const HISTORY: usize = 2;

/// A sample on its way, with the history that its method needs.
///
/// Until [`SamplerState::timestep`] is `None`: call the model on [`SamplerState::model_input`] at
/// that timestep, then [`SamplerState::step`] with its output. Requests of different methods and
/// step counts can share a model call, because each has its own state.
#[derive(Clone)]
pub struct SamplerState {
    plan: Arc<Plan>,
    clip: Option<f64>,
    done: usize,
    sample: Tensor,
    anchor: Option<Tensor>,
    /// Estimates of x_0, the newest first.
    clean: Vec<Tensor>,
}

impl SamplerState {
    pub(super) fn new(plan: Arc<Plan>, clip: Option<f64>, latent: &Tensor) -> Result<Self> {
        if latent.rank() < 2 || latent.dtype() != DType::F32 {
            return Err(DiffusionError::Shape {
                operation: "sampling",
                what: "the first noise",
                got: latent.dims().to_vec(),
                expected: "f32 [B, C, ...]".into(),
            });
        }
        let sample = match plan.initial_scale {
            1.0 => latent.detach(),
            scale => ops::scale(latent, scale as f32)?,
        };
        Ok(Self { plan, clip, done: 0, sample, anchor: None, clean: Vec::new() })
    }

    fn current(&self) -> Option<&StepPlan> {
        self.plan.steps.get(self.done)
    }

    /// The timestep of the next model call; `None` when the sample is finished.
    pub fn timestep(&self) -> Option<f64> {
        self.current().map(|step| step.timestep)
    }

    /// Model calls made so far.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Model calls in all.
    pub fn calls(&self) -> usize {
        self.plan.steps.len()
    }

    /// What the model is to be called on.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn model_input(&self) -> Result<Tensor> {
        match self.current().map_or(1.0, |step| step.input_scale) {
            1.0 => Ok(self.sample.clone()),
            scale => Ok(ops::scale(&self.sample, scale as f32)?),
        }
    }

    /// Whether the next step takes fresh noise.
    pub fn needs_noise(&self) -> bool {
        self.current().is_some_and(|step| step.noise != StepNoise::None)
    }

    /// The sample in the method's own coordinates; the result once `timestep` is `None`.
    pub fn sample(&self) -> &Tensor {
        &self.sample
    }

    /// The newest estimate of the result, for previews.
    pub fn clean(&self) -> Option<&Tensor> {
        self.clean.first()
    }

    pub fn into_sample(self) -> Tensor {
        self.sample
    }

    /// Takes the model's output for the current timestep, and fresh noise where it is needed.
    ///
    /// # Errors
    /// If the sample is finished already, the output is neither C nor 2C channels (2C for a learned
    /// range) of the sample's shape, or needed noise is missing or misshapen.
    pub fn step(&mut self, output: &Tensor, noise: Option<&Tensor>) -> Result<()> {
        let plan = self.plan.clone();
        let Some(step) = plan.steps.get(self.done) else {
            let reason = "the sample is finished; no further step exists".into();
            return Err(DiffusionError::Sampler { method: "state", reason });
        };
        let (prediction, variance) = self.split(output, matches!(step.noise, StepNoise::Learned { .. }))?;
        let deviation = self.noise_term(step, variance.as_ref(), noise)?;
        let mut clean = ops::linear_combination(&[
            (step.clean_of_sample as f32, &self.sample),
            (step.clean_of_output as f32, &prediction),
        ])?;
        if let Some(clip) = self.clip {
            clean = ops::clamp(&clean, -clip as f32, clip as f32)?;
        }
        self.clean.insert(0, clean);
        self.clean.truncate(HISTORY + 1);
        if !step.correct.is_empty() {
            self.sample = self.combined(&step.correct, None)?;
        }
        let next = self.combined(&step.advance, deviation.as_ref())?;
        if step.mark_anchor {
            self.anchor = Some(self.sample.clone());
        }
        self.sample = next;
        self.done += 1;
        Ok(())
    }

    /// The output's prediction in f32, and its variance half if the step asks for it.
    fn split(&self, output: &Tensor, learned: bool) -> Result<(Tensor, Option<Tensor>)> {
        let channels = self.sample.size(1);
        let mut wide = self.sample.dims().to_vec();
        wide[1] *= 2;
        if output.dims() == wide {
            let halves = ops::split(&ops::cast(&output.detach(), DType::F32)?, 1, &[channels, channels])?;
            let variance = learned.then(|| halves[1].clone());
            return Ok((halves[0].clone(), variance));
        }
        if output.dims() == self.sample.dims() && !learned {
            return Ok((ops::cast(&output.detach(), DType::F32)?, None));
        }
        let expected = match learned {
            true => format!("{wide:?} (the second half for the learned variance)"),
            false => format!("{:?} or {wide:?}", self.sample.dims()),
        };
        let got = output.dims().to_vec();
        Err(DiffusionError::Shape { operation: "sampling", what: "the model's output", got, expected })
    }

    /// deviation * noise.
    fn noise_term(
        &self,
        step: &StepPlan,
        variance: Option<&Tensor>,
        noise: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        if step.noise == StepNoise::None {
            return Ok(None);
        }
        let noise = noise.filter(|noise| noise.dims() == self.sample.dims()).ok_or_else(|| {
            DiffusionError::Shape {
                operation: "sampling",
                what: "this step's noise",
                got: noise.map_or(Vec::new(), |noise| noise.dims().to_vec()),
                expected: format!("{:?}", self.sample.dims()),
            }
        })?;
        match (step.noise, variance) {
            (StepNoise::Learned { log_variance_low, log_variance_range }, Some(variance)) => {
                // Half the logarithm: low / 2 + (v + 1) range / 4.
                let slope = log_variance_range / 4.0;
                let half_log = ops::scale(variance, slope as f32)?;
                let half_log = ops::add_scalar(&half_log, (log_variance_low / 2.0 + slope) as f32)?;
                Ok(Some(ops::mul(&ops::exp(&half_log)?, noise)?))
            }
            (StepNoise::Fixed { deviation }, _) => Ok(Some(ops::scale(noise, deviation as f32)?)),
            _ => unreachable!("a learned step is split into two halves before"),
        }
    }

    fn combined(&self, terms: &[(Operand, f64)], addend: Option<&Tensor>) -> Result<Tensor> {
        let mut operands: Vec<(f32, &Tensor)> = terms
            .iter()
            .map(|(operand, coefficient)| {
                let tensor = match operand {
                    Operand::Sample => &self.sample,
                    Operand::Anchor => self.anchor.as_ref().expect("a plan marks its anchor before using it"),
                    Operand::Clean(age) => &self.clean[*age],
                };
                (*coefficient as f32, tensor)
            })
            .collect();
        operands.extend(addend.map(|addend| (1.0, addend)));
        Ok(ops::linear_combination(&operands)?)
    }
}
