use anneal_tensor::{DType, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

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
    // The last is a row for a whole block of a GPU.
    for dims in [&[3, 5, 17][..], &[2, 67], &[1], &[33, 1], &[2, 1027]] {
        check_op("softmax", &[Array::normal(1, dims)], |t| Ok(vec![ops::softmax(&t[0])?]), reference);
    }
}

#[test]
fn large_scores_and_masked_ones_are_exact_and_a_scalar_is_refused() {
    on_every_device("softmax of large scores", |device| {
        let values = [1000.0f32, f32::NEG_INFINITY, 1000.0, -1000.0];
        let x = Tensor::from_slice(device, &values, &[1, 4]).unwrap();
        assert_eq!(ops::softmax(&x).unwrap().to_vec::<f32>().unwrap(), [0.5, 0.0, 0.5, 0.0]);
        let scalar = Tensor::zeros(device, &[], DType::F32).unwrap();
        let message = ops::softmax(&scalar).unwrap_err().to_string();
        assert!(message.contains("softmax: expected x of shape [.., d], found a scalar"), "{message}");
    });
}

#[test]
fn many_rows_are_all_done() {
    on_every_device("softmax of many rows", |device| {
        let rows = 70_001;
        let x = Tensor::zeros(device, &[rows, 2], DType::F32).unwrap();
        assert_eq!(ops::softmax(&x).unwrap().to_vec::<f32>().unwrap(), vec![0.5; 2 * rows]);
    });
}
