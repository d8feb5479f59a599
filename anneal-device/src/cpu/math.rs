//! Elementary functions as branch-free scalar code that the compiler vectorises.
//!
//! Contract: called in a plain loop inside [`vectorize`](super::vectorize), each compiles to
//! straight vector code; outside of it they are correct and slow. NaN in gives NaN out.
//! [`exp`] and [`tanh`] err by less than 2e-7 relative over the whole range of f32, except that
//! exponentials below the smallest normal number are zero.
//! Two habits keep the loops vectorised: rounding to an integer goes through the bits of
//! `x + 1.5 * 2^23`, because a saturating `as i32` is scalar code, and limits are compared with
//! `<` and `>`, because `f32::min` and `f32::max` swallow NaN.
//! The polynomials are minimax fits of our own (Lawson's iteration against 40-digit values).
//! GELU is arXiv 1606.08415, section 2; SiLU is its section 2's `x * sigmoid(x)`.
//! Not done: double precision, trigonometry.

use std::f32::consts::LOG2_E;

/// Adding this to |x| < 2^22 leaves round(x) in the low bits of the sum.
const ROUNDING: f32 = 12_582_912.0;
const LN2_HIGH: f32 = std::f32::consts::LN_2;
/// ln 2 - LN2_HIGH
const LN2_LOW: f32 = -1.904_654_3e-9;

/// Below this the exponential is under the smallest normal number, and zero is returned.
const UNDERFLOW: f32 = -87.33;

/// `e^x`; infinity above 88.72, zero below -87.33.
///
/// Denormal results are left out on purpose: each would cost the processor a trap of a hundred
/// cycles or more, and a softmax meets them with every masked score.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let limited = if x > 89.0 { 89.0 } else { x };
    let limited = if limited < UNDERFLOW { UNDERFLOW } else { limited };
    let shifted = limited.mul_add(LOG2_E, ROUNDING);
    let n = shifted - ROUNDING;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, limited));
    let p = 0.001_381_459_8_f32;
    let p = p.mul_add(r, 0.008_368_717);
    let p = p.mul_add(r, 0.041_668_39);
    let p = p.mul_add(r, 0.166_665_21);
    let p = p.mul_add(r, 0.499_999_94);
    let p = (p * r).mul_add(r, r) + 1.0;
    // Two factors, because 2^128 itself is out of range while p * 2^128 need not be.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUNDING.to_bits() as i32);
    let half = n >> 1;
    let result = p * power_of_two(half) * power_of_two(n.wrapping_sub(half));
    if x < UNDERFLOW { 0.0 } else { result }
}

/// `2^n` for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let s = a * a;
    let p = -0.005_717_045_f32;
    let p = p.mul_add(s, 0.020_650_588);
    let p = p.mul_add(s, -0.053_743_497);
    let p = p.mul_add(s, 0.133_314_91);
    let p = p.mul_add(s, -0.333_332_84);
    let near_zero = (p * s).mul_add(a, a);
    let beyond = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    (if a < 0.625 { near_zero } else { beyond }).copysign(x)
}

/// Logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)`; NaN at minus infinity, as 0 * infinity.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// d/dx of [`silu`].
#[inline(always)]
pub fn silu_derivative(x: f32) -> f32 {
    // Beyond 80 the value is 0 or 1 to the last bit, and the products would overflow.
    let x = if x > 80.0 { 80.0 } else { x };
    let x = if x < -80.0 { -80.0 } else { x };
    let e = exp(-x);
    let s = 1.0 / (1.0 + e);
    (x * (e * s)).mul_add(s, s)
}

/// sqrt(2 / pi)
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// GELU in its tanh form, `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, written as
/// `x * sigmoid(2 ...)`, which is the same and keeps its digits where 1 + tanh cancels.
/// NaN at minus infinity, as 0 * infinity.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    let inner = (x * x).mul_add(-2.0 * GELU_SCALE * GELU_CUBIC, -2.0 * GELU_SCALE) * x;
    x / (1.0 + exp(inner))
}

/// d/dx of [`gelu_tanh`].
#[inline(always)]
pub fn gelu_tanh_derivative(x: f32) -> f32 {
    // Beyond 9 the value is 0 or 1 to within 1e-26, and the products would overflow.
    let x = if x > 9.0 { 9.0 } else { x };
    let x = if x < -9.0 { -9.0 } else { x };
    let square = x * x;
    let inner = square.mul_add(-2.0 * GELU_SCALE * GELU_CUBIC, -2.0 * GELU_SCALE) * x;
    let slope = square.mul_add(6.0 * GELU_SCALE * GELU_CUBIC, 2.0 * GELU_SCALE);
    let e = exp(inner);
    let s = 1.0 / (1.0 + e);
    (x * slope * (e * s)).mul_add(s, s)
}

#[cfg(test)]
mod tests;
