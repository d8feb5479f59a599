//! Every vector unit of this machine against double precision and against each other; the op's
//! own tests see the widest alone.

use anneal_device::Device;

use super::ahead::Ahead;
use super::product::{Left, Shape, product};
use super::simd::{Rows, Simd, Unit, Work, dispatch};
use super::{Problem, backward_of, forward_of};
use crate::ops::attention::{Gradients, Operands, Saved, Sizes};
use crate::rng::{Purpose, Stream};
use crate::{DType, Tensor};

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, Purpose::Test, 0, 0);
    (0..count).map(|_| stream.normal() as f32).collect()
}

struct Primitives;

impl Work for Primitives {
    fn run<S: Simd>(self, simd: S) {
        let mut lanes = vec![0.0f32; S::LANES];
        let mut exp2 = |x: f32| unsafe {
            simd.store(lanes.as_mut_ptr(), simd.exp2(simd.splat(x)));
            lanes[0]
        };
        for index in 0..400_000 {
            let x = -126.0 + index as f32 * (252.0 / 400_000.0);
            let expected = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) - expected).abs() <= 2e-7 * expected, "2^{x}");
        }
        for x in [-127.0, -200.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2(x), 0.0, "2^{x}");
        }
        assert!(exp2(f32::NAN).is_nan());
        assert_eq!(exp2(0.0), 1.0);

        let values = normal(1, S::LANES);
        let sum = simd.sum(unsafe { simd.load(values.as_ptr()) });
        assert!((f64::from(sum) - values.iter().map(|value| f64::from(*value)).sum::<f64>()).abs() < 1e-5);

        let source = normal(2, S::LANES * (S::LANES + 3));
        for rows in 0..=S::LANES {
            let mut target = vec![f32::NAN; S::LANES * (S::LANES + 1)];
            let from = Rows::new(source.as_ptr(), S::LANES + 3);
            // SAFETY: both hold that many rows.
            unsafe { simd.transpose(from, rows, 2.0, Rows::new(target.as_mut_ptr(), S::LANES + 1)) };
            for row in 0..S::LANES {
                for column in 0..S::LANES {
                    let expected =
                        if column < rows { 2.0 * source[column * (S::LANES + 3) + row] } else { 0.0 };
                    assert_eq!(target[row * (S::LANES + 1) + column], expected);
                }
            }
        }
    }
}

struct Products;

impl Work for Products {
    fn run<S: Simd>(self, simd: S) {
        let (most_rows, most_columns, depth) = (33, 7, 9);
        let width = most_columns * S::LANES;
        let left = normal(3, most_rows * most_rows);
        let right = normal(4, depth * width);
        for (rows, columns) in (1..=most_rows).flat_map(|rows| (1..=most_columns).map(move |c| (rows, c))) {
            for (transposed, accumulate) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut target = normal(5, most_rows * width);
                let before = target.clone();
                let rows_of_left = Rows::new(left.as_ptr(), most_rows);
                let operand = if transposed { Left::columns(rows_of_left) } else { Left::rows(rows_of_left) };
                let (from, to) = (Rows::new(right.as_ptr(), width), Rows::new(target.as_mut_ptr(), width));
                let shape = Shape { rows, columns, depth };
                // SAFETY: the operands are that large.
                unsafe { product(simd, shape, operand, from, to, accumulate, &Ahead::nothing()) };
                for (place, value) in target.iter().enumerate() {
                    let (row, column) = (place / width, place % width);
                    let mut expected = f64::from(before[place]);
                    if row < rows && column < columns * S::LANES {
                        let at =
                            |d: usize| if transposed { d * most_rows + row } else { row * most_rows + d };
                        let terms =
                            (0..depth).map(|d| f64::from(left[at(d)]) * f64::from(right[d * width + column]));
                        expected = terms.sum::<f64>() + if accumulate { expected } else { 0.0 };
                    }
                    assert!(
                        (f64::from(*value) - expected).abs() < 1e-5,
                        "{rows} x {columns}, {row}, {column}"
                    );
                }
            }
        }
    }
}

#[test]
fn primitives_of_every_unit() {
    Unit::present().for_each(|unit| dispatch(unit, Primitives));
}

#[test]
fn products_of_every_size_on_every_unit() {
    Unit::present().for_each(|unit| dispatch(unit, Products));
}

fn tensor(device: &Device, seed: u64, sizes: &[usize]) -> Tensor {
    Tensor::from_slice(device, &normal(seed, sizes.iter().product()), sizes).unwrap()
}

/// Output and all gradients, one after the other.
fn evaluate(unit: Unit, sizes: &Sizes, masked: bool) -> Vec<f32> {
    let device = Device::cpu(Some(2), None);
    let Device::Cpu(cpu) = &device else { unreachable!("the device is the CPU") };
    let Sizes { batch, queries, keys, heads, dim } = *sizes;
    let mask: Vec<u8> = (0..batch * keys).map(|key| u8::from(key % 5 != 2)).collect();
    let operands = Operands {
        query: tensor(&device, 1, &[batch, queries, heads, dim]),
        key: tensor(&device, 2, &[batch, keys, heads, dim]),
        value: tensor(&device, 3, &[batch, keys, heads, dim]),
        bias: Some(tensor(&device, 4, &[1, heads, queries, keys])),
        mask: masked.then(|| Tensor::from_slice(&device, &mask, &[batch, keys]).unwrap()),
    };
    let problem = Problem::new(unit, sizes, 0.2, &operands);
    let empty = |like: &Tensor| Tensor::empty(&device, like.dims(), like.dtype()).unwrap();
    let output = empty(&operands.query);
    let log_sums = Tensor::empty(&device, &[batch, heads, queries], DType::F32).unwrap();
    forward_of(&cpu.pool, &problem, &output, Some(&log_sums));
    let saved = Saved { upstream: tensor(&device, 5, output.dims()), output, log_sums };
    let gradients = Gradients {
        query: Some(empty(&operands.query)),
        key: Some(empty(&operands.key)),
        value: Some(empty(&operands.value)),
        bias: operands.bias.as_ref().map(empty),
    };
    backward_of(&cpu.pool, &problem, &saved, &gradients).unwrap();
    let Gradients { query, key, value, bias } = gradients;
    let all = [Some(saved.output), query, key, value, bias];
    all.iter().flatten().flat_map(|tensor| tensor.to_vec::<f32>().unwrap()).collect()
}

#[test]
fn all_units_agree_on_whole_problems() {
    let sizes = [(2, 70, 150, 2, 64), (3, 5, 7, 2, 9), (1, 300, 140, 1, 40), (2, 17, 33, 3, 16)];
    for (batch, queries, keys, heads, dim) in sizes {
        let sizes = Sizes { batch, queries, keys, heads, dim };
        for masked in [false, true] {
            let expected = evaluate(Unit::Plain, &sizes, masked);
            let scale = expected.iter().fold(1.0f32, |scale, value| scale.max(value.abs()));
            for unit in Unit::present() {
                let got = evaluate(unit, &sizes, masked);
                let error = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
                assert!(error <= 5e-6 * scale, "{queries} x {keys} x {dim}, masked {masked}: {error:e}");
            }
        }
    }
}
