//! The exact GELU, `x * Phi(x)` (arXiv 1606.08415, section 2), branch-free so that it vectorises.
//!
//! `Phi` errs by less than 1e-7, and by less than 5e-7 of itself in its lower tail. Both polynomials are
//! minimax fits of our own (Lawson's iteration against the complementary error function in f64).

use anneal_device::cpu::math::exp;

/// 1 / sqrt(2 pi)
const DENSITY_AT_ZERO: f32 = 0.398_942_3;
/// Of `1 + TAIL_SCALE * |x|`, in whose reciprocal the tail is a polynomial.
const TAIL_SCALE: f32 = 0.325;
/// `(Phi(x) - 1/2) / x` in powers of `x^2`, for |x| < 1.
const NEAR: [f32; 6] =
    [0.398_942_3, -0.066_490_36, 0.009_973_323, -0.001_186_33, 1.134_863_9e-4, -7.654_208e-6];
/// `Phi(-a) e^(a^2/2) / s` in powers of `s = 1 / (1 + TAIL_SCALE * a)`, for a > 0.98.
const TAIL: [f32; 8] = [
    0.129_645_4,
    0.129_918_55,
    0.113_269_57,
    0.103_848_144,
    -0.000_398_411_62,
    0.123_095_855,
    -0.141_690_34,
    0.042_342_406,
];

#[inline(always)]
fn polynomial<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut value = coefficients[N - 1];
    for index in (0..N - 1).rev() {
        value = value.mul_add(x, coefficients[index]);
    }
    value
}

/// The normal distribution function, and `e^(-x^2/2)`.
#[inline(always)]
fn distribution(x: f32) -> (f32, f32) {
    // Beyond 14.5 both are zero or one; the limit keeps 0 * infinity away. NaN passes.
    let x = if x > 14.5 { 14.5 } else { x };
    let x = if x < -14.5 { -14.5 } else { x };
    let square = x * x;
    // What rounding took from the square, which the exponential would magnify.
    let lost = x.mul_add(x, -square);
    let bell = exp(-0.5 * square);
    let bell = (bell * -0.5).mul_add(lost, bell);
    let s = 1.0 / x.abs().mul_add(TAIL_SCALE, 1.0);
    let tail = bell * s * polynomial(TAIL, s);
    let far = if x < 0.0 { tail } else { 1.0 - tail };
    let near = polynomial(NEAR, square).mul_add(x, 0.5);
    (if square < 1.0 { near } else { far }, bell)
}

/// `x * Phi(x)`
#[inline(always)]
pub(super) fn exact(x: f32) -> f32 {
    x * distribution(x).0
}

/// `Phi(x) + x * phi(x)`
#[inline(always)]
pub(super) fn exact_derivative(x: f32) -> f32 {
    let (phi, bell) = distribution(x);
    (x * DENSITY_AT_ZERO).mul_add(bell, phi)
}
