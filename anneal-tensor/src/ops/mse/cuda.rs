use anneal_device::cuda::{Arguments, Launch, Source, Variant};
use anneal_device::{CudaDevice, Purpose};

use crate::kernels::element;
use crate::ops::elementwise::cuda::{self as elementwise, map};
use crate::ops::reduce;
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "mse", code: include_str!("kernel.cu") };
const MAPS: Source = Source {
    name: "mse_maps",
    code: concat!(
        include_str!("maps.cu"),
        include_str!("../elementwise/walk.cuh"),
        include_str!("../elementwise/kernel.cu")
    ),
};
const THREADS: usize = 256;
/// Elements of a sample that a block sums up.
const PART: usize = 8192;
/// The most blocks of a grid's second dimension.
const MOST_SAMPLES: usize = 65535;

fn macros(prediction: DType, target: DType) -> Vec<(&'static str, String)> {
    let mut macros = [element("PREDICTION", prediction), element("TARGET", target)].concat();
    macros.push(("PART", PART.to_string()));
    macros
}

/// The error of each sample of contiguous tensors that have elements.
pub(super) fn forward(
    cuda: &CudaDevice,
    prediction: &Tensor,
    target: &Tensor,
    output: &Tensor,
) -> Result<()> {
    let samples = prediction.size(0);
    let per_sample = prediction.elements() / samples;
    let parts = per_sample.div_ceil(PART);
    let sums = Tensor::empty_for(output.device(), &[samples, parts], DType::F32, Purpose::Workspace)?;
    let kernel = cuda.kernel(&SOURCE, "squared_error", &macros(prediction.dtype(), target.dtype()))?;
    let arguments = Arguments::new()
        .with(prediction.address())
        .with(target.address())
        .with(sums.address())
        .with(samples as i64)
        .with(per_sample as i64);
    let launch = Launch::new([parts, samples.min(MOST_SAMPLES)], THREADS);
    // SAFETY: both inputs hold a sample's elements for each sample, and the sums a number for each part.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    reduce::cuda::sum(cuda, &sums, &[false, true], 1.0 / per_sample as f32, output, false)
}

fn gradient_function(factor: f32) -> elementwise::Function {
    elementwise::Function { source: MAPS, kernel: "map_squared_error_gradient", numbers: [factor, 0.0] }
}

/// `factor * g[b] * (prediction - target)`; `gradient` has the rank of the prediction.
pub(super) fn backward(
    cuda: &CudaDevice,
    gradient: &Tensor,
    prediction: &Tensor,
    target: &Tensor,
    factor: f32,
    dx: &Tensor,
) -> Result<()> {
    map(cuda, gradient_function(factor), [gradient, prediction, target], dx)
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let of = |dtype: DType| {
        let gradient = elementwise::variant(gradient_function(1.0), &[DType::F32, dtype, dtype], dtype);
        [Variant { source: SOURCE, macros: macros(dtype, dtype) }, gradient]
    };
    dtypes.into_iter().flat_map(of).collect()
}
