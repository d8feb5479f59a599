//! The forward process against recorded samples, and the loss against the papers' formulas written
//! out by way of x_t and the two posterior means.
//! (The recorded losses need the network's output on x_t; the tests of the models compare them.)

use anneal_diffusion::{BetaSchedule, Objective, Prediction, Process, Schedule, draw_noise};
use anneal_tensor::{Device, Tensor, ops};
use anneal_testkit::{Golden, Tolerance, assert_close};

fn schedule() -> Schedule {
    Schedule::new(BetaSchedule::linear(1000), 1000).unwrap()
}

#[test]
fn noised_samples_equal_the_recorded_ones() {
    let device = Device::cpu(Some(2), None);
    let objective = Objective::new(Process::Diffusion(schedule()), Prediction::Epsilon, false, None).unwrap();
    for golden in Golden::matching("dit_") {
        let tensor = |name: &str| {
            let (values, shape) = golden.f32(name);
            Tensor::from_slice(&device, &values, &shape).unwrap()
        };
        let timesteps: Vec<f64> = golden.i64("in.t").0.into_iter().map(|timestep| timestep as f64).collect();
        let noised = objective.noised(&tensor("in.x"), &tensor("in.noise"), &timesteps).unwrap();
        let case = format!("{}: out.x_t", golden.name());
        assert_close(&case, &noised.to_vec::<f32>().unwrap(), &golden.f32("out.x_t").0, Tolerance::Forward);
    }
}

/// DDPM eq. 7.
fn posterior_mean(schedule: &Schedule, step: usize, clean: f64, noised: f64) -> f64 {
    let (beta, signal) = (schedule.betas[step], schedule.alphas_cumprod[step]);
    let before = if step == 0 { 1.0 } else { schedule.alphas_cumprod[step - 1] };
    (before.sqrt() * beta * clean + (1.0 - beta).sqrt() * (1.0 - before) * noised) / (1.0 - signal)
}

/// One element's variational term in bits: improved DDPM eq. 4 to 6, DDPM eq. 13.
fn variational(schedule: &Schedule, step: usize, clean: f64, noised: f64, estimate: f64, v: f64) -> f64 {
    let low = schedule.posterior_variance[step.max(1)].ln();
    let share = (v + 1.0) / 2.0;
    let log_variance = share * schedule.betas[step].ln() + (1.0 - share) * low;
    let mean = posterior_mean(schedule, step, estimate, noised);
    let nats = if step == 0 {
        let scale = (0.5 * log_variance).exp();
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let below = |x: f64| {
            let z = (x - mean) / scale;
            0.5 * (1.0 + (root * (z + 0.044715 * z.powi(3))).tanh())
        };
        let upper = if clean > 0.999 { 1.0 } else { below(clean + 1.0 / 255.0) };
        let lower = if clean < -0.999 { 0.0 } else { below(clean - 1.0 / 255.0) };
        -(upper - lower).ln()
    } else {
        let distance = (posterior_mean(schedule, step, clean, noised) - mean).powi(2);
        0.5 * (log_variance - low - 1.0 + (low - log_variance).exp() + distance / log_variance.exp())
    };
    nats / std::f64::consts::LN_2
}

#[test]
fn the_hybrid_loss_of_every_prediction_is_the_papers() {
    let (device, schedule) = (Device::cpu(Some(2), None), schedule());
    let timesteps = [0.0, 1.0, 300.0, 999.0];
    let draw = |step| draw_noise(&device, &[2, 3, 3], 5, step, &[0, 1, 2, 3]).unwrap();
    let clean = ops::clamp(&draw(0), -1.0, 1.0).unwrap();
    let noise = draw(1);
    let values = |tensor: &Tensor| -> Vec<f64> {
        tensor.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
    };
    let (x, z, v) = (values(&clean), values(&noise), values(&draw(2)));
    for prediction in [Prediction::Epsilon, Prediction::V, Prediction::Clean] {
        let process = Process::Diffusion(schedule.clone());
        let objective = Objective::new(process.clone(), prediction, true, None).unwrap();
        let off = values(&draw(3));
        let (mut output, mut expected) = (Vec::new(), Vec::new());
        for (sample, timestep) in timesteps.iter().enumerate() {
            let level = process.level(*timestep).unwrap();
            let (target, back) = (prediction.target(level), prediction.clean(level));
            // Off by 0.01 of x_0, so that the decoder's likelihood is not lost in a tail.
            let scale = 0.01 / back.second.abs();
            let (mut squares, mut bits) = (0.0, 0.0);
            for index in sample * 18..(sample + 1) * 18 {
                let wanted = target.first * x[index] + target.second * z[index];
                let predicted = f64::from((wanted + scale * off[index]) as f32);
                output.push(predicted as f32);
                squares += (predicted - wanted).powi(2) / 18.0;
                let noised = level.alpha * x[index] + level.sigma * z[index];
                let estimate = back.first * noised + back.second * predicted;
                let step = *timestep as usize;
                bits += variational(&schedule, step, x[index], noised, estimate, v[index]) / 18.0;
            }
            output.extend(v[sample * 18..(sample + 1) * 18].iter().map(|value| *value as f32));
            expected.push([squares + bits, squares, bits]);
        }
        let output = Tensor::from_slice(&device, &output, &[4, 4, 3, 3]).unwrap();
        let loss = objective.loss(&output, &clean, &noise, &timesteps).unwrap();
        for (part, (name, tensor)) in
            [("total", &loss.total), ("error", &loss.error), ("variational", &loss.variational)]
                .iter()
                .enumerate()
        {
            for (sample, got) in values(tensor).iter().enumerate() {
                let case = format!("{prediction:?}, {name} at {}", timesteps[sample]);
                assert_close(&case, &[*got], &[expected[sample][part]], Tolerance::Forward);
            }
        }
    }
}
