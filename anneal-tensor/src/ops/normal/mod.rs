//! Standard normal draws from the counter generator, and noise mixed into a batch in the same pass.
//!
//! Row `b` of the noise is what [`Stream::fill_normal`] of its stream gives (Box-Muller on the words of
//! Philox 4x32-10). `noised[b] = alphas[b] * clean[b] + sigmas[b] * noise[b]` is a draw of q(x_t | x_0) (DDPM,
//! arXiv 2006.11239, eq. 4). On a GPU each word is the same, and the transformation is computed in f64 as here,
//! so that draws agree to 1e-6 (they differ where two f64 logarithms, sines or cosines round differently to
//! f32). There, keys, counters and coefficients are one upload, because they change from step to step.
//! Nothing here has a gradient.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::linear_combination_per_sample;
use crate::rng::Stream;
use crate::{DType, Result, Tensor, TensorError, refuse_tracked};

/// Noise f32 `[B, sizes...]`, a row for each of B streams, whose state stays as it is.
///
/// # Errors
/// If memory runs out.
///
/// # Panics
/// On a GPU, if a stream stands within a block of four words.
pub fn normal_rows(device: &Device, sizes: &[usize], streams: &[Stream]) -> Result<Tensor> {
    let mut dims = vec![streams.len()];
    dims.extend(sizes);
    let mut noise = Tensor::empty(device, &dims, DType::F32)?;
    match device {
        Device::Cpu(cpu) => cpu::fill(&cpu.pool, streams, &mut noise),
        Device::Cuda(cuda) => cuda::fill(cuda, streams, &noise)?,
    }
    Ok(noise)
}

/// Noise as by [`normal_rows`], and `alphas[b] * clean[b] + sigmas[b] * noise[b]`, both f32 in the shape of
/// `clean` f32 `[B, ..]`.
///
/// # Errors
/// If `clean` is not f32 or tracked, or there is not one stream, alpha and sigma for each of its rows.
///
/// # Panics
/// On a GPU, if a stream stands within a block of four words.
pub fn noised(
    clean: &Tensor,
    streams: &[Stream],
    alphas: &[f32],
    sigmas: &[f32],
) -> Result<(Tensor, Tensor)> {
    const NAME: &str = "noised";
    refuse_tracked(NAME, &[clean])?;
    if clean.dtype() != DType::F32 {
        return Err(TensorError::unsupported_dtype(NAME, clean.dtype()));
    }
    let rows = [streams.len(), alphas.len(), sigmas.len()];
    let Some(sizes) = clean.dims().get(1..).filter(|_| rows.iter().all(|count| *count == clean.size(0)))
    else {
        let [streams, alphas, sigmas] = rows;
        let message =
            format!("{streams} streams, {alphas} alphas and {sigmas} sigmas for {:?}", clean.dims());
        return Err(TensorError::shape(NAME, message));
    };
    match clean.device() {
        Device::Cpu(_) => {
            let noise = normal_rows(clean.device(), sizes, streams)?;
            let noised = linear_combination_per_sample(&[(alphas, clean), (sigmas, &noise)])?;
            Ok((noise, noised))
        }
        Device::Cuda(cuda) => {
            let clean = clean.contiguous()?;
            let noise = Tensor::empty(clean.device(), clean.dims(), DType::F32)?;
            let noised = Tensor::empty(clean.device(), clean.dims(), DType::F32)?;
            cuda::mix(cuda, streams, [alphas, sigmas], &clean, [&noise, &noised])?;
            Ok((noise, noised))
        }
    }
}
