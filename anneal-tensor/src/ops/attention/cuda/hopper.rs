//! Attention by warpgroups on Hopper: maps for the copy engine; gradients in parts of queries, sums over them.

use anneal_device::cuda::{Arguments, Boxes, TensorMap};
use anneal_device::{CudaDevice, Purpose};

use super::geometry::{self, Family, Geometry};
use super::{
    Attention, BACKWARD_WGMMA, FORWARD_WGMMA, Gradients, Operands, Parameters, Saved, Sizes, reduce_rows,
    start,
};
use crate::{DType, Result, Tensor};

const BOX_ROWS: usize = 64;
/// Columns of a box: of a panel, and of a chunk for what is left of the head dim.
const BOX_COLUMNS: [usize; 2] = [64, 8];

/// `Maps` of backward_wgmma.cu.
type Maps = [[TensorMap; 2]; 8];

fn maps_of(cuda: &CudaDevice, rows: &Tensor) -> Result<[TensorMap; 2]> {
    let sizes = [0, 1, 2, 3].map(|axis| rows.size(axis));
    let strides = [0, 1, 2, 3].map(|axis| rows.strides()[axis]);
    let element = rows.dtype().element_type("attention")?;
    let [panels, chunks] = BOX_COLUMNS.map(|columns| {
        let sides = [1, BOX_ROWS, 1, columns];
        cuda.tensor_map(&Boxes { address: rows.address(), element, sizes, strides, sides })
    });
    Ok([panels?, chunks?])
}

pub(super) fn forward(
    cuda: &CudaDevice,
    operands: &Operands,
    output: &Tensor,
    macros: &[(&'static str, String)],
    geometry: &Geometry,
    parameters: Parameters,
) -> Result<()> {
    let [query, key, value] =
        [&operands.query, &operands.key, &operands.value].map(|rows| maps_of(cuda, rows));
    let maps = [query?, key?, value?, maps_of(cuda, output)?];
    let [batch, queries, heads] = [0, 1, 2].map(|axis| output.size(axis));
    let visits = queries.div_ceil(geometry.rows) * heads * batch;
    let launch = geometry.launch([visits.min(cuda.properties().multiprocessors), 1, 1]);
    let arguments = Arguments::new().with(parameters).with(maps);
    start(cuda, (&FORWARD_WGMMA, "attention_forward_wgmma"), macros, launch, arguments)
}

/// How backward deals the queries of all heads.
struct Deal {
    geometry: Geometry,
    /// Parts of a head's queries, each of one block of threads.
    parts: usize,
    /// Whether those of a head are a cluster.
    clusters: bool,
    /// Blocks of threads.
    grid: usize,
}

impl Deal {
    /// In clusters, where a head needs several blocks of threads and the device takes such.
    fn new(cuda: &CudaDevice, sizes: &Sizes, macros: &[(&'static str, String)]) -> Result<Self> {
        let (dim, queries, heads) = (sizes.dim, sizes.queries, sizes.batch * sizes.heads);
        let geometry = Geometry::backward(Family::Warpgroups, dim, queries, cuda.properties());
        let parts = geometry.cluster();
        if parts > 1 {
            let own = [macros.to_vec(), geometry.macros()].concat();
            let kernel = cuda.kernel(&BACKWARD_WGMMA, "attention_backward_wgmma", &own)?;
            let launch = geometry.launch([parts * heads, 1, 1]);
            let clusters = cuda.clusters_at_once(kernel, launch, parts).unwrap_or(0).min(heads);
            if clusters > 0 {
                return Ok(Self { geometry, parts, clusters: true, grid: parts * clusters });
            }
        }
        let multiprocessors = cuda.properties().multiprocessors;
        let geometry = Geometry::backward_of_warpgroups(dim, queries, false);
        let parts = geometry::parts_of_queries(queries.div_ceil(geometry.rows), heads, multiprocessors);
        Ok(Self { geometry, parts, clusters: false, grid: multiprocessors.min(parts * heads) })
    }
}

/// One kernel makes all gradients; where queries are dealt to several parts without clusters, another adds their `dk` and `dv`.
pub(super) fn backward(
    cuda: &CudaDevice,
    op: &Attention,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
    macros: &[(&'static str, String)],
    mut parameters: Parameters,
) -> Result<()> {
    let Sizes { batch, queries, keys, heads, dim } = op.sizes;
    let Deal { geometry, parts, clusters, grid } = Deal::new(cuda, &op.sizes, macros)?;
    let sums = [2, parts, batch, heads, keys, dim];
    let device = saved.output.device();
    let partial = (!clusters && queries > geometry.rows)
        .then(|| Tensor::empty_for(device, &sums, DType::F32, Purpose::Workspace))
        .transpose()?;
    parameters.parts = parts as i32;
    parameters.partial = partial.as_ref().map_or(std::ptr::null_mut(), Tensor::address);

    let wanted = [&gradients.query, &gradients.key, &gradients.value];
    let inputs = [&operands.query, &operands.key, &operands.value, &saved.output, &saved.upstream];
    // Of a gradient that nobody wants the map is of something else, and not used.
    let outputs = wanted.map(|gradient| gradient.as_ref().unwrap_or(&saved.output));
    let mut maps: Maps = [maps_of(cuda, &saved.output)?; 8];
    for (map, rows) in maps.iter_mut().zip(inputs.into_iter().chain(outputs)) {
        *map = maps_of(cuda, rows)?;
    }
    let launch = geometry.launch([grid, 1, 1]);
    let own = [macros.to_vec(), geometry.macros()].concat();
    let arguments = Arguments::new().with(parameters).with(maps);
    start(cuda, (&BACKWARD_WGMMA, "attention_backward_wgmma"), &own, launch, arguments)?;

    let Some(partial) = partial.filter(|_| parts > 1) else { return Ok(()) };
    let half = partial.elements() / 2 * DType::F32.size();
    for (gradient, offset, factor) in [(&gradients.key, 0, op.scale), (&gradients.value, half, 1.0)] {
        if let Some(gradient) = gradient {
            reduce_rows(cuda, macros, gradient, partial.address().wrapping_add(offset), parts, factor)?;
        }
    }
    Ok(())
}
