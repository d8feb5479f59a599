//! What kernels over rows share on a GPU: how rows are cut into runs, how many elements a thread
//! loads together, and the sums of runs added up.
//!
//! Contract: the cut depends on the shape and the number of multiprocessors, and so do the bits of every sum.

use anneal_device::cuda::{Arguments, Launch, Source, Variant};
use anneal_device::{CudaDevice, Purpose};

use super::RowBlocks;
use crate::kernels::element;
use crate::ops::gradient_target::GradientTarget;
use crate::{DType, Device, Result, Tensor};

const SOURCE: Source = Source { name: "row_blocks", code: include_str!("kernel.cu") };

/// A run has at least about this many rows, so that the sums of runs, which are written and read once more, stay small
/// beside the rows.
const LEAST_ROWS: usize = 16;
/// What beginning and ending a run takes, in rows.
const RUN_COST: usize = 8;
/// Runs are so many that the device goes through them at most so many times, unless the groups alone are more.
const MOST_WAVES: usize = 4;
/// Runs of a group from which on several slices of a block share them.
const MANY_RUNS: usize = 16;

/// The threads that a kernel has for a run.
#[derive(Clone, Copy)]
pub(in crate::ops) struct RunBlock {
    /// Warps that a multiprocessor runs at once.
    pub residents: usize,
    /// Of a block.
    pub warps: usize,
    /// Rows that a block works on at a time.
    pub together: usize,
}

/// The rows of each group cut into runs, one a block of threads.
pub(in crate::ops) struct Runs {
    pub groups: usize,
    /// Rows of a group.
    pub rows: usize,
    pub width: usize,
    /// Rows of a run; the last one of a group may have fewer.
    pub run: usize,
    /// Runs of a group, at least one.
    pub per_group: usize,
}

impl Runs {
    /// For a device of so many multiprocessors: the runs that are over first, where those of a last wave that leaves most of
    /// the device idle count as whole ones.
    pub fn new(blocks: &RowBlocks, block: RunBlock, multiprocessors: usize) -> Self {
        let RunBlock { residents, warps, together } = block;
        let (groups, rows) = (blocks.groups, blocks.rows);
        let at_once = multiprocessors * (residents / warps).max(1);
        // Of the cuts that take so many waves, the one into most parts has the shortest runs and is over first.
        let parts_of = |waves: usize| rows.div_ceil(LEAST_ROWS).min(waves * at_once / groups.max(1)).max(1);
        let run_of = |parts: usize| rows.div_ceil(parts).next_multiple_of(together).max(1);
        let cost = |run: usize| (groups * rows.div_ceil(run)).div_ceil(at_once) * (run + RUN_COST);
        let runs = (1..=MOST_WAVES).map(|waves| run_of(parts_of(waves)));
        let run = runs.min_by_key(|run| cost(*run)).expect("there is at least one");
        Self { groups, rows, width: blocks.width, run, per_group: rows.div_ceil(run).max(1) }
    }

    /// Number of runs.
    pub fn count(&self) -> usize {
        self.groups * self.per_group
    }

    /// Memory for `sums` partial sums of each run, `[groups, runs, sums, width]`.
    pub fn partial_sums(&self, device: &Device, sums: usize) -> Result<Tensor> {
        let sizes = [self.groups, self.per_group, sums, self.width];
        Tensor::empty_for(device, &sizes, DType::F32, Purpose::Workspace)
    }
}

/// The most elements, at most 16 bytes of `dtype`, that may be loaded together from contiguous rows of
/// `width` and from vectors with rows of any stride.
pub(in crate::ops) fn pack<'a>(
    width: usize,
    dtype: DType,
    rows: impl Iterator<Item = &'a Tensor> + Clone,
    vectors: impl Iterator<Item = &'a Tensor> + Clone,
) -> usize {
    let fits = |pack: usize| {
        let aligned =
            |tensor: &Tensor| (tensor.address() as usize).is_multiple_of(pack * tensor.dtype().size());
        width.is_multiple_of(pack)
            && rows.clone().all(aligned)
            && vectors.clone().all(|vector| aligned(vector) && row_stride(vector).is_multiple_of(pack))
    };
    let mut pack = 16 / dtype.size();
    while !fits(pack) {
        pack /= 2;
    }
    pack
}

/// Elements from one row of a vector per group to the next; 0 if one row serves all.
fn row_stride(vector: &Tensor) -> usize {
    if vector.rank() == 1 || vector.size(0) == 1 { 0 } else { vector.strides()[0] }
}

/// A vector's address (null if there is none) and the stride of its rows, as kernels take them.
pub(in crate::ops) fn push_vector(arguments: &mut Arguments, vector: Option<&Tensor>) {
    arguments.push(vector.map_or(std::ptr::null_mut(), Tensor::address));
    arguments.push(vector.map_or(0, row_stride) as i64);
}

/// A tensor's address, null if there is none.
pub(in crate::ops) fn address(tensor: Option<&Tensor>) -> *mut u8 {
    tensor.map_or(std::ptr::null_mut(), Tensor::address)
}

/// As the kernel's structure of that name.
#[derive(Clone, Copy)]
#[repr(C)]
struct Target {
    gradient: *mut u8,
    wide: i32,
    accumulate: i32,
}

fn macros(vector: DType, slices: usize, columns: usize) -> Vec<(&'static str, String)> {
    let sizes = [("SLICES", slices.to_string()), ("COLUMNS", columns.to_string())];
    [element("VECTOR", vector), sizes.to_vec()].concat()
}

/// Slices and columns of a block.
fn shape(runs: &Runs) -> [usize; 2] {
    if runs.per_group > MANY_RUNS { [16, 32] } else { [1, 128] }
}

/// Writes the sums of `partial`, `[groups, runs, sums, width]`, into as many targets or fewer, each of f32 or `vector`.
pub(in crate::ops) fn sum_runs<const N: usize>(
    cuda: &CudaDevice,
    runs: &Runs,
    partial: &Tensor,
    vector: DType,
    targets: [Option<&GradientTarget>; N],
) -> Result<()> {
    const { assert!(N <= 3) };
    if targets.iter().all(Option::is_none) {
        return Ok(());
    }
    let [slices, columns] = shape(runs);
    let kernel = cuda.kernel(&SOURCE, "sum_runs", &macros(vector, slices, columns))?;
    let mut arguments = Arguments::new().with(partial.address());
    for target in (0..3).map(|index| targets.get(index).copied().flatten()) {
        arguments.push(Target {
            gradient: address(target.map(|target| &target.gradient)),
            wide: target.is_some_and(|target| target.gradient.dtype() == DType::F32).into(),
            accumulate: target.is_some_and(|target| target.accumulate).into(),
        });
    }
    let column_blocks = runs.width.div_ceil(columns);
    for number in [runs.per_group, partial.size(2), runs.width, column_blocks] {
        arguments.push(number as u32);
    }
    let launch = Launch::new(runs.groups * column_blocks, [columns, slices]);
    // SAFETY: the partial sums have that shape, and each target has [groups, width] of the dtype its flag says.
    unsafe { cuda.launch(kernel, launch, arguments)? };
    Ok(())
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let shapes = [[1, 128], [16, 32]];
    let pairs = dtypes.iter().flat_map(|dtype| shapes.map(|[slices, columns]| (*dtype, slices, columns)));
    pairs
        .map(|(dtype, slices, columns)| Variant { source: SOURCE, macros: macros(dtype, slices, columns) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    /// A call, and the cut worked out by hand.
    struct Case {
        groups: usize,
        rows: usize,
        block: RunBlock,
        /// Rows of a run, runs of a group.
        expected: (usize, usize),
    }

    /// Of normalize_backward (12 resident warps, 4 rows together) and of gate_residual (16, 8). In the comments, the cost
    /// of the best cuts into one, two, three and four waves: waves times (rows of a run + 8).
    fn cases() -> Vec<Case> {
        let case = |[groups, rows]: [usize; 2], [residents, warps, together]: [usize; 3], expected| Case {
            groups,
            rows,
            block: RunBlock { residents, warps, together },
            expected,
        };
        vec![
            // DiT-B/2: 528 runs at once. 1 (128 + 8), 2 (64 + 8), 3 (44 + 8), 4 (32 + 8).
            case([256, 256], [12, 3, 4], (128, 2)),
            // 660 at once. 1 (128 + 8), 2 (56 + 8), 3 (40 + 8), 4 (32 + 8).
            case([256, 256], [16, 3, 8], (56, 5)),
            // DiT-S/2: 792 at once. 1 (88 + 8), 2 (44 + 8), 3 (32 + 8), 4 (24 + 8).
            case([256, 256], [12, 2, 4], (88, 3)),
            // DiT-XL/2: 264 at once. 1 (64 + 8), 2 (32 + 8), 3 (24 + 8), 4 (16 + 8).
            case([64, 256], [12, 5, 4], (64, 4)),
            // 1 (128 + 8), 2 (64 + 8), 3 (44 + 8), 4 (32 + 8).
            case([128, 256], [12, 5, 4], (128, 2)),
            // 396 at once. 1 (88 + 8), 2 (48 + 8), 3 (32 + 8), 4 (24 + 8).
            case([128, 256], [16, 5, 8], (88, 3)),
            // 264 at once. 1 (3788 + 8), 2 (1896 + 8), 3 (1264 + 8), 4 (948 + 8).
            case([1, 1_000_000], [12, 5, 4], (3788, 264)),
            // Few rows are one run, as are the groups where they alone are more than four waves.
            case([1, 1], [12, 5, 4], (4, 1)),
            case([2, 15], [16, 3, 8], (16, 1)),
            case([3000, 256], [12, 5, 4], (256, 1)),
            case([5, 0], [12, 5, 4], (1, 1)),
        ]
    }

    impl Case {
        fn at_once(&self) -> usize {
            MULTIPROCESSORS * (self.block.residents / self.block.warps).max(1)
        }

        fn runs(&self) -> Runs {
            let blocks = RowBlocks::new(self.groups, self.rows, 768);
            Runs::new(&blocks, self.block, MULTIPROCESSORS)
        }

        /// How long runs of so many rows take.
        fn cost(&self, run: usize) -> usize {
            (self.groups * self.rows.div_ceil(run)).div_ceil(self.at_once()) * (run + RUN_COST)
        }

        fn check(&self) {
            let Self { groups, rows, block: RunBlock { together, .. }, .. } = *self;
            let Runs { run, per_group, .. } = self.runs();
            let name = format!("{groups} x {rows}: {per_group} runs of {run}");
            assert!(per_group >= 1 && run * per_group >= rows, "{name}: rows are left");
            assert!(per_group == 1 || run * (per_group - 1) < rows, "{name}: a run is empty");
            assert!(run.is_multiple_of(together) || rows == 0, "{name}: turns of {together} rows");
            let waves = (groups * per_group).div_ceil(self.at_once());
            assert!(waves <= MOST_WAVES.max(groups.div_ceil(self.at_once())), "{name}: {waves} waves");
            // Of all cuts that are allowed.
            let most = rows.div_ceil(LEAST_ROWS).min(MOST_WAVES * self.at_once() / groups.max(1)).max(1);
            let all = (1..=most).map(|parts| rows.div_ceil(parts).next_multiple_of(together).max(1));
            let least = all.map(|run| self.cost(run)).min().unwrap();
            assert_eq!(self.cost(run), least, "{name}: another cut is over first");
        }
    }

    #[test]
    fn runs_are_those_that_are_over_first() {
        for case in cases() {
            case.check();
            let runs = case.runs();
            assert_eq!((runs.run, runs.per_group), case.expected, "{} x {}", case.groups, case.rows);
        }
    }

    #[test]
    fn runs_of_any_shape_cover_the_rows_and_none_is_empty() {
        for groups in [0, 1, 2, 7, 64, 131, 133, 500, 2111, 2113] {
            for rows in [1, 3, 16, 17, 100, 255, 257, 1024, 5000] {
                for (residents, together) in [(12, 1), (12, 2), (12, 4), (16, 8)] {
                    for warps in [1, 3, 8, 16] {
                        let (block, expected) = (RunBlock { residents, warps, together }, (0, 0));
                        Case { groups, rows, block, expected }.check();
                    }
                }
            }
        }
    }
}
