use anneal_device::CudaDevice;
use anneal_device::cuda::{Arguments, Launch, Source, Variant};

use crate::kernels::element;
use crate::ops::gradient_target::GradientTarget;
use crate::ops::row_blocks::RowBlocks;
use crate::ops::row_blocks::cuda::{RunBlock, Runs, pack, push_vector, sum_runs};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source { name: "gate_residual", code: include_str!("kernel.cu") };
/// Threads of a block at most; wider rows take several turns.
const MOST_THREADS: usize = 256;
/// Rows that a thread loads at a time.
const ROWS: usize = 8;
/// Warps that a multiprocessor runs at once: gate_residual_backward, whose rows under way are in registers, takes up to 121
/// of them for each thread with packs of 16 bytes (112 on sm_90a). gate_residual takes 42, and its runs are the same.
const RESIDENT_WARPS: usize = 16;

fn macros(dtype: DType, vector: DType, pack: usize) -> Vec<(&'static str, String)> {
    let sizes = [("PACK", pack.to_string()), ("ROWS", ROWS.to_string())];
    [element("ELEMENT", dtype), element("VECTOR", vector), sizes.to_vec()].concat()
}

/// How a call is cut, and what its kernels are compiled for.
struct Plan {
    runs: Runs,
    threads: usize,
    macros: Vec<(&'static str, String)>,
}

impl Plan {
    fn new(cuda: &CudaDevice, blocks: &RowBlocks, rows: &[&Tensor], gate: &Tensor) -> Self {
        let dtype = rows[0].dtype();
        let pack = pack(blocks.width, dtype, rows.iter().copied(), [gate].into_iter());
        let threads = blocks.width.div_ceil(pack).next_multiple_of(32).clamp(32, MOST_THREADS);
        let multiprocessors = cuda.properties().multiprocessors;
        let block = RunBlock { residents: RESIDENT_WARPS, warps: threads / 32, together: ROWS };
        let runs = Runs::new(blocks, block, multiprocessors);
        Self { runs, threads, macros: macros(dtype, gate.dtype(), pack) }
    }

    fn push_sizes(&self, arguments: &mut Arguments) {
        for number in [self.runs.rows, self.runs.run, self.runs.per_group, self.runs.width] {
            arguments.push(number as u32);
        }
    }

    fn launch(&self) -> Launch {
        Launch::new(self.runs.count(), self.threads)
    }
}

/// `output = x + gate * branch`, all contiguous but the gate's rows.
pub(super) fn forward(
    cuda: &CudaDevice,
    blocks: &RowBlocks,
    [x, branch, output]: [&Tensor; 3],
    gate: &Tensor,
) -> Result<()> {
    if output.elements() == 0 {
        return Ok(());
    }
    let plan = Plan::new(cuda, blocks, &[x, branch, output], gate);
    let kernel = cuda.kernel(&SOURCE, "gate_residual", &plan.macros)?;
    let mut arguments = Arguments::new().with(x.address()).with(branch.address()).with(output.address());
    push_vector(&mut arguments, Some(gate));
    plan.push_sizes(&mut arguments);
    // SAFETY: the tensors have the shapes that the op checked, and the output's memory is fresh.
    unsafe { cuda.launch(kernel, plan.launch(), arguments)? };
    Ok(())
}

/// Writes the gradient of `branch`, which may lie in the memory of `branch` itself, and that of the gate.
pub(super) fn backward(
    cuda: &CudaDevice,
    blocks: &RowBlocks,
    [gradient, branch, branch_gradient]: [&Tensor; 3],
    gate: &Tensor,
    target: Option<&GradientTarget>,
) -> Result<()> {
    if blocks.groups * blocks.width == 0 {
        return Ok(());
    }
    let plan = Plan::new(cuda, blocks, &[gradient, branch, branch_gradient], gate);
    let partial = plan.runs.partial_sums(gradient.device(), 1)?;
    let kernel = cuda.kernel(&SOURCE, "gate_residual_backward", &plan.macros)?;
    let mut arguments = Arguments::new();
    for tensor in [gradient, branch, branch_gradient] {
        arguments.push(tensor.address());
    }
    push_vector(&mut arguments, Some(gate));
    arguments.push(partial.address());
    plan.push_sizes(&mut arguments);
    // SAFETY: as in `forward`; each thread has read its elements of the branch before it writes them.
    unsafe { cuda.launch(kernel, plan.launch(), arguments)? };
    sum_runs(cuda, &plan.runs, &partial, gate.dtype(), [target])
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let kinds = [(DType::F32, DType::F32, 4), (DType::BF16, DType::BF16, 8), (DType::F16, DType::F32, 1)];
    kinds.map(|(dtype, vector, pack)| Variant { source: SOURCE, macros: macros(dtype, vector, pack) }).into()
}
