use anneal_tensor::{Device, Tensor, ops};
use anneal_testkit::{Array, check_op};

fn picked(x: &Array, dims: &[usize], source: impl Fn(&[usize]) -> Vec<usize>) -> Array {
    let mut out = Array::zeros(dims);
    for position in 0..out.values.len() {
        let mut rest = position;
        let mut index = vec![0; dims.len()];
        for axis in (0..dims.len()).rev() {
            index[axis] = rest % dims[axis];
            rest /= dims[axis];
        }
        out.values[position] = x.at(&source(&index));
    }
    out
}

#[test]
fn reshape_keeps_the_order_of_elements() {
    check_op(
        "reshape",
        &[Array::normal(1, &[2, 3, 4])],
        |t| Ok(vec![ops::reshape(&t[0], &[6, 2, 2])?]),
        |x| vec![Array::new(&[6, 2, 2], x[0].values.clone())],
    );
}

#[test]
fn permute_moves_dimensions() {
    check_op(
        "permute",
        &[Array::normal(2, &[2, 3, 4])],
        |t| Ok(vec![ops::permute(&t[0], &[2, 0, 1])?]),
        |x| vec![picked(&x[0], &[4, 2, 3], |i| vec![i[1], i[2], i[0]])],
    );
}

#[test]
fn narrow_and_split_take_ranges_and_concat_joins_them() {
    check_op(
        "narrow",
        &[Array::normal(3, &[2, 5, 3])],
        |t| Ok(vec![ops::narrow(&t[0], 1, 1, 3)?]),
        |x| vec![picked(&x[0], &[2, 3, 3], |i| vec![i[0], i[1] + 1, i[2]])],
    );
    check_op(
        "split",
        &[Array::normal(4, &[2, 5])],
        |t| Ok(ops::split(&t[0], 1, &[2, 3])?.into_iter().collect()),
        |x| {
            let first = picked(&x[0], &[2, 2], |i| vec![i[0], i[1]]);
            vec![first, picked(&x[0], &[2, 3], |i| vec![i[0], i[1] + 2])]
        },
    );
    check_op(
        "concat",
        &[Array::normal(5, &[2, 2, 3]), Array::normal(6, &[2, 1, 3])],
        |t| Ok(vec![ops::concat(&[&t[0], &t[1]], 1)?]),
        |x| {
            let mut out = Array::zeros(&[2, 3, 3]);
            for (b, n, d) in (0..18).map(|k| (k / 9, k / 3 % 3, k % 3)) {
                *out.at_mut(&[b, n, d]) = if n < 2 { x[0].at(&[b, n, d]) } else { x[1].at(&[b, 0, d]) };
            }
            vec![out]
        },
    );
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let x = Tensor::zeros(&Device::cpu(Some(1), None), &[2, 3], anneal_tensor::DType::F32).unwrap();
    let messages = [
        ops::reshape(&x, &[5]).unwrap_err(),
        ops::permute(&x, &[0, 0]).unwrap_err(),
        ops::narrow(&x, 1, 2, 2).unwrap_err(),
        ops::split(&x, 1, &[1, 1]).err().unwrap(),
        ops::concat(&[], 0).unwrap_err(),
    ];
    for (message, part) in messages.iter().zip(["[2, 3]", "[0, 0]", "2..4", "[1, 1]", "[]"]) {
        assert!(message.to_string().contains(part), "{message}");
    }
}
