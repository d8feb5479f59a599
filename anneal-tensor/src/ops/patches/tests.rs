use anneal_tensor::{DType, Device, Tensor, ops};
use anneal_testkit::{Array, check_op};

#[test]
fn patchify_orders_a_patch_by_channel_then_row_then_column() {
    check_op(
        "patchify",
        &[Array::normal(1, &[2, 3, 4, 6])],
        |t| Ok(vec![ops::patchify(&t[0], 2)?]),
        |x| {
            let mut out = Array::zeros(&[2, 6, 12]);
            for (b, c, y, column) in (0..144).map(|i| (i / 72, i / 24 % 3, i / 6 % 4, i % 6)) {
                let index = [b, y / 2 * 3 + column / 2, c * 4 + y % 2 * 2 + column % 2];
                *out.at_mut(&index) = x[0].at(&[b, c, y, column]);
            }
            vec![out]
        },
    );
}

#[test]
fn unpatchify_orders_a_patch_by_row_then_column_then_channel() {
    check_op(
        "unpatchify",
        &[Array::normal(2, &[2, 6, 12])],
        |t| Ok(vec![ops::unpatchify(&t[0], 2, 2, 3, 3)?]),
        |x| {
            let mut out = Array::zeros(&[2, 3, 4, 6]);
            for (b, c, y, column) in (0..144).map(|i| (i / 72, i / 24 % 3, i / 6 % 4, i % 6)) {
                let index = [b, y / 2 * 3 + column / 2, (y % 2 * 2 + column % 2) * 3 + c];
                *out.at_mut(&[b, c, y, column]) = x[0].at(&index);
            }
            vec![out]
        },
    );
}

#[test]
fn sizes_that_do_not_fit_are_named() {
    let x = Tensor::zeros(&Device::cpu(Some(1), None), &[1, 3, 4, 6], DType::F32).unwrap();
    let message = ops::patchify(&x, 4).unwrap_err().to_string();
    assert!(message.contains("patches of 4 x 4 do not tile images of shape [1, 3, 4, 6]"), "{message}");
    let tokens = ops::patchify(&x, 2).unwrap();
    let message = ops::unpatchify(&tokens, 2, 3, 3, 3).unwrap_err().to_string();
    assert!(message.contains("[1, 6, 12] are no 3 x 3 grid of 2 x 2 x 3 patches"), "{message}");
}
