use anneal_device::CudaDevice;
use anneal_device::cuda::{Source, Variant};

use super::table::Function;
use crate::ops::elementwise::cuda::{self as elementwise, map};
use crate::{DType, Result, Tensor};

const SOURCE: Source = Source {
    name: "binary",
    code: concat!(
        include_str!("kernel.cu"),
        include_str!("../elementwise/walk.cuh"),
        include_str!("../elementwise/kernel.cu")
    ),
};

fn named(kernel: &'static str) -> elementwise::Function {
    elementwise::Function { source: SOURCE, kernel, numbers: [0.0; 2] }
}

fn value(function: Function) -> elementwise::Function {
    named(match function {
        Function::Add => "map_add",
        Function::Div => "map_div",
        Function::Mul => "map_mul",
        Function::Sub => "map_sub",
    })
}

/// # Panics
/// Where the derivative is one.
fn derivative(function: Function, operand: usize) -> elementwise::Function {
    named(match (function, operand) {
        (Function::Div, 0) => "map_div_left",
        (Function::Div, _) => "map_div_right",
        (Function::Mul, 0) => "map_mul_left",
        (Function::Mul, _) => "map_mul_right",
        (Function::Sub, 1) => "map_sub_right",
        _ => unreachable!("a gradient that passes through is not computed"),
    })
}

pub(super) fn forward(
    cuda: &CudaDevice,
    function: Function,
    operands: [&Tensor; 2],
    y: &Tensor,
) -> Result<()> {
    map(cuda, value(function), operands, y)
}

/// `out = a + b`, which may be of different float dtypes; `out` may be the memory of either if its layout
/// and dtype are the same.
pub(in crate::ops) fn sum(cuda: &CudaDevice, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
    forward(cuda, Function::Add, [a, b], out)
}

/// `out = g * derivative` with respect to one operand, in the sizes of the gradient.
pub(super) fn backward(
    cuda: &CudaDevice,
    function: Function,
    operand: usize,
    gradient: &Tensor,
    saved: Option<[&Tensor; 2]>,
    out: &Tensor,
) -> Result<()> {
    let function = derivative(function, operand);
    match saved {
        Some([a, b]) => map(cuda, function, [gradient, a, b], out),
        None => map(cuda, function, [gradient], out),
    }
}

pub(in crate::ops) fn variants() -> Vec<Variant> {
    let mut all = vec![elementwise::rare_variant(value(Function::Add), &[DType::BF16; 2], DType::BF16)];
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for function in [Function::Add, Function::Div, Function::Mul, Function::Sub] {
            all.push(elementwise::variant(value(function), &[dtype; 2], dtype));
            for operand in (0..2).filter(|operand| !function.passes_through(*operand)) {
                let inputs = if function.saves() { 3 } else { 1 };
                let function = derivative(function, operand);
                // A repeated operand's is in f32, to be summed.
                for out in [dtype, DType::F32] {
                    all.push(elementwise::variant(function, &vec![dtype; inputs], out));
                }
            }
        }
        if dtype != DType::F32 {
            all.push(elementwise::variant(value(Function::Add), &[DType::F32, dtype], DType::F32));
        }
    }
    all
}
