use anneal_tensor::{DType, Device, Tensor, ops};
use anneal_testkit::{Array, check_op};

#[test]
fn terms_are_scaled_and_added() {
    // The second shape crosses chunks.
    for dims in [&[3, 5, 17][..], &[2, 1100]] {
        let inputs = [Array::normal(1, dims), Array::normal(2, dims), Array::normal(3, dims)];
        check_op(
            "linear_combination",
            &inputs,
            |t| Ok(vec![ops::linear_combination(&[(0.5, &t[0]), (-1.25, &t[1]), (2.0, &t[2])])?]),
            |x| {
                let mut out = x[0].clone();
                for (position, value) in out.values.iter_mut().enumerate() {
                    *value = 0.5 * *value - 1.25 * x[1].values[position] + 2.0 * x[2].values[position];
                }
                vec![out]
            },
        );
    }
}

#[test]
fn coefficients_by_sample() {
    for width in [7, 1100] {
        let (a, b) = ([0.5f32, -1.0, 3.0], [1.5f32, 0.0, 0.25]);
        check_op(
            "linear_combination_per_sample",
            &[Array::normal(1, &[3, width]), Array::normal(2, &[3, width])],
            |t| Ok(vec![ops::linear_combination_per_sample(&[(&a, &t[0]), (&b, &t[1])])?]),
            |x| {
                let mut out = x[0].clone();
                for (position, value) in out.values.iter_mut().enumerate() {
                    let sample = position / width;
                    *value = f64::from(a[sample]) * *value + f64::from(b[sample]) * x[1].values[position];
                }
                vec![out]
            },
        );
    }
}

#[test]
fn terms_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let x = Tensor::zeros(&device, &[2, 3], DType::F32).unwrap();
    let y = Tensor::zeros(&device, &[3, 2], DType::F32).unwrap();
    let message = ops::linear_combination(&[(1.0, &x), (1.0, &y)]).unwrap_err().to_string();
    assert!(message.contains("[2, 3]") && message.contains("[3, 2]"), "{message}");
    let message = ops::linear_combination(&[]).unwrap_err().to_string();
    assert!(message.contains("there are no terms"), "{message}");
    let message = ops::linear_combination_per_sample(&[(&[1.0], &x)]).unwrap_err().to_string();
    assert!(message.contains("1 coefficients for a tensor of shape [2, 3]"), "{message}");
}
