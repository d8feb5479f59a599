use anneal_tensor::ops::{self, Activation};
use anneal_tensor::{DType, Device, Tensor};
use anneal_testkit::{Array, Tolerance, assert_close, check_op, on_every_device};

pub fn activated(activation: Activation, value: f64) -> f64 {
    match activation {
        Activation::None => value,
        Activation::Silu => value / (1.0 + (-value).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (value + 0.044715 * value.powi(3));
            0.5 * value * (1.0 + inner.tanh())
        }
    }
}

pub fn affine(x: &Array, weight: &Array, bias: Option<&Array>) -> Array {
    let (outputs, inner) = (weight.dims[0], weight.values.len() / weight.dims[0]);
    let mut sizes = x.dims.clone();
    *sizes.last_mut().unwrap() = outputs;
    let mut y = Array::zeros(&sizes);
    for (row, out) in y.values.chunks_mut(outputs).enumerate() {
        for (o, out) in out.iter_mut().enumerate() {
            let terms = (0..inner).map(|d| x.values[row * inner + d] * weight.values[o * inner + d]);
            *out = terms.sum::<f64>() + bias.map_or(0.0, |bias| bias.values[o]);
        }
    }
    y
}

pub fn map(mut array: Array, function: impl Fn(f64) -> f64) -> Array {
    array.values.iter_mut().for_each(|value| *value = function(*value));
    array
}

#[test]
fn linear_with_each_activation_with_and_without_bias() {
    for activation in [Activation::None, Activation::GeluTanh, Activation::Silu] {
        let (x, weight, bias) =
            (Array::normal(1, &[2, 3, 17]), Array::normal(2, &[5, 17]), Array::normal(3, &[5]));
        check_op(
            &format!("linear {activation:?}"),
            &[x.clone(), weight.clone(), bias],
            |t| Ok(vec![ops::linear(&t[0], &t[1], Some(&t[2]), activation)?]),
            |x| vec![map(affine(&x[0], &x[1], Some(&x[2])), |value| activated(activation, value))],
        );
        check_op(
            &format!("linear {activation:?} without bias"),
            &[x, weight],
            |t| Ok(vec![ops::linear(&t[0], &t[1], None, activation)?]),
            |x| vec![map(affine(&x[0], &x[1], None), |value| activated(activation, value))],
        );
    }
}

#[test]
fn a_weight_with_more_dimensions_is_a_matrix_of_rows() {
    check_op(
        "linear of a patch weight",
        &[Array::normal(1, &[3, 8]), Array::normal(2, &[5, 2, 2, 2])],
        |t| Ok(vec![ops::linear(&t[0], &t[1], None, Activation::None)?]),
        |x| vec![affine(&x[0], &x[1], None)],
    );
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize]| Tensor::zeros(&device, sizes, DType::F32).unwrap();
    let message =
        ops::linear(&zeros(&[2, 3]), &zeros(&[5, 4]), None, Activation::None).unwrap_err().to_string();
    assert_eq!(message, "linear: input [2, 3] does not fit weight [5, 4]");
    let half = Tensor::zeros(&device, &[5, 3], DType::BF16).unwrap();
    let message = ops::linear(&zeros(&[2, 3]), &half, None, Activation::None).unwrap_err().to_string();
    assert!(message.contains("f32") && message.contains("bf16"), "{message}");
}

/// On a GPU by every way that it has for an activation.
#[test]
fn a_weight_with_more_dimensions_and_an_activation_is_a_matrix_of_rows() {
    on_every_device("linear of a patch weight with an activation", |device| {
        let values = |seed, dims: &[usize]| {
            let tensor = |value: &f64| 0.3 * *value as f32;
            let values: Vec<f32> = Array::normal(seed, dims).values.iter().map(tensor).collect();
            ops::cast(&Tensor::from_slice(device, &values, dims).unwrap(), DType::BF16).unwrap()
        };
        let (x, weight) = (values(1, &[40, 32]), values(2, &[24, 2, 2, 8]));
        let of = |weight: &Tensor| {
            let y = ops::linear(&x, weight, None, Activation::GeluTanh).unwrap();
            ops::cast(&y, DType::F32).unwrap().to_vec::<f32>().unwrap()
        };
        let expected = of(&ops::reshape(&weight, &[24, 32]).unwrap());
        for way in 0..3 {
            if let Device::Cuda(cuda) = device {
                cuda.prefer_way(Some(way));
            }
            assert_close(&format!("way {way} on {device}"), &of(&weight), &expected, Tolerance::Bf16);
        }
        if let Device::Cuda(cuda) = device {
            cuda.prefer_way(None);
        }
    });
}
