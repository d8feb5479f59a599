//! AdamW on every device: the loss scale, and a GPU's steps against the CPU's.

use std::sync::Arc;

use anneal_nn::{Builder, Init, ParamId, ParamStore, Parameters, ResidentStore, ScopeId, StoreOptions};
use anneal_optim::{AdamW, AdamWOptions, Decay, LossScale, Progress, State, StepReport};
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Device, Phase, Tensor, ops};
use anneal_testkit::{on_every_device, poisoned_cpu, poisoned_cuda, skip_without};

/// Matrices, a vector, a frozen table, and one parameter of several tasks whose last is ragged.
fn parameters() -> Parameters {
    let mut builder = Builder::new();
    builder.scope("all", |builder| {
        builder.add("matrix", &[70, 33], Init::XavierUniform);
        builder.add("vector", &[17], Init::Normal { standard_deviation: 0.5 });
        builder.add_frozen("table", &[5], Init::Ones);
        builder.add("long", &[3, 12_345], Init::XavierUniform);
        builder.add("one", &[1], Init::Ones);
    });
    builder.finish()
}

fn options(scale_loss: bool) -> AdamWOptions {
    AdamWOptions {
        betas: [0.9, 0.99],
        epsilon: 1e-8,
        weight_decay: 0.1,
        decay: Decay::Matrices,
        clip: Some(1.0),
        ema_rates: vec![0.5, 0.999],
        ema_warmup: true,
        scale_loss,
    }
}

struct Training {
    store: ResidentStore,
    optimizer: AdamW,
}

impl Training {
    fn new(device: &Device, compute_dtype: DType, options: AdamWOptions) -> Self {
        let sizes = StoreOptions { compute_dtype, chunk_elements: 4096, train: true };
        let store = ResidentStore::new(Arc::new(parameters()), device, sizes).unwrap();
        store.initialise(7).unwrap();
        let optimizer = AdamW::new(&store, options).unwrap();
        Self { store, optimizer }
    }

    /// A step with gradients of this size; `spoilt` puts a number that is not finite among them.
    fn step(&mut self, step: u64, size: f32, spoilt: bool) -> StepReport {
        self.store.enter(ScopeId(0), Phase::Backward).unwrap();
        for (id, spec) in self.store.parameters().iter().filter(|(_, spec)| spec.trainable) {
            let mut values = vec![0f32; spec.elements()];
            Stream::new(1, Purpose::Test, step, id.0 as u64).fill_normal(&mut values);
            values.iter_mut().for_each(|value| *value *= size);
            if spoilt && spec.name == "long" {
                values[20_000] = f32::INFINITY;
            }
            let sink = self.store.sink(id).unwrap();
            assert!(!sink.accumulate, "the step before cleared its gradients");
            let values = Tensor::from_slice(self.store.device(), &values, &spec.shape).unwrap();
            ops::overwrite(&sink.gradient, &values).unwrap();
        }
        self.store.exit(ScopeId(0), Phase::Backward).unwrap();
        self.optimizer.step(&self.store, 1e-2 / (step + 1) as f64).unwrap().wait().unwrap()
    }

    /// Small, large (clipped) and spoilt gradients.
    fn steps(&mut self) -> Vec<StepReport> {
        let sizes = [1e-4, 1.0, 30.0, 1e-3, 1e-3, 0.0, 1e-4, 2.0];
        let steps = sizes.into_iter().enumerate();
        steps.map(|(step, size)| self.step(step as u64, size, step == 3)).collect()
    }

    /// Every part of the state, and the weights, of every parameter.
    fn state(&self) -> Vec<(String, Vec<f32>)> {
        let kinds = [State::Master, State::FirstMoment, State::SecondMoment];
        let kinds = kinds.into_iter().chain([State::Average(0), State::Average(1)]);
        let kinds: Vec<State> = kinds.collect();
        let mut all = Vec::new();
        for (id, spec) in self.store.parameters().iter() {
            for kind in &kinds {
                let values = self.optimizer.read(&self.store, *kind, id).unwrap();
                all.extend(values.map(|values| (format!("{kind:?} of {}", spec.name), values)));
            }
            all.push((format!("weights of {}", spec.name), self.store.read(id).unwrap()));
        }
        all
    }
}

fn bits(state: &[(String, Vec<f32>)]) -> Vec<u32> {
    state.iter().flat_map(|(_, values)| values.iter().map(|value| value.to_bits())).collect()
}

#[test]
fn a_gpu_makes_the_steps_of_the_cpu() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "AdamW against the CPU") };
    for (dtype, scale_loss) in [(DType::F32, false), (DType::BF16, false), (DType::F16, true)] {
        let mut on_cpu = Training::new(&poisoned_cpu(2), dtype, options(scale_loss));
        let mut on_gpu = Training::new(&turn.device, dtype, options(scale_loss));
        for (step, (cpu, gpu)) in on_cpu.steps().into_iter().zip(on_gpu.steps()).enumerate() {
            assert_eq!((cpu.skipped, cpu.loss_scale), (gpu.skipped, gpu.loss_scale), "{dtype} step {step}");
            assert_eq!(cpu.skipped, step == 3);
            let error = (cpu.gradient_norm - gpu.gradient_norm).abs();
            assert!(
                cpu.skipped || error <= 1e-12 * cpu.gradient_norm,
                "{dtype} step {step}: {gpu:?} for {cpu:?}"
            );
        }
        assert_eq!(on_cpu.optimizer.progress().unwrap(), on_gpu.optimizer.progress().unwrap());
        for ((name, cpu), (_, gpu)) in on_cpu.state().iter().zip(&on_gpu.state()) {
            // A master that differs in its last bit may round to the next number of a narrow dtype.
            let limit = match (name.starts_with("weights"), dtype) {
                (true, DType::BF16) => 8e-3,
                (true, DType::F16) => 1e-3,
                _ => 1e-6,
            };
            let scale = cpu.iter().fold(1e-12f32, |scale, value| scale.max(value.abs()));
            for (index, (a, b)) in cpu.iter().zip(gpu).enumerate() {
                assert!((a - b).abs() <= limit * scale, "{dtype}, {name}[{index}]: {b} for {a}");
            }
        }
        let mut again = Training::new(&turn.device, dtype, options(scale_loss));
        again.steps();
        assert_eq!(bits(&again.state()), bits(&on_gpu.state()), "{dtype}: two runs differ");
    }
}

#[test]
fn weights_are_the_rounded_masters() {
    on_every_device("weights of AdamW", |device| {
        let mut training = Training::new(device, DType::BF16, options(false));
        training.steps();
        for (id, _) in training.store.parameters().iter().filter(|(_, spec)| spec.trainable) {
            let master = training.optimizer.read(&training.store, State::Master, id).unwrap().unwrap();
            let rounded: Vec<f32> =
                master.iter().map(|value| anneal_tensor::half::bf16::from_f32(*value).to_f32()).collect();
            assert_eq!(training.store.read(id).unwrap(), rounded);
        }
    });
}

/// Also into chunks that are cut otherwise, and without a way over the host.
#[test]
fn an_average_is_copied_into_the_store_that_samples_are_drawn_from() {
    on_every_device("copied averages", |device| {
        let mut training = Training::new(device, DType::BF16, options(false));
        training.steps();
        for compute_dtype in [DType::F32, DType::BF16] {
            let sizes = StoreOptions { compute_dtype, chunk_elements: 1 << 20, train: false };
            let target = ResidentStore::new(training.store.parameters().clone(), device, sizes).unwrap();
            let waits = waits(device);
            training.optimizer.copy_average(&training.store, 1, &target).unwrap();
            assert_eq!(self::waits(device), waits, "the host does not wait");
            for (id, spec) in target.parameters().iter() {
                let average = training.optimizer.read(&training.store, State::Average(1), id).unwrap();
                let expected = average.unwrap_or_else(|| training.store.read(id).unwrap());
                let rounded = |value: &f32| match compute_dtype {
                    DType::BF16 => anneal_tensor::half::bf16::from_f32(*value).to_f32(),
                    _ => *value,
                };
                let expected: Vec<f32> = expected.iter().map(rounded).collect();
                assert!(target.read(id).unwrap() == expected, "{} in {compute_dtype:?}", spec.name);
            }
        }
    });
}

fn waits(device: &Device) -> u64 {
    match device {
        Device::Cpu(_) => 0,
        Device::Cuda(cuda) => cuda.waits(),
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_but_the_loss_scale() {
    on_every_device("a skipped step of AdamW", |device| {
        let mut training = Training::new(device, DType::F16, options(true));
        training.step(0, 1.0, false);
        let before = training.state();
        let report = training.step(1, 1.0, true);
        assert!(report.skipped && !report.gradient_norm.is_finite());
        assert_eq!(report.loss_scale, 65_536.0, "the scale that this step's loss had");
        assert_eq!(bits(&training.state()), bits(&before));
        let loss_scale = LossScale { scale: 32_768.0, good_steps: 0 };
        assert_eq!(training.optimizer.progress().unwrap(), Progress { steps: 1, loss_scale });
        let seed = training.optimizer.loss_scale().unwrap().unwrap();
        assert!(seed.dims().is_empty());
        assert_eq!(seed.to_vec::<f32>().unwrap(), [32_768.0]);
    });
}

#[test]
fn the_loss_scale_grows_after_a_good_run_and_cancels_out() {
    on_every_device("the loss scale of AdamW", |device| {
        let plain = AdamWOptions { clip: None, ..options(false) };
        let mut scaled =
            Training::new(device, DType::F32, AdamWOptions { scale_loss: true, ..plain.clone() });
        let mut plain = Training::new(device, DType::F32, plain);
        let loss_scale = LossScale { scale: 1024.0, good_steps: 1999 };
        scaled.optimizer.set_progress(Progress { steps: 0, loss_scale }).unwrap();
        for (step, scale) in [(0, 1024.0), (1, 2048.0)] {
            let report = scaled.step(step, scale as f32 * 0.01, false);
            let expected = plain.step(step, 0.01, false);
            assert_eq!(report.loss_scale, scale);
            assert!((report.gradient_norm / expected.gradient_norm - 1.0).abs() < 1e-6);
        }
        let loss_scale = LossScale { scale: 2048.0, good_steps: 1 };
        assert_eq!(scaled.optimizer.progress().unwrap(), Progress { steps: 2, loss_scale });
        for ((name, a), (_, b)) in plain.state().iter().zip(&scaled.state()) {
            let scale = a.iter().fold(1e-12f32, |scale, value| scale.max(value.abs()));
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * scale), "{name}");
        }
    });
}

#[test]
fn where_the_loss_is_not_scaled_a_saved_scale_is_of_no_use() {
    let training = Training::new(&poisoned_cpu(1), DType::F32, options(false));
    training.optimizer.set_progress(Progress { steps: 9, loss_scale: LossScale::START }).unwrap();
    assert!(training.optimizer.loss_scale().unwrap().is_none());
    assert_eq!(training.optimizer.progress().unwrap(), Progress { steps: 9, loss_scale: LossScale::NONE });
    assert_eq!(training.store.parameters().spec(ParamId(2)).name, "table");
    assert!(training.optimizer.read(&training.store, State::Master, ParamId(2)).unwrap().is_none());
}
