use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use super::DiffusionLossRow;
use crate::kernels::element;
use crate::{DType, Device, Result, Tensor};

const SOURCE: Source = Source { name: "diffusion_loss", code: include_str!("kernel.cu") };
/// Threads of a block (`THREADS` in the kernel).
const THREADS: usize = 512;
/// The most blocks of a grid's second dimension.
const MOST_SAMPLES: usize = 65535;
/// Numbers of a row (`Row` in the kernel).
const ROW: usize = 8;

/// The rows in the kernel's layout, as bytes on the device: one upload serves forward and backward.
pub(super) fn table(device: &Device, rows: &[DiffusionLossRow]) -> Result<Tensor> {
    let numbers: Vec<[f64; ROW]> = rows
        .iter()
        .map(|row| {
            let [weight, mean_slope, low, range, decoder] = row.variational.map_or([0.0; 5], |part| {
                let decoder = f64::from(u8::from(part.decoder));
                [part.weight, part.mean_slope, part.log_variance_low, part.log_variance_range, decoder]
            });
            let (clean, noise) = (row.target_clean, row.target_noise);
            [clean, noise, row.error_weight, weight, mean_slope, low, range, decoder]
        })
        .collect();
    let bytes: &[u8] = bytemuck::cast_slice(&numbers);
    Tensor::from_slice(device, bytes, &[bytes.len()])
}

fn macros(output: DType, learned: bool) -> Vec<(&'static str, String)> {
    let mut macros = element("OUTPUT", output);
    macros.extend(learned.then(|| ("LEARNED", "1".to_string())));
    macros
}

/// Writes total, error and variational term of each sample; all tensors contiguous.
pub(super) fn forward(
    cuda: &CudaDevice,
    table: &Tensor,
    [output, clean, noise]: [&Tensor; 3],
    losses: &[Tensor],
) -> Result<()> {
    let samples = clean.size(0);
    if samples == 0 {
        return Ok(());
    }
    let learned = output.elements() > clean.elements();
    let kernel = cuda.kernel(&SOURCE, "diffusion_loss", &macros(output.dtype(), learned))?;
    let mut arguments = Arguments::new();
    for tensor in [table, output, clean, noise].into_iter().chain(losses) {
        arguments.push(tensor.address());
    }
    let arguments = arguments.with((clean.elements() / samples) as i64);
    // SAFETY: shapes were checked; the table has a row and each loss a number for each sample.
    unsafe { cuda.launch(kernel, Launch::new(samples, THREADS), arguments)? };
    Ok(())
}

/// Writes the gradient of `sum_b upstream_b * total_b` with respect to the output; all tensors contiguous.
pub(super) fn backward(
    cuda: &CudaDevice,
    table: &Tensor,
    [output, clean, noise]: [&Tensor; 3],
    upstream: &Tensor,
    gradient: &Tensor,
) -> Result<()> {
    if clean.elements() == 0 {
        return Ok(());
    }
    let (samples, learned) = (clean.size(0), output.elements() > clean.elements());
    let elements = clean.elements() / samples;
    let kernel = cuda.kernel(&SOURCE, "diffusion_loss_gradient", &macros(output.dtype(), learned))?;
    let mut arguments = Arguments::new();
    for tensor in [table, output, clean, noise, upstream, gradient] {
        arguments.push(tensor.address());
    }
    let arguments = arguments.with(samples as i64).with(elements as i64);
    let launch = Launch::new([elements.div_ceil(THREADS), samples.min(MOST_SAMPLES)], THREADS);
    // SAFETY: as in forward; the gradient has the output's shape and dtype.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let pairs = dtypes.iter().flat_map(|dtype| [false, true].map(|learned| (*dtype, learned)));
    pairs.map(|(dtype, learned)| Variant { source: SOURCE, macros: macros(dtype, learned) }).collect()
}
