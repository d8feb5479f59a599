//! How two tensors are compared: one figure per tensor, one table of limits.

use crate::Tolerance;

/// The relative error of a tensor: `max |got - expected| / max |expected|`.
///
/// Per tensor, not per element: an element that cancels to nearly zero carries the absolute
/// rounding of its neighbours, so its own relative error says nothing about the code.
/// An `expected` of zeros gives the absolute error; a NaN on either side gives infinity.
///
/// # Panics
/// If the lengths differ.
pub fn relative_error<T: Copy + Into<f64>>(got: &[T], expected: &[T]) -> f64 {
    assert_eq!(got.len(), expected.len(), "tensors of different length cannot be compared");
    let mut difference = 0f64;
    let mut scale = 0f64;
    for (got, expected) in got.iter().zip(expected) {
        let (got, expected) = ((*got).into(), (*expected).into());
        if got.is_nan() || expected.is_nan() {
            return f64::INFINITY;
        }
        // Equal infinities have no distance, though their difference is NaN.
        if got != expected {
            difference = difference.max((got - expected).abs());
        }
        scale = scale.max(expected.abs());
    }
    let error = if scale == 0.0 { difference } else { difference / scale };
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Asserts that [`relative_error`] is within the tolerance.
///
/// # Panics
/// If it is not, or if the lengths differ: the message names the tensor, the figure, the limit
/// and the place of the largest difference.
#[track_caller]
pub fn assert_close<T: Copy + Into<f64>>(name: &str, got: &[T], expected: &[T], tolerance: Tolerance) {
    assert_eq!(got.len(), expected.len(), "{name}: {} values, {} expected", got.len(), expected.len());
    let error = relative_error(got, expected);
    if error <= tolerance.limit() {
        return;
    }
    let distance = |index: &usize| {
        let distance = (got[*index].into() - expected[*index].into()).abs();
        if distance.is_nan() { f64::INFINITY } else { distance }
    };
    let worst = (0..got.len()).max_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
    panic!(
        "{name}: relative error {error:.3e}, {tolerance:?} allows {:.1e}; furthest at {worst}: {} for {}",
        tolerance.limit(),
        got[worst].into(),
        expected[worst].into()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_relative_to_the_tensors_largest_value() {
        assert_eq!(relative_error(&[1.0f64, 0.5], &[2.0, 0.5]), 0.5);
        assert_eq!(relative_error(&[0.25f64], &[0.0]), 0.25);
        assert_eq!(relative_error::<f64>(&[], &[]), 0.0);
    }

    #[test]
    fn what_is_not_a_number_is_never_close() {
        assert_eq!(relative_error(&[f64::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(relative_error(&[f64::NAN], &[f64::NAN]), f64::INFINITY);
        assert_eq!(relative_error(&[f64::INFINITY], &[1.0]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0], &[f64::INFINITY]), f64::INFINITY);
    }

    #[test]
    #[should_panic(expected = "weight: relative error 1.000e-3, Forward allows 1.0e-5; furthest at 1")]
    fn a_failure_names_the_tensor_and_the_place() {
        assert_close("weight", &[1.0f64, 0.999, 1.0], &[1.0, 1.0, 1.0], Tolerance::Forward);
    }
}
