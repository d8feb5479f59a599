use anneal_device::ThreadPool;
use anneal_device::cpu::gemm::{self, Epilogue, Gemm, Matrix, MatrixMut, RowSums};
use anneal_device::cpu::{ElementType, math, vectorize};

use super::super::gradient_target::GradientTarget;
use super::Activation;
use super::matrix::MatrixView;
use crate::parallel::{ELEMENTS_PER_TASK, parts_mut};
use crate::{Float, Result, Tensor, TensorError, for_float};

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
    let (x, weight) = (MatrixView::of_rows(x)?, MatrixView::of_weight(weight)?);
    let bias = bias.map(MatrixView::of_rows).transpose()?;
    let preactivation = preactivation.map(matrix_to_write).transpose()?;
    let epilogue = match fused(activation) {
        None => Epilogue::None,
        Some(function) => Epilogue::Activation { function, preactivation },
    };
    let problem = Gemm {
        bias: bias.as_ref().map(matrix).transpose()?,
        epilogue,
        ..Gemm::new(
            (x.rows, weight.rows, x.columns),
            matrix(&x)?,
            matrix(&weight)?.transposed(),
            matrix_to_write(y)?,
        )
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
    let (gradient, weight) = (MatrixView::of_rows(gradient)?, MatrixView::of_weight(weight)?);
    let through = through.and_then(|(activation, tensor)| Some((fused(activation)?, tensor)));
    let through =
        through.map(|(function, tensor)| Ok::<_, TensorError>((function, MatrixView::of_rows(tensor)?)));
    let through = through.transpose()?;
    let epilogue = match &through {
        None => Epilogue::None,
        Some((function, view)) => {
            Epilogue::ActivationBackward { function: *function, preactivation: matrix(view)? }
        }
    };
    let shape = (gradient.rows, weight.columns, gradient.columns);
    let (a, b) = (matrix(&gradient)?, matrix(&weight)?);
    let problem = Gemm { epilogue, ..Gemm::new(shape, a, b, matrix_to_write(dx)?) };
    // SAFETY: the shapes were checked in forward, and dx is fresh memory.
    unsafe { gemm::gemm(pool, &problem) };
    Ok(())
}

/// `dW (+)= g^T x` and `db (+)= sum of g over rows`, in f32.
pub(in crate::ops) fn parameter_gradients(
    pool: &ThreadPool,
    gradient: &Tensor,
    x: &Tensor,
    weight: Option<&GradientTarget>,
    bias: Option<&GradientTarget>,
) -> Result<()> {
    let view = MatrixView::of_rows(gradient)?;
    let gradient = matrix(&view)?;
    match (weight, bias) {
        (Some(weight), bias) => {
            let x = MatrixView::of_rows(x)?;
            // SAFETY: a sink or fresh memory of [outputs, inner] and [outputs], written here alone.
            unsafe {
                let c = MatrixMut::new(weight.gradient.pointer::<f32>().cast(), ElementType::F32, x.columns);
                let shape = (view.columns, x.columns, view.rows);
                let row_sums = bias.map(|bias| RowSums::new(bias.gradient.pointer(), bias.accumulate));
                let (a, b) = (gradient.transposed(), matrix(&x)?);
                let accumulate = weight.accumulate;
                gemm::gemm(pool, &Gemm { accumulate, row_sums, ..Gemm::new(shape, a, b, c) });
            }
        }
        (None, Some(bias)) => {
            let mut target = bias.gradient.detach();
            // SAFETY: as above, and the matrix covers [rows, outputs].
            unsafe {
                gemm::column_sums(pool, gradient, view.rows, target.shared_data_mut(), bias.accumulate);
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

/// A view as an operand; the view keeps the memory.
fn matrix(view: &MatrixView) -> Result<Matrix<'static>> {
    let element = view.memory.dtype().element_type("linear")?;
    // SAFETY: the strides address the view's memory alone, which outlives the product.
    Ok(unsafe { Matrix::new(view.memory.address(), element, view.strides[0], view.strides[1]) })
}

fn matrix_to_write(tensor: &Tensor) -> Result<MatrixMut<'static>> {
    assert!(tensor.is_contiguous(), "products are written to contiguous memory");
    let (element, columns) = (tensor.dtype().element_type("linear")?, tensor.size(tensor.rank() - 1));
    // SAFETY: the op that made the tensor holds it while the product runs.
    Ok(unsafe { MatrixMut::new(tensor.address(), element, columns) })
}
