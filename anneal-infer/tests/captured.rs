//! Sampling on a GPU, where model calls are replayed, against the CPU.

use std::ops::ControlFlow;
use std::sync::Arc;

use anneal_diffusion::{
    BetaSchedule, Guidance, GuidanceShape, Method, Objective, Prediction, Process, SamplerOptions, Schedule,
    Steps,
};
use anneal_infer::{Pipeline, Request, Samples};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{Forward, ParamStore, ResidentStore, StoreOptions};
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Device, Result, Tensor};
use anneal_testkit::{poisoned_cpu, poisoned_cuda, skip_without};

fn pipeline(device: &Device) -> Pipeline {
    let config = DitConfig {
        image_size: [8, 8],
        channels: 3,
        patch_size: 2,
        hidden_size: 48,
        depth: 2,
        heads: 3,
        classes: 5,
        ..DitConfig::preset("DiT-S/2").unwrap()
    };
    let (model, parameters) = Dit::new(&config).unwrap();
    let options = StoreOptions { compute_dtype: DType::F32, chunk_elements: 4096, train: false };
    let store = ResidentStore::new(Arc::new(parameters), device, options).unwrap();
    // A model as initialised gives zeros.
    for (id, spec) in store.parameters().iter() {
        let mut values = vec![0f32; spec.elements()];
        Stream::new(3, Purpose::Test, 0, id.0 as u64).fill_normal(&mut values);
        values.iter_mut().for_each(|value| *value *= 0.1);
        store.write(id, &values).unwrap();
    }
    let process = Process::Diffusion(Schedule::new(BetaSchedule::linear(1000), 1000).unwrap());
    let objective = Objective::new(process, Prediction::Epsilon, config.learn_sigma, None).unwrap();
    Pipeline { model: Arc::new(model), store: Arc::new(store), objective }
}

fn request(method: Method, shape: GuidanceShape) -> Request {
    Request {
        labels: vec![0, 1, 2, 3, 4, 5, 1],
        seeds: (10..17).collect(),
        latents: None,
        sampler: SamplerOptions {
            method,
            steps: Steps::Count(8),
            prediction: Prediction::Epsilon,
            clip: Some(1.0),
        },
        guidance: Guidance::new(2.0, shape, None).unwrap(),
        // Two batches of one size, and a smaller one.
        batch: 3,
    }
}

fn sample(pipeline: &Pipeline, request: &Request) -> Samples {
    pipeline.sample(request, &mut |_, _| ControlFlow::Continue(())).unwrap()
}

#[test]
fn replayed_model_calls_give_the_samples_of_the_cpu() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "captured sampling") };
    let (on_cpu, on_gpu) = (pipeline(&poisoned_cpu(2)), pipeline(&turn.device));
    let interval = GuidanceShape::Interval { low: 0.3, high: 0.7 };
    for (method, shape) in [
        (Method::Ddim { eta: 1.0 }, GuidanceShape::Constant),
        (Method::Heun, interval),
        (Method::UniPc, interval),
        (Method::DpmSolver2m { karras: false }, GuidanceShape::Constant),
    ] {
        let request = request(method, shape);
        let (cpu, gpu) = (sample(&on_cpu, &request), sample(&on_gpu, &request));
        for (index, (a, b)) in cpu.values.iter().zip(&gpu.values).enumerate() {
            assert!((a - b).abs() < 1e-3, "{method:?}, number {index}: {b} for {a}");
        }
        assert_eq!(gpu, sample(&on_gpu, &request), "{method:?}: two runs differ");
    }
}

/// A model that looks at its output, which no captured work may.
struct Looking(Arc<dyn Denoiser>);

impl Denoiser for Looking {
    fn forward(
        &self,
        forward: &Forward,
        image: &Tensor,
        timesteps: &[f32],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let output = self.0.forward(forward, image, timesteps, conditioning)?;
        assert!(output.to_vec::<f32>()?.iter().all(|value| value.is_finite()));
        Ok(output)
    }

    fn image_shape(&self) -> [usize; 3] {
        self.0.image_shape()
    }

    fn classes(&self) -> usize {
        self.0.classes()
    }

    fn null_label(&self) -> i64 {
        self.0.null_label()
    }

    fn learns_sigma(&self) -> bool {
        self.0.learns_sigma()
    }
}

#[test]
fn a_model_that_cannot_be_captured_gives_its_samples_and_says_so() {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", "what cannot be captured") };
    let plain = pipeline(&turn.device);
    let looking = Pipeline { model: Arc::new(Looking(plain.model.clone())), ..plain.clone() };
    let request = request(Method::Ddim { eta: 0.0 }, GuidanceShape::Constant);
    let (expected, got) = (sample(&plain, &request), sample(&looking, &request));
    assert_eq!(got.values, expected.values);
    assert_eq!(expected.warnings, Vec::<String>::new());
    // Once for each number of rows.
    assert_eq!(got.warnings.len(), 2, "{:?}", got.warnings);
    for warning in &got.warnings {
        assert!(warning.contains("no longer captured") && warning.contains("read on the host"), "{warning}");
    }
}
