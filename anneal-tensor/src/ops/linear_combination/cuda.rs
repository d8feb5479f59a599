use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::{blocks_to_fill, element};
use crate::ops::elementwise::cuda::WIDEST;
use crate::{DType, Result, Tensor, TensorError};

const SOURCE: Source = Source { name: "linear_combination", code: include_str!("kernel.cu") };
const THREADS: usize = 256;
/// `MOST_TERMS` of the kernel.
const MOST_TERMS: usize = 16;

/// `Terms` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Terms {
    tensors: [usize; MOST_TERMS],
    coefficients: [f32; MOST_TERMS],
    count: u32,
    samples: u32,
}

/// What multiplies the terms.
pub(super) enum Coefficients<'a> {
    /// A number for each term; arguments of the kernel, so they must be constants in a captured step.
    Numbers(&'a [f32]),
    /// A number for each term and sample, f32 `[terms, b]` on the device.
    Table(&'a Tensor),
}

fn macros(dtype: DType, pack: usize, by_sample: bool) -> Vec<(&'static str, String)> {
    let mut macros = element("ELEMENT", dtype);
    macros.push(("PACK", pack.to_string()));
    macros.extend(by_sample.then(|| ("BY_SAMPLE", "1".to_string())));
    macros
}

/// The sum of contiguous tensors of the output's shape and dtype.
///
/// # Errors
/// If there are more terms than the kernel takes.
pub(super) fn sum(
    cuda: &CudaDevice,
    coefficients: Coefficients,
    tensors: &[&Tensor],
    output: &Tensor,
) -> Result<()> {
    if tensors.len() > MOST_TERMS {
        let message = format!("{} terms, of which a GPU adds at most {MOST_TERMS}", tensors.len());
        return Err(TensorError::shape("linear_combination", message));
    }
    let (count, dtype) = (output.elements(), output.dtype());
    if count == 0 {
        return Ok(());
    }
    let mut terms = Terms {
        tensors: [0; MOST_TERMS],
        coefficients: [0.0; MOST_TERMS],
        count: tensors.len() as u32,
        samples: 1,
    };
    terms.tensors.iter_mut().zip(tensors).for_each(|(to, tensor)| *to = tensor.address() as usize);
    let mut table = std::ptr::null_mut();
    match coefficients {
        Coefficients::Numbers(numbers) => terms.coefficients[..numbers.len()].copy_from_slice(numbers),
        Coefficients::Table(of_samples) => {
            terms.samples = of_samples.size(1) as u32;
            table = of_samples.address();
        }
    }
    let (per_sample, widest) = (count / terms.samples as usize, WIDEST / dtype.size());
    let aligned = |tensor: &&Tensor| (tensor.address() as usize).is_multiple_of(WIDEST);
    let whole = terms.samples == 1 || per_sample.is_multiple_of(widest);
    let pack = if whole && aligned(&output) && tensors.iter().all(aligned) { widest } else { 1 };
    let macros = macros(dtype, pack, !table.is_null());
    let kernel = cuda.kernel(&SOURCE, "linear_combination", &macros)?;
    let arguments = Arguments::new()
        .with(terms)
        .with(table)
        .with(output.address())
        .with(count as u64)
        .with(per_sample as u64);
    let launch = Launch::over(count.div_ceil(pack), THREADS, blocks_to_fill(cuda));
    // SAFETY: all tensors hold `count` elements of this dtype, and the table a number for each term and sample.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let pairs = dtypes.iter().flat_map(|dtype| [false, true].map(|by_sample| (*dtype, by_sample)));
    pairs
        .map(|(dtype, by_sample)| {
            let pack = WIDEST / dtype.size();
            Variant { source: SOURCE, macros: macros(dtype, pack, by_sample) }
        })
        .collect()
}
