//! The ground floor of the CPU kernels: SIMD dispatch, element formats, vector mathematics and
//! the matrix multiply.

mod element;
pub mod gemm;
pub mod math;
mod simd;

pub use element::{Element, ElementType};
pub use simd::{vector_unit, vectorize};
