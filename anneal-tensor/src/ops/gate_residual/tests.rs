use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

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
    for (seed, dims) in [(1, [3, 5, 17]), (10, [2, 3, 33]), (20, [1, 1, 1]), (30, [2, 9, 24])] {
        let inputs = [
            Array::normal(seed, &dims),
            Array::normal(seed + 1, &dims),
            Array::normal(seed + 2, &[dims[0], dims[2]]),
        ];
        check_op("gate_residual", &inputs, |t| Ok(vec![ops::gate_residual(&t[0], &t[1], &t[2])?]), reference);
    }
}

/// A width of more than one turn of a GPU's block, more rows than one run, a gate from a wider tensor.
#[test]
fn many_wide_rows_are_gated_by_sample() {
    on_every_device("many_wide_rows_are_gated_by_sample", |device| {
        for dims in [[2, 41, 1152], [3, 19, 2304], [1, 1, 1000], [2, 70, 37]] {
            let [b, n, d] = dims;
            let arrays = [Array::normal(1, &dims), Array::normal(2, &dims), Array::normal(3, &[b, 2 * d])];
            let [x, branch, wide] = arrays.each_ref().map(|array| {
                let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
                Tensor::from_slice(device, &values, &array.dims).unwrap()
            });
            let tape = Tape::new();
            let gate = ops::narrow(&wide, 1, d, d).unwrap();
            let [x, branch, gate] = [x, branch, gate].map(|input| tape.variable(&input));
            let y = ops::gate_residual(&x, &branch, &gate).unwrap();
            // The gradient is the branch itself, so that of the gate is a sum of squares.
            tape.backward_from(vec![(y.clone(), branch.detach())]).unwrap();
            let gradients = [&branch, &gate].map(|input| tape.take_gradient(input).unwrap());
            let [y, branch_gradient, gate_gradient] =
                [&y, &gradients[0], &gradients[1]].map(|tensor| tensor.to_vec::<f32>().unwrap());
            let mut squares = vec![0.0; b * d];
            for at in 0..b * n * d {
                let (sample, column) = (at / d / n, at % d);
                let (gate, branch) = (arrays[2].at(&[sample, d + column]), arrays[1].values[at]);
                let sum = arrays[0].values[at] + gate * branch;
                assert!((f64::from(y[at]) - sum).abs() <= 2e-6 * sum.abs().max(1.0), "{dims:?}");
                let product = gate * branch;
                assert!((f64::from(branch_gradient[at]) - product).abs() <= 2e-6 * product.abs().max(1.0));
                squares[sample * d + column] += branch * branch;
            }
            for (sum, expected) in gate_gradient.iter().zip(squares) {
                assert!((f64::from(*sum) - expected).abs() <= 2e-5 * expected.max(1.0), "{dims:?}");
            }
        }
    });
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
