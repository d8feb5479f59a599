use anneal_tensor::{DType, Device, Result, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

type Operation = fn(&Tensor, &Tensor) -> Result<Tensor>;
type Formula = fn(f64, f64) -> f64;

const OPERATIONS: [(&str, Operation, Formula); 4] = [
    ("add", ops::add, |a, b| a + b),
    ("sub", ops::sub, |a, b| a - b),
    ("mul", ops::mul, |a, b| a * b),
    ("div", ops::div, |a, b| a / b),
];

/// `f` of two arrays with trailing dimensions aligned.
fn broadcast(f: impl Fn(f64, f64) -> f64, a: &Array, b: &Array) -> Array {
    let rank = a.dims.len().max(b.dims.len());
    let size = |x: &Array, axis: usize| (axis + x.dims.len()).checked_sub(rank).map_or(1, |own| x.dims[own]);
    let dims: Vec<usize> = (0..rank).map(|axis| size(a, axis).max(size(b, axis))).collect();
    let mut out = Array::zeros(&dims);
    for position in 0..out.values.len() {
        let mut rest = position;
        let mut index = vec![0; rank];
        for axis in (0..rank).rev() {
            index[axis] = rest % dims[axis];
            rest /= dims[axis];
        }
        let pick = |x: &Array| {
            let own = &index[rank - x.dims.len()..];
            let own: Vec<usize> =
                own.iter().zip(&x.dims).map(|(i, size)| if *size == 1 { 0 } else { *i }).collect();
            x.at(&own)
        };
        out.values[position] = f(pick(a), pick(b));
    }
    out
}

#[test]
fn functions_of_two_tensors_with_every_kind_of_broadcast() {
    let shapes: [(&[usize], &[usize]); 9] = [
        (&[3, 5, 17], &[3, 5, 17]),
        (&[3, 5, 17], &[17]),
        (&[3, 1, 17], &[5, 1]),
        (&[2, 3], &[4, 2, 3]),
        (&[3, 1, 1], &[3, 4, 5]),
        (&[7], &[]),
        (&[1, 1], &[1, 1]),
        // Rows that are whole packs of a GPU's accesses, beside rows and numbers that repeat.
        (&[2, 3, 16], &[3, 1]),
        (&[2, 1, 24], &[3, 24]),
    ];
    for (name, op, formula) in OPERATIONS {
        for (a, b) in shapes {
            check_op(
                &format!("{name} of {a:?} and {b:?}"),
                &[Array::normal(1, a), Array::uniform(2, b, 0.5, 2.0)],
                |t| Ok(vec![op(&t[0], &t[1])?]),
                |x| vec![broadcast(formula, &x[0], &x[1])],
            );
        }
    }
}

/// Enough rows for several blocks, and enough columns for several pieces; all sums are exact.
#[test]
fn a_bias_over_many_rows_gets_the_sum_of_all() {
    on_every_device("the gradient of a bias over many rows", |device| {
        let (rows, width) = (300, 1100);
        let values: Vec<f32> = (0..rows * width).map(|i| (i % 7) as f32).collect();
        let x = Tensor::from_slice(device, &values, &[rows, width]).unwrap();
        let tape = anneal_tensor::Tape::new();
        let bias = tape.variable(&Tensor::zeros(device, &[width], DType::F32).unwrap());
        let y = ops::add(&x, &bias).unwrap();
        tape.backward_from(vec![(y, x)]).unwrap();
        let gradient = tape.take_gradient(&bias).unwrap().to_vec::<f32>().unwrap();
        for (column, gradient) in gradient.iter().enumerate() {
            let expected: usize = (0..rows).map(|row| (row * width + column) % 7).sum();
            assert_eq!(*gradient, expected as f32, "column {column}");
        }
    });
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let a = Tensor::zeros(&device, &[2, 3], DType::F32).unwrap();
    let b = Tensor::zeros(&device, &[2], DType::F32).unwrap();
    let message = ops::mul(&a, &b).unwrap_err().to_string();
    assert!(message.contains("mul: shapes [2, 3] and [2] do not broadcast"), "{message}");
    let message = ops::add(&a, &Tensor::zeros(&device, &[3], DType::BF16).unwrap()).unwrap_err().to_string();
    assert!(message.contains("add: operands are f32 and bf16: cast one of them"), "{message}");
}
