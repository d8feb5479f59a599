use anneal_device::cuda::AttentionBackend;
use anneal_tensor::ops::{self, AttentionInput, attention};
use anneal_tensor::{DType, Device, Result, Tape, Tensor};
use anneal_testkit::{
    Array, Tolerance, assert_close, check_op, on_every_device, poisoned_cpu, poisoned_cuda, skip_without,
};

/// Sizes of a case, and its key mask (`[B, M]`, empty for none).
#[derive(Clone)]
struct Case {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
    scale: f64,
    mask: Vec<u8>,
}

impl Case {
    fn new(batch: usize, queries: usize, keys: usize, heads: usize, dim: usize) -> Self {
        Self { batch, queries, keys, heads, dim, scale: 0.3, mask: Vec::new() }
    }

    /// Leaves out about a third of the keys, and all of the last sample.
    fn masked(mut self) -> Self {
        let seen = |index: usize| index / self.keys + 1 < self.batch && index * 7 % 3 != 1;
        self.mask = (0..self.batch * self.keys).map(|index| u8::from(seen(index)) * 255).collect();
        self
    }

    fn mask_tensor(&self, device: &Device) -> Option<Tensor> {
        let sizes = [self.batch, self.keys];
        (!self.mask.is_empty()).then(|| Tensor::from_slice(device, &self.mask, &sizes).unwrap())
    }

    fn inputs(&self) -> Vec<Array> {
        let Self { batch, queries, keys, heads, dim, .. } = *self;
        let query = Array::normal(1, &[batch, queries, heads, dim]);
        let [key, value] = [2, 3].map(|seed| Array::normal(seed, &[batch, keys, heads, dim]));
        vec![query, key, value]
    }

    fn with_bias(&self, batch: usize, heads: usize) -> Vec<Array> {
        let mut inputs = self.inputs();
        inputs.push(Array::normal(4, &[batch, heads, self.queries, self.keys]));
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let input = AttentionInput::Separate { query: &inputs[0], key: &inputs[1], value: &inputs[2] };
        let mask = self.mask_tensor(inputs[0].device());
        Ok(vec![attention(input, inputs.get(3), mask.as_ref(), self.scale as f32)?])
    }

    fn check(&self, name: &str, inputs: &[Array]) {
        check_op(name, inputs, |inputs| self.run(inputs), |inputs| vec![self.reference(inputs).output]);
    }
}

fn bias_at(bias: &Array, b: usize, h: usize, n: usize, m: usize) -> f64 {
    bias.at(&[b.min(bias.dims[0] - 1), h.min(bias.dims[1] - 1), n, m])
}

struct Reference {
    output: Array,
    /// `[B, H, N, M]`
    probabilities: Array,
}

impl Case {
    /// The formula in f64: whole rows of scores, no blocks.
    fn reference(&self, inputs: &[Array]) -> Reference {
        let Self { batch, queries, keys, heads, dim, .. } = *self;
        let (query, key, value) = (&inputs[0], &inputs[1], &inputs[2]);
        let mut output = Array::zeros(&[batch, queries, heads, dim]);
        let mut probabilities = Array::zeros(&[batch, heads, queries, keys]);
        for (b, h, n) in triples(batch, heads, queries) {
            let row = (0..keys).map(|m| {
                let dot: f64 = (0..dim).map(|d| query.at(&[b, n, h, d]) * key.at(&[b, m, h, d])).sum();
                let bias = inputs.get(3).map_or(0.0, |bias| bias_at(bias, b, h, n, m));
                let seen = self.mask.is_empty() || self.mask[b * keys + m] != 0;
                if seen { self.scale * dot + bias } else { f64::NEG_INFINITY }
            });
            let row: Vec<f64> = row.collect();
            let maximum = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if maximum == f64::NEG_INFINITY {
                continue;
            }
            let sum: f64 = row.iter().map(|score| (score - maximum).exp()).sum();
            for m in 0..keys {
                let p = (row[m] - maximum).exp() / sum;
                *probabilities.at_mut(&[b, h, n, m]) = p;
                for d in 0..dim {
                    *output.at_mut(&[b, n, h, d]) += p * value.at(&[b, m, h, d]);
                }
            }
        }
        Reference { output, probabilities }
    }

    /// Gradients of `sum(upstream * output)` by the formulas in the head of the op, in f64.
    fn reference_gradients(&self, inputs: &[Array], upstream: &Array) -> Vec<Array> {
        let Self { batch, queries, keys, heads, dim, scale, .. } = *self;
        let (query, key, value) = (&inputs[0], &inputs[1], &inputs[2]);
        let p = self.reference(inputs).probabilities;
        let mut gradients: Vec<Array> = inputs.iter().map(|input| Array::zeros(&input.dims)).collect();
        for (b, h, n) in triples(batch, heads, queries) {
            let dot = |m: usize| {
                (0..dim).map(|d| upstream.at(&[b, n, h, d]) * value.at(&[b, m, h, d])).sum::<f64>()
            };
            let dp: Vec<f64> = (0..keys).map(dot).collect();
            let delta: f64 = (0..keys).map(|m| p.at(&[b, h, n, m]) * dp[m]).sum();
            for m in 0..keys {
                let p = p.at(&[b, h, n, m]);
                let ds = p * (dp[m] - delta);
                for d in 0..dim {
                    *gradients[0].at_mut(&[b, n, h, d]) += scale * ds * key.at(&[b, m, h, d]);
                    *gradients[1].at_mut(&[b, m, h, d]) += scale * ds * query.at(&[b, n, h, d]);
                    *gradients[2].at_mut(&[b, m, h, d]) += p * upstream.at(&[b, n, h, d]);
                }
                if let Some(bias) = gradients.get_mut(3) {
                    let (b, h) = (b.min(bias.dims[0] - 1), h.min(bias.dims[1] - 1));
                    *bias.at_mut(&[b, h, n, m]) += ds;
                }
            }
        }
        gradients
    }

    /// Value and gradients of `sum(upstream * output)`, computed in a dtype.
    fn evaluate(&self, device: &Device, inputs: &[Array], upstream: &Array, dtype: DType) -> Vec<Vec<f32>> {
        let tape = Tape::new();
        let cast = |array: &Array| ops::cast(&tensor(device, array), dtype).unwrap();
        let read = |tensor: &Tensor| ops::cast(tensor, DType::F32).unwrap().to_vec::<f32>().unwrap();
        let variables: Vec<Tensor> = inputs.iter().map(|input| tape.variable(&cast(input))).collect();
        let output = self.run(&variables).unwrap().remove(0);
        let value = read(&output.detach());
        tape.backward_from(vec![(output, cast(upstream))]).unwrap();
        let gradients = variables.iter().map(|variable| read(&tape.take_gradient(variable).unwrap()));
        std::iter::once(value).chain(gradients).collect()
    }

    /// Value and gradients against the formulas: in f32 with equal bits for 1, 2 and 3 threads, and on a
    /// GPU in every dtype.
    fn check_large(&self, name: &str, inputs: &[Array]) {
        let upstream = Array::normal(9, &[self.batch, self.queries, self.heads, self.dim]);
        let runs =
            [1, 2, 3].map(|threads| self.evaluate(&poisoned_cpu(threads), inputs, &upstream, DType::F32));
        close(&format!("{name}: value"), &runs[0][0], &self.reference(inputs).output, Tolerance::OpValue);
        for (index, gradient) in self.reference_gradients(inputs, &upstream).iter().enumerate() {
            close(&format!("{name}: gradient {index}"), &runs[0][1 + index], gradient, Tolerance::OpGradient);
        }
        let [one, two, three] = runs.map(|run| bits(&run));
        assert!(one == two && one == three, "{name}: threads differ");
        self.check_on_gpu(name, inputs);
    }

    /// Value and gradients of every dtype on a GPU against the formulas, and equal bits twice.
    fn check_on_gpu(&self, name: &str, inputs: &[Array]) {
        let Some(turn) = poisoned_cuda() else {
            return skip_without("CUDA device", name);
        };
        for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            let inputs: Vec<Array> = inputs.iter().map(|input| rounded(input, dtype)).collect();
            let mut expected = vec![self.reference(&inputs).output];
            let upstream = rounded(&Array::normal(9, &expected[0].dims), dtype);
            expected.extend(self.reference_gradients(&inputs, &upstream));
            let [got, again] = [0, 1].map(|_| self.evaluate(&turn.device, &inputs, &upstream, dtype));
            for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let error = relative_error(got, expected);
                assert!(error < bound, "{name} ({dtype}), {index}: {error:e}");
            }
            assert!(bits(&got) == bits(&again), "{name} ({dtype}): two runs differ");
        }
    }
}

fn bits(run: &[Vec<f32>]) -> Vec<u32> {
    run.concat().into_iter().map(f32::to_bits).collect()
}

/// The values that a dtype can hold.
fn rounded(array: &Array, dtype: DType) -> Array {
    let round = |value: &f64| match dtype {
        DType::BF16 => half::bf16::from_f64(*value).to_f64(),
        DType::F16 => half::f16::from_f64(*value).to_f64(),
        _ => *value,
    };
    Array::new(&array.dims, array.values.iter().map(round).collect())
}

/// `|got - expected| / |expected|`; where nearly nothing is expected, the difference itself.
fn relative_error(got: &[f32], expected: &Array) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference =
        norm(&mut got.iter().zip(&expected.values).map(|(got, expected)| f64::from(*got) - expected));
    match norm(&mut expected.values.iter().copied()) {
        size if size > 1e-6 => difference / size,
        _ => difference,
    }
}

fn triples(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |index| (index / (b * c), index / c % b, index % c))
}

fn tensor(device: &Device, array: &Array) -> Tensor {
    let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
    Tensor::from_slice(device, &values, &array.dims).unwrap()
}

fn close(name: &str, got: &[f32], expected: &Array, tolerance: Tolerance) {
    let got: Vec<f64> = got.iter().map(|value| f64::from(*value)).collect();
    assert_close(name, &got, &expected.values, tolerance);
}

#[test]
fn separate_inputs_of_several_widths_and_lengths() {
    for (queries, keys, dim) in [(5, 3, 4), (1, 1, 16), (3, 7, 33), (17, 5, 8), (4, 1, 5), (2, 19, 16)] {
        let case = Case::new(2, queries, keys, 2, dim);
        case.check(&format!("attention {queries}x{keys}x{dim}"), &case.inputs());
    }
}

#[test]
fn a_packed_input_has_a_packed_gradient() {
    for (queries, dim) in [(5, 4), (3, 16)] {
        let case = Case::new(2, queries, queries, 3, dim);
        let qkv = Array::normal(5, &[2, queries, 3, 3, dim]);
        check_op(
            "attention, packed",
            &[qkv],
            |inputs| Ok(vec![attention(AttentionInput::Packed(&inputs[0]), None, None, case.scale as f32)?]),
            |inputs| vec![case.reference(&unpacked(&inputs[0])).output],
        );
    }
}

fn unpacked(qkv: &Array) -> Vec<Array> {
    let [b, n, h, d] = [0, 1, 3, 4].map(|axis| qkv.dims[axis]);
    let part = |part: usize| {
        let mut array = Array::zeros(&[b, n, h, d]);
        for (b, n, h) in triples(b, n, h) {
            (0..d).for_each(|d| *array.at_mut(&[b, n, h, d]) = qkv.at(&[b, n, part, h, d]));
        }
        array
    };
    vec![part(0), part(1), part(2)]
}

#[test]
fn packed_and_separate_views_of_the_same_memory_agree_bit_for_bit() {
    on_every_device("packed and separate views of the same memory agree bit for bit", |device| {
        let qkv = tensor(device, &Array::normal(5, &[2, 70, 3, 2, 64]));
        let packed = attention(AttentionInput::Packed(&qkv), None, None, 0.125).unwrap();
        let part = |part| ops::reshape(&ops::narrow(&qkv, 2, part, 1).unwrap(), &[2, 70, 2, 64]).unwrap();
        let (query, key, value) = (part(0), part(1), part(2));
        let input = AttentionInput::Separate { query: &query, key: &key, value: &value };
        let separate = attention(input, None, None, 0.125).unwrap();
        assert_eq!(packed.to_vec::<f32>().unwrap(), separate.to_vec::<f32>().unwrap());
    });
}

#[test]
fn a_bias_is_broadcast_over_batch_and_heads_and_so_is_its_gradient() {
    let case = Case::new(2, 3, 5, 2, 4);
    for (batch, heads) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        case.check(&format!("attention, bias [{batch}, {heads}]"), &case.with_bias(batch, heads));
    }
}

#[test]
fn masked_keys_take_no_part_and_a_sample_without_keys_gives_zeros() {
    let case = Case::new(3, 3, 8, 2, 4).masked();
    case.check("attention, mask", &case.inputs());
    case.check("attention, mask and bias", &case.with_bias(1, 2));
    on_every_device("attention without keys", |device| {
        let tensors: Vec<Tensor> = case.inputs().iter().map(|input| tensor(device, input)).collect();
        let zeros = case.run(&tensors).unwrap()[0].to_vec::<f32>().unwrap();
        assert!(zeros[2 * 3 * 2 * 4..].iter().all(|value| *value == 0.0));
    });
}

#[test]
fn blocks_of_queries_and_keys_in_every_combination_of_remainders() {
    let sizes = [
        (1, 130, 64),
        (7, 65, 72),
        (65, 7, 64),
        (130, 130, 32),
        (257, 130, 16),
        (33, 300, 33),
        (64, 31, 128),
    ];
    for (queries, keys, dim) in sizes {
        let case = Case { scale: 1.0 / (dim as f64).sqrt(), ..Case::new(2, queries, keys, 2, dim) };
        case.check_large(&format!("{queries}x{keys}x{dim}"), &case.inputs());
    }
}

#[test]
fn few_heads_are_cut_along_the_queries() {
    for keys in [64, 200] {
        let case = Case { scale: 0.125, ..Case::new(1, 700, keys, 1, 64) };
        case.check_large("one head", &case.inputs());
    }
    let case = Case { scale: 0.125, ..Case::new(2, 650, 130, 1, 64) }.masked();
    case.check_large("one head, mask", &case.inputs());
}

/// Sizes that reach all kernels of a GPU: ragged ends, several blocks of keys and of queries, wide heads.
#[test]
fn kernels_of_a_gpu_agree_with_the_formulas_and_with_themselves() {
    let sizes = [
        (70, 270, 72),
        (256, 256, 72),
        (257, 40, 8),
        (33, 140, 104),
        (65, 530, 64),
        (30, 60, 33),
        (130, 140, 80),
        (40, 140, 80),
        (1, 1, 72),
    ];
    for (queries, keys, dim) in sizes {
        let case = Case { scale: -0.125, ..Case::new(2, queries, keys, 2, dim) };
        let name = format!("{queries}x{keys}x{dim}");
        case.check_on_gpu(&name, &case.inputs());
        case.masked().check_on_gpu(&format!("{name}, mask"), &Case::new(2, queries, keys, 2, dim).inputs());
    }
    for (batch, heads) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        let case = Case { scale: 0.125, ..Case::new(2, 65, 300, 2, 72) }.masked();
        case.check_on_gpu(&format!("bias {batch} {heads}"), &case.with_bias(batch, heads));
    }
}

/// More heads than a device has multiprocessors, so that blocks of threads which stay for several heads go on to others;
/// a value that is not a number in one head stays there.
#[test]
fn many_heads_on_a_gpu_have_the_bits_of_each_alone() {
    let Some(turn) = poisoned_cuda() else {
        return skip_without("CUDA device", "many heads");
    };
    let Device::Cuda(cuda) = &turn.device else { unreachable!("a CUDA device was asked for") };
    cuda.set_attention_backend(Some(AttentionBackend::Own));
    let (batch, heads, dtype) = (20, 16, DType::BF16);
    for (queries, keys, dim) in [
        (40, 40, 40),
        (130, 200, 64),
        (256, 200, 72),
        (256, 40, 72),
        (130, 200, 80),
        (40, 200, 72),
        (300, 70, 72),
    ] {
        let case = Case { scale: 0.125, ..Case::new(batch, queries, keys, heads, dim) };
        let mut inputs = case.inputs();
        inputs[0].values[5] = f64::NAN;
        let upstream = Array::normal(9, &[batch, queries, heads, dim]);
        let all = case.evaluate(&turn.device, &inputs, &upstream, dtype);
        for (b, h) in [(0, 0), (0, 1), (8, 4), (9, 15), (19, 15)] {
            let one = |array: &Array| {
                let sizes = [1, array.dims[1], 1, dim];
                let values = (0..array.dims[1]).flat_map(|n| (0..dim).map(move |d| (n, d)));
                Array::new(&sizes, values.map(|(n, d)| array.at(&[b, n, h, d])).collect())
            };
            let alone = Case { batch: 1, heads: 1, mask: Vec::new(), ..case };
            let own: Vec<Array> = inputs.iter().map(one).collect();
            let alone = alone.evaluate(&turn.device, &own, &one(&upstream), dtype);
            for (index, (all, alone)) in all.iter().zip(&alone).enumerate() {
                let rows = if index < 2 { queries } else { keys };
                let values = all.iter().map(|value| f64::from(*value)).collect();
                let own = one(&Array::new(&[batch, rows, heads, dim], values));
                let same = own.values.iter().zip(alone).all(|(own, alone)| {
                    own.to_bits() == f64::from(*alone).to_bits() || own.is_nan() && alone.is_nan()
                });
                assert!(same, "{queries}x{keys}x{dim}, head {b} {h}, {index}");
                assert_eq!(own.values.iter().any(|value| value.is_nan()), (b, h) == (0, 0), "{index}");
            }
        }
    }
    cuda.set_attention_backend(None);
}

/// So many heads that some blocks of threads with four groups of queries stay for a third one, whose queries go where the
/// first one's were: masks, biases and negative scales there, and the widest heads of four groups and of two.
#[test]
fn many_heads_of_four_groups_of_queries() {
    let case = Case::new(17, 130, 70, 16, 8);
    case.clone().masked().check_on_gpu("many heads, mask", &case.inputs());
    let negative = Case { scale: -0.3, ..case.clone() };
    negative.check_on_gpu("many heads, bias, negative scale", &negative.with_bias(1, 16));
    case.clone().masked().check_on_gpu("many heads, mask and bias", &case.with_bias(17, 1));
    for dim in [80, 128] {
        let case = Case { scale: -0.1, ..Case::new(17, 130, 12, 16, dim) }.masked();
        case.check_on_gpu(&format!("many wide heads, {dim}"), &case.inputs());
    }
}

/// Queries of three to eight blocks of threads, and more heads than clusters that a device runs at once.
#[test]
fn clusters_hand_their_sums_on_on_a_gpu() {
    // Few enough scores that no other kernels are asked.
    let few = Case { scale: 0.125, ..Case::new(3, 600, 70, 8, 8) };
    few.check_on_gpu("clusters", &few.inputs());
    let case = Case { scale: 0.125, ..Case::new(3, 600, 70, 16, 8) };
    case.clone().masked().check_on_gpu("clusters, mask and bias", &case.with_bias(3, 1));
    for (queries, keys, dim) in [(1000, 64, 72), (1900, 130, 40)] {
        let case = Case { scale: -0.1, ..Case::new(2, queries, keys, 2, dim) };
        case.check_on_gpu(&format!("clusters, {queries}x{keys}x{dim}"), &case.inputs());
    }
}

/// Heads too wide for clusters, whose blocks of threads visit all queries; and more queries than clusters take, dealt to three parts of
/// three visits.
#[test]
fn visits_and_parts_add_up_on_a_gpu() {
    for (batch, queries, heads, dim) in [(12, 300, 11, 80), (20, 2100, 2, 8)] {
        let case = Case { scale: 0.125, ..Case::new(batch, queries, 10, heads, dim) };
        case.check_on_gpu(&format!("visits, {queries}x{dim}"), &case.inputs());
    }
}

#[test]
fn large_blocks_with_bias_and_mask() {
    for (batch, heads) in [(1, 1), (3, 1), (1, 2), (3, 2)] {
        let case = Case { scale: 0.125, ..Case::new(3, 130, 150, 2, 24) };
        case.check_large("bias", &case.with_bias(batch, heads));
        let case = case.masked();
        case.check_large("bias and mask", &case.with_bias(batch, heads));
    }
}

#[test]
fn many_small_heads_share_a_task() {
    let case = Case { scale: 0.2, ..Case::new(9, 16, 16, 4, 32) };
    case.check_large("small heads", &case.inputs());
}

#[test]
fn huge_scores_neither_overflow_nor_lose_the_winner() {
    on_every_device("huge scores neither overflow nor lose the winner", |device| {
        let mut case = Case::new(1, 20, 140, 1, 16);
        case.scale = 1.0;
        let mut inputs = case.inputs();
        // Scores up to some 1e7, where neighbours differ by far more than 88.
        inputs[..2].iter_mut().for_each(|input| input.values.iter_mut().for_each(|value| *value *= 1024.0));
        let tensors: Vec<Tensor> = inputs.iter().map(|input| tensor(device, input)).collect();
        let output = case.run(&tensors).unwrap()[0].to_vec::<f32>().unwrap();
        close("huge scores", &output, &case.reference(&inputs).output, Tolerance::OpValue);
    });
}

#[test]
fn scores_that_grow_from_block_to_block_are_rescaled() {
    let case = Case { scale: 1.0, ..Case::new(1, 3, 400, 1, 4) };
    let mut inputs = case.inputs();
    for (position, value) in inputs[1].values.iter_mut().enumerate() {
        *value *= 1.0 + (position / 4) as f64 / 40.0;
    }
    case.check_large("growing scores", &inputs);
}

#[test]
fn a_bias_of_minus_infinity_masks() {
    on_every_device("a bias of minus infinity masks", |device| {
        let case = Case::new(1, 4, 6, 1, 16);
        let mut inputs = case.with_bias(1, 1);
        for m in 0..6 {
            *inputs[3].at_mut(&[0, 0, 1, m]) = f64::NEG_INFINITY;
            *inputs[3].at_mut(&[0, 0, 2, m]) = if m < 3 { f64::NEG_INFINITY } else { 0.0 };
        }
        let tape = Tape::new();
        let variables: Vec<Tensor> =
            inputs.iter().map(|input| tape.variable(&tensor(device, input))).collect();
        let output = case.run(&variables).unwrap().remove(0);
        let expected = case.reference(&inputs).output;
        close("value", &output.detach().to_vec::<f32>().unwrap(), &expected, Tolerance::OpValue);
        assert!(output.detach().to_vec::<f32>().unwrap()[16..32].iter().all(|value| *value == 0.0));
        let upstream = Array::normal(9, &expected.dims);
        tape.backward_from(vec![(output, tensor(device, &upstream))]).unwrap();
        for (variable, expected) in variables.iter().zip(case.reference_gradients(&inputs, &upstream)) {
            let gradient = tape.take_gradient(variable).unwrap().to_vec::<f32>().unwrap();
            close("gradient", &gradient, &expected, Tolerance::OpGradient);
        }
    });
}

#[test]
fn a_value_that_is_not_a_number_shows() {
    on_every_device("a value that is not a number shows", |device| {
        let case = Case::new(1, 2, 3, 1, 16);
        for input in 0..3 {
            let mut inputs = case.inputs();
            inputs[input].values[0] = f64::NAN;
            let tensors: Vec<Tensor> = inputs.iter().map(|input| tensor(device, input)).collect();
            assert!(case.run(&tensors).unwrap()[0].to_vec::<f32>().unwrap()[0].is_nan(), "input {input}");
        }
    });
}

#[test]
fn only_wanted_gradients_are_computed_and_they_are_the_same() {
    on_every_device("only wanted gradients are computed and they are the same", |device| {
        let case = Case::new(2, 40, 70, 2, 16);
        let inputs = case.with_bias(1, 2);
        let gradients = |wanted: &[bool]| -> Vec<Option<Vec<f32>>> {
            let tape = Tape::new();
            let tensors: Vec<Tensor> = inputs.iter().map(|input| tensor(device, input)).collect();
            let variables: Vec<Tensor> = tensors
                .iter()
                .zip(wanted)
                .map(|(tensor, wanted)| if *wanted { tape.variable(tensor) } else { tensor.clone() })
                .collect();
            let output = case.run(&variables).unwrap().remove(0);
            let upstream = tensor(device, &Array::normal(9, output.dims()));
            tape.backward_from(vec![(output, upstream)]).unwrap();
            let taken = variables.iter().zip(wanted).map(|(variable, wanted)| {
                wanted.then(|| tape.take_gradient(variable).unwrap().to_vec::<f32>().unwrap())
            });
            taken.collect()
        };
        let all = gradients(&[true; 4]);
        for only in 0..4 {
            let mut wanted = [false; 4];
            wanted[only] = true;
            assert_eq!(gradients(&wanted)[only], all[only], "input {only}");
        }
    });
}

#[test]
fn a_bias_may_be_f32_beside_bf16_inputs() {
    on_every_device("a bias may be f32 beside bf16 inputs", |device| {
        let case = Case::new(1, 5, 7, 2, 8);
        let inputs = case.with_bias(1, 2);
        let mut tensors: Vec<Tensor> = inputs.iter().map(|input| tensor(device, input)).collect();
        for tensor in &mut tensors[..3] {
            *tensor = ops::cast(tensor, DType::BF16).unwrap();
        }
        let output = case.run(&tensors).unwrap().remove(0);
        assert_eq!(output.dtype(), DType::BF16);
        let output = ops::cast(&output, DType::F32).unwrap().to_vec::<f32>().unwrap();
        close("bf16", &output, &case.reference(&inputs).output, Tolerance::Bf16);
    });
}

#[test]
fn what_does_not_fit_is_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize], dtype| Tensor::zeros(&device, sizes, dtype).unwrap();
    let query = zeros(&[2, 3, 4, 8], DType::F32);
    let key = zeros(&[2, 5, 4, 8], DType::F32);
    let message = |input: AttentionInput, bias: Option<&Tensor>, mask: Option<&Tensor>| {
        attention(input, bias, mask, 1.0).unwrap_err().to_string()
    };
    let fitting = AttentionInput::Separate { query: &query, key: &key, value: &key };
    let narrow = zeros(&[2, 5, 4, 7], DType::F32);
    assert_eq!(
        message(AttentionInput::Separate { query: &query, key: &key, value: &narrow }, None, None),
        "attention: queries [2, 3, 4, 8], keys [2, 5, 4, 8] and values [2, 5, 4, 7] do not fit; \
         expected [B, N, H, D] and twice [B, M, H, D]"
    );
    let half = zeros(&[2, 5, 4, 8], DType::BF16);
    assert_eq!(
        message(AttentionInput::Separate { query: &query, key: &half, value: &key }, None, None),
        "attention: queries are f32, but keys or values are bf16"
    );
    assert_eq!(
        message(AttentionInput::Packed(&zeros(&[2, 3, 2, 4, 8], DType::F32)), None, None),
        "attention: packed queries, keys and values are [B, N, 3, H, D], not [2, 3, 2, 4, 8]"
    );
    assert_eq!(
        message(AttentionInput::Packed(&query), None, None),
        "attention: expected 5 dimensions, found shape [2, 3, 4, 8]"
    );
    assert_eq!(
        message(AttentionInput::Packed(&zeros(&[2, 3, 3, 4, 8], DType::I64)), None, None),
        "attention: dtype i64 is not supported here"
    );
    assert_eq!(
        message(fitting, Some(&zeros(&[3, 4, 3, 5], DType::F32)), None),
        "attention: a bias of shape [3, 4, 3, 5] does not fit; expected [1 or 2, 1 or 4, 3, 5]"
    );
    assert_eq!(
        message(fitting, Some(&zeros(&[1, 1, 3, 5], DType::U8)), None),
        "attention's bias: dtype u8 is not supported here"
    );
    assert_eq!(
        message(fitting, None, Some(&zeros(&[2, 3], DType::U8))),
        "attention: a key mask of shape [2, 3] does not fit; expected [2, 5]"
    );
    assert_eq!(
        message(fitting, None, Some(&zeros(&[2, 5], DType::F32))),
        "attention: the key mask must be u8, not f32"
    );
}
