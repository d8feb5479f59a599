use anneal_tensor::ops::{self, Activation};
use anneal_testkit::{Array, check_op};

use crate::linear::{activated, affine, map};

#[test]
fn two_layers_and_the_activation_between() {
    for activation in [Activation::GeluTanh, Activation::Silu, Activation::None] {
        let inputs = [
            Array::normal(1, &[2, 3, 9]),
            Array::normal(2, &[13, 9]),
            Array::normal(3, &[13]),
            Array::normal(4, &[5, 13]),
            Array::normal(5, &[5]),
        ];
        check_op(
            &format!("feed_forward {activation:?}"),
            &inputs,
            |t| Ok(vec![ops::feed_forward(&t[0], &t[1], &t[2], &t[3], &t[4], activation)?]),
            |x| {
                let hidden = map(affine(&x[0], &x[1], Some(&x[2])), |value| activated(activation, value));
                vec![affine(&hidden, &x[3], Some(&x[4]))]
            },
        );
    }
}
