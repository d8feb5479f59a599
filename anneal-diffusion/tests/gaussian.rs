//! Every sampler against data whose exact solution is known: independent normal values.
//!
//! For x_0 ~ N(mean, deviation^2) the best estimate of x_0 is linear in x, and the
//! probability-flow ODE keeps (x - alpha mean) / sqrt(alpha^2 deviation^2 + sigma^2) constant.

use std::ops::ControlFlow;

use anneal_diffusion::{
    BetaSchedule, DiffusionError, Method, NoiseSource, Prediction, Process, Result, Sampler, SamplerOptions,
    Schedule, SeededNoise, Spacing, StepVariance, Steps, draw_latents,
};
use anneal_tensor::{Device, Tensor};

const MEAN: f64 = 0.7;
const DEVIATION: f64 = 0.4;

fn diffusion() -> Process {
    Process::Diffusion(Schedule::new(BetaSchedule::linear(1000), 1000).unwrap())
}

/// The ideal model, in the terms of `prediction`; a second half of `variance` if it is given.
fn ideal(
    process: &Process,
    prediction: Prediction,
    variance: Option<f32>,
) -> impl FnMut(&Tensor, &[f64]) -> Result<Tensor> {
    move |x, timesteps| {
        let level = process.level(timesteps[0])?;
        let spread = level.alpha * level.alpha * DEVIATION * DEVIATION + level.sigma * level.sigma;
        let target = prediction.target(level);
        let mut outputs = Vec::new();
        let mut dims = x.dims().to_vec();
        for x in x.to_vec::<f32>()? {
            let x = f64::from(x);
            let clean = MEAN + level.alpha * DEVIATION * DEVIATION / spread * (x - level.alpha * MEAN);
            // (x - alpha x_0) / sigma, written so that it holds at sigma 0 as well.
            let noise = level.sigma / spread * (x - level.alpha * MEAN);
            outputs.push((target.first * clean + target.second * noise) as f32);
            outputs.extend(variance);
        }
        if variance.is_some() {
            dims[1] *= 2;
        }
        Ok(Tensor::from_slice(x.device(), &outputs, &dims)?)
    }
}

struct NoNoise;

impl NoiseSource for NoNoise {
    fn noise(&mut self, step: usize, _like: &Tensor) -> anneal_tensor::Result<Tensor> {
        panic!("model call {step} of a deterministic sampler asked for noise");
    }
}

fn latent() -> Tensor {
    let seeds: Vec<u64> = (0..64).collect();
    draw_latents(&Device::cpu(Some(1), None), &[1], &seeds).unwrap()
}

fn options(method: Method, steps: Steps, prediction: Prediction) -> SamplerOptions {
    SamplerOptions { method, steps, prediction, clip: None }
}

/// Where the ODE leads from the sampler's first level.
fn exact(process: &Process, sampler: &Sampler) -> Vec<f64> {
    let start = sampler.start(&latent()).unwrap();
    let level = process.level(start.timestep().unwrap()).unwrap();
    let spread = (level.alpha * level.alpha * DEVIATION * DEVIATION + level.sigma * level.sigma).sqrt();
    let end = |x: f32| MEAN + DEVIATION * (f64::from(x) - level.alpha * MEAN) / spread;
    start.model_input().unwrap().to_vec::<f32>().unwrap().into_iter().map(end).collect()
}

fn run(process: &Process, options: &SamplerOptions) -> (Vec<f32>, Vec<f64>) {
    let sampler = Sampler::new(process, options).unwrap();
    let mut model = ideal(process, options.prediction, None);
    let got = sampler.sample(&mut model, &latent(), &mut NoNoise, &mut |_| ControlFlow::Continue(()));
    (got.unwrap().to_vec::<f32>().unwrap(), exact(process, &sampler))
}

fn largest_error((got, exact): (Vec<f32>, Vec<f64>)) -> f64 {
    got.iter().zip(exact).map(|(got, exact)| (f64::from(*got) - exact).abs()).fold(0.0, f64::max)
}

/// (method, spacing of its own, order of accuracy)
fn deterministic() -> Vec<(Method, Process, i32)> {
    vec![
        (Method::Ddim { eta: 0.0 }, diffusion(), 1),
        (Method::DpmSolver2m { karras: false }, diffusion(), 2),
        (Method::UniPc, diffusion(), 2),
        (Method::Euler, diffusion(), 1),
        (Method::Heun, diffusion(), 2),
        (Method::FlowEuler { shift: 1.0 }, Process::Flow, 1),
        (Method::FlowEuler { shift: 3.0 }, Process::Flow, 1),
    ]
}

#[test]
fn deterministic_samplers_converge_to_the_exact_solution_at_their_order() {
    for (method, process, order) in deterministic() {
        let error = |steps| {
            // From the noisiest level downwards, so that all solve the same problem.
            let steps = match method {
                Method::Ddim { .. } => Steps::Spaced(steps, Spacing::Trailing),
                _ => Steps::Count(steps),
            };
            largest_error(run(&process, &options(method, steps, Prediction::V)))
        };
        let steps = if order == 1 { 100 } else { 25 };
        let (coarse, fine) = (error(steps), error(2 * steps));
        let ratio = coarse / fine;
        let expected = 2f64.powi(order);
        let errors = format!("{method:?}: error {coarse:.2e} at {steps} steps, {fine:.2e} at twice as many");
        assert!(ratio > 0.75 * expected && fine < 3e-2, "{errors}");
    }
}

/// Karras et al. eq. 5 with rho 7 between the chain's ends; the model is asked at those very levels,
/// not at the whole timesteps beside them that it is told.
#[test]
fn karras_levels_are_those_of_the_paper_and_lead_to_the_exact_solution() {
    let process = diffusion();
    let error = |count: usize| {
        let method = Method::DpmSolver2m { karras: true };
        let options = options(method, Steps::Count(count), Prediction::Clean);
        let sampler = Sampler::new(&process, &options).unwrap();
        let root = |timestep| process.level(timestep).unwrap().noise_to_signal().powf(1.0 / 7.0);
        let (most, least) = (root(999.0), root(0.0));
        let mut call = 0;
        let mut model = |x: &Tensor, timesteps: &[f64]| -> Result<Tensor> {
            let ratio = (most + call as f64 / (count - 1) as f64 * (least - most)).powi(7);
            let (alpha, sigma) = (1.0 / (1.0 + ratio * ratio).sqrt(), ratio / (1.0 + ratio * ratio).sqrt());
            let told = process.level(timesteps[0]).unwrap().noise_to_signal();
            assert!((told / ratio - 1.0).abs() < 0.2 || told < 0.05, "call {call}: {told} for {ratio}");
            call += 1;
            let spread = alpha * alpha * DEVIATION * DEVIATION + sigma * sigma;
            let clean = |x: f32| MEAN + alpha * DEVIATION.powi(2) / spread * (f64::from(x) - alpha * MEAN);
            let clean: Vec<f32> = x.to_vec::<f32>()?.into_iter().map(|x| clean(x) as f32).collect();
            Ok(Tensor::from_slice(x.device(), &clean, x.dims())?)
        };
        let got = sampler.sample(&mut model, &latent(), &mut NoNoise, &mut |_| ControlFlow::Continue(()));
        largest_error((got.unwrap().to_vec::<f32>().unwrap(), exact(&process, &sampler)))
    };
    let (coarse, fine) = (error(20), error(40));
    assert!(coarse / fine > 3.0 && fine < 2e-2, "error {coarse:.2e} at 20 steps, {fine:.2e} at 40");
}

/// Zero terminal SNR: the start holds no signal, so the sample does not know the data's mean yet.
#[test]
fn a_chain_without_signal_at_its_end_is_sampled_through_v() {
    let Process::Diffusion(schedule) = diffusion() else { unreachable!() };
    let process = Process::Diffusion(schedule.with_zero_terminal_snr().unwrap());
    let last = process.level(999.0).unwrap();
    assert_eq!((last.alpha, last.sigma), (0.0, 1.0));
    assert_eq!(process.level(0.0).unwrap().alpha, schedule.level(0.0).unwrap().alpha);
    let steps = || Steps::Spaced(100, Spacing::Trailing);
    let error = largest_error(run(&process, &options(Method::Ddim { eta: 0.0 }, steps(), Prediction::V)));
    assert!(error < 5e-2, "error {error:.2e}");
    for (method, prediction) in
        [(Method::Ddim { eta: 0.0 }, Prediction::Epsilon), (Method::Euler, Prediction::V)]
    {
        let refusal = Sampler::new(&process, &options(method, steps(), prediction)).unwrap_err().to_string();
        assert!(refusal.contains("no signal is left"), "{refusal}");
    }
}

#[test]
fn every_prediction_leads_to_the_same_sample() {
    for (method, process, _) in deterministic() {
        let sample = |prediction| run(&process, &options(method, Steps::Count(10), prediction)).0;
        // Epsilon has no x_0 at time 1 of a flow, where x holds no signal.
        let base = sample(Prediction::Clean);
        for prediction in [Prediction::Epsilon, Prediction::V, Prediction::Flow] {
            if prediction == Prediction::Epsilon && process == Process::Flow {
                continue;
            }
            for (got, expected) in sample(prediction).iter().zip(&base) {
                assert!((got - expected).abs() < 2e-5, "{method:?} {prediction:?}: {got} for {expected}");
            }
        }
    }
}

fn ancestral(variance: StepVariance, steps: &str, output_variance: Option<f32>, count: u64) -> Vec<f32> {
    let process = diffusion();
    let method = Method::Ddpm { variance };
    let options = options(method, Steps::Respaced(steps.into()), Prediction::Epsilon);
    let sampler = Sampler::new(&process, &options).unwrap();
    let seeds: Vec<u64> = (0..count).collect();
    let latent = draw_latents(&Device::cpu(Some(2), None), &[1], &seeds).unwrap();
    let mut model = ideal(&process, Prediction::Epsilon, output_variance);
    let mut noise = SeededNoise { seeds };
    let sample = sampler.sample(&mut model, &latent, &mut noise, &mut |_| ControlFlow::Continue(()));
    sample.unwrap().to_vec::<f32>().unwrap()
}

#[test]
fn ancestral_samples_have_the_datas_mean_and_deviation() {
    for variance in [StepVariance::Posterior, StepVariance::Beta] {
        let samples = ancestral(variance, "500", None, 20_000);
        let count = samples.len() as f64;
        let mean = samples.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        let square = samples.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count;
        // Four standard errors of 20000 draws, and 1 % for the 500 steps.
        assert!((mean - MEAN).abs() < 0.03 * DEVIATION, "{variance:?}: mean {mean}");
        assert!((square.sqrt() / DEVIATION - 1.0).abs() < 0.03, "{variance:?}: deviation {}", square.sqrt());
    }
}

#[test]
fn the_ends_of_the_learned_range_are_the_two_fixed_variances() {
    for (end, variance) in [(-1.0, StepVariance::Posterior), (1.0, StepVariance::Beta)] {
        let learned = ancestral(StepVariance::LearnedRange, "10", Some(end), 100);
        let fixed = ancestral(variance, "10", None, 100);
        for (learned, fixed) in learned.iter().zip(&fixed) {
            assert!((learned - fixed).abs() < 1e-5, "{variance:?}: {learned} for {fixed}");
        }
    }
}

#[test]
fn clipping_bounds_the_estimate_of_the_clean_sample() {
    let process = diffusion();
    let options = SamplerOptions {
        clip: Some(1.0),
        ..options(Method::Ddim { eta: 0.0 }, Steps::Count(5), Prediction::Clean)
    };
    let mut model = |x: &Tensor, _: &[f64]| -> Result<Tensor> {
        Ok(Tensor::from_slice(x.device(), &vec![5.0f32; x.elements()], x.dims())?)
    };
    let sampler = Sampler::new(&process, &options).unwrap();
    let sample = sampler.sample(&mut model, &latent(), &mut NoNoise, &mut |state| {
        let clean = state.clean().unwrap().to_vec::<f32>().unwrap();
        assert!(clean.iter().all(|value| *value == 1.0));
        ControlFlow::Continue(())
    });
    assert!(sample.unwrap().to_vec::<f32>().unwrap().iter().all(|value| (value - 1.0).abs() < 1e-6));
}

#[test]
fn a_sampler_stops_when_asked_and_refuses_what_does_not_fit() {
    let process = diffusion();
    let new = |process: &Process, method, steps| {
        Sampler::new(process, &options(method, steps, Prediction::Epsilon)).map_err(|error| error.to_string())
    };
    let ddim = Method::Ddim { eta: 0.0 };
    let sampler = new(&process, ddim, Steps::Count(5)).unwrap();
    let mut model = ideal(&process, Prediction::Epsilon, None);
    let stopped = sampler.sample(&mut model, &latent(), &mut NoNoise, &mut |state| match state.done() {
        2 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(DiffusionError::Stopped { done: 2, steps: 5 })));

    let refusal = |process: &Process, method, steps| new(process, method, steps).unwrap_err();
    assert_eq!(
        refusal(&Process::Flow, ddim, Steps::Count(5)),
        "sampler ddim: this model was trained by flow matching; choose flow_euler"
    );
    assert!(refusal(&process, Method::FlowEuler { shift: 1.0 }, Steps::Count(5)).contains("choose ddim"));
    assert!(refusal(&Process::Flow, Method::FlowEuler { shift: 0.0 }, Steps::Count(5)).contains("not 0"));
    assert!(refusal(&process, Method::Ddim { eta: 2.0 }, Steps::Count(5)).contains("not 2"));
    assert!(refusal(&process, ddim, Steps::Count(0)).contains("ask for 1 to 1000"));
    assert!(refusal(&process, ddim, Steps::Count(1001)).contains("ask for 1 to 1000"));
    assert!(refusal(&process, Method::UniPc, Steps::Count(1000)).contains("too many"));

    let mut state = sampler.start(&latent()).unwrap();
    let wrong = Tensor::from_slice(latent().device(), &[0f32; 4], &[4, 1]).unwrap();
    let message = state.step(&wrong, None).unwrap_err().to_string();
    assert_eq!(message, "sampling: the model's output has shape [4, 1]; [64, 1] or [64, 2] is expected");
    let variance = StepVariance::LearnedRange;
    let mut state =
        new(&process, Method::Ddpm { variance }, Steps::Count(5)).unwrap().start(&latent()).unwrap();
    let message = state.step(&latent(), None).unwrap_err().to_string();
    assert!(message.contains("[64, 2] (the second half for the learned variance) is expected"), "{message}");
}

/// Serving runs many requests in one call: each alone must give the same bits.
#[test]
fn states_stepped_side_by_side_equal_runs_alone() {
    let process = diffusion();
    for method in [Method::UniPc, Method::Heun, Method::Ddim { eta: 1.0 }] {
        let options = options(method, Steps::Count(6), Prediction::V);
        let sampler = Sampler::new(&process, &options).unwrap();
        let device = Device::cpu(Some(1), None);
        let mut states: Vec<_> = (0..3u64)
            .map(|seed| (seed, sampler.start(&draw_latents(&device, &[2], &[seed]).unwrap()).unwrap()))
            .collect();
        let mut model = ideal(&process, Prediction::V, None);
        for _ in 0..sampler.calls() {
            for (seed, state) in &mut states {
                let timestep = state.timestep().unwrap();
                let output = model(&state.model_input().unwrap(), &[timestep]).unwrap();
                let mut source = SeededNoise { seeds: vec![*seed] };
                let noise = state.needs_noise().then(|| source.noise(state.done(), state.sample()).unwrap());
                state.step(&output, noise.as_ref()).unwrap();
            }
        }
        let together = sampler
            .sample(
                &mut model,
                &draw_latents(&device, &[2], &[0, 1, 2]).unwrap(),
                &mut SeededNoise { seeds: vec![0, 1, 2] },
                &mut |_| ControlFlow::Continue(()),
            )
            .unwrap();
        let alone: Vec<f32> =
            states.into_iter().flat_map(|(_, state)| state.into_sample().to_vec::<f32>().unwrap()).collect();
        assert_eq!(together.to_vec::<f32>().unwrap(), alone, "{method:?}");
    }
}
