//! Every sampler against recorded trajectories on a closed-form model.

use std::ops::ControlFlow;

use anneal_diffusion::{
    BetaSchedule, DiffusionError, Method, NoiseSource, Prediction, Process, Sampler, SamplerOptions,
    Schedule, Spacing, Steps,
};
use anneal_tensor::{Device, Tensor};
use anneal_testkit::{Golden, Tolerance, assert_close};

/// The samplers under test are deterministic.
struct NoNoise;

impl NoiseSource for NoNoise {
    fn noise(&mut self, step: usize, _like: &Tensor) -> anneal_tensor::Result<Tensor> {
        panic!("model call {step} of a deterministic sampler asked for noise");
    }
}

/// The coefficients of `eps(x,t) = A x + B sin(2x) + C t/1000` from the file's metadata.
struct ClosedForm {
    linear: f32,
    sine: f32,
    time: f32,
}

impl ClosedForm {
    fn parse(text: &str) -> Self {
        let formula = text.split('=').nth(1).unwrap_or_else(|| panic!("no formula in '{text}'"));
        let terms: Vec<&str> = formula.split('+').map(str::trim).collect();
        let coefficient = |ending: &str| {
            let term = terms.iter().find_map(|term| term.strip_suffix(ending));
            let term = term.unwrap_or_else(|| panic!("no term in {ending} in '{text}'"));
            term.trim().parse().unwrap_or_else(|_| panic!("'{term}' in '{text}' is not a number"))
        };
        assert_eq!(terms.len(), 3, "'{text}' has another form");
        Self { linear: coefficient(" x"), sine: coefficient("sin(2x)"), time: coefficient("t/1000") }
    }

    fn call(&self, x: &Tensor, timesteps: &[f64]) -> Result<Tensor, DiffusionError> {
        let values = x.to_vec::<f32>()?;
        let row = values.len() / timesteps.len();
        let outputs: Vec<f32> = values
            .iter()
            .enumerate()
            .map(|(index, x)| {
                let time = self.time * timesteps[index / row] as f32 / 1000.0;
                self.linear * x + self.sine * (2.0 * x).sin() + time
            })
            .collect();
        Ok(Tensor::from_slice(x.device(), &outputs, x.dims())?)
    }
}

fn process(golden: &Golden, name: &str) -> Process {
    if name.starts_with("flow") {
        return Process::Flow;
    }
    let betas = &golden.config()["betas"];
    let number = |key: &str| betas[key].as_f64().unwrap_or_else(|| panic!("no {key} in the metadata"));
    let kind = match betas["beta_schedule"].as_str() {
        Some("linear") => BetaSchedule::Linear { start: number("beta_start"), end: number("beta_end") },
        Some("squaredcos_cap_v2") => BetaSchedule::SquaredCosine,
        other => panic!("no schedule is called {other:?}"),
    };
    let schedule = Schedule::new(kind, number("num_train_timesteps") as usize).unwrap();
    // The one recording with zero terminal SNR, as arXiv 2305.08891 pairs it with v and trailing.
    Process::Diffusion(match name {
        "ddim_trailing_v" => schedule.with_zero_terminal_snr().unwrap(),
        _ => schedule,
    })
}

fn options(golden: &Golden, name: &str) -> SamplerOptions {
    let count = golden.config()["steps"].as_u64().expect("a number of steps in the metadata") as usize;
    let shift = name.strip_prefix("flow_euler_shift").map_or(1.0, |shift| shift.parse().unwrap());
    let (method, steps, prediction) = match name {
        "ddim" => (Method::Ddim { eta: 0.0 }, Steps::Count(count), Prediction::Epsilon),
        "ddim_trailing_v" => {
            (Method::Ddim { eta: 0.0 }, Steps::Spaced(count, Spacing::Trailing), Prediction::V)
        }
        "dpmpp_2m" => (Method::DpmSolver2m { karras: false }, Steps::Count(count), Prediction::Epsilon),
        "dpmpp_2m_karras" => (Method::DpmSolver2m { karras: true }, Steps::Count(count), Prediction::Epsilon),
        "unipc" => (Method::UniPc, Steps::Count(count), Prediction::Epsilon),
        "euler" => (Method::Euler, Steps::Count(count), Prediction::Epsilon),
        "heun" => (Method::Heun, Steps::Count(count), Prediction::Epsilon),
        _ if name.starts_with("flow_euler") => {
            (Method::FlowEuler { shift }, Steps::Count(count), Prediction::Flow)
        }
        _ => panic!("{}: no sampler is known as {name}", golden.path().display()),
    };
    SamplerOptions { method, steps, prediction, clip: None }
}

#[test]
fn every_recorded_trajectory_is_followed_at_every_model_call() {
    let device = Device::cpu(Some(2), None);
    for golden in Golden::matching_with("samplers", "z") {
        let model = ClosedForm::parse(golden.config()["model"].as_str().expect("the model's formula"));
        let (z, shape) = golden.f32("z");
        let latent = Tensor::from_slice(&device, &z, &shape).unwrap();
        let names = golden.names("");
        let names: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(".trajectory")).collect();
        assert!(!names.is_empty());
        for name in names {
            let sampler = Sampler::new(&process(&golden, name), &options(&golden, name)).unwrap();
            let case = format!("{}: {name}", golden.name());
            let timesteps = golden.f64(&format!("{name}.timesteps")).0;
            assert_close(&format!("{case}, timesteps"), &sampler.timesteps(), &timesteps, Tolerance::Forward);
            let (trajectory, dims) = golden.f32(&format!("{name}.trajectory"));
            assert_eq!(dims[0], sampler.calls(), "{case}: model calls");
            let mut call = 0;
            let end = sampler
                .sample(&mut |x, timesteps| model.call(x, timesteps), &latent, &mut NoNoise, &mut |state| {
                    let got = state.sample().to_vec::<f32>().unwrap();
                    let expected = &trajectory[call * got.len()..][..got.len()];
                    let place = format!("{case}, after model call {call}");
                    assert_close(&place, &got, expected, Tolerance::Trajectory);
                    call += 1;
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!(call, sampler.calls(), "{case}");
            let got = end.to_vec::<f32>().unwrap();
            assert_close(&case, &got, &trajectory[trajectory.len() - got.len()..], Tolerance::Trajectory);
        }
    }
}
