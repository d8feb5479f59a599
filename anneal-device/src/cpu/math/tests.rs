use super::*;
use crate::cpu::vectorize;

/// Every sign and exponent with mantissas spread by a multiplicative hash, and the special values.
fn whole_range() -> Vec<f32> {
    let mut values: Vec<f32> =
        (0..3_000_000u32).map(|index| f32::from_bits(index.wrapping_mul(2_654_435_769))).collect();
    // Most random bit patterns are huge or tiny; the interesting region needs its own samples.
    values.extend((-1_100_000..=1_100_000).map(|index| index as f32 * 1e-4));
    let special = [0.0, 1.0, 0.625, 88.722_83, 88.722_84, 87.336_5, 103.97, 104.0, 9.0, 1e-38, 1e-45];
    values.extend(special.iter().flat_map(|x: &f32| [*x, -*x]));
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN]);
    values
}

fn map(values: &[f32], function: impl Fn(f32) -> f32) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    vectorize(
        #[inline(always)]
        || out.iter_mut().zip(values).for_each(|(out, x)| *out = function(*x)),
    );
    out
}

/// Asserts `|f(x) - reference(x)| <= relative * |reference| + absolute`, with NaN for NaN.
fn compare(
    name: &str,
    values: &[f32],
    function: impl Fn(f32) -> f32,
    reference: impl Fn(f64) -> f64,
    (relative, absolute): (f64, f64),
) {
    let got = map(values, function);
    let mut worst = 0.0f64;
    for (x, got) in values.iter().zip(got) {
        let want = reference(*x as f64);
        if want.is_nan() {
            assert!(got.is_nan(), "{name}({x:e}) = {got:e}, expected NaN");
            continue;
        }
        let want = if want.abs() > f32::MAX as f64 { want.signum() * f64::INFINITY } else { want };
        if want.is_infinite() {
            assert_eq!(got as f64, want, "{name}({x:e})");
            continue;
        }
        let error = (got as f64 - want).abs();
        worst = worst.max((error - absolute) / want.abs());
        assert!(error <= relative * want.abs() + absolute, "{name}({x:e}) = {got:e}, expected {want:e}");
    }
    println!("{name}: worst relative error {worst:.2e}");
}

/// Results below the smallest normal number are zero.
const SMALLEST: f64 = 1.2e-38;

#[test]
fn exp_and_tanh_hold_their_relative_error_over_all_of_f32() {
    let values = whole_range();
    compare("exp", &values, exp, f64::exp, (2e-7, SMALLEST));
    compare("tanh", &values, tanh, f64::tanh, (2e-7, SMALLEST));
    assert_eq!(exp(0.0), 1.0);
    assert!(tanh(-0.0).is_sign_negative());
}

#[test]
fn sigmoid_and_silu_agree_with_double_precision() {
    let values = whole_range();
    let s = |x: f64| 1.0 / (1.0 + (-x).exp());
    // Below -87 the f32 exponential overflows: the value is zero instead of under 1e-36.
    compare("sigmoid", &values, sigmoid, s, (4e-7, 1e-37));
    // Minus infinity has no value (0 * infinity).
    let finite: Vec<f32> = values.iter().copied().filter(|x| *x != f32::NEG_INFINITY).collect();
    compare("silu", &finite, silu, |x| x * s(x), (5e-7, 1e-35));
    assert!(silu(f32::NAN).is_nan() && silu_derivative(f32::NAN).is_nan());
    let derivative = |x: f64| {
        let x = x.clamp(-700.0, 700.0);
        s(x) * (1.0 + x * (1.0 - s(x)))
    };
    compare("silu'", &values, silu_derivative, derivative, (5e-7, 1e-7));
}

#[test]
fn gelu_and_its_derivative_agree_with_the_published_formula_in_double_precision() {
    let values = whole_range();
    let scale = (2.0 / std::f64::consts::PI).sqrt();
    let gelu = |x: f64| 0.5 * x * (1.0 + (scale * (x + 0.044715 * x * x * x)).tanh());
    let finite: Vec<f32> = values.iter().copied().filter(|x| *x != f32::NEG_INFINITY).collect();
    compare("gelu", &finite, gelu_tanh, gelu, (5e-7, 1e-7));
    let derivative = |x: f64| {
        let x = x.clamp(-30.0, 30.0);
        let t = (scale * (x + 0.044715 * x * x * x)).tanh();
        0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * scale * (1.0 + 3.0 * 0.044715 * x * x)
    };
    compare("gelu'", &values, gelu_tanh_derivative, derivative, (5e-7, 3e-7));
    assert!(gelu_tanh(f32::NAN).is_nan() && gelu_tanh(f32::NEG_INFINITY).is_nan());
}

#[test]
fn derivatives_are_those_of_the_functions() {
    for index in -800..800 {
        let x = index as f32 * 0.01;
        let h = 1e-2f32;
        let slope =
            |f: fn(f32) -> f32| (f(x + h) as f64 - f(x - h) as f64) / ((x + h) as f64 - (x - h) as f64);
        assert!((slope(silu) - silu_derivative(x) as f64).abs() < 1e-4, "silu' at {x}");
        assert!((slope(gelu_tanh) - gelu_tanh_derivative(x) as f64).abs() < 1e-4, "gelu' at {x}");
    }
}
