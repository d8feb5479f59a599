//! The loss of a diffusion model in one pass: weighted squared error plus, for a model that also
//! predicts its variance, the variational term.
//!
//! With `target = target_clean * x_0 + target_noise * noise`, per sample and over n elements:
//! - `error = 1/n sum (output - target)^2` (DDPM eq. 14, arXiv 2006.11239, for epsilon);
//! - `variational = 1/n sum KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))` in bits (improved DDPM
//!   eq. 4 to 7, 2102.09672), or at the chain's first step the negative log-likelihood of x_0
//!   under the discretised Gaussian (DDPM eq. 13);
//! - `total = error_weight * error + weight * variational`.
//!
//! The predicted log-variance is `low + (v + 1) / 2 * range` with v the output's second half
//! (improved DDPM eq. 15). As there, the variational term trains the variance alone: its gradient
//! with respect to the predicted mean is taken as zero.
//! The two means differ by `mean_slope * (target - output)`, whatever the model predicts, because
//! the clean sample is affine in the output and the target gives the true one; so x_t is not
//! needed. What depends on the timestep comes as numbers in each [`DiffusionLossRow`]: this op
//! knows no schedule. Arithmetic is f64 inside: near t = T the term is a difference of nearly
//! equal numbers, and it costs nothing beside a model.

mod cpu;
pub(super) mod cuda;

use crate::{BackwardPass, DType, Op, Outputs, Result, Saver, Tensor, TensorError, apply};
use anneal_device::Device;

const NAME: &str = "diffusion_loss";

/// One sample's coefficients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiffusionLossRow {
    pub target_clean: f64,
    pub target_noise: f64,
    /// What multiplies the squared error in the total.
    pub error_weight: f64,
    /// Present in all rows or in none: whether the output has a second half for the variance.
    pub variational: Option<VariationalRow>,
}

/// One sample's coefficients of the variational term.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VariationalRow {
    /// What multiplies the term, in bits, in the total.
    pub weight: f64,
    /// How far the posterior's mean moves per unit of (target - output).
    pub mean_slope: f64,
    /// Logarithm of the posterior's own variance.
    pub log_variance_low: f64,
    /// Logarithm of beta, minus `log_variance_low`.
    pub log_variance_range: f64,
    /// Whether this is the chain's first step, where the decoder's likelihood takes the KL's place.
    /// The posterior's mean is x_0 there.
    pub decoder: bool,
}

/// The loss of each sample, f32 `[B]`.
pub struct DiffusionLoss {
    /// The number to train on.
    pub total: Tensor,
    /// The squared error without its weight; for reports, untracked.
    pub error: Tensor,
    /// The variational term in bits without its weight, 0 if there is none; for reports, untracked.
    pub variational: Tensor,
}

/// The loss of `output` [B, C, ...], or [B, 2C, ...] with rows that have a variational part,
/// against `clean` (x_0) and `noise`, both f32 [B, C, ...].
///
/// # Errors
/// If shapes disagree, the rows are not one a sample, or `clean` or `noise` is tracked or not f32.
pub fn diffusion_loss(
    output: &Tensor,
    clean: &Tensor,
    noise: &Tensor,
    rows: &[DiffusionLossRow],
) -> Result<DiffusionLoss> {
    check(output, clean, noise, rows)?;
    let op = Loss { rows: rows.to_vec() };
    let mut outputs = apply(op, &[output, clean, noise])?.into_iter();
    let mut next = || outputs.next().expect("three outputs");
    Ok(DiffusionLoss { total: next(), error: next().detach(), variational: next().detach() })
}

fn check(output: &Tensor, clean: &Tensor, noise: &Tensor, rows: &[DiffusionLossRow]) -> Result<()> {
    crate::refuse_tracked("diffusion_loss (clean sample and noise)", &[clean, noise])?;
    for tensor in [clean, noise] {
        if tensor.dtype() != DType::F32 {
            return Err(TensorError::unsupported_dtype(NAME, tensor.dtype()));
        }
    }
    let learned = rows.iter().filter(|row| row.variational.is_some()).count();
    if learned != 0 && learned != rows.len() {
        return Err(TensorError::shape(NAME, "the variational part must be in all rows or in none"));
    }
    let mut expected = clean.dims().to_vec();
    if expected.len() < 2 || noise.dims() != expected || rows.len() != expected[0] {
        let message = format!(
            "clean {expected:?}, noise {:?} and {} rows; wanted one shape [B, C, ...] and B rows",
            noise.dims(),
            rows.len()
        );
        return Err(TensorError::shape(NAME, message));
    }
    expected[1] *= if learned == 0 { 1 } else { 2 };
    if output.dims() != expected {
        let kind = if learned == 0 { "without" } else { "with" };
        let message =
            format!("the model's output is {:?}; {kind} a learned variance {expected:?}", output.dims());
        return Err(TensorError::shape(NAME, message));
    }
    Ok(())
}

struct Loss {
    rows: Vec<DiffusionLossRow>,
}

impl Op for Loss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let [output, clean, noise] =
            [inputs[0].contiguous()?, inputs[1].contiguous()?, inputs[2].contiguous()?];
        let mut losses: Vec<Tensor> = (0..3)
            .map(|_| Tensor::empty(output.device(), &[self.rows.len()], DType::F32))
            .collect::<Result<_>>()?;
        let mut table = None;
        match output.device() {
            Device::Cpu(cpu) => {
                cpu::forward(&cpu.pool, &self.rows, [&output, &clean, &noise], &mut losses)?;
            }
            Device::Cuda(cuda) => {
                let rows = cuda::table(output.device(), &self.rows)?;
                cuda::forward(cuda, &rows, [&output, &clean, &noise], &losses)?;
                table = Some(rows);
            }
        }
        saver.input(0, &output);
        saver.tensor(&clean);
        saver.tensor(&noise);
        table.iter().for_each(|table| saver.tensor(table));
        Ok(losses.into_iter().collect())
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let Some(upstream) = pass.take_gradient(0) else { return Ok(()) };
        let upstream = upstream.contiguous()?;
        let [output, clean, noise] = [pass.take_saved(0)?, pass.take_saved(1)?, pass.take_saved(2)?];
        let output = output.contiguous()?;
        let mut gradient = Tensor::empty(output.device(), output.dims(), output.dtype())?;
        match output.device() {
            Device::Cpu(cpu) => {
                let inputs = [&output, &clean, &noise];
                cpu::backward(&cpu.pool, &self.rows, inputs, &upstream, &mut gradient)?;
            }
            Device::Cuda(cuda) => {
                let (table, inputs) = (pass.take_saved(3)?, [&output, &clean, &noise]);
                cuda::backward(cuda, &table, inputs, &upstream, &gradient)?;
            }
        }
        pass.give(0, gradient)
    }
}
