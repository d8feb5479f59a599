use anneal_device::CudaDevice;
use anneal_device::cuda::{Source, Variant};

use super::table::{Function, Of};
use crate::ops::elementwise::cuda::{self as elementwise, map};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source {
    name: "unary",
    code: concat!(
        include_str!("kernel.cu"),
        include_str!("../elementwise/walk.cuh"),
        include_str!("../elementwise/kernel.cu")
    ),
};

/// The kernels of a function and of its gradient, and the numbers they use.
fn kernels(function: Function) -> ([&'static str; 2], [f32; 2]) {
    let numbers = match function {
        Function::Affine { factor, offset } => [factor, offset],
        Function::Clamp { low, high } => [low, high],
        _ => [0.0; 2],
    };
    let names = match function {
        Function::Affine { .. } => ["map_affine", "map_affine_gradient"],
        Function::Clamp { .. } => ["map_clamp", "map_clamp_gradient"],
        Function::Exp => ["map_exp", "map_exp_gradient"],
        Function::GeluExact => ["map_gelu_exact", "map_gelu_exact_gradient"],
        Function::GeluTanh => ["map_gelu_tanh", "map_gelu_tanh_gradient"],
        Function::Log => ["map_log", "map_log_gradient"],
        Function::Sigmoid => ["map_sigmoid", "map_sigmoid_gradient"],
        Function::Silu => ["map_silu", "map_silu_gradient"],
        Function::Sqrt => ["map_sqrt", "map_sqrt_gradient"],
        Function::Square => ["map_square", "map_square_gradient"],
        Function::Tanh => ["map_tanh", "map_tanh_gradient"],
    };
    (names, numbers)
}

fn value(function: Function) -> elementwise::Function {
    let ([kernel, _], numbers) = kernels(function);
    elementwise::Function { source: SOURCE, kernel, numbers }
}

fn derivative(function: Function) -> elementwise::Function {
    let ([_, kernel], numbers) = kernels(function);
    elementwise::Function { source: SOURCE, kernel, numbers }
}

pub(super) fn forward(cuda: &CudaDevice, function: Function, x: &Tensor, y: &Tensor) -> Result<()> {
    map(cuda, value(function), [x], y)
}

/// `y = factor * x`, broadcast to the sizes of `y`.
pub(in crate::ops) fn scaled(cuda: &CudaDevice, x: &Tensor, factor: f32, y: &Tensor) -> Result<()> {
    forward(cuda, Function::Affine { factor, offset: 0.0 }, x, y)
}

/// `dx = g * derivative(saved)`; `dx` may be the memory of the gradient.
pub(super) fn backward(
    cuda: &CudaDevice,
    function: Function,
    saved: Option<&Tensor>,
    gradient: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    match saved {
        Some(saved) => map(cuda, derivative(function), [gradient, saved], dx),
        None => map(cuda, derivative(function), [gradient], dx),
    }
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let functions = [
        Function::Affine { factor: 1.0, offset: 0.0 },
        Function::Clamp { low: 0.0, high: 1.0 },
        Function::Exp,
        Function::GeluExact,
        Function::GeluTanh,
        Function::Log,
        Function::Sigmoid,
        Function::Silu,
        Function::Sqrt,
        Function::Square,
        Function::Tanh,
    ];
    let of = |function: Function, dtype: DType| {
        let operands = if function.saves() == Of::Nothing { 1 } else { 2 };
        [
            elementwise::variant(value(function), &[dtype], dtype),
            elementwise::variant(derivative(function), &vec![dtype; operands], dtype),
        ]
    };
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    functions.iter().flat_map(|function| dtypes.iter().flat_map(move |dtype| of(*function, *dtype))).collect()
}
