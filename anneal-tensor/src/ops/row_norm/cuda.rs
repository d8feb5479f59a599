use anneal_device::cuda::{Arguments, Launch, Source, Variant};
use anneal_device::{CudaDevice, Purpose};

use super::{Again, Backward, Forward, RowNorm, Targets, Vectors};
use crate::kernels::element;
use crate::ops::cast;
use crate::ops::linear::cuda::{SumTargets, add_partials};
use crate::ops::row_blocks::RowBlocks;
use crate::ops::row_blocks::cuda::{RunBlock, Runs, address, pack, push_vector, sum_runs};
use crate::{DType, Result, Tensor};

const FORWARD: Source = Source { name: "row_norm/forward", code: include_str!("forward.cu") };
const BACKWARD: Source = Source { name: "row_norm/backward", code: include_str!("backward.cu") };

/// Elements of a row that a thread of the forward kernel may hold; wider rows get more warps.
const HELD: usize = 48;
/// The same of few rows, and what is few for a multiprocessor.
const FEW_HELD: usize = 16;
const FEW_ROWS: usize = 16;

/// Warps of the backward kernel that a multiprocessor runs at once: 168 registers for each thread, with a few spills where a branch
/// has a bias.
const RESIDENT_WARPS: usize = 12;

/// What a kernel is compiled for.
#[derive(Clone, Copy)]
struct Kind {
    element: DType,
    vector: DType,
    pack: usize,
    width: usize,
}

impl Kind {
    fn new<'a>(width: usize, rows: &[Option<&'a Tensor>], vectors: &[Option<&'a Tensor>]) -> Self {
        let element = rows.iter().flatten().next().expect("there are rows").dtype();
        let vector = vectors.iter().flatten().next().map_or(element, |vector| vector.dtype());
        let (rows, vectors) = (rows.iter().flatten().copied(), vectors.iter().flatten().copied());
        Self { element, vector, pack: pack(width, element, rows, vectors), width }
    }

    fn macros(self, sizes: &[(&'static str, usize)]) -> Vec<(&'static str, String)> {
        let types = [element("ELEMENT", self.element), element("VECTOR", self.vector)].concat();
        let sizes = sizes.iter().map(|(name, size)| (*name, size.to_string()));
        types.into_iter().chain([("PACK", self.pack.to_string())]).chain(sizes).collect()
    }
}

/// Geometry of the forward kernels: threads of a row, and packs of a thread.
struct Team {
    threads: usize,
    iterations: usize,
}

impl Team {
    /// `few` rows do not fill the device: each gets more warps, so that a thread has less to do one after the other. Half a warp
    /// is enough where no thread of it goes without a pack, while some of a whole one would.
    fn new(kind: Kind, few: bool) -> Self {
        let packs = kind.width.div_ceil(kind.pack);
        let held = if few { FEW_HELD } else { HELD };
        let halves = packs.is_multiple_of(16) && !packs.is_multiple_of(32) && !few;
        let wide =
            |threads: &usize| packs.div_ceil(*threads) * kind.pack <= held && (*threads > 16 || halves);
        let threads = [16, 32, 64, 128, 256, 512].into_iter().find(wide).unwrap_or(1024);
        Self { threads, iterations: packs.div_ceil(threads) }
    }

    fn of_rows(kind: Kind, rows: usize, cuda: &CudaDevice) -> Self {
        Self::new(kind, rows < FEW_ROWS * cuda.properties().multiprocessors)
    }

    fn macros(&self, kind: Kind) -> Vec<(&'static str, String)> {
        kind.macros(&[("TEAM", self.threads), ("ITERATIONS", self.iterations)])
    }

    fn launch(&self, rows: usize) -> Launch {
        let teams = if self.threads > 32 { 1 } else { 128 / self.threads };
        Launch::new(rows.div_ceil(teams), self.threads * teams)
    }
}

/// Geometry of the backward kernel: a thread has the same packs of columns in every row.
struct Columns {
    threads: usize,
    iterations: usize,
    /// Rows at a time: with the packs of a thread, a measure of its registers.
    rows: usize,
}

impl Columns {
    fn new(kind: Kind) -> Self {
        let packs = kind.width.div_ceil(kind.pack);
        let iterations = match packs.div_ceil(256) {
            few @ 1..=2 => few,
            _ => packs.div_ceil(512).max(1),
        };
        let threads = packs.div_ceil(iterations).max(1).next_multiple_of(32);
        // So that all but the last iteration lie in the row, which the kernel relies on.
        let iterations = packs.div_ceil(threads).max(1);
        let rows = match iterations {
            1 => 4,
            2 => 2,
            _ => 1,
        };
        Self { threads, iterations, rows }
    }

    fn macros(&self, kind: Kind, options: Options) -> Vec<(&'static str, String)> {
        let blocks = (RESIDENT_WARPS * 32 / self.threads).max(1);
        kind.macros(&[
            ("THREADS", self.threads),
            ("ITERATIONS", self.iterations),
            ("ROWS", self.rows),
            ("BLOCKS", blocks),
            ("GATED", options.gated.into()),
            ("BIASED", options.biased.into()),
            ("DIRECT", options.direct.into()),
        ])
    }
}

/// What the backward kernel may leave out.
#[derive(Clone, Copy, Default)]
struct Options {
    /// A branch, and its bias.
    gated: bool,
    biased: bool,
    /// A gradient of z as an output.
    direct: bool,
}

/// The vectors in one dtype: f32 if theirs differ.
fn of_one_dtype(vectors: &Vectors) -> Result<[Option<Tensor>; 4]> {
    let all = [&vectors.scale, &vectors.shift, &vectors.gate, &vectors.branch_bias];
    let dtype = vectors.common_dtype();
    let convert = |vector: &Option<Tensor>| match (vector, dtype) {
        (Some(vector), None) => cast(vector, DType::F32).map(Some),
        (vector, _) => Ok(vector.clone()),
    };
    Ok([convert(all[0])?, convert(all[1])?, convert(all[2])?, convert(all[3])?])
}

pub(super) fn forward(cuda: &CudaDevice, op: &RowNorm, job: &Forward) -> Result<()> {
    let RowBlocks { groups, rows, width, .. } = *job.blocks;
    if groups * rows * width == 0 {
        return Ok(());
    }
    let [scale, shift, gate, branch_bias] = of_one_dtype(job.vectors)?;
    let vectors = [scale.as_ref(), shift.as_ref(), gate.as_ref(), branch_bias.as_ref()];
    let (branch, sum) = job.gated.unzip();
    let kind = Kind::new(width, &[Some(job.x), branch, sum, Some(job.output)], &vectors);
    let team = Team::of_rows(kind, groups * rows, cuda);
    let kernel = cuda.kernel(&FORWARD, "normalize", &team.macros(kind))?;
    let mut arguments = Arguments::new().with(job.x.address());
    for tensor in [branch, sum, Some(job.output), job.statistics] {
        arguments.push(address(tensor));
    }
    vectors.iter().for_each(|vector| push_vector(&mut arguments, *vector));
    let arguments = arguments.with((groups * rows) as u32).with(rows as u32).with(width as i32);
    let arguments = arguments.with(job.vectors.base).with(op.eps).with(i32::from(op.centered));
    // SAFETY: the tensors are contiguous and of the shapes that the op checked, vectors have a row for each group.
    unsafe { cuda.launch(kernel, team.launch(groups * rows), arguments)? };
    Ok(())
}

pub(super) fn again(cuda: &CudaDevice, job: &Again) -> Result<()> {
    let RowBlocks { groups, rows, width, .. } = *job.blocks;
    if groups * rows * width == 0 {
        return Ok(());
    }
    let [scale, shift, ..] = of_one_dtype(job.vectors)?;
    let vectors = [scale.as_ref(), shift.as_ref()];
    let kind = Kind::new(width, &[Some(job.z), Some(job.output)], &vectors);
    let team = Team::of_rows(kind, groups * rows, cuda);
    let kernel = cuda.kernel(&FORWARD, "normalize_again", &team.macros(kind))?;
    let mut arguments = Arguments::new();
    for tensor in [job.z, job.statistics, job.output] {
        arguments.push(tensor.address());
    }
    vectors.iter().for_each(|vector| push_vector(&mut arguments, *vector));
    let arguments = arguments.with((groups * rows) as u32).with(rows as u32).with(width as i32);
    let arguments = arguments.with(job.vectors.base);
    // SAFETY: as in `forward`.
    unsafe { cuda.launch(kernel, team.launch(groups * rows), arguments)? };
    Ok(())
}

/// Writes the gradients of z and the branch, and those of the vectors into `targets`.
pub(super) fn backward(cuda: &CudaDevice, op: &RowNorm, job: &Backward, targets: &Targets) -> Result<()> {
    let RowBlocks { groups, width, .. } = *job.blocks;
    let bias_partial_of = |runs: usize| {
        let memory = |_| Tensor::empty_for(job.z.device(), &[1, runs, width], DType::F32, Purpose::Workspace);
        targets.branch_bias.as_ref().map(memory).transpose()
    };
    let sum_bias = |partial: Option<Tensor>| match partial.zip(targets.branch_bias.as_ref()) {
        Some((partial, target)) => add_partials(cuda, &partial, job.z.dtype(), SumTargets::one(target)),
        None => Ok(()),
    };
    if groups * width == 0 {
        return sum_bias(bias_partial_of(0)?);
    }
    let [scale, _, gate, branch_bias] = of_one_dtype(job.vectors)?;
    let vectors = [scale.as_ref(), gate.as_ref(), branch_bias.as_ref()];
    let (branch, branch_gradient) = job.branch.unzip();
    let rows =
        [Some(job.z), Some(job.gradient), job.sum_gradient, Some(job.z_gradient), branch, branch_gradient];
    let kind = Kind::new(width, &rows, &vectors);
    let columns = Columns::new(kind);
    let block = RunBlock { residents: RESIDENT_WARPS, warps: columns.threads / 32, together: columns.rows };
    let runs = Runs::new(job.blocks, block, cuda.properties().multiprocessors);
    let partial = runs.partial_sums(job.z.device(), if branch.is_some() { 3 } else { 2 })?;
    let bias_partial = bias_partial_of(runs.count())?;
    let (gated, biased, direct) = (branch.is_some(), branch_bias.is_some(), job.sum_gradient.is_some());
    let macros = columns.macros(kind, Options { gated, biased, direct });
    let kernel = cuda.kernel(&BACKWARD, "normalize_backward", &macros)?;
    let mut arguments = Arguments::new();
    for tensor in [Some(job.z), Some(job.statistics), Some(job.gradient), job.sum_gradient] {
        arguments.push(address(tensor));
    }
    for tensor in [Some(job.z_gradient), branch, branch_gradient] {
        arguments.push(address(tensor));
    }
    vectors.iter().for_each(|vector| push_vector(&mut arguments, *vector));
    let arguments = arguments.with(partial.address()).with(address(bias_partial.as_ref()));
    let arguments = arguments.with(runs.rows as u32).with(runs.run as u32).with(runs.per_group as u32);
    let arguments = arguments.with(width as i32).with(job.vectors.base).with(i32::from(op.centered));
    // SAFETY: as in `forward`; results share memory only with what the same thread has read before.
    unsafe { cuda.launch(kernel, Launch::new(runs.count(), columns.threads), arguments)? };
    sum_runs(cuda, &runs, &partial, op.sum_dtype(), targets.of_groups.each_ref().map(Option::as_ref))?;
    sum_bias(bias_partial)
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let (f32, bf16, f16) = (DType::F32, DType::BF16, DType::F16);
    let kinds = [
        (f32, f32, 1152, 4),
        (f32, f32, 37, 1),
        (bf16, bf16, 1152, 8),
        (bf16, bf16, 384, 8),
        (bf16, bf16, 9000, 8),
        (f16, f32, 1152, 8),
        (f16, f16, 37, 1),
    ];
    let mut all = Vec::new();
    for (element, vector, width, pack) in kinds {
        let kind = Kind { element, vector, pack, width };
        let teams = [false, true].map(|few| Team::new(kind, few).macros(kind));
        all.extend(teams.map(|macros| Variant { source: FORWARD, macros }));
        let plain = Options::default();
        let gated = [false, true].map(|biased| Options { gated: true, biased, direct: false });
        let both = gated.into_iter().flat_map(|options| [options, Options { direct: true, ..options }]);
        let forms = both.chain([plain]).map(|options| Columns::new(kind).macros(kind, options));
        all.extend(forms.map(|macros| Variant { source: BACKWARD, macros }));
    }
    all
}
