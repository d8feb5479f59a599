//! Our own kernels beside cuDNN's; without a GPU or cuDNN there is nothing to compare.

use anneal_device::CudaDevice;
use anneal_device::cuda::{AttentionBackend, dnn_version};
use anneal_tensor::ops::{self, AttentionInput, attention};
use anneal_tensor::{DType, Device, Tape, Tensor};
use anneal_testkit::{Array, Tolerance, assert_close, poisoned_cuda, skip_without};

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
}

const SHAPES: [Shape; 5] = [
    Shape { batch: 2, queries: 256, keys: 256, heads: 3, dim: 72 },
    Shape { batch: 1, queries: 200, keys: 200, heads: 2, dim: 64 },
    Shape { batch: 2, queries: 130, keys: 77, heads: 2, dim: 40 },
    Shape { batch: 1, queries: 1100, keys: 1100, heads: 2, dim: 72 },
    Shape { batch: 1, queries: 64, keys: 300, heads: 1, dim: 128 },
];

/// The shapes that the installed cuDNN serves: up to 9.15 it wants a multiple of 128 keys.
fn shapes() -> impl Iterator<Item = Shape> {
    let any = dnn_version().is_some_and(|version| version >= 91_600);
    SHAPES.into_iter().filter(move |shape| any || shape.keys.is_multiple_of(128))
}

/// Calls `test` with a GPU and its handle, if there is one and cuDNN too.
fn with_cudnn(name: &str, test: impl Fn(&Device, &CudaDevice)) {
    let Some(turn) = poisoned_cuda() else { return skip_without("CUDA device", name) };
    if dnn_version().is_none() {
        return skip_without("cuDNN", name);
    }
    let Device::Cuda(cuda) = &turn.device else { unreachable!("asked for a GPU") };
    test(&turn.device, cuda);
    cuda.set_attention_backend(None);
    cuda.set_deterministic(false);
}

impl Shape {
    fn inputs(self, device: &Device, dtype: DType, packed: bool) -> Vec<Tensor> {
        let Self { batch, queries, keys, heads, dim } = self;
        let shapes = match packed {
            true => vec![vec![batch, queries, 3, heads, dim]],
            false => [queries, keys, keys].map(|tokens| vec![batch, tokens, heads, dim]).to_vec(),
        };
        shapes.iter().zip(1..).map(|(sizes, seed)| normal(device, seed, sizes, dtype)).collect()
    }

    /// Value and gradients, forward and backward each by a backend of its own.
    fn run(
        self,
        device: &Device,
        cuda: &CudaDevice,
        inputs: &[Tensor],
        [forward, backward]: [AttentionBackend; 2],
    ) -> Vec<Vec<f32>> {
        let Self { batch, queries, heads, dim, .. } = self;
        let tape = Tape::new();
        let variables: Vec<Tensor> = inputs.iter().map(|input| tape.variable(input)).collect();
        let input = match &variables[..] {
            [qkv] => AttentionInput::Packed(qkv),
            [query, key, value] => AttentionInput::Separate { query, key, value },
            _ => unreachable!("packed or separate"),
        };
        cuda.set_attention_backend(Some(forward));
        let output = attention(input, None, None, 1.0 / (dim as f32).sqrt()).unwrap();
        let value = read(&output.detach());
        let upstream = normal(device, 9, &[batch, queries, heads, dim], inputs[0].dtype());
        cuda.set_attention_backend(Some(backward));
        tape.backward_from(vec![(output, upstream)]).unwrap();
        let gradients = variables.iter().map(|variable| read(&tape.take_gradient(variable).unwrap()));
        std::iter::once(value).chain(gradients).collect()
    }
}

fn normal(device: &Device, seed: u64, sizes: &[usize], dtype: DType) -> Tensor {
    let values: Vec<f32> = Array::normal(seed, sizes).values.iter().map(|value| *value as f32).collect();
    ops::cast(&Tensor::from_slice(device, &values, sizes).unwrap(), dtype).unwrap()
}

fn read(tensor: &Tensor) -> Vec<f32> {
    ops::cast(tensor, DType::F32).unwrap().to_vec::<f32>().unwrap()
}

fn close(name: &str, got: &[Vec<f32>], expected: &[Vec<f32>], tolerance: Tolerance) {
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|value| f64::from(*value)).collect() };
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_close(&format!("{name}, tensor {index}"), &wide(got), &wide(expected), tolerance);
    }
}

#[test]
fn backends_agree_and_one_goes_on_with_what_the_other_saved() {
    use AttentionBackend::{Dnn, Own};
    with_cudnn("attention by both backends", |device, cuda| {
        for shape in shapes() {
            for (dtype, tolerance) in [(DType::BF16, Tolerance::Bf16), (DType::F16, Tolerance::F16)] {
                for packed in [false, true] {
                    if packed && shape.queries != shape.keys {
                        continue;
                    }
                    let inputs = shape.inputs(device, dtype, packed);
                    let own = shape.run(device, cuda, &inputs, [Own, Own]);
                    for backends in [[Dnn, Dnn], [Own, Dnn], [Dnn, Own]] {
                        let got = shape.run(device, cuda, &inputs, backends);
                        close(
                            &format!("{shape:?} {dtype} packed {packed} {backends:?}"),
                            &got,
                            &own,
                            tolerance,
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn cudnn_in_the_deterministic_mode_gives_equal_bits() {
    with_cudnn("deterministic attention by cuDNN", |device, cuda| {
        cuda.set_deterministic(true);
        for shape in shapes() {
            let inputs = shape.inputs(device, DType::BF16, false);
            let runs = [0, 1].map(|_| shape.run(device, cuda, &inputs, [AttentionBackend::Dnn; 2]));
            assert!(runs[0] == runs[1], "{shape:?}");
            let own = shape.run(device, cuda, &inputs, [AttentionBackend::Own; 2]);
            close(&format!("{shape:?} deterministic"), &runs[0], &own, Tolerance::Bf16);
        }
    });
}

#[test]
fn the_measured_choice_is_one_of_both() {
    with_cudnn("measured attention", |device, cuda| {
        let shape = Shape { batch: 8, queries: 256, keys: 256, heads: 4, dim: 72 };
        let inputs = shape.inputs(device, DType::BF16, true);
        let own = shape.run(device, cuda, &inputs, [AttentionBackend::Own; 2]);
        cuda.set_attention_backend(None);
        let output = attention(AttentionInput::Packed(&inputs[0]), None, None, 1.0 / 72f32.sqrt()).unwrap();
        close("measured", &[read(&output)], &own[..1], Tolerance::Bf16);
    });
}
