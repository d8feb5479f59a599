//! Our own kernels: their arguments and launches.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;

use anneal_device::cuda::{Arguments, Kernel, Launch, Source, Variant};
use anneal_device::{CudaDevice, Purpose};

use super::super::{Gradients, NAME, Operands, Saved, Sizes};
use super::tiling::{GENERIC, REDUCE, SOURCES, Tiling, backward_tilings, forward_tilings, generic_tile};
use crate::{DType, Result, Tensor, TensorError};

pub(super) use super::tiling::MATRIX_UNIT_DIM;

/// Threads of a row in the generic kernels.
const GENERIC_LANES: usize = 8;
const REDUCE_THREADS: usize = 256;
/// Images of one launch: what the third dimension of a grid holds.
const MOST_IMAGES: usize = 65_535;

/// `Rows` of kernel_common: `[B, N or M, H, D]`, strides in elements.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Rows {
    data: u64,
    batch: i64,
    token: i64,
    head: i64,
}

/// `Arguments` of kernel_common.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct KernelArguments {
    query: Rows,
    key: Rows,
    value: Rows,
    output: Rows,
    output_gradient: Rows,
    query_gradient: Rows,
    key_gradient: Rows,
    value_gradient: Rows,
    bias: u64,
    bias_batch: i64,
    bias_head: i64,
    bias_query: i64,
    mask: u64,
    mask_batch: i64,
    log_sums: u64,
    query_partial: u64,
    bias_partial: u64,
    batch: i32,
    heads: i32,
    queries: i32,
    keys: i32,
    scale: f32,
    /// The end of the structure, named because launches are compared byte by byte.
    padding: u32,
}

fn address(tensor: &Tensor) -> u64 {
    tensor.address() as u64
}

fn rows(tensor: Option<&Tensor>) -> Rows {
    tensor.map_or(Rows::default(), |tensor| {
        let [batch, token, head] = [0, 1, 2].map(|axis| tensor.strides()[axis] as i64);
        Rows { data: address(tensor), batch, token, head }
    })
}

/// The number by which the kernels know a dtype.
fn code(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 1,
        DType::BF16 => 2,
        DType::F16 => 3,
        DType::I64 | DType::U8 => unreachable!("shapes and dtypes were checked before"),
    }
}

/// One call: what all its launches share.
struct Call<'a> {
    cuda: &'a CudaDevice,
    sizes: Sizes,
    element: DType,
    bias: Option<DType>,
    arguments: KernelArguments,
}

impl<'a> Call<'a> {
    fn new(cuda: &'a CudaDevice, sizes: &Sizes, scale: f32, operands: &Operands) -> Self {
        let Sizes { batch, queries, keys, heads, .. } = *sizes;
        let mut arguments = KernelArguments {
            query: rows(Some(&operands.query)),
            key: rows(Some(&operands.key)),
            value: rows(Some(&operands.value)),
            batch: batch as i32,
            heads: heads as i32,
            queries: queries as i32,
            keys: keys as i32,
            scale,
            ..KernelArguments::default()
        };
        if let Some(bias) = &operands.bias {
            // A dimension in which the bias is broadcast has no stride.
            let stride = |axis: usize| if bias.size(axis) == 1 { 0 } else { bias.strides()[axis] as i64 };
            arguments.bias = address(bias);
            (arguments.bias_batch, arguments.bias_head) = (stride(0), stride(1));
            arguments.bias_query = bias.strides()[2] as i64;
        }
        if let Some(mask) = &operands.mask {
            (arguments.mask, arguments.mask_batch) = (address(mask), mask.strides()[0] as i64);
        }
        let bias = operands.bias.as_ref().map(Tensor::dtype);
        Self { cuda, sizes: *sizes, element: operands.query.dtype(), bias, arguments }
    }

    /// Whether the kernels of the matrix unit serve: 16-bit elements, aligned rows of whole 16 bytes.
    fn on_matrix_unit(&self) -> bool {
        let a = &self.arguments;
        let all = [a.query, a.key, a.value, a.output, a.output_gradient];
        let gradients = [a.query_gradient, a.key_gradient, a.value_gradient];
        let aligned = |rows: &Rows| {
            rows.data.is_multiple_of(16) && [rows.batch, rows.token, rows.head].iter().all(|s| s % 8 == 0)
        };
        let dim = self.sizes.dim;
        self.element != DType::F32
            && dim.is_multiple_of(8)
            && dim <= MATRIX_UNIT_DIM
            && all.iter().chain(&gradients).all(aligned)
    }

    fn kernel(&self, source: &Source, name: &'static str, more: &[(&'static str, usize)]) -> Result<Kernel> {
        Ok(self.cuda.kernel(source, name, &macros(self.sizes.dim, self.element, self.bias, more))?)
    }

    /// The first of the shapes that fits this GPU.
    fn fitting(&self, tilings: fn(bool, usize) -> Vec<Tiling>) -> Tiling {
        let properties = self.cuda.properties();
        let mut all = tilings(properties.compute.0 == 9, self.sizes.dim);
        let fits = |tiling: &Tiling| tiling.shared <= properties.shared_memory_per_block;
        let index = all.iter().position(fits).unwrap_or(all.len() - 1);
        all.swap_remove(index)
    }

    fn generic_tile(&self) -> Result<(usize, usize)> {
        let (dim, available) = (self.sizes.dim, self.cuda.properties().shared_memory_per_block);
        let too_wide = || TensorError::shape(NAME, format!("a head dim of {dim} is too wide for this GPU"));
        generic_tile(dim, available).ok_or_else(too_wide)
    }

    /// Starts a kernel over `blocks` times heads times images.
    fn launch(&self, kernel: Kernel, blocks: usize, threads: usize, shared: usize) -> Result<()> {
        let grid = [blocks.max(1), self.sizes.heads, self.sizes.batch];
        self.launch_with(kernel, grid, threads, shared, Arguments::new().with(self.arguments))
    }

    fn launch_with(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        arguments: Arguments,
    ) -> Result<()> {
        let launch = Launch::new(grid, threads).shared(shared);
        // SAFETY: the addresses are those of tensors with these sizes and strides, alive through the call.
        unsafe { self.cuda.launch(kernel, launch, arguments)? };
        Ok(())
    }

    fn forward(&self) -> Result<()> {
        if self.on_matrix_unit() {
            let tiling = self.fitting(forward_tilings);
            let kernel = self.kernel(&tiling.source, tiling.kernel, &tiling.macros)?;
            let blocks = self.sizes.queries.div_ceil(tiling.rows);
            return self.launch(kernel, blocks, tiling.threads, tiling.shared);
        }
        let (tile, shared) = self.generic_tile()?;
        let kernel = self.kernel(&GENERIC, "attention_forward_generic", &[("TILE", tile)])?;
        self.launch(kernel, self.sizes.queries.div_ceil(tile), tile * GENERIC_LANES, shared)
    }

    fn backward(
        &mut self,
        gradients: &Gradients,
        bias_partial: Option<&Tensor>,
        like: &Tensor,
    ) -> Result<()> {
        self.arguments.query_gradient = rows(gradients.query.as_ref());
        self.arguments.key_gradient = rows(gradients.key.as_ref());
        self.arguments.value_gradient = rows(gradients.value.as_ref());
        self.arguments.bias_partial = bias_partial.map_or(0, address);
        if self.on_matrix_unit() {
            return self.backward_on_matrix_unit(gradients.query.is_some(), like);
        }
        let (tile, shared) = self.generic_tile()?;
        let (threads, macros) = (tile * GENERIC_LANES, [("TILE", tile)]);
        if gradients.query.is_some() || bias_partial.is_some() {
            let kernel = self.kernel(&GENERIC, "attention_backward_queries_generic", &macros)?;
            self.launch(kernel, self.sizes.queries.div_ceil(tile), threads, shared)?;
        }
        if gradients.key.is_some() || gradients.value.is_some() {
            let kernel = self.kernel(&GENERIC, "attention_backward_keys_generic", &macros)?;
            self.launch(kernel, self.sizes.keys.div_ceil(tile), threads, shared)?;
        }
        Ok(())
    }

    /// Keys are cut into parts where there are too few heads to fill the GPU; `like` gives the device.
    fn backward_on_matrix_unit(&mut self, query_wanted: bool, like: &Tensor) -> Result<()> {
        let Sizes { batch, queries, keys, heads, dim } = self.sizes;
        let tiling = self.fitting(backward_tilings);
        let blocks = keys.div_ceil(tiling.rows).max(1);
        let parts = parts(blocks, heads * batch, self.cuda.properties().multiprocessors);
        // Lives until the launches are queued: the memory is in the order of the stream.
        let partial = match query_wanted && blocks > 1 {
            true => {
                let sizes = [parts, batch, heads, queries, dim];
                Some(Tensor::empty_for(like.device(), &sizes, DType::F32, Purpose::Workspace)?)
            }
            false => None,
        };
        self.arguments.query_partial = partial.as_ref().map_or(0, address);
        let kernel = self.kernel(&tiling.source, tiling.kernel, &tiling.macros)?;
        self.launch(kernel, parts, tiling.threads, tiling.shared)?;
        if parts == 1 || !query_wanted {
            return Ok(());
        }
        let kernel = self.kernel(&REDUCE, "attention_reduce_queries", &[])?;
        let grid = [(queries * dim).div_ceil(REDUCE_THREADS), heads, batch];
        let arguments = Arguments::new().with(self.arguments).with(parts as i32);
        self.launch_with(kernel, grid, REDUCE_THREADS, 0, arguments)
    }

    /// The sum of `bias_partial` over the dimensions in which the bias is broadcast.
    fn reduce_bias(&mut self, bias_partial: &Tensor, gradient: &Tensor) -> Result<()> {
        self.arguments.bias_partial = address(bias_partial);
        let (b_size, h_size) = (gradient.size(0), gradient.size(1));
        if b_size > MOST_IMAGES {
            return Err(TensorError::shape(NAME, format!("a bias for each of {b_size} images is too many")));
        }
        let kernel = self.kernel(&REDUCE, "attention_reduce_bias", &[])?;
        let grid = [(self.sizes.queries * self.sizes.keys).div_ceil(REDUCE_THREADS).max(1), h_size, b_size];
        let arguments = Arguments::new()
            .with(self.arguments)
            .with(address(gradient))
            .with(b_size as i32)
            .with(h_size as i32);
        self.launch_with(kernel, grid, REDUCE_THREADS, 0, arguments)
    }
}

/// How many shares `blocks` of keys are cut into, so that `heads` of all images fill the multiprocessors;
/// no share is left without a block.
fn parts(blocks: usize, heads: usize, multiprocessors: usize) -> usize {
    let wanted = multiprocessors.div_ceil(heads.max(1)).clamp(1, blocks);
    blocks.div_ceil(blocks.div_ceil(wanted))
}

fn macros(
    dim: usize,
    element: DType,
    bias: Option<DType>,
    more: &[(&'static str, usize)],
) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("HEAD_DIM", dim.to_string()),
        ("ELEMENT", code(element).to_string()),
        ("BIAS", bias.map_or(0, code).to_string()),
    ];
    all.extend(more.iter().map(|(name, value)| (*name, value.to_string())));
    all
}

/// Images `first..first + count` of `[B, ..]`; a tensor with one for all images stays as it is.
fn images(tensor: &Tensor, first: usize, count: usize) -> Tensor {
    if tensor.size(0) == 1 {
        return tensor.detach();
    }
    let mut sizes = tensor.dims().to_vec();
    sizes[0] = count;
    tensor.view(first * tensor.strides()[0], &sizes, tensor.strides())
}

impl Operands {
    fn images(&self, first: usize, count: usize) -> Self {
        let part = |tensor: &Tensor| images(tensor, first, count);
        Self {
            query: part(&self.query),
            key: part(&self.key),
            value: part(&self.value),
            bias: self.bias.as_ref().map(part),
            mask: self.mask.as_ref().map(part),
        }
    }
}

/// First images and numbers of the launches that a batch is cut into.
fn launches_of(batch: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..batch).step_by(MOST_IMAGES).map(move |first| (first, MOST_IMAGES.min(batch - first)))
}

pub(super) fn forward(
    cuda: &CudaDevice,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    output: &Tensor,
    log_sums: Option<&Tensor>,
) -> Result<()> {
    for (first, count) in launches_of(sizes.batch) {
        let sizes = Sizes { batch: count, ..*sizes };
        let mut call = Call::new(cuda, &sizes, scale, &operands.images(first, count));
        call.arguments.output = rows(Some(&images(output, first, count)));
        call.arguments.log_sums = log_sums.map_or(0, |sums| address(&images(sums, first, count)));
        call.forward()?;
    }
    Ok(())
}

pub(super) fn backward(
    cuda: &CudaDevice,
    sizes: &Sizes,
    scale: f32,
    operands: &Operands,
    saved: &Saved,
    gradients: &Gradients,
) -> Result<()> {
    let Sizes { batch, queries, keys, heads, .. } = *sizes;
    let partial_of = |_: &Tensor| {
        let sizes = [batch, heads, queries, keys];
        Tensor::empty_for(saved.output.device(), &sizes, DType::F32, Purpose::Workspace)
    };
    let bias_partial = gradients.bias.as_ref().map(partial_of).transpose()?;
    for (first, count) in launches_of(batch) {
        let sizes = Sizes { batch: count, ..*sizes };
        let part = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| images(tensor, first, count));
        let mut call = Call::new(cuda, &sizes, scale, &operands.images(first, count));
        call.arguments.output = rows(Some(&images(&saved.output, first, count)));
        call.arguments.output_gradient = rows(Some(&images(&saved.upstream, first, count)));
        call.arguments.log_sums = address(&images(&saved.log_sums, first, count));
        let gradients = Gradients {
            query: part(&gradients.query),
            key: part(&gradients.key),
            value: part(&gradients.value),
            bias: None,
        };
        call.backward(&gradients, part(&bias_partial).as_ref(), &saved.output)?;
    }
    match (&bias_partial, &gradients.bias) {
        (Some(partial), Some(gradient)) => {
            Call::new(cuda, sizes, scale, operands).reduce_bias(partial, gradient)
        }
        _ => Ok(()),
    }
}

/// Changes with the text of any kernel, so that what was measured with another text is measured again.
pub(super) fn revision() -> u64 {
    static REVISION: OnceLock<u64> = OnceLock::new();
    *REVISION.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        SOURCES.iter().for_each(|source| source.code.hash(&mut hasher));
        hasher.finish()
    })
}

/// Every kernel in all its shapes, with and without a bias.
pub(super) fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for (dim, element, bias) in [(72, DType::BF16, None), (128, DType::F16, Some(DType::F32))] {
        for tiling in [forward_tilings(true, dim), backward_tilings(true, dim)].concat() {
            let macros = macros(dim, element, bias, &tiling.macros);
            all.push(Variant { source: tiling.source, macros });
        }
    }
    for (element, bias) in
        [(DType::F32, None), (DType::BF16, Some(DType::F16)), (DType::F16, Some(DType::BF16))]
    {
        all.push(Variant { source: GENERIC, macros: macros(33, element, bias, &[("TILE", 32)]) });
        all.push(Variant { source: REDUCE, macros: macros(72, element, bias, &[]) });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_have_the_layout_of_the_kernels() {
        assert_eq!(size_of::<Rows>(), 32);
        assert_eq!(size_of::<KernelArguments>(), 8 * 32 + 9 * 8 + 6 * 4);
        assert_eq!(std::mem::offset_of!(KernelArguments, scale), 8 * 32 + 9 * 8 + 4 * 4);
    }

    #[test]
    fn no_part_of_the_keys_is_empty() {
        assert_eq!(parts(1, 1024, 132), 1);
        assert_eq!(parts(16, 64, 132), 3);
        for blocks in 1..40 {
            for heads in [1, 2, 16, 60, 500] {
                let parts = parts(blocks, heads, 132);
                assert!(parts >= 1 && (parts - 1) * blocks.div_ceil(parts) < blocks, "{blocks} {heads}");
            }
        }
    }

    #[test]
    fn a_large_batch_is_cut_into_launches() {
        let all: Vec<_> = launches_of(140_000).collect();
        assert_eq!(all, [(0, 65_535), (65_535, 65_535), (131_070, 8_930)]);
        assert_eq!(launches_of(0).count(), 0);
    }
}
