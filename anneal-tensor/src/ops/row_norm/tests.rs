use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anneal_tensor::ops::Activation;
use anneal_tensor::{
    BackwardPass, DType, Device, Leaf, Op, Outputs, Purpose, Remake, Remaking, Result, Saver, Sink, Tape,
    Tensor, apply, checkpoint, ops,
};
use anneal_testkit::{Array, check_op, on_every_device};

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
    for dims in [&[3, 5, 17][..], &[4, 33], &[2, 1, 2, 67], &[3, 72]] {
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
    for (dims, seed) in [([3, 5, 17], 1), ([2, 3, 65], 11), ([2, 1, 37], 21), ([2, 6, 24], 31)] {
        let vector = |seed| Array::normal(seed, &[dims[0], dims[2]]);
        check_op(
            "layer_norm_modulate",
            &[Array::normal(seed, &dims), vector(seed + 1), vector(seed + 2)],
            |t| Ok(vec![ops::layer_norm_modulate(&t[0], &t[1], &t[2], EPS as f32)?]),
            |x| vec![modulated(&x[0], &x[1], &x[2])],
        );
    }
}

/// Of x, branch, gate, shift, scale and, if it is there, the branch's bias.
fn gated(t: &[Tensor]) -> Result<Vec<Tensor>> {
    let [x, branch, gate, shift, scale, bias @ ..] = t else { panic!("five or six inputs") };
    let bias = bias.first();
    let (sum, normal) =
        ops::gate_residual_layer_norm_modulate(x, branch, bias, gate, shift, scale, EPS as f32)?;
    Ok(vec![sum, normal])
}

fn gated_reference(x: &[Array]) -> Vec<Array> {
    let bias = |d| x.get(5).map_or(0.0, |bias| bias.at(&[d]));
    let mut sum = affine(&x[1], |b, d| x[2].at(&[b, d]), |b, d| x[2].at(&[b, d]) * bias(d));
    sum.values.iter_mut().zip(&x[0].values).for_each(|(sum, x)| *sum += x);
    let normal = modulated(&sum, &x[3], &x[4]);
    vec![sum, normal]
}

fn gated_inputs(dims: [usize; 3]) -> [Array; 6] {
    let vector = |seed| Array::normal(seed, &[dims[0], dims[2]]);
    let bias = Array::normal(6, &dims[2..]);
    [Array::normal(1, &dims), Array::normal(2, &dims), vector(3), vector(4), vector(5), bias]
}

#[test]
fn the_gated_residual_and_the_norm_in_one_pass() {
    // A GPU works on up to four rows at a time, and takes one, two, four or eight elements together.
    for dims in [[3, 5, 17], [2, 3, 65], [2, 1, 16], [2, 5, 20], [1, 2, 42]] {
        let name = "gate_residual_layer_norm_modulate";
        let inputs = gated_inputs(dims);
        check_op(name, &inputs[..5], gated, gated_reference);
        check_op(&format!("{name} with the branch's bias"), &inputs, gated, gated_reference);
    }
}

#[test]
fn either_output_may_go_unused() {
    for kept in 0..2 {
        for count in 5..=6 {
            check_op(
                "gate_residual_layer_norm_modulate, one output",
                &gated_inputs([2, 3, 17])[..count],
                |t| Ok(vec![gated(t)?.swap_remove(kept)]),
                |x| vec![gated_reference(x).swap_remove(kept)],
            );
        }
    }
}

fn tensor(device: &Device, array: &Array, dtype: DType) -> Tensor {
    let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
    ops::cast(&Tensor::from_slice(device, &values, &array.dims).unwrap(), dtype).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    ops::cast(&tensor.detach(), DType::F32).unwrap().to_vec().unwrap()
}

/// Outputs of the fused op and the gradients of its inputs, for these gradients of both outputs.
fn outputs_and_gradients(inputs: &[Tensor], seeds: [&Tensor; 2]) -> Vec<Vec<f32>> {
    outputs_and_gradients_but(inputs.len(), inputs, seeds)
}

/// The same, where one input, if there is one of that number, is not tracked.
fn outputs_and_gradients_but(untracked: usize, inputs: &[Tensor], seeds: [&Tensor; 2]) -> Vec<Vec<f32>> {
    let tape = Tape::new();
    let track = |(index, input): (usize, &Tensor)| match index == untracked {
        true => input.clone(),
        false => tape.variable(input),
    };
    let variables: Vec<Tensor> = inputs.iter().enumerate().map(track).collect();
    let outputs = gated(&variables).unwrap();
    let seeds = outputs.iter().cloned().zip(seeds.map(Tensor::clone)).collect();
    tape.backward_from(seeds).unwrap();
    let tracked = variables.iter().filter(|variable| variable.is_tracked());
    let gradients = tracked.map(|variable| tape.take_gradient(variable).unwrap());
    outputs.iter().cloned().chain(gradients).map(|tensor| values(&tensor)).collect()
}

/// Nothing is summed for a bias that is not trained; the gate's gradient has its part all the same.
#[test]
fn a_bias_without_a_gradient_leaves_the_others_as_they_are() {
    on_every_device("a_bias_without_a_gradient_leaves_the_others_as_they_are", |device| {
        for dims in [[3, 21, 128], [2, 3, 17]] {
            let inputs = gated_inputs(dims).map(|array| tensor(device, &array, DType::F32));
            let mut all = outputs_and_gradients(&inputs, [&inputs[0], &inputs[1]]);
            assert!(all.pop().unwrap().iter().any(|value| *value != 0.0));
            assert!(outputs_and_gradients_but(5, &inputs, [&inputs[0], &inputs[1]]) == all);
        }
    });
}

/// The vectors are then read in f32, and each gradient has its own input's dtype.
#[test]
fn a_bias_may_be_of_another_dtype_than_the_other_vectors() {
    on_every_device("a_bias_may_be_of_another_dtype_than_the_other_vectors", |device| {
        let inputs = gated_inputs([3, 21, 72]).map(|array| tensor(device, &array, DType::BF16));
        let seeds = [&inputs[0], &inputs[1]];
        let expected = outputs_and_gradients(&inputs, seeds);
        let mut mixed = inputs.clone();
        mixed[5] = ops::cast(&inputs[5], DType::F32).unwrap();
        for (got, expected) in outputs_and_gradients(&mixed, seeds).iter().zip(&expected) {
            let scale = expected.iter().fold(1.0f32, |scale, value| scale.max(value.abs()));
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() <= 1e-2 * scale, "{got} {expected}");
            }
        }
    });
}

#[test]
fn no_samples_sum_to_no_gradient_of_the_bias() {
    on_every_device("no_samples_sum_to_no_gradient_of_the_bias", |device| {
        let zeros = |sizes: &[usize]| Tensor::zeros(device, sizes, DType::F32).unwrap();
        let (rows, vector) = (zeros(&[0, 3, 17]), zeros(&[0, 17]));
        let tape = Tape::new();
        let bias = tape.variable(&zeros(&[17]));
        let outputs =
            gated(&[rows.clone(), rows.clone(), vector.clone(), vector.clone(), vector, bias.clone()]);
        tape.backward_from(vec![(outputs.unwrap().swap_remove(1), rows)]).unwrap();
        assert_eq!(values(&tape.take_gradient(&bias).unwrap()), [0.0; 17]);
    });
}

/// Several blocks a group and several groups a task, against the same rows one sample at a time.
#[test]
fn large_and_many_groups_equal_their_parts() {
    on_every_device("large_and_many_groups_equal_their_parts", |device| {
        for dims in [[2, 300, 256], [70, 2, 33]] {
            // Without the bias, whose gradient is one for all samples.
            let whole: Vec<Tensor> =
                gated_inputs(dims)[..5].iter().map(|array| tensor(device, array, DType::F32)).collect();
            let all = outputs_and_gradients(&whole, [&whole[0], &whole[0]]);
            for sample in [0, dims[0] - 1] {
                let part: Vec<Tensor> =
                    whole.iter().map(|input| ops::narrow(input, 0, sample, 1).unwrap()).collect();
                for (all, part) in all.iter().zip(outputs_and_gradients(&part, [&part[0], &part[0]])) {
                    let all = &all[sample * part.len()..][..part.len()];
                    for (a, b) in all.iter().zip(part) {
                        assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} {b}");
                    }
                }
            }
        }
    });
}

/// Widths of models, and others that a GPU cuts in other ways, with more rows than fit a run evenly and
/// with vectors that are columns of one wider tensor; against the formulas in f64.
#[test]
fn rows_of_every_width_with_vectors_from_one_tensor() {
    on_every_device("rows_of_every_width_with_vectors_from_one_tensor", |device| {
        let few = [
            [3, 21, 1152],
            [2, 37, 384],
            [2, 18, 768],
            [2, 33, 37],
            [3, 5, 1000],
            [1, 3, 9000],
            [70, 2, 33],
            [2, 300, 256],
        ];
        // A GPU has teams of their own for few rows.
        let many: &[_] = if matches!(device, Device::Cpu(_)) {
            &[]
        } else {
            &[[9, 256, 1152], [9, 256, 384], [9, 257, 384]]
        };
        for dims in few.iter().chain(many).copied() {
            for dtype in [DType::F32, DType::BF16] {
                let [b, _, d] = dims;
                let arrays =
                    [Array::normal(1, &dims), Array::normal(2, &dims), Array::normal(3, &[b, 5 * d])];
                let [x, branch, modulation] = arrays.each_ref().map(|array| tensor(device, array, dtype));
                let vector = |index| ops::narrow(&modulation, 1, index * d, d).unwrap();
                let bias = tensor(device, &Array::normal(4, &[d]), dtype);
                let inputs = [x, branch, vector(4), vector(0), vector(2), bias];
                let seeds = [7, 8].map(|seed| tensor(device, &Array::normal(seed, &dims), dtype));
                for inputs in [&inputs[..5], &inputs] {
                    agrees_with_the_formulas(inputs, &seeds);
                }
            }
        }
    });
}

fn agrees_with_the_formulas(inputs: &[Tensor], seeds: &[Tensor; 2]) {
    let (dims, dtype) = (inputs[0].dims(), inputs[0].dtype());
    let got = outputs_and_gradients(inputs, seeds.each_ref());
    let exact =
        |tensor: &Tensor| Array::new(tensor.dims(), values(tensor).into_iter().map(f64::from).collect());
    let wide: Vec<Array> = inputs.iter().map(exact).collect();
    let expected = analytic(&wide, &seeds.each_ref().map(exact));
    let limit = if dtype == DType::F32 { 2e-5 } else { 1e-2 };
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let scale = expected.values.iter().fold(1.0f64, |scale, value| scale.max(value.abs()));
        for (a, b) in got.iter().zip(&expected.values) {
            let error = (f64::from(*a) - b).abs() / scale;
            assert!(error <= limit, "{dims:?} {dtype}, result {index} of {}: {a} for {b}", inputs.len());
        }
    }
}

/// Both outputs, and the gradients by the formulas in the op's head.
fn analytic(x: &[Array], [direct, incoming]: &[Array; 2]) -> Vec<Array> {
    let [_, branch, gate, _, scale, bias @ ..] = x else { panic!("five or six inputs") };
    let bias = bias.first();
    let outputs = gated_reference(x);
    let (n, width) = (normalised(&outputs[0], true), gate.dims[1]);
    let rows = n.values.len() / width;
    let per_sample = rows / gate.dims[0];
    let mut dz = Array::zeros(&n.dims);
    let mut dbranch = Array::zeros(&n.dims);
    let [mut dgate, mut dshift, mut dscale] = [(); 3].map(|()| Array::zeros(&gate.dims));
    let mut dbias = bias.map(|bias| Array::zeros(&bias.dims));
    for row in 0..rows {
        let (range, sample) = (row * width..(row + 1) * width, row / per_sample);
        let (z, n) = (&outputs[0].values[range.clone()], &n.values[range.clone()]);
        let mean = z.iter().sum::<f64>() / width as f64;
        let variance = z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / width as f64;
        let g = &incoming.values[range.clone()];
        let p: Vec<f64> = g.iter().enumerate().map(|(d, g)| g * (1.0 + scale.at(&[sample, d]))).collect();
        let mean_p = p.iter().sum::<f64>() / width as f64;
        let slope = p.iter().zip(n).map(|(p, n)| p * n).sum::<f64>() / width as f64;
        for d in 0..width {
            let at = row * width + d;
            let through = (p[d] - mean_p - n[d] * slope) / (variance + EPS).sqrt();
            dz.values[at] = through + direct.values[at];
            dbranch.values[at] = gate.at(&[sample, d]) * dz.values[at];
            let branch = branch.values[at] + bias.map_or(0.0, |bias| bias.at(&[d]));
            *dgate.at_mut(&[sample, d]) += branch * dz.values[at];
            if let Some(dbias) = &mut dbias {
                *dbias.at_mut(&[d]) += dbranch.values[at];
            }
            *dshift.at_mut(&[sample, d]) += g[d];
            *dscale.at_mut(&[sample, d]) += g[d] * n[d];
        }
    }
    outputs.into_iter().chain([dz, dbranch, dgate, dshift, dscale]).chain(dbias).collect()
}

struct Weight {
    value: Tensor,
    gradient: Tensor,
}

impl Leaf for Weight {
    fn fetch(&self) -> Result<Tensor> {
        Ok(self.value.clone())
    }
    fn sink(&self) -> Result<Sink> {
        Ok(Sink { gradient: self.gradient.clone(), accumulate: true })
    }
}

fn weight(tape: &Tape, device: &Device, seed: u64, sizes: &[usize]) -> (Tensor, Tensor) {
    let value = tensor(device, &Array::normal(seed, sizes), DType::F32);
    let gradient = Tensor::zeros(device, sizes, DType::F32).unwrap();
    (tape.leaf(Arc::new(Weight { value, gradient: gradient.clone() })).unwrap(), gradient)
}

const PART: [usize; 3] = [4, 16, 64];

/// Two parts of a block whose products save the norms' outputs.
fn block(t: &[Tensor]) -> Result<Vec<Tensor>> {
    let [x, shift, scale, gate, weight, affine, bias] = t else { panic!("seven inputs") };
    let normed = ops::layer_norm_modulate(x, shift, scale, EPS as f32)?;
    let branch = ops::linear(&normed, weight, None, Activation::None)?;
    drop(normed);
    // The branch's bias is a parameter too, but the normalised rows are made again without it.
    let (sum, normed) =
        ops::gate_residual_layer_norm_modulate(x, &branch, Some(bias), gate, shift, scale, EPS as f32)?;
    drop(branch);
    let branch = ops::linear(&normed, weight, None, Activation::None)?;
    drop(normed);
    // Its weight is a parameter, so its output is kept.
    let normed = ops::layer_norm(&branch, Some(affine), None, EPS as f32)?;
    Ok(vec![sum, ops::linear(&normed, weight, None, Activation::None)?])
}

/// All results of a block, and the bytes of activations that it keeps for backward.
fn run_block(device: &Device, remaking: Remaking, checkpointed: bool) -> (Vec<Vec<f32>>, usize) {
    let tape = Tape::new().with_remaking(remaking);
    let [b, _, d] = PART;
    let (weight, weight_gradient) = weight(&tape, device, 5, &[d, d]);
    let (affine, affine_gradient) = self::weight(&tape, device, 6, &[d]);
    let (bias, bias_gradient) = self::weight(&tape, device, 7, &[d]);
    let arrays = [Array::normal(1, &PART), Array::normal(2, &[b, d]), Array::normal(3, &[b, d])];
    let gate = Array::normal(4, &[b, d]);
    let variables: Vec<Tensor> =
        arrays.iter().chain([&gate]).map(|array| tape.variable(&tensor(device, array, DType::F32))).collect();
    let inputs: Vec<Tensor> = variables.iter().cloned().chain([weight, affine, bias]).collect();
    let seed = tensor(device, &Array::normal(9, &PART), DType::F32);
    let activations = Purpose::ALL.iter().position(|purpose| *purpose == Purpose::Activations).unwrap();
    let before = device.memory().in_use[activations];
    let outputs: Outputs = match checkpointed {
        true => checkpoint(&inputs.iter().collect::<Vec<_>>(), |_, inputs| block(inputs)).unwrap(),
        false => block(&inputs).unwrap().into_iter().collect(),
    };
    let kept = device.memory().in_use[activations] - before;
    let mut results: Vec<Vec<f32>> = outputs.iter().map(values).collect();
    tape.backward_from(outputs.into_iter().map(|output| (output, seed.clone())).collect()).unwrap();
    let gradients = variables.iter().map(|variable| tape.take_gradient(variable).unwrap());
    let sinks = [weight_gradient, affine_gradient, bias_gradient];
    results.extend(gradients.chain(sinks).map(|gradient| values(&gradient)));
    (results, kept)
}

#[test]
fn outputs_made_again_give_the_same_gradients_in_less_memory() {
    on_every_device("outputs_made_again_give_the_same_gradients_in_less_memory", |device| {
        let (expected, kept) = run_block(device, Remaking::Never, false);
        let (results, kept_less) = run_block(device, Remaking::Always, false);
        assert!(results == expected);
        let of_norm = PART.iter().product::<usize>() * 4;
        assert_eq!(kept - kept_less, 2 * of_norm, "two of the three norms' outputs are not kept");
        let default_keeps = if matches!(device, Device::Cpu(_)) { kept } else { kept_less };
        assert_eq!(run_block(device, Remaking::default(), false).1, default_keeps);
        let checkpointed =
            [Remaking::Never, Remaking::Always].map(|remaking| run_block(device, remaking, true).0);
        assert!(checkpointed[0] == checkpointed[1] && checkpointed[0][..2] == expected[..2]);
    });
}

/// Passes its input on, and can make it again; counts how often it does.
struct Counted {
    made: Arc<AtomicUsize>,
}

struct Copied(Tensor, Arc<AtomicUsize>);

impl Remake for Copied {
    fn remake(&self) -> Result<Tensor> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(self.0.clone())
    }
}

impl Op for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }
    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        assert!(saver.remakes([0]));
        saver.remake(0, Copied(inputs[0].detach(), self.made.clone()));
        Ok([inputs[0].detach()].into_iter().collect())
    }
    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let gradient = pass.only_gradient();
        pass.give(0, gradient)
    }
}

#[test]
fn a_product_has_its_input_made_again_once() {
    let device = Device::cpu(Some(1), None);
    let tape = Tape::new().with_remaking(Remaking::Always);
    let made = Arc::new(AtomicUsize::new(0));
    let x = tape.variable(&tensor(&device, &Array::normal(1, &[3, 4]), DType::F32));
    let x = apply(Counted { made: made.clone() }, &[&x]).unwrap().pop().unwrap();
    let (weight, _) = weight(&tape, &device, 2, &[4, 4]);
    let y = ops::linear(&x, &weight, None, Activation::None).unwrap();
    let seed = y.detach();
    tape.backward_from(vec![(y, seed)]).unwrap();
    assert_eq!(made.load(Ordering::Relaxed), 1);
    let alive = Arc::strong_count(&made);
    assert_eq!(alive, 1, "what could make it again is gone with its op");
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize]| Tensor::zeros(&device, sizes, DType::F32).unwrap();
    let x = zeros(&[3, 4, 5]);
    let row = zeros(&[3, 5]);
    let gated = |branch: &Tensor, bias: Option<&Tensor>, gate: &Tensor| {
        let result = ops::gate_residual_layer_norm_modulate(&x, branch, bias, gate, &row, &row, 1e-6);
        result.unwrap_err().to_string()
    };
    let message = ops::layer_norm(&x, Some(&zeros(&[4])), None, 1e-6).unwrap_err().to_string();
    assert!(message.contains("layer_norm: weight has shape [4]") && message.contains("[5]"), "{message}");
    let message = ops::layer_norm_modulate(&x, &zeros(&[3, 4]), &row, 1e-6).unwrap_err().to_string();
    assert!(message.contains("shift has shape [3, 4]") && message.contains("[3, 5]"), "{message}");
    assert!(gated(&zeros(&[3, 4, 6]), None, &row).contains("branch is f32 [3, 4, 6]"));
    assert!(gated(&x, None, &zeros(&[1, 5])).contains("gate has shape [1, 5]"));
    let message = gated(&x, Some(&row), &row);
    assert!(message.contains("branch_bias has shape [3, 5]") && message.contains("must be [5]"), "{message}");
    let ids = Tensor::zeros(&device, &[2, 3], DType::I64).unwrap();
    let message = ops::rms_norm(&ids, None, 1e-6).unwrap_err().to_string();
    assert!(message.contains("rms_norm: dtype i64"), "{message}");
}
