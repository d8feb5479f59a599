use anneal_tensor::{DType, ops};
use anneal_testkit::{Array, check_op};

#[test]
fn a_cast_keeps_values_and_passes_gradients_through() {
    let x = Array::normal(1, &[3, 5, 17]);
    check_op("cast", &[x], |t| Ok(vec![ops::cast(&t[0], DType::F32)?]), |x| vec![x[0].clone()]);
}
