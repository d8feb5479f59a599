use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device, poisoned_cuda, skip_without};

fn ids(device: &Device, values: &[i64], sizes: &[usize]) -> Tensor {
    Tensor::from_slice(device, values, sizes).unwrap()
}

#[test]
fn embedding_repeats_rows_and_sums_their_gradients() {
    // Rows 0 and 3 repeat, row 2 is absent; the second table is cut into several ranges of rows.
    for (rows, width, list) in [(5, 17, vec![3, 0, 3, 4, 1, 0]), (700, 65, vec![699, 3, 350, 699, 0, 1])] {
        check_op(
            "embedding",
            &[Array::normal(1, &[rows, width])],
            |t| Ok(vec![ops::embedding(&t[0], &ids(t[0].device(), &list, &[2, 3]))?]),
            |x| {
                let mut out = Array::zeros(&[2, 3, width]);
                for (k, d) in (0..6 * width).map(|i| (i / width, i % width)) {
                    *out.at_mut(&[k / 3, k % 3, d]) = x[0].at(&[list[k] as usize, d]);
                }
                vec![out]
            },
        );
    }
}

#[test]
fn rows_are_gathered_by_sample() {
    let list = [4i64, 0, 4, 1, 2, 3, 3, 0];
    check_op(
        "gather_rows",
        &[Array::normal(1, &[2, 5, 17])],
        |t| Ok(vec![ops::gather_rows(&t[0], &ids(t[0].device(), &list, &[2, 4]))?]),
        |x| {
            let mut out = Array::zeros(&[2, 4, 17]);
            for (b, k, d) in (0..8 * 17).map(|i| (i / 17 / 4, i / 17 % 4, i % 17)) {
                *out.at_mut(&[b, k, d]) = x[0].at(&[b, list[b * 4 + k] as usize, d]);
            }
            vec![out]
        },
    );
}

#[test]
fn rows_are_scattered_by_sample_and_absent_ones_are_zero() {
    let list = [4i64, 0, 6, 2, 3, 2];
    check_op(
        "scatter_rows",
        &[Array::normal(1, &[2, 3, 17])],
        |t| Ok(vec![ops::scatter_rows(&t[0], &ids(t[0].device(), &list, &[2, 3]), 7)?]),
        |x| {
            let mut out = Array::zeros(&[2, 7, 17]);
            for (b, k, d) in (0..6 * 17).map(|i| (i / 17 / 3, i / 17 % 3, i % 17)) {
                *out.at_mut(&[b, list[b * 3 + k] as usize, d]) += x[0].at(&[b, k, d]);
            }
            vec![out]
        },
    );
}

#[test]
fn indices_that_do_not_fit_are_named() {
    let device = Device::cpu(Some(1), None);
    let x = Tensor::zeros(&device, &[2, 3, 4], DType::F32).unwrap();
    let table = Tensor::zeros(&device, &[3, 4], DType::F32).unwrap();
    let message = ops::embedding(&table, &ids(&device, &[0, 3], &[2])).unwrap_err().to_string();
    assert!(message.contains("embedding: index 3 at position 1 is outside of 0..3"), "{message}");
    let message = ops::gather_rows(&x, &ids(&device, &[0, -1], &[2, 1])).unwrap_err().to_string();
    assert!(message.contains("gather_rows: index -1 at position 1"), "{message}");
    let message = ops::gather_rows(&x, &ids(&device, &[0, 1, 2], &[3, 1])).unwrap_err().to_string();
    assert!(message.contains("index [3, 1] has 3 samples, x [2, 3, 4] has 2"), "{message}");
    let message = ops::scatter_rows(&x, &ids(&device, &[0, 1], &[2, 1]), 5).unwrap_err().to_string();
    assert!(message.contains("one entry for each row of x [2, 3, 4]"), "{message}");
    let message = ops::embedding(&table, &table).unwrap_err().to_string();
    assert!(message.contains("indices must be i64, found f32"), "{message}");
}

#[test]
fn many_rows_are_picked_and_their_gradients_summed_exactly() {
    on_every_device("embedding of many ids", |device| {
        let (rows, width, count) = (1001, 12, 70_001);
        let values: Vec<f32> = (0..rows * width).map(|place| place as f32).collect();
        let list: Vec<i64> = (0..count as i64).map(|k| k * k % 1000).collect();
        let tape = Tape::new();
        let table = tape.variable(&Tensor::from_slice(device, &values, &[rows, width]).unwrap());
        let picked = ops::embedding(&table, &ids(device, &list, &[count])).unwrap();
        let read = picked.to_vec::<f32>().unwrap();
        for (k, row) in read.chunks(width).enumerate() {
            let start = list[k] as usize * width;
            assert_eq!(row, &values[start..start + width], "row {k}");
        }
        tape.backward_from(vec![(picked.clone(), Tensor::full(device, 1.0, picked.dims()).unwrap())])
            .unwrap();
        let gradient = tape.take_gradient(&table).unwrap().to_vec::<f32>().unwrap();
        for (row, gradient) in gradient.chunks(width).enumerate() {
            let times = list.iter().filter(|id| **id == row as i64).count();
            assert_eq!(gradient, vec![times as f32; width], "row {row}");
        }
    });
}

/// The host does not see the indices there.
#[test]
fn indices_outside_give_nan_on_a_gpu_and_place_nothing() {
    let Some(turn) = poisoned_cuda() else {
        return skip_without("CUDA device", "indices outside");
    };
    for width in [3, 8] {
        let x = Tensor::full(&turn.device, 1.0, &[1, 3, width]).unwrap();
        let index = ids(&turn.device, &[2, 3, -1], &[1, 3]);
        let picked = ops::gather_rows(&x, &index).unwrap().to_vec::<f32>().unwrap();
        assert!(picked[..width].iter().all(|value| *value == 1.0));
        assert!(picked[width..].iter().all(|value| value.is_nan()));
        let placed = ops::scatter_rows(&x, &index, 3).unwrap().to_vec::<f32>().unwrap();
        let expected: Vec<f32> =
            (0..3 * width).map(|place| f32::from(u8::from(place / width == 2))).collect();
        assert_eq!(placed, expected);
    }
}
