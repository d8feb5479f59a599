use anneal_tensor::{Device, Element, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

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

/// Sizes, the dimension that is cut, lengths of the pieces and those that are used.
type Cut = (&'static [usize], usize, &'static [usize], &'static [usize]);

/// Few and many pieces along every dimension, of odd sizes, of whole words and of none; some reach no loss.
#[test]
fn gradients_of_a_split_are_put_together_with_zeros_for_what_is_missing() {
    let cases: [Cut; 7] = [
        (&[3, 96], 1, &[16; 6], &[0, 1, 2, 3, 4, 5]),
        (&[3, 96], 1, &[16; 6], &[1, 4]),
        (&[2, 21, 3], 1, &[1, 2, 3, 4, 0, 5, 1, 1, 3, 1], &[9, 0, 3, 4, 7]),
        (&[2, 21, 3], 1, &[1, 2, 3, 4, 0, 5, 1, 1, 3, 1], &[2]),
        (&[2, 5, 8], 2, &[4, 2, 2], &[2, 0]),
        (&[7, 3], 0, &[2, 4, 1], &[0, 1, 2]),
        (&[7, 8], 0, &[2, 4, 1], &[1]),
    ];
    for (number, (dims, axis, lens, used)) in cases.into_iter().enumerate() {
        let part = |x: &Array, index: usize| {
            let start: usize = lens[..index].iter().sum();
            let mut size = dims.to_vec();
            size[axis] = lens[index];
            picked(x, &size, |i| (0..dims.len()).map(|k| i[k] + if k == axis { start } else { 0 }).collect())
        };
        check_op(
            &format!("split, case {number}"),
            &[Array::normal(20 + number as u64, dims)],
            |t| {
                let pieces = ops::split(&t[0], axis, lens)?;
                Ok(used.iter().map(|index| pieces[*index].clone()).collect())
            },
            |x| used.iter().map(|index| part(&x[0], *index)).collect(),
        );
    }
}

/// Cut at places of every alignment and joined again, from memory in order and out of it.
#[test]
fn what_is_cut_and_joined_is_whole_in_every_dtype() {
    fn check<T: Element + PartialEq + std::fmt::Debug>(device: &Device, value: impl Fn(usize) -> T) {
        let sizes = [5, 6, 48];
        let values: Vec<T> = (0..5 * 6 * 48).map(value).collect();
        let whole = Tensor::from_slice(device, &values, &sizes).unwrap();
        let turned = ops::permute(&whole, &[2, 0, 1]).unwrap().contiguous().unwrap();
        let turned = ops::permute(&turned, &[1, 2, 0]).unwrap();
        let cuts: [(usize, &[usize]); 6] = [
            (2, &[16, 16, 16]),
            (2, &[8, 4, 4, 2, 1, 1, 12, 16]),
            (2, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 3]),
            (1, &[1, 2, 3]),
            (0, &[2, 3]),
            (0, &[5]),
        ];
        for (axis, lens) in cuts {
            let [straight, crossed] = [&whole, &turned].map(|x| ops::split(x, axis, lens).unwrap());
            let mixed = straight.iter().zip(&crossed).enumerate();
            let mixed = mixed.map(|(index, (a, b))| if index % 2 == 0 { a } else { b }).collect();
            for pieces in [straight.iter().collect(), crossed.iter().collect(), mixed] {
                let pieces: Vec<&Tensor> = pieces;
                let joined = ops::concat(&pieces, axis).unwrap();
                assert_eq!(joined.to_vec::<T>().unwrap(), values, "{lens:?} along dimension {axis}");
            }
        }
    }
    on_every_device("cutting and joining", |device| {
        check(device, |place| place as f32);
        check(device, |place| place as i64);
        check(device, |place| place as u8);
        check(device, |place| anneal_tensor::half::f16::from_f32(place as f32));
        check(device, |place| anneal_tensor::half::bf16::from_f32(place as f32));
    });
}

#[test]
fn the_gradient_of_a_split_is_one_launch() {
    on_every_device("launches of a split", |device| {
        let Device::Cuda(cuda) = device else { return };
        let tape = anneal_tensor::Tape::new();
        let x = tape.variable(&Tensor::full(device, 1.0, &[4, 96]).unwrap());
        let pieces = ops::split(&x, 1, &[16; 6]).unwrap();
        let seed = Tensor::full(device, 2.0, &[4, 16]).unwrap();
        let seeds = pieces.iter().take(5).map(|piece| (piece.clone(), seed.clone())).collect();
        let before = cuda.launches();
        tape.backward_from(seeds).unwrap();
        assert_eq!(cuda.launches() - before, 1);
        let gradient = tape.take_gradient(&x).unwrap().to_vec::<f32>().unwrap();
        let expected = |place: usize| if place % 96 < 80 { 2.0 } else { 0.0 };
        assert!(gradient.iter().enumerate().all(|(place, value)| *value == expected(place)));
    });
}

/// More pieces than one launch takes, of two layouts, with gaps.
#[test]
fn many_pieces_are_joined() {
    on_every_device("joining many pieces", |device| {
        let tensor = |place: usize, width: usize| {
            let values: Vec<f32> = (0..3 * width).map(|i| (place * 100 + i) as f32).collect();
            Tensor::from_slice(device, &values, &[3, width]).unwrap()
        };
        let widths: Vec<usize> = [8; 200].into_iter().chain([5, 8, 8, 3]).chain([4; 12]).collect();
        let pieces: Vec<Tensor> = widths.iter().enumerate().map(|(i, width)| tensor(i, *width)).collect();
        let joined = ops::concat(&pieces.iter().collect::<Vec<_>>(), 1).unwrap().to_vec::<f32>().unwrap();
        let row = |row: usize| {
            let pieces = widths.iter().enumerate();
            pieces.flat_map(move |(i, width)| (0..*width).map(move |j| (i * 100 + row * width + j) as f32))
        };
        assert_eq!(joined, (0..3).flat_map(row).collect::<Vec<f32>>());
    });
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

/// Ranges and orders whose runs are words of every width that a copy may use, at every alignment.
#[test]
fn strided_copies_keep_the_elements_of_every_dtype() {
    fn check<T: Element + PartialEq + std::fmt::Debug>(device: &Device, value: impl Fn(usize) -> T) {
        let sizes = [5, 6, 48];
        let values: Vec<T> = (0..5 * 6 * 48).map(value).collect();
        let whole = Tensor::from_slice(device, &values, &sizes).unwrap();
        for (start, len) in [(0, 48), (0, 32), (16, 16), (8, 24), (4, 12), (2, 6), (1, 5), (3, 1), (40, 8)] {
            let part = ops::narrow(&whole, 2, start, len).unwrap();
            for order in [[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1]] {
                let turned = ops::permute(&part, &order).unwrap().to_vec::<T>().unwrap();
                let size = [5, 6, len];
                let [a, b, c] = order.map(|axis| size[axis]);
                for (position, value) in turned.iter().enumerate() {
                    let mut index = [0; 3];
                    (index[order[0]], index[order[1]], index[order[2]]) =
                        (position / (b * c), position / c % b, position % c);
                    let place = (index[0] * 6 + index[1]) * 48 + start + index[2];
                    assert_eq!(*value, values[place], "{order:?} of {start}..{}", start + len);
                }
                assert_eq!(turned.len(), a * b * c);
            }
        }
    }
    on_every_device("strided copies", |device| {
        check(device, |place| place as f32);
        check(device, |place| place as i64);
        check(device, |place| place as u8);
        check(device, |place| anneal_tensor::half::bf16::from_f32(place as f32));
    });
}

#[test]
fn a_large_transposition_is_whole() {
    on_every_device("a large transposition", |device| {
        let (rows, columns) = (517, 613);
        let values: Vec<f32> = (0..rows * columns).map(|place| place as f32).collect();
        let x = Tensor::from_slice(device, &values, &[rows, columns]).unwrap();
        let turned = ops::permute(&x, &[1, 0]).unwrap().to_vec::<f32>().unwrap();
        for (position, value) in turned.iter().enumerate() {
            assert_eq!(*value, values[position % rows * columns + position / rows]);
        }
    });
}
