use std::sync::{Arc, Mutex};

use anneal_tensor::{DType, Device, Leaf, Result, Sink, Tape, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

use crate::linear::affine;

/// Inputs: x, weights, biases.
fn reference(inputs: &[Array], parts: usize) -> Vec<Array> {
    let (weights, biases) = inputs[1..].split_at((inputs.len() - 1) / 2);
    let of_layer = |(weight, bias): (&Array, &Array)| {
        let y = affine(&inputs[0], weight, Some(bias));
        let (rows, outputs) = (y.dims[0], y.dims[1]);
        let width = outputs / parts;
        let part = move |part: usize| {
            let row = |row: usize| y.values[row * outputs + part * width..][..width].to_vec();
            Array::new(&[rows, width], (0..rows).flat_map(row).collect())
        };
        (0..parts).map(part).collect::<Vec<_>>()
    };
    weights.iter().zip(biases).flat_map(of_layer).collect()
}

fn stack(x: &Tensor, weights: &[Tensor], biases: &[Tensor], parts: usize) -> Result<Vec<Tensor>> {
    let (weights, biases): (Vec<_>, Vec<_>) = (weights.iter().collect(), biases.iter().collect());
    Ok(ops::linear_stack(x, &weights, &biases, parts)?.into_vec())
}

#[test]
fn layers_in_memory_of_their_own() {
    for (layers, [rows, inner, outputs], parts) in
        [(1, [3, 5, 6], 2), (3, [4, 7, 15], 3), (2, [1, 16, 8], 1), (4, [2, 8, 1], 1)]
    {
        let arrays = |first: usize, dims: &[usize]| -> Vec<Array> {
            (first..first + layers).map(|seed| Array::normal(seed as u64, dims)).collect()
        };
        let mut inputs = vec![Array::normal(1, &[rows, inner])];
        inputs.extend(arrays(10, &[outputs, inner]));
        inputs.extend(arrays(20, &[outputs]));
        check_op(
            &format!("linear_stack of {layers} layers {outputs}x{inner}"),
            &inputs,
            |t| {
                let (weights, biases) = t[1..].split_at(layers);
                stack(&t[0], weights, biases, parts)
            },
            |x| reference(x, parts),
        );
    }
}

/// Weights and biases of layers cut from one vector, `gap` elements after each.
fn cut(
    flat: &Tensor,
    layers: usize,
    [outputs, inner]: [usize; 2],
    gap: usize,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let sizes = [outputs * inner, outputs];
    let step = sizes[0] + sizes[1] + 2 * gap;
    let piece = |start: usize, sizes: &[usize]| {
        ops::reshape(&ops::narrow(flat, 0, start, sizes.iter().product())?, sizes)
    };
    let weights = (0..layers).map(|layer| piece(layer * step, &[outputs, inner]));
    let weights = weights.collect::<Result<_>>()?;
    let biases = (0..layers).map(|layer| piece(layer * step + sizes[0] + gap, &[outputs]));
    Ok((weights, biases.collect::<Result<_>>()?))
}

#[test]
fn layers_at_equal_distances_in_one_memory() {
    for (layers, rows, sizes @ [outputs, inner], gap) in
        [(3, 2, [12, 8], 0), (3, 5, [6, 5], 1), (2, 4, [8, 16], 8), (5, 1, [4, 3], 3)]
    {
        let elements = layers * (outputs * inner + outputs + 2 * gap);
        check_op(
            &format!("linear_stack of {layers} layers {outputs}x{inner} in one memory"),
            &[Array::normal(1, &[rows, inner]), Array::normal(2, &[elements])],
            |t| {
                let (weights, biases) = cut(&t[1], layers, sizes, gap)?;
                stack(&t[0], &weights, &biases, 2)
            },
            |x| {
                let step = elements / layers;
                let piece = |start: usize, dims: &[usize]| {
                    Array::new(dims, x[1].values[start..][..dims.iter().product()].to_vec())
                };
                let mut inputs = vec![x[0].clone()];
                inputs.extend((0..layers).map(|layer| piece(layer * step, &sizes)));
                let bias = outputs * inner + gap;
                inputs.extend((0..layers).map(|layer| piece(layer * step + bias, &[outputs])));
                reference(&inputs, 2)
            },
        );
    }
}

struct Parameter {
    value: Tensor,
    sink: Tensor,
    accumulate: bool,
    asked: Mutex<usize>,
}

impl Leaf for Parameter {
    fn fetch(&self) -> Result<Tensor> {
        Ok(self.value.clone())
    }
    fn sink(&self) -> Result<Sink> {
        *self.asked.lock().unwrap() += 1;
        Ok(Sink { gradient: self.sink.clone(), accumulate: self.accumulate })
    }
}

/// Small whole numbers: every sum of their products is exact in every dtype.
fn whole(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|index| ((index * 7 + index / 3 + seed * 5) % 5) as f32 - 2.0).collect()
}

/// Layers whose weights and sinks lie in flat memory, after a gap of `gaps[i]` elements each.
struct Layers {
    sizes: [usize; 2],
    gaps: Vec<usize>,
    /// Whether each layer's gradient is added to what is there.
    accumulate: Vec<bool>,
}

impl Layers {
    /// Where weights and biases start, and the elements in all.
    fn places(&self) -> (Vec<[usize; 2]>, usize) {
        let [outputs, inner] = self.sizes;
        let mut end = 0;
        let place = |gap: &usize| {
            let weight = end + gap;
            let bias = (weight + outputs * inner).next_multiple_of(16);
            end = (bias + outputs).next_multiple_of(16);
            [weight, bias]
        };
        (self.gaps.iter().map(place).collect(), end)
    }

    fn check(&self, device: &Device, dtype: DType, rows: usize) {
        let [outputs, inner] = self.sizes;
        let ((places, elements), layers) = (self.places(), self.gaps.len());
        let (x_values, values, g_values) =
            (whole(rows * inner, 1), whole(elements, 2), whole(layers * rows * outputs, 3));
        let tensor = |values: &[f32], sizes: &[usize]| {
            ops::cast(&Tensor::from_slice(device, values, sizes).unwrap(), dtype).unwrap()
        };
        let flat = tensor(&values, &[elements]);
        let sinks = Tensor::from_slice(device, &vec![7.0f32; elements], &[elements]).unwrap();
        let tape = Tape::new();
        let mut leaves = Vec::new();
        let mut leaf = |start: usize, sizes: &[usize], layer: usize| {
            let piece = |flat: &Tensor| flat.piece(start, sizes).unwrap();
            let (value, sink, accumulate) = (piece(&flat), piece(&sinks), self.accumulate[layer]);
            let parameter = Arc::new(Parameter { value, sink, accumulate, asked: Mutex::default() });
            leaves.push(parameter.clone());
            tape.leaf(parameter).unwrap()
        };
        let places_of = |which: usize| places.iter().map(move |place| place[which]).enumerate();
        let weights: Vec<Tensor> =
            places_of(0).map(|(layer, start)| leaf(start, &[outputs, inner], layer)).collect();
        let biases: Vec<Tensor> = places_of(1).map(|(layer, start)| leaf(start, &[outputs], layer)).collect();
        let x = tape.variable(&tensor(&x_values, &[rows, inner]));
        let vectors = stack(&x, &weights, &biases, 1).unwrap();
        let seed =
            |layer: usize| tensor(&g_values[layer * rows * outputs..][..rows * outputs], &[rows, outputs]);
        let case = format!("{:?} x {rows} rows, gaps {:?}, {dtype} on {device}", self.sizes, self.gaps);
        for (layer, vector) in vectors.iter().enumerate() {
            let y = ops::cast(&vector.detach(), DType::F32).unwrap().to_vec::<f32>().unwrap();
            let [weight, bias] = places[layer];
            let value = |index: usize| -> f32 {
                let (row, o) = (index / outputs, index % outputs);
                let term = |d: usize| x_values[row * inner + d] * values[weight + o * inner + d];
                values[bias + o] + (0..inner).map(term).sum::<f32>()
            };
            assert_eq!(y, (0..rows * outputs).map(value).collect::<Vec<_>>(), "layer {layer} of {case}");
        }
        tape.backward_from(vectors.iter().cloned().enumerate().map(|(i, y)| (y, seed(i))).collect()).unwrap();
        assert!(leaves.iter().all(|leaf| *leaf.asked.lock().unwrap() == 1), "sinks are asked for once");
        let g = |layer: usize, row: usize, o: usize| g_values[(layer * rows + row) * outputs + o];
        let mut expected = vec![7.0f32; elements];
        let mut dx = vec![0.0f32; rows * inner];
        for (layer, [weight, bias]) in places.iter().enumerate() {
            let before = if self.accumulate[layer] { 7.0 } else { 0.0 };
            for o in 0..outputs {
                expected[bias + o] = before + (0..rows).map(|row| g(layer, row, o)).sum::<f32>();
                for d in 0..inner {
                    let term = |row: usize| g(layer, row, o) * x_values[row * inner + d];
                    expected[weight + o * inner + d] = before + (0..rows).map(term).sum::<f32>();
                    let value = values[weight + o * inner + d];
                    (0..rows).for_each(|row| dx[row * inner + d] += g(layer, row, o) * value);
                }
            }
        }
        assert_eq!(sinks.to_vec::<f32>().unwrap(), expected, "sinks of {case}");
        let got = ops::cast(&tape.take_gradient(&x).unwrap(), DType::F32).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(got, dx, "input gradient of {case}");
    }
}

/// Sinks and weights at equal distances, at distances that change, and only some to be added to; what lies between them
/// is not touched.
#[test]
fn gradients_go_into_sinks_wherever_they_lie() {
    on_every_device("sinks of linear_stack", |device| {
        let (t, f) = (true, false);
        let gaps_and_sums = [
            (vec![0; 4], vec![f; 4]),
            (vec![0; 4], vec![t; 4]),
            (vec![16, 16, 0, 0, 48, 0], vec![f, f, f, t, t, f]),
            (vec![3, 0, 5], vec![t, f, t]),
            (vec![0], vec![t]),
        ];
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for (sizes, rows) in [([12, 8], 2), ([5, 3], 4), ([16, 24], 3)] {
                for (gaps, accumulate) in gaps_and_sums.clone() {
                    Layers { sizes, gaps, accumulate }.check(device, dtype, rows);
                }
            }
        }
        // More rows than one block sums.
        for accumulate in [vec![f; 3], vec![t; 3]] {
            Layers { sizes: [136, 8], gaps: vec![0; 3], accumulate }.check(device, DType::F32, 300);
        }
    });
}

/// A vector that nothing was made of, and a whole layer of such.
#[test]
fn vectors_without_a_gradient_count_as_zeros() {
    on_every_device("unused vectors of linear_stack", |device| {
        let (layers, rows, inner, outputs) = (6, 3, 4, 8);
        let tensor = |seed: usize, sizes: &[usize]| {
            Tensor::from_slice(device, &whole(sizes.iter().product(), seed), sizes).unwrap()
        };
        let gradients = |unused: &dyn Fn() -> Option<Tensor>| {
            let tape = Tape::new();
            let variables = |first: usize, sizes: &[usize]| -> Vec<Tensor> {
                (0..layers).map(|layer| tape.variable(&tensor(first + layer, sizes))).collect()
            };
            let x = tape.variable(&tensor(1, &[rows, inner]));
            let (weights, biases) = (variables(2, &[outputs, inner]), variables(20, &[outputs]));
            let vectors = stack(&x, &weights, &biases, 2).unwrap().into_iter().enumerate();
            let seed = |index: usize| match index {
                0 | 1 | 5 => unused(),
                _ => Some(tensor(40 + index, &[rows, outputs / 2])),
            };
            let seeds = vectors.filter_map(|(index, vector)| Some((vector, seed(index)?))).collect();
            tape.backward_from(seeds).unwrap();
            let all = std::iter::once(&x).chain(&weights).chain(&biases);
            let values = |variable| tape.take_gradient(variable).unwrap().to_vec::<f32>().unwrap();
            all.map(values).collect::<Vec<_>>()
        };
        let zeros = || Some(Tensor::zeros(device, &[rows, outputs / 2], DType::F32).unwrap());
        let expected = gradients(&zeros);
        assert!(expected[0].iter().any(|value| *value != 0.0), "the others count");
        assert!(expected[1].iter().all(|value| *value == 0.0), "the first layer is unused");
        assert_eq!(gradients(&|| None), expected, "on {device}");
    });
}

/// On a GPU a stack in one memory is a product for the outputs, one for the inputs' gradients and their sum, one for the
/// weights', one launch for the biases', and one that brings the gradients together.
#[test]
fn a_stack_is_few_launches() {
    on_every_device("launches of linear_stack", |device| {
        let Device::Cuda(cuda) = device else { return };
        let layers = Layers { sizes: [48, 16], gaps: vec![0; 28], accumulate: vec![false; 28] };
        let (places, elements) = layers.places();
        let flat = Tensor::full(device, 0.5, &[elements]).unwrap();
        let sinks = Tensor::full(device, 0.5, &[elements]).unwrap();
        let launches = || {
            let tape = Tape::new();
            let leaf = |start: usize, sizes: &[usize]| {
                let piece = |flat: &Tensor| flat.piece(start, sizes).unwrap();
                let (value, sink, asked) = (piece(&flat), piece(&sinks), Mutex::default());
                tape.leaf(Arc::new(Parameter { value, sink, accumulate: false, asked })).unwrap()
            };
            let weights: Vec<Tensor> = places.iter().map(|place| leaf(place[0], &[48, 16])).collect();
            let biases: Vec<Tensor> = places.iter().map(|place| leaf(place[1], &[48])).collect();
            let x = tape.variable(&Tensor::full(device, 1.0, &[2, 16]).unwrap());
            let seed = Tensor::full(device, 2.0, &[2, 8]).unwrap();
            let before = cuda.launches();
            let vectors = stack(&x, &weights, &biases, 6).unwrap();
            let forward = cuda.launches() - before;
            let seeds = vectors.into_iter().map(|vector| (vector, seed.clone())).collect();
            tape.backward_from(seeds).unwrap();
            (forward, cuda.launches() - before - forward)
        };
        // The first time algorithms are measured.
        launches();
        assert_eq!(launches(), (1, 5));
    });
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let zeros = |sizes: &[usize]| Tensor::zeros(&device, sizes, DType::F32).unwrap();
    let (x, weight, bias) = (zeros(&[2, 3]), zeros(&[4, 3]), zeros(&[4]));
    let message = |x: &Tensor, weights: &[Tensor], biases: &[Tensor], parts| {
        stack(x, weights, biases, parts).unwrap_err().to_string()
    };
    let one = std::slice::from_ref;
    assert_eq!(message(&x, one(&weight), &[], 2), "linear_stack: 1 weights and 0 biases");
    assert_eq!(message(&x, &[], &[], 2), "linear_stack: 0 weights and 0 biases");
    assert_eq!(
        message(&x, one(&weight), one(&bias), 3),
        "linear_stack: 4 outputs cannot be cut into 3 parts"
    );
    let wide = zeros(&[5, 3]);
    let found = message(&x, &[weight.clone(), wide], &[bias.clone(), zeros(&[5])], 1);
    assert_eq!(found, "linear_stack: weights [4, 3] and [5, 3] are not of one size");
    let found = message(&zeros(&[2, 5]), one(&weight), one(&bias), 2);
    assert_eq!(found, "linear_stack: input [2, 5] does not fit weight [4, 3] and bias [4]");
    assert!(message(&zeros(&[2, 1, 3]), one(&weight), one(&bias), 2).contains("[2, 1, 3]"));
}
