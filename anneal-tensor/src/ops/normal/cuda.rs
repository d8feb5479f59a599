use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::rng::Stream;
use crate::{Device, Result, Tensor};

const SOURCE: Source = Source { name: "normal", code: include_str!("kernel.cu") };
/// Threads of a block (`THREADS` in the kernel), and elements that each makes.
const THREADS: usize = 256;
const PER_THREAD: usize = 4;
/// Words of a row (`Row` in the kernel).
const ROW: usize = 8;

/// The streams and coefficients in the kernel's layout, as bytes on the device.
fn table(device: &Device, rows: impl Iterator<Item = (Stream, [f32; 2])>) -> Result<Tensor> {
    let words: Vec<[u32; ROW]> = rows
        .map(|(stream, [alpha, sigma])| {
            let ([low, high], [position, sample, step, upper]) = stream.key_and_counter();
            [low, high, position, sample, step, upper, alpha.to_bits(), sigma.to_bits()]
        })
        .collect();
    let bytes: &[u8] = bytemuck::cast_slice(&words);
    Tensor::from_slice(device, bytes, &[bytes.len()])
}

/// Elements of a row, blocks of a row, and the launch for all rows.
fn geometry(noise: &Tensor) -> (usize, usize, Launch) {
    let width: usize = noise.dims()[1..].iter().product();
    let per_row = width.div_ceil(THREADS * PER_THREAD);
    (width, per_row, Launch::new(noise.size(0) * per_row, THREADS))
}

/// A row of draws from each stream.
pub(super) fn fill(cuda: &CudaDevice, streams: &[Stream], noise: &Tensor) -> Result<()> {
    if noise.elements() == 0 {
        return Ok(());
    }
    let table = table(noise.device(), streams.iter().map(|stream| (stream.clone(), [0.0; 2])))?;
    let (width, per_row, launch) = geometry(noise);
    let kernel = cuda.kernel(&SOURCE, "normal", &[])?;
    let arguments =
        Arguments::new().with(table.address()).with(noise.address()).with(width as u64).with(per_row as u32);
    // SAFETY: the table has a row for each row of the contiguous noise.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

/// Noise, and `alphas[b] * clean[b] + sigmas[b] * noise[b]`; all tensors contiguous.
pub(super) fn mix(
    cuda: &CudaDevice,
    streams: &[Stream],
    [alphas, sigmas]: [&[f32]; 2],
    clean: &Tensor,
    [noise, noised]: [&Tensor; 2],
) -> Result<()> {
    if noise.elements() == 0 {
        return Ok(());
    }
    let coefficients = alphas.iter().zip(sigmas).map(|(alpha, sigma)| [*alpha, *sigma]);
    let table = table(noise.device(), streams.iter().cloned().zip(coefficients))?;
    let (width, per_row, launch) = geometry(noise);
    let kernel = cuda.kernel(&SOURCE, "noised", &[])?;
    let arguments = Arguments::new()
        .with(table.address())
        .with(clean.address())
        .with(noise.address())
        .with(noised.address())
        .with(width as u64)
        .with(per_row as u32);
    // SAFETY: the table has a row for each row of the tensors, which are contiguous and of one shape.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    vec![Variant { source: SOURCE, macros: Vec::new() }]
}
