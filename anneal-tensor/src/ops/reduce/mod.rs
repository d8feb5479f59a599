//! Sums, means and maxima over any dimensions.
//!
//! Accumulated in f32 in an order that the shape alone decides; the result has the input's dtype.
//! Gradients, with `g` that of the result: of a sum `g`, of a mean `g / n`, of a maximum `g` shared
//! equally among the elements that equal it; each broadcast over the dimensions that went.

pub(super) mod cpu;
pub(super) mod cuda;

use anneal_device::{Device, Purpose};
use smallvec::SmallVec;

use super::elementwise::check_float;
use super::{cast, only, single, unary};
use crate::{BackwardPass, DType, Dims, Op, Outputs, Result, Saver, Tensor, TensorError, apply, dims};

/// The sum over `axes`; with `keep` they stay as dimensions of size one.
///
/// # Errors
/// If an axis is no dimension of `x` or is named twice, or the dtype is no float.
pub fn sum(x: &Tensor, axes: &[usize], keep: bool) -> Result<Tensor> {
    reduced("sum", Kind::Sum { mean: false }, x, axes, keep)
}

/// The mean over `axes`; with `keep` they stay as dimensions of size one.
///
/// # Errors
/// If an axis is no dimension of `x` or is named twice, there is nothing to take the mean of, or the
/// dtype is no float.
pub fn mean(x: &Tensor, axes: &[usize], keep: bool) -> Result<Tensor> {
    reduced("mean", Kind::Sum { mean: true }, x, axes, keep)
}

/// The maximum over `axes` (NaN if there is one); with `keep` they stay as dimensions of size one.
///
/// # Errors
/// If an axis is no dimension of `x` or is named twice, there is nothing to take the maximum of, or the
/// dtype is no float.
pub fn max(x: &Tensor, axes: &[usize], keep: bool) -> Result<Tensor> {
    reduced("max", Kind::Max, x, axes, keep)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Sum { mean: bool },
    Max,
}

/// For each dimension whether it goes.
pub(super) type Flags = SmallVec<[bool; 6]>;

fn reduced(name: &'static str, kind: Kind, x: &Tensor, axes: &[usize], keep: bool) -> Result<Tensor> {
    check_float(name, x.dtype())?;
    let mut flags: Flags = SmallVec::from_elem(false, x.rank());
    if axes.iter().any(|axis| *axis >= x.rank() || std::mem::replace(&mut flags[*axis], true)) {
        let message = format!("{axes:?} are no distinct dimensions of shape {:?}", x.dims());
        return Err(TensorError::shape(name, message));
    }
    let count: usize = axes.iter().map(|axis| x.size(*axis)).product();
    if count == 0 && kind != (Kind::Sum { mean: false }) {
        let message = format!("dimensions {axes:?} of shape {:?} have no elements", x.dims());
        return Err(TensorError::shape(name, message));
    }
    let factor = if kind == (Kind::Sum { mean: true }) { 1.0 / count as f32 } else { 1.0 };
    let op = Reduce { name, kind, factor, flags, keep, from: dims(x.dims()), dtype: x.dtype() };
    Ok(only(apply(op, &[x])?))
}

struct Reduce {
    name: &'static str,
    kind: Kind,
    factor: f32,
    flags: Flags,
    keep: bool,
    from: Dims,
    dtype: DType,
}

/// The dimensions of a contiguous tensor as a reduction walks them: neighbours that both stay or both go
/// are one.
struct Axes {
    /// Sizes and strides of the outer dimensions that stay and that go, innermost first.
    kept: SmallVec<[(usize, usize); 6]>,
    gone: SmallVec<[(usize, usize); 6]>,
    /// The innermost dimension, and whether it goes.
    inner: usize,
    inner_goes: bool,
}

impl Axes {
    fn new(sizes: &[usize], flags: &[bool]) -> Self {
        let mut merged: SmallVec<[(usize, bool); 6]> = SmallVec::new();
        for (&size, &flag) in sizes.iter().zip(flags).filter(|(size, _)| **size != 1) {
            match merged.last_mut() {
                Some((last, goes)) if *goes == flag => *last *= size,
                _ => merged.push((size, flag)),
            }
        }
        let (inner, inner_goes) = merged.pop().unwrap_or((1, false));
        let mut axes = Self { kept: SmallVec::new(), gone: SmallVec::new(), inner, inner_goes };
        let mut stride = inner;
        for (size, goes) in merged.into_iter().rev() {
            if goes { &mut axes.gone } else { &mut axes.kept }.push((size, stride));
            stride *= size;
        }
        axes
    }

    /// Elements of the outer dimensions that stay and that go.
    fn counts(&self) -> (usize, usize) {
        let product = |axes: &[(usize, usize)]| axes.iter().map(|axis| axis.0).product();
        (product(&self.kept), product(&self.gone))
    }
}

impl Reduce {
    /// The sizes of the result with each reduced dimension at one.
    fn kept_sizes(&self) -> Dims {
        self.from.iter().zip(&self.flags).map(|(size, gone)| if *gone { 1 } else { *size }).collect()
    }

    fn output_sizes(&self) -> Dims {
        let stay = |gone: &bool| self.keep || !gone;
        let kept = self.kept_sizes();
        kept.iter().zip(&self.flags).filter(|(_, gone)| stay(gone)).map(|(size, _)| *size).collect()
    }

    /// How many elements equal their maximum `y`.
    fn ties(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let equal = Tensor::empty_for(x.device(), x.dims(), DType::F32, Purpose::Workspace)?;
        let mut count = Tensor::empty(x.device(), y.dims(), DType::F32)?;
        match x.device() {
            Device::Cpu(cpu) => {
                cpu::equal(&cpu.pool, x, y, &equal);
                cpu::sum(&cpu.pool, &equal, &self.flags, 1.0, &mut count, false)?;
            }
            Device::Cuda(cuda) => {
                cuda::equal(cuda, x, y, &equal)?;
                cuda::sum(cuda, &equal, &self.flags, 1.0, &count, false)?;
            }
        }
        Ok(count)
    }
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        let x = inputs[0].contiguous()?;
        let mut y = Tensor::empty(x.device(), &self.kept_sizes(), DType::F32)?;
        match (x.device(), self.kind) {
            (Device::Cpu(cpu), Kind::Sum { .. }) => {
                cpu::sum(&cpu.pool, &x, &self.flags, self.factor, &mut y, false)?
            }
            (Device::Cpu(cpu), Kind::Max) => cpu::max(&cpu.pool, &x, &self.flags, &mut y)?,
            (Device::Cuda(cuda), Kind::Sum { .. }) => {
                cuda::sum(cuda, &x, &self.flags, self.factor, &y, false)?
            }
            (Device::Cuda(cuda), Kind::Max) => cuda::max(cuda, &x, &self.flags, &y)?,
        }
        if self.kind == Kind::Max {
            saver.input(0, inputs[0]);
            saver.tensor(&y);
        }
        cast(&y.piece(0, &self.output_sizes())?, self.dtype).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient().contiguous()?.piece(0, &self.kept_sizes())?;
        let dx = Tensor::empty(gradient.device(), &self.from, self.dtype)?;
        match (self.kind, gradient.device()) {
            (Kind::Sum { .. }, Device::Cpu(cpu)) => cpu::expand(&cpu.pool, &gradient, self.factor, &dx),
            (Kind::Sum { .. }, Device::Cuda(cuda)) => {
                unary::cuda::scaled(cuda, &gradient, self.factor, &dx)?;
            }
            (Kind::Max, device) => {
                let (x, y) = (pass.take_saved(0)?, pass.take_saved(1)?);
                let ties = self.ties(&x, &y)?;
                let of = [&x, &y, &ties];
                match device {
                    Device::Cpu(cpu) => cpu::share(&cpu.pool, &gradient, of, &dx),
                    Device::Cuda(cuda) => cuda::share(cuda, &gradient, of, &dx)?,
                }
            }
        }
        pass.give(0, dx)
    }
}
