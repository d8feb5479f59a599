use anneal_tensor::{DType, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

#[test]
fn the_error_of_each_sample() {
    // The second shape has several segments a sample.
    for dims in [&[3, 5, 17][..], &[2, 67, 65], &[4]] {
        let per_sample = dims[1..].iter().product::<usize>();
        check_op(
            "mse",
            &[Array::normal(1, dims), Array::normal(2, dims)],
            |t| Ok(vec![ops::mse(&t[0], &t[1])?]),
            |x| {
                let pairs = x[0].values.chunks(per_sample).zip(x[1].values.chunks(per_sample));
                let error = |(a, b): (&[f64], &[f64])| {
                    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / per_sample as f64
                };
                vec![Array::new(&dims[..1], pairs.map(error).collect())]
            },
        );
    }
}

#[test]
fn dtypes_may_differ_and_shapes_may_not() {
    on_every_device("mse of two dtypes", |device| {
        let x = Tensor::from_slice(device, &[1.0f32, 2.0, 3.0, 5.0], &[2, 2]).unwrap();
        let target = Tensor::zeros(device, &[2, 2], DType::BF16).unwrap();
        assert_eq!(ops::mse(&x, &target).unwrap().to_vec::<f32>().unwrap(), [2.5, 17.0]);
        let other = Tensor::zeros(device, &[4], DType::F32).unwrap();
        let message = ops::mse(&x, &other).unwrap_err().to_string();
        assert!(message.contains("prediction [2, 2] and target [4]"), "{message}");
    });
}

#[test]
fn more_samples_than_a_grid_has_rows() {
    on_every_device("mse of many samples", |device| {
        let samples = 70_001;
        let values: Vec<f32> = (0..2 * samples).map(|place| (place / 2 % 5) as f32).collect();
        let x = Tensor::from_slice(device, &values, &[samples, 2]).unwrap();
        let zero = Tensor::zeros(device, &[samples, 2], DType::F32).unwrap();
        let error = ops::mse(&x, &zero).unwrap().to_vec::<f32>().unwrap();
        assert!(error.iter().enumerate().all(|(sample, error)| *error == ((sample % 5) as f32).powi(2)));
    });
}
