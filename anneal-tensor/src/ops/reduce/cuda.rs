use anneal_device::cuda::{Arguments, Launch, Source, Variant};
use anneal_device::{CudaDevice, Purpose};
use smallvec::smallvec;

use super::Axes;
use crate::kernels::element;
use crate::ops::elementwise::cuda::{self as elementwise, WIDEST, WalkArgument, map};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source {
    name: "reduce",
    code: concat!(include_str!("../elementwise/walk.cuh"), include_str!("kernel.cu")),
};
const MAPS: Source = Source {
    name: "reduce_maps",
    code: concat!(
        include_str!("maps.cu"),
        include_str!("../elementwise/walk.cuh"),
        include_str!("../elementwise/kernel.cu")
    ),
};
/// Threads of a block (`THREADS` in the kernel), and of a warp.
const THREADS: usize = 256;
const WARP: usize = 32;
/// Groups of at most this many elements are a warp's work.
const SMALL: usize = 2048;
/// Large groups are cut until there are about this many blocks. Not the number of multiprocessors: bits
/// should not depend on the model of the GPU.
const BLOCKS: usize = 1024;
/// A part has at least this many elements for each of its threads.
const WORK: usize = 32;

/// `Finish` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Finish {
    factor: f32,
    accumulate: u32,
}

/// `out (+)= factor * sum of x` over the flagged dimensions of a contiguous tensor; `out` is f32.
pub(in crate::ops) fn sum(
    cuda: &CudaDevice,
    x: &Tensor,
    flags: &[bool],
    factor: f32,
    out: &Tensor,
    accumulate: bool,
) -> Result<()> {
    reduce(cuda, x, flags, false, Finish { factor, accumulate: accumulate.into() }, out)
}

pub(super) fn max(cuda: &CudaDevice, x: &Tensor, flags: &[bool], out: &Tensor) -> Result<()> {
    reduce(cuda, x, flags, true, Finish { factor: 1.0, accumulate: 0 }, out)
}

/// One launch, or two by way of the results of parts where there are few groups.
fn reduce(
    cuda: &CudaDevice,
    x: &Tensor,
    flags: &[bool],
    maximum: bool,
    finish: Finish,
    out: &Tensor,
) -> Result<()> {
    assert!(x.is_contiguous() && out.is_contiguous() && out.dtype() == DType::F32);
    if out.elements() == 0 {
        return Ok(());
    }
    let axes = Axes::new(x.dims(), flags);
    let stage = Stage::new(&axes, x);
    if stage.parts == 1 {
        return stage.launch(cuda, &axes, x, maximum, finish, out);
    }
    let (groups, width) = (axes.counts().0, if axes.inner_goes { 1 } else { axes.inner });
    let sizes = [groups, stage.parts, width];
    let partial = Tensor::empty_for(x.device(), &sizes, DType::F32, Purpose::Workspace)?;
    stage.launch(cuda, &axes, x, maximum, Finish { factor: 1.0, accumulate: 0 }, &partial)?;
    let (kept, gone) = (smallvec![(groups, stage.parts * width)], (stage.parts, width));
    let axes = match axes.inner_goes {
        true => Axes { kept, gone: smallvec![], inner: gone.0, inner_goes: true },
        false => Axes { kept, gone: smallvec![gone], inner: width, inner_goes: false },
    };
    Stage { parts: 1, ..Stage::new(&axes, &partial) }.launch(cuda, &axes, &partial, maximum, finish, out)
}

/// How one launch cuts its work.
struct Stage {
    pack: usize,
    /// Threads along a row: of a warp or block where the row goes, else those side by side.
    lanes: usize,
    /// Positions of a group: packs where the innermost dimension goes, else rows.
    count: usize,
    parts: usize,
}

impl Stage {
    fn new(axes: &Axes, x: &Tensor) -> Self {
        let widest = WIDEST / x.dtype().size();
        let aligned = (x.address() as usize).is_multiple_of(WIDEST) && axes.inner.is_multiple_of(widest);
        let pack = if aligned { widest } else { 1 };
        let ((groups, gone), packs) = (axes.counts(), axes.inner / pack);
        if axes.inner_goes {
            let lanes = if gone * axes.inner <= SMALL { WARP } else { THREADS };
            let most = gone * axes.inner / (THREADS * WORK);
            let parts = if lanes == WARP { 1 } else { (BLOCKS / groups).min(most).max(1) };
            return Self { pack, lanes, count: gone * packs, parts };
        }
        let lanes = packs.next_power_of_two().min(WARP);
        let tiles = packs.div_ceil(lanes);
        let most = gone * pack / (THREADS / lanes * WORK);
        Self { pack, lanes, count: gone, parts: (BLOCKS / (groups * tiles)).min(most).max(1) }
    }

    fn launch(
        &self,
        cuda: &CudaDevice,
        axes: &Axes,
        x: &Tensor,
        maximum: bool,
        finish: Finish,
        out: &Tensor,
    ) -> Result<()> {
        let groups = axes.counts().0;
        let outer =
            |axes: &[(usize, usize)]| axes.iter().map(|(size, step)| (*size, [*step])).collect::<Vec<_>>();
        let (kept, mut gone) = (outer(&axes.kept), outer(&axes.gone));
        if axes.inner_goes {
            gone.insert(0, (axes.inner, [1]));
        }
        let kept = WalkArgument::<1>::new("reduce", kept.into_iter(), 1)?;
        let gone =
            WalkArgument::<1>::new("reduce", gone.into_iter(), if axes.inner_goes { self.pack } else { 1 })?;
        let part = self.count.div_ceil(self.parts);
        let (name, launch, first) = match axes.inner_goes {
            true => {
                let blocks = (groups * self.parts).div_ceil(THREADS / self.lanes);
                ("reduce_rows", Launch::new(blocks, THREADS), groups)
            }
            false => {
                let tiles = (axes.inner / self.pack).div_ceil(self.lanes);
                let block = [self.lanes, THREADS / self.lanes];
                ("reduce_columns", Launch::new(groups * self.parts * tiles, block), axes.inner)
            }
        };
        let lanes = axes.inner_goes.then_some(self.lanes);
        let index = if x.elements() < 1 << 31 { "u32" } else { "u64" };
        let kernel = cuda.kernel(&SOURCE, name, &macros(x.dtype(), maximum, self.pack, lanes, index))?;
        let arguments = Arguments::new()
            .with(x.address())
            .with(out.address())
            .with(kept)
            .with(gone)
            .with(first as u64)
            .with(self.count as u64)
            .with(self.parts as u64)
            .with(part as u64)
            .with(finish);
        // SAFETY: the walks cover the contiguous x, and out has a number for each part of each group.
        unsafe { cuda.launch(kernel, launch, arguments)? };
        Ok(())
    }
}

fn macros(
    dtype: DType,
    maximum: bool,
    pack: usize,
    lanes: Option<usize>,
    index: &str,
) -> Vec<(&'static str, String)> {
    let mut macros = element("ELEMENT", dtype);
    macros.extend([("PACK", pack.to_string()), ("INDEX", index.to_string())]);
    macros.extend(lanes.map(|lanes| ("LANES", lanes.to_string())));
    macros.extend(maximum.then(|| ("MAXIMUM", "1".to_string())));
    macros
}

/// One where `x` is its maximum, else zero.
pub(super) fn equal(cuda: &CudaDevice, x: &Tensor, maximum: &Tensor, out: &Tensor) -> Result<()> {
    map(cuda, EQUAL, [x, maximum], out)
}

/// The gradient of each maximum in equal shares; `of` are x, the maxima, and how many share each.
pub(super) fn share(cuda: &CudaDevice, gradient: &Tensor, of: [&Tensor; 3], dx: &Tensor) -> Result<()> {
    map(cuda, SHARE, [gradient, of[0], of[1], of[2]], dx)
}

const EQUAL: elementwise::Function =
    elementwise::Function { source: MAPS, kernel: "map_equal", numbers: [0.0; 2] };
const SHARE: elementwise::Function =
    elementwise::Function { source: MAPS, kernel: "map_share", numbers: [0.0; 2] };

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for lanes in [Some(WARP), Some(THREADS), None] {
            for (maximum, pack) in [(false, WIDEST / dtype.size()), (false, 1), (true, 1)] {
                let macros = macros(dtype, maximum, pack, lanes, "u32");
                all.push(Variant { source: SOURCE, macros });
            }
        }
        all.push(elementwise::variant(EQUAL, &[dtype, DType::F32], DType::F32));
        all.push(elementwise::variant(SHARE, &[dtype, dtype, DType::F32, DType::F32], dtype));
    }
    for lanes in [Some(WARP), Some(THREADS), None] {
        all.push(Variant { source: SOURCE, macros: macros(DType::BF16, false, 8, lanes, "u64") });
    }
    all
}
