use anneal_tensor::{DType, Device, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

/// Folds the values that share an index once `axes` are left out; all dimensions are kept.
fn fold(x: &Array, axes: &[usize], start: f64, f: impl Fn(f64, f64) -> f64) -> Array {
    let mut dims = x.dims.clone();
    axes.iter().for_each(|axis| dims[*axis] = 1);
    let mut out = Array::new(&dims, vec![start; dims.iter().product()]);
    for (position, value) in x.values.iter().enumerate() {
        let mut rest = position;
        let mut index = vec![0; dims.len()];
        for axis in (0..dims.len()).rev() {
            index[axis] = rest % x.dims[axis] % dims[axis];
            rest /= x.dims[axis];
        }
        let cell = out.at_mut(&index);
        *cell = f(*cell, *value);
    }
    out
}

fn without(x: Array, axes: &[usize]) -> Array {
    let kept = (0..x.dims.len()).filter(|axis| !axes.contains(axis)).map(|axis| x.dims[axis]);
    Array::new(&kept.collect::<Vec<usize>>(), x.values)
}

const AXES: [&[usize]; 8] = [&[], &[0], &[1], &[2], &[0, 2], &[2, 1], &[0, 1], &[0, 1, 2]];

#[test]
fn sums_and_means_over_any_dimensions() {
    // Odd rows, and rows that are whole packs of a GPU's accesses.
    for (dims, axes) in AXES.iter().flat_map(|axes| [([3, 5, 17], *axes), ([2, 5, 16], *axes)]) {
        let count: usize = axes.iter().map(|axis| dims[*axis]).product();
        check_op(
            &format!("sum over {axes:?}"),
            &[Array::normal(1, &dims)],
            |t| Ok(vec![ops::sum(&t[0], axes, true)?]),
            |x| vec![fold(&x[0], axes, 0.0, |a, b| a + b)],
        );
        check_op(
            &format!("mean over {axes:?}"),
            &[Array::normal(2, &dims)],
            |t| Ok(vec![ops::mean(&t[0], axes, false)?]),
            |x| {
                let mut sum = without(fold(&x[0], axes, 0.0, |a, b| a + b), axes);
                sum.values.iter_mut().for_each(|value| *value /= count as f64);
                vec![sum]
            },
        );
    }
}

#[test]
fn maxima_over_any_dimensions() {
    // Distinct values a step of the differences apart, in a scattered order; exact in bf16.
    let values = (0..3 * 5 * 7).map(|i| (i * 37 % 105) as f64 / 4.0 - 13.0).collect();
    let x = Array::new(&[3, 5, 7], values);
    for axes in AXES {
        check_op(
            &format!("max over {axes:?}"),
            std::slice::from_ref(&x),
            |t| Ok(vec![ops::max(&t[0], axes, false)?]),
            |x| vec![without(fold(&x[0], axes, f64::NEG_INFINITY, f64::max), axes)],
        );
    }
}

/// Runs cut into pieces, rows cut into columns and blocks, and what a GPU cuts into parts; all sums are exact.
#[test]
fn large_reductions_equal_their_parts() {
    on_every_device("large reductions", |device| {
        for (rows, width) in [(70, 9001), (4096, 64), (2, 40_000), (20_001, 3)] {
            let values: Vec<f32> = (0..rows * width).map(|i| (i % 11) as f32 - 5.0).collect();
            let x = Tensor::from_slice(device, &values, &[rows, width]).unwrap();
            let total = |list: &mut dyn Iterator<Item = usize>| list.map(|i| values[i]).sum::<f32>();
            let all = ops::sum(&x, &[0, 1], false).unwrap().to_vec::<f32>().unwrap();
            assert_eq!(all, [total(&mut (0..rows * width))]);
            let columns = ops::sum(&x, &[0], false).unwrap().to_vec::<f32>().unwrap();
            let each = ops::sum(&x, &[1], false).unwrap().to_vec::<f32>().unwrap();
            for (column, sum) in columns.iter().enumerate() {
                assert_eq!(*sum, total(&mut (0..rows).map(|row| row * width + column)));
            }
            for (row, sum) in each.iter().enumerate() {
                assert_eq!(*sum, total(&mut (row * width..(row + 1) * width)));
            }
        }
    });
}

#[test]
fn equal_maxima_share_the_gradient_and_nan_is_a_maximum() {
    on_every_device("equal maxima", |device| {
        let tape = anneal_tensor::Tape::new();
        let x = tape.variable(&Tensor::from_slice(device, &[2.0f32, 5.0, 5.0, 1.0], &[4]).unwrap());
        tape.backward(&ops::max(&x, &[0], false).unwrap()).unwrap();
        assert_eq!(tape.take_gradient(&x).unwrap().to_vec::<f32>().unwrap(), [0.0, 0.5, 0.5, 0.0]);
        let x = Tensor::from_slice(device, &[2.0f32, f32::NAN, 5.0], &[3]).unwrap();
        assert!(ops::max(&x, &[0], false).unwrap().to_vec::<f32>().unwrap()[0].is_nan());
    });
}

#[test]
fn bad_axes_are_named() {
    let device = Device::cpu(Some(1), None);
    let x = Tensor::zeros(&device, &[2, 3], DType::F32).unwrap();
    for axes in [&[2][..], &[0, 0]] {
        let message = ops::sum(&x, axes, false).unwrap_err().to_string();
        assert!(message.contains("no distinct dimensions of shape [2, 3]"), "{message}");
    }
    let empty = Tensor::zeros(&device, &[0], DType::F32).unwrap();
    let message = ops::max(&empty, &[0], false).unwrap_err().to_string();
    assert!(message.contains("max: dimensions [0] of shape [0] have no elements"), "{message}");
    assert_eq!(ops::sum(&empty, &[0], false).unwrap().to_vec::<f32>().unwrap(), [0.0]);
}
