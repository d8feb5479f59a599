use std::f64::consts::{FRAC_2_PI, LN_2};

use anneal_device::ThreadPool;

use super::{DiffusionLossRow, VariationalRow};
use crate::parallel::{Shared, parts_mut};
use crate::{Float, Result, Tensor, for_float};

/// Half the distance of two pixel values when 0..255 is mapped to -1..1.
const HALF_BIN: f64 = 1.0 / 255.0;
/// Likelihoods below this count as this: the logarithm stays finite, and its slope is zero.
const SMALLEST_LIKELIHOOD: f64 = 1e-12;

/// One sample's elements: the prediction, the variance's half (empty without one), x_0 and noise.
struct Sample<'a, T> {
    prediction: &'a [T],
    variance: &'a [T],
    clean: &'a [f32],
    noise: &'a [f32],
}

impl<'a, T: Float> Sample<'a, T> {
    fn of(index: usize, output: &'a [T], clean: &'a [f32], noise: &'a [f32], samples: usize) -> Self {
        let (elements, outputs) = (clean.len() / samples, output.len() / samples);
        let (prediction, variance) = output[index * outputs..][..outputs].split_at(elements);
        let part = index * elements..(index + 1) * elements;
        Self { prediction, variance, clean: &clean[part.clone()], noise: &noise[part] }
    }

    /// output - target.
    #[inline(always)]
    fn difference(&self, row: &DiffusionLossRow, index: usize) -> f64 {
        let target =
            row.target_clean * f64::from(self.clean[index]) + row.target_noise * f64::from(self.noise[index]);
        f64::from(self.prediction[index].to_f32()) - target
    }
}

/// Writes total, error and variational term of each sample.
pub(super) fn forward(
    pool: &ThreadPool,
    rows: &[DiffusionLossRow],
    [output, clean, noise]: [&Tensor; 3],
    losses: &mut [Tensor],
) -> Result<()> {
    for_float!(super::NAME, output.dtype(), T => {
        let (output, clean, noise) = (output.data::<T>(), clean.data::<f32>(), noise.data::<f32>());
        let losses: Vec<Shared<f32>> =
            losses.iter_mut().map(|loss| Shared::new(loss.data_mut::<f32>().as_mut_ptr())).collect();
        pool.run(rows.len(), |index| {
            let sample = Sample::of(index, output, clean, noise, rows.len());
            let (error, variational) = losses_of(&rows[index], &sample);
            let weight = rows[index].variational.map_or(0.0, |row| row.weight);
            let total = rows[index].error_weight * error + weight * variational;
            for (loss, value) in losses.iter().zip([total, error, variational]) {
                // SAFETY: each sample writes its own element.
                unsafe { loss.slice(index, 1)[0] = value as f32 };
            }
        });
        Ok(())
    })
}

fn losses_of<T: Float>(row: &DiffusionLossRow, sample: &Sample<T>) -> (f64, f64) {
    let count = sample.clean.len() as f64;
    let (mut error, mut variational) = (0.0, 0.0);
    for index in 0..sample.clean.len() {
        let difference = sample.difference(row, index);
        error += difference * difference;
        if let Some(row) = &row.variational {
            let variance = f64::from(sample.variance[index].to_f32());
            variational += term(row, difference, variance, f64::from(sample.clean[index])).0;
        }
    }
    (error / count, variational / (count * LN_2))
}

/// Writes the gradient of `sum_b upstream_b * total_b` with respect to the output.
pub(super) fn backward(
    pool: &ThreadPool,
    rows: &[DiffusionLossRow],
    [output, clean, noise]: [&Tensor; 3],
    upstream: &Tensor,
    gradient: &mut Tensor,
) -> Result<()> {
    for_float!(super::NAME, output.dtype(), T => {
        let (output, clean, noise) = (output.data::<T>(), clean.data::<f32>(), noise.data::<f32>());
        let upstream = upstream.data::<f32>();
        parts_mut(pool, gradient.data_mut::<T>(), output.len() / rows.len(), |index, part| {
            let sample = Sample::of(index, output, clean, noise, rows.len());
            gradient_of(&rows[index], &sample, f64::from(upstream[index]), part);
        });
        Ok(())
    })
}

fn gradient_of<T: Float>(row: &DiffusionLossRow, sample: &Sample<T>, upstream: f64, gradient: &mut [T]) {
    let elements = sample.clean.len();
    let (prediction, variance) = gradient.split_at_mut(elements);
    let error_scale = upstream * row.error_weight * 2.0 / elements as f64;
    for index in 0..elements {
        let difference = sample.difference(row, index);
        prediction[index] = T::from_f32((error_scale * difference) as f32);
        if let Some(row) = &row.variational {
            let scale = upstream * row.weight / (elements as f64 * LN_2);
            let predicted = f64::from(sample.variance[index].to_f32());
            let slope = term(row, difference, predicted, f64::from(sample.clean[index])).1;
            variance[index] = T::from_f32((scale * slope) as f32);
        }
    }
}

/// The variational term of one element in nats, and its derivative with respect to `variance`.
fn term(row: &VariationalRow, difference: f64, variance: f64, clean: f64) -> (f64, f64) {
    let above_low = (variance + 1.0) / 2.0 * row.log_variance_range;
    let mean_difference = -row.mean_slope * difference;
    let (value, slope) = if row.decoder {
        let log_scale = (row.log_variance_low + above_low) / 2.0;
        let (value, slope) = log_likelihood(clean, mean_difference, log_scale);
        (-value, -slope / 2.0)
    } else {
        let precision = (-row.log_variance_low - above_low).exp();
        let distance = mean_difference * mean_difference * precision;
        let shrink = (-above_low).exp_m1();
        ((above_low + shrink + distance) / 2.0, (-shrink - distance) / 2.0)
    };
    (value, slope * row.log_variance_range / 2.0)
}

/// The logarithm of the likelihood of a pixel under a Gaussian whose mean lies `offset` below it,
/// and its derivative with respect to `log_scale`. The end bins reach to infinity.
fn log_likelihood(pixel: f64, offset: f64, log_scale: f64) -> (f64, f64) {
    // Mirrored into the lower tail, where small masses do not cancel.
    let (pixel, offset) = if offset > 0.0 { (-pixel, -offset) } else { (pixel, offset) };
    let inverse = (-log_scale).exp();
    let (upper, lower) = ((offset + HALF_BIN) * inverse, (offset - HALF_BIN) * inverse);
    let (upper_mass, upper_density) = if pixel > 0.999 { (1.0, 0.0) } else { normal(upper) };
    let (lower_mass, lower_density) = if pixel < -0.999 { (0.0, 0.0) } else { normal(lower) };
    let likelihood = upper_mass - lower_mass;
    if likelihood < SMALLEST_LIKELIHOOD {
        return (SMALLEST_LIKELIHOOD.ln(), 0.0);
    }
    // Both bounds scale with 1 / scale, so d bound / d log_scale = -bound.
    (likelihood.ln(), (lower * lower_density - upper * upper_density) / likelihood)
}

/// The normal distribution function by its tanh approximation (arXiv 1606.08415, section 2),
/// which the published losses are defined with, and its derivative; (1 + tanh y) / 2 is
/// written as the logistic function of 2y, which keeps its digits in the lower tail.
fn normal(x: f64) -> (f64, f64) {
    let scale = 2.0 * FRAC_2_PI.sqrt();
    let argument = scale * (x + 0.044715 * x * x * x);
    let (mass, rest) = (1.0 / (1.0 + (-argument).exp()), 1.0 / (1.0 + argument.exp()));
    (mass, mass * rest * scale * (1.0 + 3.0 * 0.044715 * x * x))
}
