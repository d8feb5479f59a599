//! The ground floor of the CPU kernels: SIMD dispatch and the matrix multiply.

mod simd;

pub use simd::vectorize;
