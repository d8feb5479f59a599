use anneal_tensor::{DType, Device, Result, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

fn check(name: &str, x: Array, op: impl Fn(&Tensor) -> Result<Tensor>, f: impl Fn(f64) -> f64) {
    check_op(
        name,
        &[x],
        |t| Ok(vec![op(&t[0])?]),
        |x| vec![Array::new(&x[0].dims, x[0].values.iter().map(|x| f(*x)).collect())],
    );
}

/// Three samples of chunk-crossing rows.
fn normal() -> Array {
    Array::normal(1, &[3, 1, 171])
}

fn positive() -> Array {
    Array::uniform(2, &[3, 57], 0.25, 4.0)
}

fn tanh_gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

/// The normal distribution function by its Taylor series about zero (phi(x) times
/// x + x^3/3 + x^5/15 + ..), good to 1e-13 for |x| < 6.
fn normal_distribution(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..150 {
        term *= x * x / (2 * n + 1) as f64;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

#[test]
fn every_function_equals_its_formula_and_its_differences() {
    check("add_scalar", normal(), |x| ops::add_scalar(x, 1.5), |x| x + 1.5);
    check("scale", normal(), |x| ops::scale(x, -2.5), |x| -2.5 * x);
    check("neg", normal(), ops::neg, |x| -x);
    check("exp", normal(), ops::exp, f64::exp);
    check("log", positive(), ops::log, f64::ln);
    check("sqrt", positive(), ops::sqrt, f64::sqrt);
    check("square", normal(), ops::square, |x| x * x);
    check("tanh", normal(), ops::tanh, f64::tanh);
    check("sigmoid", normal(), ops::sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
    check("silu", normal(), ops::silu, |x| x / (1.0 + (-x).exp()));
    check("clamp", normal(), |x| ops::clamp(x, -0.7, 0.9), |x| x.clamp(-0.7, 0.9));
    check("gelu, tanh", normal(), |x| ops::gelu(x, ops::Gelu::Tanh), tanh_gelu);
    check("gelu", normal(), |x| ops::gelu(x, ops::Gelu::Exact), |x| x * normal_distribution(x));
}

/// A quarter of a million elements: several tasks.
#[test]
fn the_exact_gelu_is_accurate_everywhere() {
    let values: Vec<f32> = (0..250_001).map(|step| (step as f32 - 125_000.0) / 125_000.0 * 5.9).collect();
    let x = Tensor::from_slice(&Device::cpu(Some(2), None), &values, &[values.len()]).unwrap();
    let y = ops::gelu(&x, ops::Gelu::Exact).unwrap().to_vec::<f32>().unwrap();
    for (x, y) in values.iter().zip(&y) {
        let expected = f64::from(*x) * normal_distribution(f64::from(*x));
        let error = (f64::from(*y) - expected).abs();
        assert!(error <= 1.5e-7 * f64::from(x.abs()).max(1e-3), "gelu({x}) = {y}, not {expected}");
    }
}

#[test]
fn extremes_stay_finite_and_nan_stays_nan() {
    on_every_device("extremes of gelu and clamp", |device| {
        let x = Tensor::from_slice(device, &[-1e30f32, -20.0, 20.0, 1e30, f32::NAN], &[5]).unwrap();
        let y = ops::gelu(&x, ops::Gelu::Exact).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(y[..4], [0.0, 0.0, 20.0, 1e30]);
        assert!(y[4].is_nan());
        let y = ops::clamp(&x, -1.0, 1.0).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(y[..4], [-1.0, -1.0, 1.0, 1.0]);
        assert!(y[4].is_nan());
    });
}

#[test]
fn bad_inputs_are_named() {
    let device = Device::cpu(Some(1), None);
    let ids = Tensor::zeros(&device, &[2], DType::I64).unwrap();
    let message = ops::silu(&ids).unwrap_err().to_string();
    assert!(message.contains("silu: dtype i64"), "{message}");
    let x = Tensor::zeros(&device, &[2], DType::F32).unwrap();
    let message = ops::clamp(&x, 1.0, -1.0).unwrap_err().to_string();
    assert!(message.contains("the limits 1 and -1 are no range"), "{message}");
}
