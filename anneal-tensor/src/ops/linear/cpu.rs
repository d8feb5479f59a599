use anneal_device::ThreadPool;
use anneal_device::cpu::gemm::{self, Epilogue, Gemm, Matrix, MatrixMut, RowSums};
use anneal_device::cpu::{ElementType, math, vectorize};

use super::super::gradient_target::GradientTarget;
use super::Activation;
use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::shape::reshape_strides;
use crate::{DType, Float, Result, Tensor, TensorError, for_float};

/// `y = act(x W^T + b)`, and `x W^T + b` itself into `preactivation` if given.
pub(in crate::ops) fn affine(
    pool: &ThreadPool,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    preactivation: Option<&Tensor>,
    y: &Tensor,
) -> Result<()> {
    let (x, rows) = matrix_of_rows(x)?;
    let outputs = weight.size(0);
    let (weight, _) = matrix_of_weight(weight)?;
    let preactivation = preactivation.map(matrix_to_write).transpose()?;
    let epilogue = match fused(activation) {
        None => Epilogue::None,
        Some(function) => Epilogue::Activation { function, preactivation },
    };
    let problem = Gemm {
        bias: bias.map(|bias| Ok::<_, TensorError>(matrix_of_rows(bias)?.0.matrix)).transpose()?,
        epilogue,
        ..Gemm::new((rows, outputs, x.columns), x.matrix, weight.matrix.transposed(), matrix_to_write(y)?)
    };
    // SAFETY: the shapes were checked by the op, and y and the pre-activation are fresh memory.
    unsafe { gemm::gemm(pool, &problem) };
    Ok(())
}

/// `dx = g W`, times `act'(preactivation)` if one is given.
pub(in crate::ops) fn input_gradient(
    pool: &ThreadPool,
    gradient: &Tensor,
    weight: &Tensor,
    through: Option<(Activation, &Tensor)>,
    dx: &Tensor,
) -> Result<()> {
    let (gradient, rows) = matrix_of_rows(gradient)?;
    let (weight, inner) = matrix_of_weight(weight)?;
    let epilogue = match through.and_then(|(activation, tensor)| Some((fused(activation)?, tensor))) {
        None => Epilogue::None,
        Some((function, tensor)) => {
            Epilogue::ActivationBackward { function, preactivation: matrix_of_rows(tensor)?.0.matrix }
        }
    };
    let shape = (rows, inner, gradient.columns);
    let problem = Gemm { epilogue, ..Gemm::new(shape, gradient.matrix, weight.matrix, matrix_to_write(dx)?) };
    // SAFETY: the shapes were checked in forward, and dx is fresh memory.
    unsafe { gemm::gemm(pool, &problem) };
    Ok(())
}

/// `dW (+)= g^T x` and `db (+)= sum of g over rows`, in f32.
pub(super) fn parameter_gradients(
    pool: &ThreadPool,
    gradient: &Tensor,
    x: &Tensor,
    weight: Option<&GradientTarget>,
    bias: Option<&GradientTarget>,
) -> Result<()> {
    let (gradient, rows) = matrix_of_rows(gradient)?;
    match (weight, bias) {
        (Some(weight), bias) => {
            let (x, _) = matrix_of_rows(x)?;
            // SAFETY: a sink or fresh memory of [outputs, inner] and [outputs], written here alone.
            unsafe {
                let c = MatrixMut::new(weight.gradient.pointer::<f32>().cast(), ElementType::F32, x.columns);
                let shape = (gradient.columns, x.columns, rows);
                let row_sums = bias.map(|bias| RowSums::new(bias.gradient.pointer(), bias.accumulate));
                let a = gradient.matrix.transposed();
                let accumulate = weight.accumulate;
                gemm::gemm(pool, &Gemm { accumulate, row_sums, ..Gemm::new(shape, a, x.matrix, c) });
            }
        }
        (None, Some(bias)) => {
            let mut target = bias.gradient.detach();
            // SAFETY: as above, and the matrix covers [rows, outputs].
            unsafe {
                gemm::column_sums(pool, gradient.matrix, rows, target.shared_data_mut(), bias.accumulate);
            }
        }
        (None, None) => {}
    }
    Ok(())
}

/// `g *= act'(preactivation)`, element by element.
pub(super) fn activation_backward(
    pool: &ThreadPool,
    activation: Activation,
    gradient: &mut Tensor,
    preactivation: &Tensor,
) -> Result<()> {
    let Some(function) = fused(activation) else { return Ok(()) };
    for_float!("linear", gradient.dtype(), T => {
        let preactivation = preactivation.data::<T>();
        parts_mut(pool, gradient.data_mut::<T>(), ELEMENTS_PER_TASK, |index, part| {
            let preactivation = &preactivation[index * ELEMENTS_PER_TASK..][..part.len()];
            match function {
                gemm::Activation::GeluTanh => times_derivative(part, preactivation, math::gelu_tanh_derivative),
                gemm::Activation::Silu => times_derivative(part, preactivation, math::silu_derivative),
            }
        });
        Ok(())
    })
}

#[inline(always)]
fn times_derivative<T: Float>(gradient: &mut [T], preactivation: &[T], derivative: impl Fn(f32) -> f32) {
    vectorize(
        #[inline(always)]
        || {
            for (gradient, value) in gradient.iter_mut().zip(preactivation) {
                *gradient = T::from_f32(gradient.to_f32() * derivative(value.to_f32()));
            }
        },
    );
}

fn fused(activation: Activation) -> Option<gemm::Activation> {
    match activation {
        Activation::None => None,
        Activation::GeluTanh => Some(gemm::Activation::GeluTanh),
        Activation::Silu => Some(gemm::Activation::Silu),
    }
}

/// A tensor seen as a matrix; it holds the copy that a view without such strides needs.
struct Operand {
    matrix: Matrix<'static>,
    columns: usize,
    _memory: Tensor,
}

/// `[.., columns]` as `[rows, columns]`, and the number of rows.
fn matrix_of_rows(tensor: &Tensor) -> Result<(Operand, usize)> {
    let columns = tensor.size(tensor.rank() - 1);
    let rows = tensor.elements() / columns.max(1);
    Ok((operand(tensor, rows, columns)?, rows))
}

/// A weight `[outputs, ..]` as `[outputs, inner]`, and the inner size.
fn matrix_of_weight(tensor: &Tensor) -> Result<(Operand, usize)> {
    let inner = tensor.elements() / tensor.size(0).max(1);
    Ok((operand(tensor, tensor.size(0), inner)?, inner))
}

fn operand(tensor: &Tensor, rows: usize, columns: usize) -> Result<Operand> {
    let (memory, strides) = match reshape_strides(tensor.dims(), tensor.strides(), &[rows, columns]) {
        Some(strides) => (tensor.detach(), strides),
        None => (tensor.contiguous()?, crate::dims(&[columns, 1])),
    };
    let (pointer, element) = address(&memory)?;
    // SAFETY: the operand keeps the memory alive, and the strides address it alone.
    let matrix = unsafe { Matrix::new(pointer, element, strides[0], strides[1]) };
    Ok(Operand { matrix, columns, _memory: memory })
}

fn matrix_to_write(tensor: &Tensor) -> Result<MatrixMut<'static>> {
    assert!(tensor.is_contiguous(), "products are written to contiguous memory");
    let (pointer, element) = address(tensor)?;
    // SAFETY: the op that made the tensor holds it while the product runs.
    Ok(unsafe { MatrixMut::new(pointer, element, tensor.size(tensor.rank() - 1)) })
}

fn address(tensor: &Tensor) -> Result<(*mut u8, ElementType)> {
    Ok(match tensor.dtype() {
        DType::F32 => (tensor.pointer::<f32>().cast(), ElementType::F32),
        DType::BF16 => (tensor.pointer::<half::bf16>().cast(), ElementType::Bf16),
        DType::F16 => (tensor.pointer::<half::f16>().cast(), ElementType::F16),
        other => return Err(TensorError::unsupported_dtype("linear", other)),
    })
}
