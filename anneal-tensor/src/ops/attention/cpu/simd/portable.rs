//! Arrays of four, which compilers turn into the vectors of any processor.

use super::{Rows, Simd};

#[derive(Clone, Copy)]
pub(in super::super) struct Plain;

const LANES: usize = 4;

#[inline(always)]
fn each(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Plain {
    type Vector = [f32; LANES];
    const LANES: usize = LANES;
    const MOST_COLUMNS: usize = 2;

    #[inline(always)]
    fn most_rows(columns: usize) -> usize {
        if columns == 1 { 8 } else { 4 }
    }

    #[inline(always)]
    fn call<R>(self, body: impl FnOnce() -> R) -> R {
        body()
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::Vector {
        unsafe { source.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::Vector) {
        unsafe { target.cast::<[f32; LANES]>().write_unaligned(value) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // Where there is no such instruction, `f32::mul_add` is a function call per element.
        std::array::from_fn(|lane| {
            if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                a[lane].mul_add(b[lane], c[lane])
            } else {
                a[lane] * b[lane] + c[lane]
            }
        })
    }

    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sum(self, value: Self::Vector) -> f32 {
        (value[0] + value[2]) + (value[1] + value[3])
    }

    #[inline(always)]
    fn scale_exponent(self, value: Self::Vector, power: Self::Vector) -> Self::Vector {
        each(value, power, |value, power| f32::from_bits(value.to_bits().wrapping_add(power.to_bits() << 23)))
    }

    #[inline(always)]
    unsafe fn transpose(self, source: Rows<*const f32>, rows: usize, factor: f32, target: Rows<*mut f32>) {
        for row in 0..LANES {
            for column in 0..LANES {
                // SAFETY: the caller's promise; missing rows are not read.
                unsafe {
                    let value = if row < rows { *source.row(row).add(column) } else { 0.0 };
                    *target.row(column).add(row) = value * factor;
                }
            }
        }
    }
}
