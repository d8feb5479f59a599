use anneal_tensor::{DType, Device, Tensor, ops};
use anneal_testkit::{Array, check_op};

fn reference(x: &[Array]) -> Vec<Array> {
    let [samples, rows, width] = [x[0].dims[0], x[0].dims[1], x[0].dims[2]];
    let mut out = Array::zeros(&x[0].dims);
    for (b, n, d) in (0..samples * rows * width).map(|i| (i / width / rows, i / width % rows, i % width)) {
        *out.at_mut(&[b, n, d]) = x[0].at(&[b, n, d]) + x[2].at(&[b, d]) * x[1].at(&[b, n, d]);
    }
    vec![out]
}

#[test]
fn the_branch_is_gated_by_sample() {
    for (seed, dims) in [(1, [3, 5, 17]), (10, [2, 3, 33]), (20, [1, 1, 1])] {
        let inputs = [
            Array::normal(seed, &dims),
            Array::normal(seed + 1, &dims),
            Array::normal(seed + 2, &[dims[0], dims[2]]),
        ];
        check_op("gate_residual", &inputs, |t| Ok(vec![ops::gate_residual(&t[0], &t[1], &t[2])?]), reference);
    }
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize]| Tensor::zeros(&device, sizes, DType::F32).unwrap();
    let x = zeros(&[3, 4, 5]);
    let message = ops::gate_residual(&x, &zeros(&[3, 4, 6]), &zeros(&[3, 5])).unwrap_err().to_string();
    assert!(message.contains("branch is f32 [3, 4, 6]"), "{message}");
    let message = ops::gate_residual(&x, &x, &zeros(&[2, 5])).unwrap_err().to_string();
    assert!(message.contains("gate has shape [2, 5]") && message.contains("[3, 5]"), "{message}");
    let message = ops::gate_residual(&zeros(&[5]), &zeros(&[5]), &zeros(&[5])).unwrap_err().to_string();
    assert!(message.contains("expected x of shape [b, .., d], found [5]"), "{message}");
}
