//! Rows picked by index, and rows placed by index: `embedding`, `gather_rows`, `scatter_rows`.
//!
//! Picking `y[k] = x[index[k]]` and placing `y[index[k]] += x[k]` are each other's gradient. Rows
//! placed at one index are added up in the order of `k`, so repeated indices are deterministic.
//! On a GPU the indices are not looked at before the kernel runs, because that would wait for the device: whoever
//! uploads them checks them on the host. An index outside picks a row of NaN there, which no later step
//! takes for a result, and is ignored where rows are placed.

mod cpu;
pub(super) mod cuda;

use anneal_device::Device;

use super::gradient_target::GradientTarget;
use super::{cast, only, single};
use crate::{BackwardPass, DType, Dims, Op, Outputs, Result, Saver, Tensor, TensorError, apply, dims};

/// Rows of `table` `[v, d]` at `ids` i64 `[..]`: `[.., d]` in the table's dtype.
///
/// # Errors
/// If an id is not in `0..v` (the message names it; on a GPU a row of NaN instead), or a shape or dtype does not fit.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let [rows, width] = table.shape("embedding")?;
    Ok(only(apply(Pick::new("embedding", table, [1, rows, width]), &[table, ids])?))
}

/// Row `index[b, k]` of each sample: `x` `[b, n, d]`, `index` i64 `[b, k]`, result `[b, k, d]`.
///
/// # Errors
/// If an index is not in `0..n` (the message names it; on a GPU a row of NaN instead), or a shape or dtype does not fit.
pub fn gather_rows(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let sizes = x.shape("gather_rows")?;
    check_index("gather_rows", x, index)?;
    Ok(only(apply(Pick::new("gather_rows", x, sizes), &[x, index])?))
}

/// Row `k` of each sample placed at `index[b, k]` of `n` rows; rows that no index names are zero,
/// rows named twice are sums. `x` `[b, k, d]`, `index` i64 `[b, k]`, result `[b, n, d]`.
///
/// # Errors
/// If an index is not in `0..n` (the message names it; on a GPU its row is left out instead), or a shape or dtype does not fit.
pub fn scatter_rows(x: &Tensor, index: &Tensor, n: usize) -> Result<Tensor> {
    x.shape::<3>("scatter_rows")?;
    check_index("scatter_rows", x, index)?;
    if index.dims() != &x.dims()[..2] {
        let message =
            format!("index {:?} must have one entry for each row of x {:?}", index.dims(), x.dims());
        return Err(TensorError::shape("scatter_rows", message));
    }
    Ok(only(apply(Place { rows: n }, &[x, index])?))
}

fn check_index(op: &'static str, x: &Tensor, index: &Tensor) -> Result<()> {
    let [groups, _] = index.shape(op)?;
    if groups != x.size(0) {
        let message =
            format!("index {:?} has {groups} samples, x {:?} has {}", index.dims(), x.dims(), x.size(0));
        return Err(TensorError::shape(op, message));
    }
    Ok(())
}

/// The indices in row-major order, all within `0..rows` as far as the host can see them.
fn checked(op: &'static str, index: &Tensor, rows: usize) -> Result<Tensor> {
    if index.dtype() != DType::I64 {
        return Err(TensorError::DType {
            op,
            message: format!("indices must be i64, found {}", index.dtype()),
        });
    }
    let index = index.contiguous()?;
    let outside = match index.device() {
        Device::Cpu(_) => index.data::<i64>().iter().position(|id| !(0..rows as i64).contains(id)),
        Device::Cuda(_) => None,
    };
    match outside {
        None => Ok(index),
        Some(position) => {
            let id = index.data::<i64>()[position];
            let message = format!("index {id} at position {position} is outside of 0..{rows}");
            Err(TensorError::shape(op, message))
        }
    }
}

/// `sizes` are those of x: groups, rows of a group, width.
fn picked(x: &Tensor, index: &Tensor, sizes: [usize; 3]) -> Result<Tensor> {
    let mut output_sizes = dims(index.dims());
    output_sizes.push(sizes[2]);
    let mut output = Tensor::empty(x.device(), &output_sizes, x.dtype())?;
    match x.device() {
        Device::Cpu(cpu) => cpu::pick(&cpu.pool, &x.contiguous()?, index, sizes, &mut output)?,
        Device::Cuda(cuda) => cuda::pick(cuda, &x.contiguous()?, index, sizes, &output)?,
    }
    Ok(output)
}

struct Pick {
    name: &'static str,
    /// Groups, rows of a group, and width of x.
    sizes: [usize; 3],
    dims: Dims,
    dtype: DType,
}

impl Pick {
    fn new(name: &'static str, x: &Tensor, sizes: [usize; 3]) -> Self {
        Self { name, sizes, dims: dims(x.dims()), dtype: x.dtype() }
    }
}

impl Op for Pick {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let index = checked(self.name, inputs[1], self.sizes[1])?;
        saver.tensor(&index);
        picked(inputs[0], &index, self.sizes).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?;
        let index = pass.saved(0)?;
        let Some(mut target) = GradientTarget::new(pass, 0, gradient.device(), &self.dims)? else {
            return Ok(());
        };
        match gradient.device() {
            Device::Cpu(cpu) => {
                cpu::place(&cpu.pool, &gradient, &index, self.sizes, &mut target.gradient, target.accumulate)?
            }
            Device::Cuda(cuda) => {
                cuda::place(cuda, &gradient, &index, self.sizes, &target.gradient, target.accumulate)?
            }
        }
        target.give(pass, self.dtype)
    }
}

struct Place {
    rows: usize,
}

impl Op for Place {
    fn name(&self) -> &'static str {
        "scatter_rows"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let [groups, _, width] = inputs[0].shape(self.name())?;
        let index = checked(self.name(), inputs[1], self.rows)?;
        let x = inputs[0].contiguous()?;
        let mut output = Tensor::empty(x.device(), &[groups, self.rows, width], DType::F32)?;
        match x.device() {
            Device::Cpu(cpu) => {
                cpu::place(&cpu.pool, &x, &index, [groups, self.rows, width], &mut output, false)?
            }
            Device::Cuda(cuda) => cuda::place(cuda, &x, &index, [groups, self.rows, width], &output, false)?,
        }
        saver.tensor(&index);
        cast(&output, x.dtype()).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        let index = pass.saved(0)?;
        let sizes = gradient.shape(self.name())?;
        pass.give(0, picked(&gradient, &index, sizes)?)
    }
}
