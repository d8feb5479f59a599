//! Changes of layout: reshape, permutation of dimensions, ranges of one dimension, and their joining.
//!
//! All but `concat` are views where memory allows it; their gradients are layout changes themselves.

use crate::shape::reshape_strides;
use crate::{BackwardPass, Dims, Op, Outputs, Result, Saver, Tensor, TensorError, apply, dims};

use super::copy::{self, Piece};
use super::{only, single};

/// The same elements under other sizes; a copy only if the strides demand one.
///
/// # Errors
/// If the numbers of elements differ.
pub fn reshape(input: &Tensor, sizes: &[usize]) -> Result<Tensor> {
    Ok(only(apply(Reshape { from: dims(input.dims()), to: dims(sizes) }, &[input])?))
}

struct Reshape {
    from: Dims,
    to: Dims,
}

fn reshaped(input: &Tensor, sizes: &[usize]) -> Result<Tensor> {
    if input.elements() != sizes.iter().product::<usize>() {
        let message = format!("{:?} cannot become {sizes:?}: the numbers of elements differ", input.dims());
        return Err(TensorError::shape("reshape", message));
    }
    match reshape_strides(input.dims(), input.strides(), sizes) {
        Some(strides) => Ok(input.view(0, sizes, &strides)),
        None => input.contiguous()?.piece(0, sizes),
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        reshaped(inputs[0], &self.to).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        pass.give(0, reshaped(&gradient, &self.from)?)
    }
}

/// Dimensions in another order: output dimension `i` is input dimension `order[i]`. A view.
///
/// # Errors
/// If `order` is not a permutation of the dimensions.
pub fn permute(input: &Tensor, order: &[usize]) -> Result<Tensor> {
    let mut seen = vec![false; input.rank()];
    let valid = order.len() == input.rank()
        && order.iter().all(|axis| *axis < seen.len() && !std::mem::replace(&mut seen[*axis], true));
    if !valid {
        let message = format!("{order:?} is no order of the dimensions of {:?}", input.dims());
        return Err(TensorError::shape("permute", message));
    }
    Ok(only(apply(Permute { order: dims(order) }, &[input])?))
}

struct Permute {
    order: Dims,
}

fn permuted(input: &Tensor, order: &[usize]) -> Tensor {
    let pick = |list: &[usize]| order.iter().map(|axis| list[*axis]).collect::<Dims>();
    input.view(0, &pick(input.dims()), &pick(input.strides()))
}

impl Op for Permute {
    fn name(&self) -> &'static str {
        "permute"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        Ok(single(permuted(inputs[0], &self.order)))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let mut inverse = dims(&self.order);
        for (position, axis) in self.order.iter().enumerate() {
            inverse[*axis] = position;
        }
        let gradient = pass.only_gradient();
        pass.give(0, permuted(&gradient, &inverse))
    }
}

/// The range `start..start + len` of one dimension. A view.
///
/// # Errors
/// If the range leaves the dimension.
pub fn narrow(input: &Tensor, axis: usize, start: usize, len: usize) -> Result<Tensor> {
    if axis >= input.rank() || start + len > input.size(axis) {
        let message = format!("{start}..{} leaves dimension {axis} of {:?}", start + len, input.dims());
        return Err(TensorError::shape("narrow", message));
    }
    let op = Narrow { axis, start, len, from: dims(input.dims()) };
    Ok(only(apply(op, &[input])?))
}

struct Narrow {
    axis: usize,
    start: usize,
    len: usize,
    from: Dims,
}

impl Narrow {
    fn view(&self, whole: &Tensor) -> Tensor {
        let mut sizes = dims(whole.dims());
        sizes[self.axis] = self.len;
        whole.view(self.start * whole.strides()[self.axis], &sizes, whole.strides())
    }
}

impl Op for Narrow {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        Ok(single(self.view(inputs[0])))
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        let rest = self.from[self.axis] - self.start - self.len;
        let whole =
            joined(&self.from, self.axis, [(self.start, None), (self.len, Some(gradient)), (rest, None)])?;
        pass.give(0, whole)
    }
}

/// A contiguous tensor of these sizes whose ranges along a dimension, one after the other, are the pieces; a missing
/// one is zeros.
///
/// # Panics
/// If all are missing.
fn joined(
    sizes: &[usize],
    axis: usize,
    pieces: impl IntoIterator<Item = (usize, Option<Tensor>)>,
) -> Result<Tensor> {
    let (lens, sources): (Dims, Vec<Option<Tensor>>) = pieces.into_iter().unzip();
    let present = sources.iter().flatten().next().expect("there is a piece");
    let whole = Tensor::empty(present.device(), sizes, present.dtype())?;
    let targets = parts(&whole, axis, &lens);
    let pieces: Vec<Piece> =
        sources.into_iter().zip(targets).map(|(source, target)| Piece { source, target }).collect();
    copy::pieces(&pieces)?;
    Ok(whole)
}

/// Views of ranges of a dimension, one after the other.
fn parts(whole: &Tensor, axis: usize, lens: &[usize]) -> impl Iterator<Item = Tensor> {
    lens.iter().scan(0, move |start, &len| {
        let part = Narrow { axis, start: *start, len, from: Dims::new() }.view(whole);
        *start += len;
        Some(part)
    })
}

/// Tensors joined along one dimension, in a new contiguous tensor.
///
/// # Errors
/// If the list is empty, or sizes of other dimensions or dtypes differ.
pub fn concat(inputs: &[&Tensor], axis: usize) -> Result<Tensor> {
    let lens = inputs.iter().map(|input| input.dims().get(axis).copied().unwrap_or(0)).collect();
    Ok(only(apply(Concat { axis, lens }, inputs)?))
}

struct Concat {
    axis: usize,
    lens: Dims,
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        let fits = |input: &&Tensor| {
            let same = |axis: usize| axis == self.axis || input.size(axis) == inputs[0].size(axis);
            input.rank() == inputs[0].rank()
                && input.dtype() == inputs[0].dtype()
                && (0..input.rank()).all(same)
        };
        if inputs.is_empty() || self.axis >= inputs[0].rank() || !inputs.iter().all(fits) {
            let message = format!("{inputs:?} cannot be joined along dimension {}", self.axis);
            return Err(TensorError::shape("concat", message));
        }
        let mut sizes = dims(inputs[0].dims());
        sizes[self.axis] = self.lens.iter().sum();
        let pieces = self.lens.iter().zip(inputs).map(|(len, input)| (*len, Some((*input).clone())));
        joined(&sizes, self.axis, pieces).map(single)
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        parts(&gradient, self.axis, &self.lens)
            .enumerate()
            .try_for_each(|(index, part)| pass.give(index, part))
    }
}

/// A tensor cut along one dimension into views of the given lengths; the inverse of [`concat`].
///
/// # Errors
/// If the lengths do not add up to the dimension.
pub fn split(input: &Tensor, axis: usize, lens: &[usize]) -> Result<Outputs> {
    if axis >= input.rank() || lens.iter().sum::<usize>() != input.size(axis) {
        let message = format!("lengths {lens:?} do not add up to dimension {axis} of {:?}", input.dims());
        return Err(TensorError::shape("split", message));
    }
    apply(Split { axis, lens: dims(lens), from: dims(input.dims()) }, &[input])
}

struct Split {
    axis: usize,
    lens: Dims,
    from: Dims,
}

impl Op for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn forward(&self, inputs: &[&Tensor], _saver: &mut Saver) -> Result<Outputs> {
        Ok(parts(inputs[0], self.axis, &self.lens).collect())
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradients: Vec<_> =
            self.lens.iter().enumerate().map(|(index, len)| (*len, pass.take_gradient(index))).collect();
        pass.give(0, joined(&self.from, self.axis, gradients)?)
    }
}
