use anneal_tensor::{DType, Device, Tensor, ops};
use anneal_testkit::{Array, check_op};

fn reference(x: &[Array]) -> Vec<Array> {
    let mut out = x[0].clone();
    for row in out.values.chunks_mut(*x[0].dims.last().unwrap()) {
        let largest = row.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
        row.iter_mut().for_each(|value| *value = (*value - largest).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|value| *value /= sum);
    }
    vec![out]
}

#[test]
fn softmax_of_rows() {
    for dims in [&[3, 5, 17][..], &[2, 67], &[1], &[33, 1]] {
        check_op("softmax", &[Array::normal(1, dims)], |t| Ok(vec![ops::softmax(&t[0])?]), reference);
    }
}

#[test]
fn large_scores_and_masked_ones_are_exact_and_a_scalar_is_refused() {
    let device = Device::cpu(Some(1), None);
    let values = [1000.0f32, f32::NEG_INFINITY, 1000.0, -1000.0];
    let x = Tensor::from_slice(&device, &values, &[1, 4]).unwrap();
    assert_eq!(ops::softmax(&x).unwrap().to_vec::<f32>().unwrap(), [0.5, 0.0, 0.5, 0.0]);
    let scalar = Tensor::zeros(&device, &[], DType::F32).unwrap();
    let message = ops::softmax(&scalar).unwrap_err().to_string();
    assert!(message.contains("softmax: expected x of shape [.., d], found a scalar"), "{message}");
}
