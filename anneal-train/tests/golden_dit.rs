//! DiT against the public PyTorch implementation: forward, losses, every gradient, optimizer steps
//! with EMA, and whole sampling runs; on the CPU and on a GPU. Sizes and settings come from each file;
//! `ANNEAL_GOLDEN` names another folder of such files.

use std::collections::BTreeMap;
use std::sync::Arc;

use anneal_diffusion::{
    BetaSchedule, Branch, DiffusionError, Guidance, GuidanceShape, Method, NoiseSource, Objective,
    Prediction, Process, Sampler, SamplerOptions, Schedule, StepVariance, Steps,
};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_optim::{AdamW, AdamWOptions, Decay, State};
use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_testkit::{Golden, Tolerance, assert_close, on_every_device, relative_error};

/// Weights by their public names.
type Weights = BTreeMap<String, Vec<f32>>;

struct Case {
    golden: Golden,
    device: Device,
    model: Dit,
    store: Arc<ResidentStore>,
    objective: Objective,
}

impl Case {
    fn all(device: &Device) -> Vec<Self> {
        let cases: Vec<Self> =
            Golden::matching("dit_").into_iter().map(|golden| Self::new(golden, device)).collect();
        assert!(!cases.is_empty(), "no golden DiT file was found");
        cases
    }

    fn new(golden: Golden, device: &Device) -> Self {
        let number = |key: &str| {
            golden.config()[key].as_u64().unwrap_or_else(|| panic!("{key} in the metadata")) as usize
        };
        let config = DitConfig {
            image_size: [number("input_size"); 2],
            channels: number("in_channels"),
            patch_size: number("patch_size"),
            hidden_size: number("hidden_size"),
            depth: number("depth"),
            heads: number("num_heads"),
            mlp_ratio: golden.config()["mlp_ratio"].as_f64().unwrap_or(4.0),
            classes: number("num_classes"),
            learn_sigma: golden.config()["learn_sigma"].as_bool().unwrap_or(true),
            mlp_norm_epsilon: 1e-6,
            frequency_shift: 0,
            block_embedders: false,
        };
        let (model, parameters) = Dit::new(&config).unwrap();
        // A small chunk size, so that parameters are spread over several.
        let options = StoreOptions { compute_dtype: DType::F32, chunk_elements: 1 << 14, train: true };
        let store = Arc::new(ResidentStore::new(Arc::new(parameters), device, options).unwrap());
        let schedule = Schedule::new(BetaSchedule::linear(1000), 1000).unwrap();
        let process = Process::Diffusion(schedule);
        let objective = Objective::new(process, Prediction::Epsilon, config.learn_sigma, None).unwrap();
        Self { golden, device: device.clone(), model, store, objective }
    }

    fn weights(&self, prefix: &str) -> Weights {
        let names = self.golden.names(prefix);
        names.iter().map(|name| (name[prefix.len()..].to_owned(), self.golden.f32(name).0)).collect()
    }

    fn load(&self, weights: &Weights) {
        assert_eq!(weights.len(), self.store.parameters().len(), "{}: number of tensors", self.golden.name());
        for (name, values) in weights {
            let id = self.store.parameters().find(name).unwrap_or_else(|| panic!("no parameter {name}"));
            self.store.write(id, values).unwrap();
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        let (values, shape) = self.golden.f32(name);
        Tensor::from_slice(&self.device, &values, &shape).unwrap()
    }

    fn timesteps(&self, name: &str) -> Vec<f64> {
        self.golden.i64(name).0.into_iter().map(|value| value as f64).collect()
    }

    fn predict(&self, forward: &Forward, x: &Tensor, timesteps: &[f64], labels: &[i64]) -> Tensor {
        let timesteps: Vec<f32> = timesteps.iter().map(|value| *value as f32).collect();
        self.model.forward(forward, x, &timesteps, &Conditioning { labels }).unwrap()
    }

    /// Losses (squared error, variational term, total) with the gradient left in the store.
    fn backward(&self, timesteps: &str, noise: &str, checkpoint: bool) -> [Vec<f32>; 3] {
        let (clean, noise) = (self.tensor("in.x"), self.tensor(noise));
        let timesteps = self.timesteps(timesteps);
        let noised = self.objective.noised(&clean, &noise, &timesteps).unwrap();
        let tape = Tape::new();
        let forward = Forward::new(self.store.clone()).recording(&tape).checkpoint_blocks(checkpoint);
        let output = self.predict(&forward, &noised, &timesteps, &self.golden.i64("in.y").0);
        let losses = self.objective.loss(&output, &clean, &noise, &timesteps).unwrap();
        tape.backward(&ops::mean(&losses.total, &[0], false).unwrap()).unwrap();
        [losses.error, losses.variational, losses.total].map(|loss| loss.to_vec::<f32>().unwrap())
    }

    fn gradients(&self) -> Weights {
        self.store.finish_gradients().unwrap();
        let parameters = self.store.parameters();
        let trained = parameters.iter().filter(|(_, spec)| spec.trainable);
        trained
            .map(|(id, spec)| {
                let slot = self.store.layout().slot(id);
                let gradients = self.store.chunk(slot.chunk).unwrap().gradients.unwrap();
                let piece = gradients.piece(slot.offset, &[slot.elements]).unwrap();
                (spec.name.clone(), piece.to_vec::<f32>().unwrap())
            })
            .collect()
    }

    /// The recorded optimizer steps from some weights: losses, weights and averages.
    fn train(&self, start: &Weights) -> (Vec<f32>, Weights, Weights) {
        self.load(start);
        let config = &self.golden.config()["adamw"];
        let number = |value: &serde_json::Value| value.as_f64().expect("a number in the metadata");
        let options = AdamWOptions {
            betas: [number(&config["betas"][0]), number(&config["betas"][1])],
            epsilon: number(&config["eps"]),
            weight_decay: number(&config["weight_decay"]),
            decay: Decay::All,
            clip: None,
            ema_rates: vec![number(&self.golden.config()["ema_decay"])],
            ema_warmup: false,
            scale_loss: false,
        };
        let mut optimizer = AdamW::new(&*self.store, options).unwrap();
        let mut losses = Vec::new();
        for step in 0..self.golden.f32("train.losses").0.len() {
            let total = &self.backward(&format!("train.{step}.t"), &format!("train.{step}.noise"), false)[2];
            losses.push(total.iter().sum::<f32>() / total.len() as f32);
            let report = optimizer.step(&*self.store, number(&config["lr"])).unwrap().wait().unwrap();
            assert!(!report.skipped);
        }
        let read = |state| {
            let of = |id| optimizer.read(&*self.store, state, id).unwrap();
            let all = self.store.parameters().iter();
            all.filter_map(|(id, spec)| Some((spec.name.clone(), of(id)?))).collect::<Weights>()
        };
        (losses, read(State::Master), read(State::Average(0)))
    }

    /// The weights before training. A file may hold the trained weights under `param.` too; then the
    /// initial ones follow from the average, `ema = r^n p_0 + (1 - r) sum r^(n-k) p_k`, by fixed point.
    fn initial(&self) -> Weights {
        let stored = self.weights("param.");
        if self.weights("trained.") != stored {
            return stored;
        }
        let average = self.weights("ema.");
        let rate = self.golden.config()["ema_decay"].as_f64().unwrap();
        let share = rate.powi(self.golden.f32("train.losses").0.len() as i32) as f32;
        let mut start = average.clone();
        for _ in 0..12 {
            let (_, _, ours) = self.train(&start);
            let mut worst = 0f32;
            for (name, ours) in &ours {
                for ((value, target), ours) in
                    start.get_mut(name).unwrap().iter_mut().zip(&average[name]).zip(ours)
                {
                    *value += (target - ours) / share;
                    worst = worst.max((target - ours).abs());
                }
            }
            if worst < 2e-7 {
                return start;
            }
        }
        panic!("{}: the initial weights do not follow from ema.*", self.golden.name());
    }
}

fn assert_all_close(case: &str, got: &Weights, expected: &Weights, tolerance: Tolerance) {
    for (name, got) in got {
        assert_close(&format!("{case} {name}"), got, &expected[name], tolerance);
    }
}

#[test]
fn forward_losses_and_every_gradient() {
    on_every_device("forward losses and every gradient", |device| {
        for case in Case::all(device) {
            let name = case.golden.name().to_owned();
            case.load(&case.initial());
            let forward = Forward::new(case.store.clone());
            let output = case.predict(
                &forward,
                &case.tensor("in.x"),
                &case.timesteps("in.t"),
                &case.golden.i64("in.y").0,
            );
            let expected = case.golden.f32("out.forward").0;
            assert_close(
                &format!("{name} forward"),
                &output.to_vec::<f32>().unwrap(),
                &expected,
                Tolerance::Forward,
            );
            let noised = case
                .objective
                .noised(&case.tensor("in.x"), &case.tensor("in.noise"), &case.timesteps("in.t"))
                .unwrap();
            let expected = case.golden.f32("out.x_t").0;
            assert_close(
                &format!("{name} x_t"),
                &noised.to_vec::<f32>().unwrap(),
                &expected,
                Tolerance::Forward,
            );

            let expected = case.weights("grad.");
            let mut plain = None;
            for checkpoint in [false, true] {
                case.store.clear_gradients();
                let losses = case.backward("in.t", "in.noise", checkpoint);
                for (loss, kind) in losses.iter().zip(["mse", "vb", "loss"]) {
                    let golden = format!("out.{kind}");
                    if case.golden.has(&golden) {
                        assert_close(
                            &format!("{name} {kind}"),
                            loss,
                            &case.golden.f32(&golden).0,
                            Tolerance::Forward,
                        );
                    }
                }
                let gradients = case.gradients();
                assert!(gradients.keys().eq(expected.keys()), "{name}: gradients differ in names");
                assert_all_close(&format!("{name} gradient"), &gradients, &expected, Tolerance::Gradient);
                let plain = plain.get_or_insert_with(|| gradients.clone());
                assert!(*plain == gradients, "{name}: activation checkpointing changed a gradient's bits");
            }
        }
    });
}

#[test]
fn the_position_table_is_the_published_one() {
    on_every_device("the position table is the published one", |device| {
        for case in Case::all(device) {
            let id = case.store.parameters().find("pos_embed").unwrap();
            let ours = case.store.parameters().spec(id).init.values(0, id, case.store.parameters().spec(id));
            assert_close(
                case.golden.name(),
                &ours,
                &case.golden.f32("param.pos_embed").0,
                Tolerance::Forward,
            );
        }
    });
}

#[test]
fn optimizer_steps_with_averages() {
    on_every_device("optimizer steps with averages", |device| {
        let mut trained_cases = 0;
        for case in Case::all(device).into_iter().filter(|case| case.golden.has("train.losses")) {
            trained_cases += 1;
            let name = case.golden.name().to_owned();
            let (losses, trained, averages) = case.train(&case.initial());
            assert_close(
                &format!("{name} losses"),
                &losses,
                &case.golden.f32("train.losses").0,
                Tolerance::Forward,
            );
            assert_all_close(
                &format!("{name} trained"),
                &trained,
                &case.weights("trained."),
                Tolerance::Gradient,
            );
            assert_all_close(
                &format!("{name} average"),
                &averages,
                &case.weights("ema."),
                Tolerance::Gradient,
            );
        }
        assert!(trained_cases > 0, "no golden file has training steps");
    });
}

struct Recorded<'a> {
    case: &'a Case,
    values: Vec<f32>,
    shape: Vec<usize>,
}

impl NoiseSource for Recorded<'_> {
    fn noise(&mut self, step: usize, _like: &Tensor) -> anneal_tensor::Result<Tensor> {
        let size: usize = self.shape[1..].iter().product();
        Tensor::from_slice(&self.case.device, &self.values[step * size..][..size], &self.shape[1..])
    }
}

/// The files batch guidance as the published code does: rows with a class, then the same latents
/// without one; both halves of the result share the guided channels, and each keeps the rest.
fn guided_pair(case: &Case, x: &Tensor, timesteps: &[f64], labels: &[i64], scale: f64) -> Tensor {
    let rows = labels.len() / 2;
    let half = ops::narrow(x, 0, 0, rows).unwrap();
    let forward = Forward::new(case.store.clone());
    let guidance = Guidance::new(scale, GuidanceShape::Constant, Some(3)).unwrap();
    let mut unconditional = None;
    let mut model = guidance.guide(case.objective.process(), |x, timesteps, branches| {
        let labels: Vec<i64> = branches
            .iter()
            .map(|branch| match branch {
                Branch::Conditional(row) => labels[*row],
                Branch::Unconditional(row) => labels[rows + *row],
            })
            .collect();
        let output = case.predict(&forward, x, timesteps, &labels);
        unconditional = Some(ops::narrow(&output, 0, rows, rows).unwrap());
        Ok::<_, DiffusionError>(output)
    });
    let guided = model(&half, &timesteps[..rows]).unwrap();
    drop(model);
    let unconditional = unconditional.unwrap();
    let channels = guided.size(1);
    let shared = ops::narrow(&guided, 1, 0, 3).unwrap();
    let rest = ops::narrow(&unconditional, 1, 3, channels - 3).unwrap();
    ops::concat(&[&guided, &ops::concat(&[&shared, &rest], 1).unwrap()], 0).unwrap()
}

#[test]
fn whole_sampling_runs_with_guidance() {
    on_every_device("whole sampling runs with guidance", |device| {
        let mut runs = 0;
        for case in Case::all(device).into_iter().filter(|case| case.golden.has("sample.z")) {
            let weights = case.weights("trained.");
            case.load(&if weights.is_empty() { case.weights("param.") } else { weights });
            let scale = case.golden.config()["cfg_scale"].as_f64().expect("cfg_scale in the metadata");
            let labels = case.golden.i64("sample.y").0;
            let learned = Method::Ddpm { variance: StepVariance::LearnedRange };
            let methods = [
                ("ddpm", learned),
                ("ddim", Method::Ddim { eta: 0.0 }),
                ("ddim_eta1", Method::Ddim { eta: 1.0 }),
            ];
            for (name, method) in methods {
                let (values, shape) = case.golden.f32(&format!("sample.{name}.noise"));
                let count = shape[0];
                let steps = if name == "ddpm" { format!("{count}") } else { format!("ddim{count}") };
                let options = SamplerOptions {
                    method,
                    steps: Steps::Respaced(steps),
                    prediction: Prediction::Epsilon,
                    clip: None,
                };
                let sampler = Sampler::new(case.objective.process(), &options).unwrap();
                let mut expected_timesteps = case.timesteps(&format!("sample.{name}.timesteps"));
                expected_timesteps.sort_by(|a, b| b.total_cmp(a));
                assert_eq!(sampler.timesteps(), expected_timesteps, "{name}");
                let mut noise = Recorded { case: &case, values, shape };
                let sample = sampler
                    .sample::<DiffusionError>(
                        &mut |x, timesteps| Ok(guided_pair(&case, x, timesteps, &labels, scale)),
                        &case.tensor("sample.z"),
                        &mut noise,
                        &mut |_| std::ops::ControlFlow::Continue(()),
                    )
                    .unwrap();
                let expected = case.golden.f32(&format!("sample.{name}.out")).0;
                let case_name = format!("{} {name}", case.golden.name());
                assert_close(&case_name, &sample.to_vec::<f32>().unwrap(), &expected, Tolerance::Trajectory);
                runs += 1;
            }
        }
        assert!(runs > 0, "no golden file has sampling runs");
    });
}

#[test]
fn a_wrong_weight_is_noticed() {
    on_every_device("a wrong weight is noticed", |device| {
        let case = &Case::all(device)[0];
        let mut weights = case.initial();
        weights.get_mut("blocks.0.attn.qkv.weight").unwrap()[0] += 0.1;
        case.load(&weights);
        let output = case.predict(
            &Forward::new(case.store.clone()),
            &case.tensor("in.x"),
            &case.timesteps("in.t"),
            &case.golden.i64("in.y").0,
        );
        let error = relative_error(&output.to_vec::<f32>().unwrap(), &case.golden.f32("out.forward").0);
        assert!(error > Tolerance::Forward.limit(), "{error:e}");
    });
}
