use anneal_tensor::{DType, Device, Result, Tape, Tensor, ops};
use anneal_testkit::{Array, check_op};

const EPS: f64 = 1e-6;

/// `(z - mean) / sqrt(variance + eps)` of each row; about zero if not centred.
fn normalised(z: &Array, centered: bool) -> Array {
    let width = *z.dims.last().unwrap();
    let mut out = z.clone();
    for row in out.values.chunks_mut(width) {
        let mean = if centered { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / width as f64;
        row.iter_mut().for_each(|value| *value = (*value - mean) / (variance + EPS).sqrt());
    }
    out
}

/// `n * multiplier + shift`, each a function of (sample, column).
fn affine(n: &Array, multiplier: impl Fn(usize, usize) -> f64, shift: impl Fn(usize, usize) -> f64) -> Array {
    let width = *n.dims.last().unwrap();
    let per_sample = n.values.len() / n.dims[0];
    let mut out = n.clone();
    for (position, value) in out.values.iter_mut().enumerate() {
        let (sample, column) = (position / per_sample, position % width);
        *value = *value * multiplier(sample, column) + shift(sample, column);
    }
    out
}

fn modulated(z: &Array, shift: &Array, scale: &Array) -> Array {
    affine(&normalised(z, true), |b, d| 1.0 + scale.at(&[b, d]), |b, d| shift.at(&[b, d]))
}

#[test]
fn layer_norm_with_and_without_its_vectors() {
    for dims in [&[3, 5, 17][..], &[4, 33], &[2, 1, 2, 67]] {
        let width = *dims.last().unwrap();
        let vectors = [Array::normal(2, &[width]), Array::normal(3, &[width])];
        let inputs = [Array::normal(1, dims), vectors[0].clone(), vectors[1].clone()];
        check_op(
            "layer_norm",
            &inputs,
            |t| Ok(vec![ops::layer_norm(&t[0], Some(&t[1]), Some(&t[2]), EPS as f32)?]),
            |x| vec![affine(&normalised(&x[0], true), |_, d| x[1].at(&[d]), |_, d| x[2].at(&[d]))],
        );
    }
    let inputs = [Array::normal(1, &[3, 17]), Array::normal(2, &[17])];
    check_op(
        "layer_norm, no weight",
        &inputs[..1],
        |t| Ok(vec![ops::layer_norm(&t[0], None, None, EPS as f32)?]),
        |x| vec![normalised(&x[0], true)],
    );
    check_op(
        "layer_norm, bias alone",
        &inputs,
        |t| Ok(vec![ops::layer_norm(&t[0], None, Some(&t[1]), EPS as f32)?]),
        |x| vec![affine(&normalised(&x[0], true), |_, _| 1.0, |_, d| x[1].at(&[d]))],
    );
}

#[test]
fn rms_norm_with_and_without_weight() {
    let inputs = [Array::normal(4, &[3, 5, 33]), Array::normal(5, &[33])];
    check_op(
        "rms_norm",
        &inputs,
        |t| Ok(vec![ops::rms_norm(&t[0], Some(&t[1]), EPS as f32)?]),
        |x| vec![affine(&normalised(&x[0], false), |_, d| x[1].at(&[d]), |_, _| 0.0)],
    );
    check_op(
        "rms_norm, no weight",
        &inputs[..1],
        |t| Ok(vec![ops::rms_norm(&t[0], None, EPS as f32)?]),
        |x| vec![normalised(&x[0], false)],
    );
}

#[test]
fn layer_norm_modulate_by_sample() {
    for (dims, seed) in [([3, 5, 17], 1), ([2, 3, 65], 11)] {
        let vector = |seed| Array::normal(seed, &[dims[0], dims[2]]);
        check_op(
            "layer_norm_modulate",
            &[Array::normal(seed, &dims), vector(seed + 1), vector(seed + 2)],
            |t| Ok(vec![ops::layer_norm_modulate(&t[0], &t[1], &t[2], EPS as f32)?]),
            |x| vec![modulated(&x[0], &x[1], &x[2])],
        );
    }
}

fn gated(t: &[Tensor]) -> Result<Vec<Tensor>> {
    let (sum, normal) =
        ops::gate_residual_layer_norm_modulate(&t[0], &t[1], &t[2], &t[3], &t[4], EPS as f32)?;
    Ok(vec![sum, normal])
}

fn gated_reference(x: &[Array]) -> Vec<Array> {
    let mut sum = affine(&x[1], |b, d| x[2].at(&[b, d]), |_, _| 0.0);
    sum.values.iter_mut().zip(&x[0].values).for_each(|(sum, x)| *sum += x);
    let normal = modulated(&sum, &x[3], &x[4]);
    vec![sum, normal]
}

fn gated_inputs(dims: [usize; 3]) -> [Array; 5] {
    let vector = |seed| Array::normal(seed, &[dims[0], dims[2]]);
    [Array::normal(1, &dims), Array::normal(2, &dims), vector(3), vector(4), vector(5)]
}

#[test]
fn the_gated_residual_and_the_norm_in_one_pass() {
    for dims in [[3, 5, 17], [2, 3, 65]] {
        check_op("gate_residual_layer_norm_modulate", &gated_inputs(dims), gated, gated_reference);
    }
}

#[test]
fn either_output_may_go_unused() {
    for kept in 0..2 {
        check_op(
            "gate_residual_layer_norm_modulate, one output",
            &gated_inputs([2, 3, 17]),
            |t| Ok(vec![gated(t)?.swap_remove(kept)]),
            |x| vec![gated_reference(x).swap_remove(kept)],
        );
    }
}

/// Several blocks a group and several groups a task, against the same rows one sample at a time.
#[test]
fn large_and_many_groups_equal_their_parts() {
    let device = Device::cpu(Some(3), None);
    for dims in [[2, 300, 256], [70, 2, 33]] {
        let arrays = gated_inputs(dims);
        let tensor = |array: &Array| {
            let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
            Tensor::from_slice(&device, &values, &array.dims).unwrap()
        };
        let whole: Vec<Tensor> = arrays.iter().map(tensor).collect();
        let run = |inputs: &[Tensor]| {
            let tape = Tape::new();
            let variables: Vec<Tensor> = inputs.iter().map(|input| tape.variable(input)).collect();
            let outputs = gated(&variables).unwrap();
            let seeds =
                outputs.iter().map(|output| (output.clone(), inputs[0].contiguous().unwrap())).collect();
            tape.backward_from(seeds).unwrap();
            let gradients = variables.iter().map(|variable| tape.take_gradient(variable).unwrap());
            outputs.iter().map(Tensor::detach).chain(gradients).collect::<Vec<Tensor>>()
        };
        let all = run(&whole);
        for sample in [0, dims[0] - 1] {
            let part: Vec<Tensor> =
                whole.iter().map(|input| ops::narrow(input, 0, sample, 1).unwrap()).collect();
            for (all, part) in all.iter().zip(run(&part)) {
                let all = ops::narrow(all, 0, sample, 1).unwrap().to_vec::<f32>().unwrap();
                for (a, b) in all.iter().zip(part.to_vec::<f32>().unwrap()) {
                    assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} {b}");
                }
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize]| Tensor::zeros(&device, sizes, DType::F32).unwrap();
    let x = zeros(&[3, 4, 5]);
    let row = zeros(&[3, 5]);
    let gated = |branch: &Tensor, gate: &Tensor| {
        ops::gate_residual_layer_norm_modulate(&x, branch, gate, &row, &row, 1e-6).unwrap_err().to_string()
    };
    let message = ops::layer_norm(&x, Some(&zeros(&[4])), None, 1e-6).unwrap_err().to_string();
    assert!(message.contains("layer_norm: weight has shape [4]") && message.contains("[5]"), "{message}");
    let message = ops::layer_norm_modulate(&x, &zeros(&[3, 4]), &row, 1e-6).unwrap_err().to_string();
    assert!(message.contains("shift has shape [3, 4]") && message.contains("[3, 5]"), "{message}");
    assert!(gated(&zeros(&[3, 4, 6]), &row).contains("branch is f32 [3, 4, 6]"));
    assert!(gated(&x, &zeros(&[1, 5])).contains("gate has shape [1, 5]"));
    let ids = Tensor::zeros(&device, &[2, 3], DType::I64).unwrap();
    let message = ops::rms_norm(&ids, None, 1e-6).unwrap_err().to_string();
    assert!(message.contains("rms_norm: dtype i64"), "{message}");
}
