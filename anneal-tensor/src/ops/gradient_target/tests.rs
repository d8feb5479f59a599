use std::sync::Arc;

use anneal_tensor::ops::Activation;
use anneal_tensor::{DType, Device, Leaf, Result, Sink, Tape, Tensor, ops};
use anneal_testkit::on_every_device;

struct Parameter {
    value: Tensor,
    gradient: Tensor,
    accumulate: bool,
}

impl Leaf for Parameter {
    fn fetch(&self) -> Result<Tensor> {
        Ok(self.value.clone())
    }
    fn sink(&self) -> Result<Sink> {
        Ok(Sink { gradient: self.gradient.clone(), accumulate: self.accumulate })
    }
}

/// What an op leaves in the sink of its parameter, which held sevens before.
fn sink_after(value: &Tensor, accumulate: bool, op: impl Fn(&Tensor) -> Result<Tensor>) -> Vec<f32> {
    let sevens = vec![7.0f32; value.elements()];
    let gradient = Tensor::from_slice(value.device(), &sevens, value.dims()).unwrap();
    let tape = Tape::new();
    let parameter = Parameter { value: value.clone(), gradient: gradient.clone(), accumulate };
    let output = op(&tape.leaf(Arc::new(parameter)).unwrap()).unwrap();
    let ones = vec![1.0f32; output.elements()];
    let ones = Tensor::from_slice(value.device(), &ones, output.dims()).unwrap();
    let seed = ops::cast(&ones, output.dtype()).unwrap();
    tape.backward_from(vec![(output, seed)]).unwrap();
    gradient.to_vec().unwrap()
}

#[test]
fn a_parameter_gets_its_gradient_written_or_added_once() {
    on_every_device("gradient sinks", written_or_added_once);
}

fn written_or_added_once(device: &Device) {
    for dtype in [DType::F32, DType::BF16] {
        let tensor = |values: &[f32], sizes: &[usize]| {
            ops::cast(&Tensor::from_slice(device, values, sizes).unwrap(), dtype).unwrap()
        };
        let x = tensor(&[1.0, -1.0, 1.0, -1.0, 1.0, -1.0], &[3, 2]);
        let row = tensor(&[2.0, 3.0], &[2]);
        let table = tensor(&[0.0; 8], &[4, 2]);
        let ids = Tensor::from_slice(device, &[2i64, 0, 2], &[3]).unwrap();
        for (accumulate, before) in [(false, 0.0), (true, 7.0)] {
            let expected = |sums: &[f32]| sums.iter().map(|sum| before + sum).collect::<Vec<f32>>();
            // The rows of x are normalised already, so the weight's gradient is their sum.
            let weight = sink_after(&row, accumulate, |w| ops::layer_norm(&x, Some(w), None, 0.0));
            assert_eq!(weight, expected(&[3.0, -3.0]));
            let bias = sink_after(&row, accumulate, |b| ops::layer_norm(&x, None, Some(b), 0.0));
            assert_eq!(bias, expected(&[3.0, 3.0]));
            let matrix = tensor(&[0.5; 8], &[4, 2]);
            let product = sink_after(&matrix, accumulate, |w| ops::linear(&x, w, None, Activation::None));
            assert_eq!(product, expected(&[3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 3.0, -3.0]));
            let outputs = tensor(&[1.0; 4], &[4]);
            let bias =
                sink_after(&outputs, accumulate, |b| ops::linear(&x, &matrix, Some(b), Activation::None));
            assert_eq!(bias, expected(&[3.0; 4]));
            let added = sink_after(&row, accumulate, |b| ops::add(&x, b));
            assert_eq!(added, expected(&[3.0, 3.0]));
            // The sum's gradient is 1, so the bias' is the gate's sum.
            let branch_bias = sink_after(&row, accumulate, |b| {
                Ok(ops::gate_residual_layer_norm_modulate(&x, &x, Some(b), &x, &x, &x, 1e-6)?.0)
            });
            assert_eq!(branch_bias, expected(&[3.0, -3.0]));
            let embedded = sink_after(&table, accumulate, |t| ops::embedding(t, &ids));
            assert_eq!(embedded, expected(&[1.0, 1.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0]));
        }
    }
}
