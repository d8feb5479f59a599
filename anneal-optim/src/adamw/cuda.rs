use std::sync::Arc;

use anneal_device::cuda::{Arguments, Launch, Source, Variant};
use anneal_device::{CudaDevice, DeviceError};
use anneal_nn::Chunk;
use anneal_tensor::kernels::element;
use anneal_tensor::{DType, Device, Purpose, Result, Tensor, TensorError, ops};

use super::loss_scale::{GOOD_STEPS, RANGE};
use super::report::{DeviceProgress, DeviceReport};
use super::{AdamWOptions, ChunkState, Task};

const SOURCE: Source = Source { name: "adamw", code: include_str!("kernel.cu") };
/// Threads of a block, as in the kernel; each takes packs of four elements.
const THREADS: usize = 256;
const DECIDING_THREADS: usize = 1024;
/// Numbers of the kernel's `Constants` beside two for each average.
const CONSTANTS: usize = 12;

/// What the kernels find their data by, on the device.
pub(super) struct Tables {
    /// As uploaded: a store may move its chunks.
    addresses: Vec<i64>,
    pointers: Tensor,
    tasks: Tensor,
    /// Bits of the averages' rates in f64.
    rates: Tensor,
}

/// The kernel's `Settings`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Settings {
    beta: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    clip: f64,
    least_scale: f32,
    most_scale: f32,
    good_steps: i32,
    ema_warmup: i32,
}

fn macros(weights: DType, averages: usize) -> Vec<(&'static str, String)> {
    let mut macros = element("WEIGHT", weights);
    macros.push(("AVERAGES", averages.to_string()));
    macros
}

/// The kernels with and without masters and averages, for compiling ahead.
pub fn kernel_variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let pairs = dtypes.iter().flat_map(|dtype| [0, 1, 2].map(|averages| (*dtype, averages)));
    pairs.map(|(dtype, averages)| Variant { source: SOURCE, macros: macros(dtype, averages) }).collect()
}

impl Tables {
    fn new(device: &Device, options: &AdamWOptions, tasks: &[Task], addresses: Vec<i64>) -> Result<Self> {
        let of_tasks: Vec<i64> = tasks
            .iter()
            .flat_map(|task| [task.state as i64, task.start as i64, task.elements as i64, task.decays.into()])
            .collect();
        let rates: Vec<i64> = options.ema_rates.iter().map(|rate| rate.to_bits() as i64).collect();
        let (pointers, tasks, rates) =
            (kept(device, &addresses)?, kept(device, &of_tasks)?, kept(device, &rates)?);
        Ok(Self { addresses, pointers, tasks, rates })
    }
}

/// A copy that counts as the optimizer's.
fn kept(device: &Device, values: &[i64]) -> Result<Tensor> {
    let tensor = Tensor::empty_for(device, &[values.len()], DType::I64, Purpose::Optimizer)?;
    ops::overwrite(&tensor, &Tensor::from_slice(device, values, &[values.len()])?)?;
    Ok(tensor)
}

/// The rows of the kernel's `pointers`.
fn addresses(states: &[ChunkState], chunks: &[Chunk]) -> Result<Vec<i64>> {
    let mut addresses = Vec::new();
    for (state, chunk) in states.iter().zip(chunks) {
        let gradients = chunk.gradients.as_ref().expect("a trained chunk has gradients");
        let master = state.master.as_ref().unwrap_or(&chunk.weights);
        let tensors = [gradients, &chunk.weights, master].into_iter();
        for tensor in tensors.chain(&state.moments).chain(&state.averages) {
            let address = tensor.address() as usize;
            if !address.is_multiple_of(16) {
                let message = format!("chunk {} does not begin on a multiple of 16 bytes", state.chunk);
                return Err(TensorError::Store { message });
            }
            addresses.push(address as i64);
        }
    }
    Ok(addresses)
}

/// One step, all of it decided and done on the device.
///
/// The tables are uploaded in the first step and when the store has moved a chunk.
///
/// # Errors
/// If that happens inside a captured step.
pub(super) fn step(
    cuda: &Arc<CudaDevice>,
    (options, tasks, states): (&AdamWOptions, &[Task], &[ChunkState]),
    tables: &mut Option<Tables>,
    progress: &DeviceProgress,
    chunks: &[Chunk],
    learning_rate: f64,
) -> Result<DeviceReport> {
    let device = Device::Cuda(cuda.clone());
    let addresses = addresses(states, chunks)?;
    let tables = match tables {
        Some(tables) if tables.addresses == addresses => tables,
        _ if cuda.in_captured_step() => {
            let message = "the store has moved a chunk".into();
            return Err(DeviceError::Capture { message }.into());
        }
        tables => tables.insert(Tables::new(&device, options, tasks, addresses)?),
    };
    let report = DeviceReport::empty(&device)?;
    let weights = chunks.first().map_or(DType::F32, |chunk| chunk.weights.dtype());
    let macros = macros(weights, options.ema_rates.len());
    let kernel = |name| cuda.kernel(&SOURCE, name, &macros);
    let learning_rate = Tensor::from_slice(&device, &[learning_rate.to_bits() as i64], &[1])?;
    let scratch = |count, dtype| Tensor::empty_for(&device, &[count], dtype, Purpose::Workspace);
    let partials = scratch(tasks.len(), DType::I64)?;
    let constants = scratch(CONSTANTS + 2 * options.ema_rates.len(), DType::F32)?;
    let (tasks_at, pointers_at) = (tables.tasks.address(), tables.pointers.address());
    let squares = Arguments::new().with(tasks_at).with(pointers_at).with(partials.address());
    let decide = Arguments::new()
        .with(partials.address())
        .with(tasks.len() as i64)
        .with(learning_rate.address())
        .with(tables.rates.address())
        .with(settings(options))
        .with(progress.counts.address())
        .with(progress.loss_scale.address())
        .with(constants.address())
        .with(report.address());
    let update = Arguments::new().with(tasks_at).with(pointers_at).with(constants.address());
    let over_tasks = Launch::new(tasks.len(), THREADS);
    // SAFETY: the tables hold the addresses of tensors that live as long as store and optimizer, and
    // tasks are ranges within them; the other memory has the kernel's sizes and goes back in stream order.
    unsafe {
        if !tasks.is_empty() {
            cuda.launch(kernel("adamw_squares")?, over_tasks, squares)?;
        }
        cuda.launch(kernel("adamw_decide")?, Launch::new(1, DECIDING_THREADS), decide)?;
        if !tasks.is_empty() {
            cuda.launch(kernel("adamw_update")?, over_tasks, update)?;
        }
    }
    Ok(report)
}

fn settings(options: &AdamWOptions) -> Settings {
    let [least_scale, most_scale] = RANGE;
    Settings {
        beta: options.betas,
        epsilon: options.epsilon,
        weight_decay: options.weight_decay,
        clip: options.clip.unwrap_or(f64::INFINITY),
        least_scale,
        most_scale,
        good_steps: if options.scale_loss { GOOD_STEPS as i32 } else { 0 },
        ema_warmup: options.ema_warmup.into(),
    }
}
