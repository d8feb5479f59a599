use anneal_tensor::ops::{self, Activation};
use anneal_tensor::{DType, Device, Tape, Tensor};
use anneal_testkit::{Array, Tolerance, assert_close, check_op, on_every_device};

use crate::linear::{activated, affine, map};

#[test]
fn two_layers_and_the_activation_between() {
    for activation in [Activation::GeluTanh, Activation::Silu, Activation::None] {
        let inputs = [
            Array::normal(1, &[2, 3, 9]),
            Array::normal(2, &[13, 9]),
            Array::normal(3, &[13]),
            Array::normal(4, &[5, 13]),
        ];
        check_op(
            &format!("feed_forward {activation:?}"),
            &inputs,
            |t| Ok(vec![ops::feed_forward(&t[0], &t[1], &t[2], &t[3], activation)?]),
            |x| {
                let hidden = map(affine(&x[0], &x[1], Some(&x[2])), |value| activated(activation, value));
                vec![affine(&hidden, &x[3], None)]
            },
        );
    }
}

/// The output without and with a recording, and the gradients of the four inputs, in f32. Inputs are rounded
/// to `rounded` first. Sizes are rows, width, hidden width and outputs.
fn evaluate(
    device: &Device,
    dtype: DType,
    rounded: DType,
    activation: Activation,
    [rows, width, hidden, outputs]: [usize; 4],
) -> Vec<Vec<f32>> {
    let sizes: [&[usize]; 5] =
        [&[rows, width], &[hidden, width], &[hidden], &[outputs, hidden], &[rows, outputs]];
    let input = |(index, dims): (usize, &&[usize])| {
        let values = Array::normal(index as u64, dims).values;
        let values: Vec<f32> = values.iter().map(|value| 0.3 * *value as f32).collect();
        let tensor = ops::cast(&Tensor::from_slice(device, &values, dims).unwrap(), rounded).unwrap();
        ops::cast(&tensor, dtype).unwrap()
    };
    let inputs: Vec<Tensor> = sizes.iter().enumerate().map(input).collect();
    let tape = Tape::new();
    let t: Vec<Tensor> = inputs[..4].iter().map(|input| tape.variable(input)).collect();
    let run = |t: &[Tensor]| ops::feed_forward(&t[0], &t[1], &t[2], &t[3], activation).unwrap();
    let (plain, y) = (run(&inputs), run(&t));
    let mut results = vec![plain, y.detach()];
    tape.backward_from(vec![(y, inputs[4].clone())]).unwrap();
    results.extend(t.iter().map(|variable| tape.take_gradient(variable).unwrap()));
    let values = |tensor: &Tensor| ops::cast(tensor, DType::F32).unwrap().to_vec().unwrap();
    results.iter().map(values).collect()
}

/// Sizes with whole packs, several parts of each column's sum, ragged tiles, rows that the GPU library's GELU takes, and more
/// tiles than a GPU works on at once; on a GPU every way that it has for them.
#[test]
fn wider_layers_agree_with_f32_on_one_thread() {
    on_every_device("wide feed_forward", |device| {
        let ways = if matches!(device, Device::Cuda(_)) { 3 } else { 1 };
        for sizes in [[300, 24, 136, 16], [700, 72, 520, 200], [6000, 24, 520, 16]] {
            for way in 0..ways {
                if let Device::Cuda(cuda) = device {
                    cuda.prefer_way(Some(way));
                }
                all_activations_agree(device, sizes, way);
            }
        }
        if let Device::Cuda(cuda) = device {
            cuda.prefer_way(None);
        }
    });
}

fn all_activations_agree(device: &Device, sizes: [usize; 4], way: usize) {
    for activation in [Activation::GeluTanh, Activation::Silu, Activation::None] {
        for (dtype, tolerance) in [
            (DType::F32, Tolerance::OpGradient),
            (DType::BF16, Tolerance::Bf16),
            (DType::F16, Tolerance::F16),
        ] {
            let expected = evaluate(&Device::cpu(Some(1), None), DType::F32, dtype, activation, sizes);
            let got = evaluate(device, dtype, dtype, activation, sizes);
            for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let name =
                    format!("{activation:?} in {dtype}, way {way}, {sizes:?}, result {index} on {device}");
                assert_close(&name, got, expected, tolerance);
            }
        }
    }
}
