//! One harness that checks the value and every gradient of any op.
//!
//! An op is compared with a plain f64 reference of its formula, and its gradients with
//! central differences of that reference (whose own error is near 1e-9, so the op's
//! rounding is all that is left). Each case runs on every device present, for one and
//! several threads (equal bits) and twice on a GPU (equal bits), with contiguous and with strided inputs, in
//! memory that was filled with NaN, in f32 and, on inputs rounded to the type, in bf16 and f16.

use std::sync::{Mutex, MutexGuard, OnceLock};

use anneal_device::Device;
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Result, Tape, Tensor, ops};

use crate::{Tolerance, skip_without};

/// A plain array of the reference: sizes and values in row-major order.
#[derive(Clone, Debug)]
pub struct Array {
    pub dims: Vec<usize>,
    pub values: Vec<f64>,
}

impl Array {
    pub fn new(dims: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(dims.iter().product::<usize>(), values.len(), "an array of {dims:?}");
        Self { dims: dims.to_vec(), values }
    }

    /// Standard normal values; `seed` tells the arrays of a test apart.
    pub fn normal(seed: u64, dims: &[usize]) -> Self {
        let mut stream = Stream::new(seed, Purpose::Test, 0, 0);
        let count = dims.iter().product();
        Self::new(dims, (0..count).map(|_| f64::from(stream.normal() as f32)).collect())
    }

    /// Uniform values in `low..high`.
    pub fn uniform(seed: u64, dims: &[usize], low: f64, high: f64) -> Self {
        let mut stream = Stream::new(seed, Purpose::Test, 1, 0);
        let count = dims.iter().product();
        let draw = |_| f64::from((low + (high - low) * stream.uniform()) as f32);
        Self::new(dims, (0..count).map(draw).collect())
    }

    pub fn zeros(dims: &[usize]) -> Self {
        Self::new(dims, vec![0.0; dims.iter().product()])
    }

    /// The value at an index list.
    pub fn at(&self, index: &[usize]) -> f64 {
        self.values[self.position(index)]
    }

    pub fn at_mut(&mut self, index: &[usize]) -> &mut f64 {
        let position = self.position(index);
        &mut self.values[position]
    }

    fn position(&self, index: &[usize]) -> usize {
        assert_eq!(index.len(), self.dims.len());
        index.iter().zip(&self.dims).fold(0, |position, (index, size)| {
            assert!(index < size);
            position * size + index
        })
    }

    fn rounded(&self, dtype: DType) -> Self {
        let round = |value: &f64| match dtype {
            DType::BF16 => half::bf16::from_f64(*value).to_f64(),
            DType::F16 => half::f16::from_f64(*value).to_f64(),
            _ => *value,
        };
        Self { dims: self.dims.clone(), values: self.values.iter().map(round).collect() }
    }

    fn tensor(&self, device: &Device, dtype: DType, layout: Layout) -> Tensor {
        let values: Vec<f32> = self.values.iter().map(|value| *value as f32).collect();
        match layout {
            Layout::Contiguous => {
                let tensor = Tensor::from_slice(device, &values, &self.dims).unwrap();
                ops::cast(&tensor, dtype).unwrap()
            }
            // The same values between columns of NaN that a kernel must not touch.
            Layout::Strided => {
                let Some((&last, outer)) = self.dims.split_last() else {
                    return self.tensor(device, dtype, Layout::Contiguous);
                };
                let mut wide_dims = outer.to_vec();
                wide_dims.push(last + 3);
                let rows: usize = outer.iter().product();
                let mut wide = vec![f32::NAN; rows * (last + 3)];
                for row in 0..rows {
                    wide[row * (last + 3) + 2..][..last].copy_from_slice(&values[row * last..][..last]);
                }
                let wide = Tensor::from_slice(device, &wide, &wide_dims).unwrap();
                ops::narrow(&ops::cast(&wide, dtype).unwrap(), outer.len(), 2, last).unwrap()
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Contiguous,
    Strided,
}

/// A device for tests with this many threads, whose memory cache is filled with NaN.
pub fn poisoned_cpu(threads: usize) -> Device {
    let device = Device::cpu(Some(threads), None);
    let blocks: Vec<Tensor> = (4..18)
        .flat_map(|power| (0..6).map(move |_| 1usize << power))
        .map(|elements| Tensor::from_slice(&device, &vec![f32::NAN; elements], &[elements]).unwrap())
        .collect();
    drop(blocks);
    device
}

/// The first GPU with its free memory filled with NaN, if there is one; shared by the tests of a
/// process, which then run one after the other.
///
/// # Panics
/// If there is none but `ANNEAL_REQUIRE_CUDA` is set.
pub fn poisoned_cuda() -> Option<CudaTurn> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let device = DEVICE.get_or_init(|| match Device::cuda(0, None) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("ANNEAL_REQUIRE_CUDA").is_some() => panic!("{error}"),
        Err(_) => None,
    });
    let device = device.clone()?;
    let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    Tensor::full(&device, f32::NAN, &[16 << 20]).expect("memory to fill with NaN");
    Some(CudaTurn { device, _turn: turn })
}

/// A GPU for as long as this lives.
pub struct CudaTurn {
    pub device: Device,
    _turn: MutexGuard<'static, ()>,
}

/// Calls `test` on the CPU and on the GPU; a machine without one says so and counts it.
pub fn on_every_device(name: &str, test: impl Fn(&Device)) {
    test(&poisoned_cpu(2));
    match poisoned_cuda() {
        Some(turn) => test(&turn.device),
        None => skip_without("CUDA device", name),
    }
}

/// Checks an op on float inputs; see the module's head. `reference` is its formula in f64.
///
/// # Panics
/// With the case, the input and the figure, if anything is off.
pub fn check_op(
    name: &str,
    inputs: &[Array],
    op: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    reference: impl Fn(&[Array]) -> Vec<Array>,
) {
    if poisoned_cuda().is_none() {
        skip_without("CUDA device", name);
    }
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let inputs: Vec<Array> = inputs.iter().map(|input| input.rounded(dtype)).collect();
        let expected = expect(&inputs, &reference);
        for layout in [Layout::Contiguous, Layout::Strided] {
            let case = format!("{name} ({dtype}, {layout:?})");
            let got = run(&poisoned_cpu(1), &inputs, dtype, layout, &op, &expected);
            compare(&case, dtype, &got, &expected);
            let again = run(&poisoned_cpu(3), &inputs, dtype, layout, &op, &expected);
            assert_eq!(got.bits(), again.bits(), "{case}: one thread and three differ");
            let Some(turn) = poisoned_cuda() else { continue };
            let case = format!("{case} on {}", turn.device);
            let got = run(&turn.device, &inputs, dtype, layout, &op, &expected);
            compare(&case, dtype, &got, &expected);
            let again = run(&turn.device, &inputs, dtype, layout, &op, &expected);
            assert_eq!(got.bits(), again.bits(), "{case}: two runs differ");
        }
    }
}

/// Outputs, and the gradient of `sum_k upstream_k * output_k` with respect to each input.
struct Evaluation {
    outputs: Vec<Array>,
    upstream: Vec<Array>,
    gradients: Vec<Array>,
}

impl Evaluation {
    fn bits(&self) -> Vec<u64> {
        let arrays = self.outputs.iter().chain(&self.gradients);
        arrays.flat_map(|array| array.values.iter().map(|value| value.to_bits())).collect()
    }
}

fn expect(inputs: &[Array], reference: &impl Fn(&[Array]) -> Vec<Array>) -> Evaluation {
    let outputs = reference(inputs);
    let upstream: Vec<Array> = outputs
        .iter()
        .enumerate()
        // Multiples of 1/64 are exact in every dtype.
        .map(|(index, output)| {
            let mut draws = Array::normal(900 + index as u64, &output.dims);
            draws.values.iter_mut().for_each(|value| *value = (*value * 64.0).round() / 64.0);
            draws
        })
        .collect();
    let loss = |inputs: &[Array]| -> f64 {
        let outputs = reference(inputs);
        let pairs = outputs.iter().zip(&upstream);
        pairs.flat_map(|(output, weight)| output.values.iter().zip(&weight.values)).map(|(a, b)| a * b).sum()
    };
    let mut gradients = Vec::new();
    for index in 0..inputs.len() {
        let mut shifted = inputs.to_vec();
        let mut gradient = Array::zeros(&inputs[index].dims);
        for position in 0..gradient.values.len() {
            let value = inputs[index].values[position];
            let step = 1e-5 * value.abs().max(1.0);
            shifted[index].values[position] = value + step;
            let above = loss(&shifted);
            shifted[index].values[position] = value - step;
            gradient.values[position] = (above - loss(&shifted)) / (2.0 * step);
            shifted[index].values[position] = value;
        }
        gradients.push(gradient);
    }
    Evaluation { outputs, upstream, gradients }
}

fn run(
    device: &Device,
    inputs: &[Array],
    dtype: DType,
    layout: Layout,
    op: &impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    expected: &Evaluation,
) -> Evaluation {
    let tensors: Vec<Tensor> = inputs.iter().map(|input| input.tensor(device, dtype, layout)).collect();
    let plain = op(&tensors).unwrap();
    let tape = Tape::new();
    let variables: Vec<Tensor> = tensors.iter().map(|tensor| tape.variable(tensor)).collect();
    let outputs = op(&variables).unwrap();
    assert!(outputs.iter().all(Tensor::is_tracked), "an output lost its gradient");
    let arrays: Vec<Array> = outputs.iter().map(array).collect();
    for (untracked, tracked) in plain.iter().map(array).zip(&arrays) {
        assert_eq!(untracked.values, tracked.values, "recording changed the value");
    }
    let seeds = outputs
        .iter()
        .zip(&expected.upstream)
        .map(|(output, upstream)| (output.clone(), upstream.tensor(device, output.dtype(), layout)))
        .collect();
    tape.backward_from(seeds).unwrap();
    let gradients = variables
        .iter()
        .map(|variable| match tape.take_gradient(variable) {
            Some(gradient) => array(&gradient),
            None => Array::zeros(variable.dims()),
        })
        .collect();
    Evaluation { outputs: arrays, upstream: Vec::new(), gradients }
}

fn compare(case: &str, dtype: DType, got: &Evaluation, expected: &Evaluation) {
    let (value, gradient) = match dtype {
        DType::F32 => (Tolerance::OpValue, Tolerance::OpGradient),
        DType::BF16 => (Tolerance::Bf16, Tolerance::Bf16),
        _ => (Tolerance::F16, Tolerance::F16),
    };
    assert_eq!(got.outputs.len(), expected.outputs.len(), "{case}: number of outputs");
    for (index, (got, expected)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
        assert_near(&format!("{case}, output {index}"), got, expected, value);
    }
    for (index, (got, expected)) in got.gradients.iter().zip(&expected.gradients).enumerate() {
        assert_near(&format!("{case}, gradient of input {index}"), got, expected, gradient);
    }
}

fn assert_near(case: &str, got: &Array, expected: &Array, tolerance: Tolerance) {
    assert_eq!(got.dims, expected.dims, "{case}: shape");
    // The floor of one keeps gradients that are exactly zero (as behind a norm) comparable.
    let scale = expected.values.iter().fold(1.0f64, |scale, value| scale.max(value.abs()));
    for (position, (a, b)) in got.values.iter().zip(&expected.values).enumerate() {
        let error = (a - b).abs() / scale;
        assert!(error <= tolerance.limit(), "{case}, element {position}: {a} for {b} (error {error:.2e})");
    }
}

fn array(tensor: &Tensor) -> Array {
    let values = ops::cast(&tensor.detach(), DType::F32).unwrap().to_vec::<f32>().unwrap();
    Array::new(tensor.dims(), values.into_iter().map(f64::from).collect())
}
