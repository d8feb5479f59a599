//! Dimension lists and stride arithmetic.

use smallvec::SmallVec;

/// Sizes or strides, outermost dimension first.
pub type Dims = SmallVec<[usize; 6]>;

/// A dimension list from a slice.
pub fn dims(sizes: &[usize]) -> Dims {
    SmallVec::from_slice(sizes)
}

/// Row-major strides, in elements.
pub(crate) fn contiguous_strides(sizes: &[usize]) -> Dims {
    let mut strides = dims(sizes);
    let mut step = 1;
    for axis in (0..sizes.len()).rev() {
        strides[axis] = step;
        step *= sizes[axis].max(1);
    }
    strides
}

/// Whether elements follow each other in memory (dimensions of size one may have any stride).
pub(crate) fn is_contiguous(sizes: &[usize], strides: &[usize]) -> bool {
    if sizes.contains(&0) {
        return true;
    }
    let mut step = 1;
    for axis in (0..sizes.len()).rev() {
        if sizes[axis] != 1 && strides[axis] != step {
            return false;
        }
        step *= sizes[axis];
    }
    true
}

/// Strides of the same memory under new sizes, if no copy is needed.
pub(crate) fn reshape_strides(sizes: &[usize], strides: &[usize], new_sizes: &[usize]) -> Option<Dims> {
    let old: Vec<(usize, usize)> =
        sizes.iter().copied().zip(strides.iter().copied()).filter(|(size, _)| *size != 1).collect();
    let mut new_strides = contiguous_strides(new_sizes);
    if sizes.iter().product::<usize>() == 0 {
        return Some(new_strides);
    }
    // Walk both lists from the inside; each group of old dimensions that lies densely in
    // memory may be cut anew.
    let mut old_axis = old.len();
    let mut new_axis = new_sizes.len();
    while old_axis > 0 {
        let (mut old_size, base) = old[old_axis - 1];
        let mut reach = base * old_size;
        old_axis -= 1;
        let mut new_size = 1;
        let mut step = base;
        loop {
            while new_size < old_size && new_axis > 0 {
                new_axis -= 1;
                new_strides[new_axis] = step;
                step *= new_sizes[new_axis];
                new_size *= new_sizes[new_axis];
            }
            if new_size == old_size {
                break;
            }
            if old_axis == 0 || old[old_axis - 1].1 != reach {
                return None;
            }
            old_axis -= 1;
            old_size *= old[old_axis].0;
            reach = old[old_axis].1 * old[old_axis].0;
        }
    }
    while new_axis > 0 {
        new_axis -= 1;
        debug_assert_eq!(new_sizes[new_axis], 1);
    }
    Some(new_strides)
}

/// The shape that two shapes broadcast to (trailing dimensions aligned), if they do.
pub(crate) fn broadcast(left: &[usize], right: &[usize]) -> Option<Dims> {
    let rank = left.len().max(right.len());
    let at =
        |sizes: &[usize], axis: usize| (axis + sizes.len()).checked_sub(rank).map_or(1, |index| sizes[index]);
    (0..rank)
        .map(|axis| match (at(left, axis), at(right, axis)) {
            (a, b) if a == b => Some(a),
            (1, b) => Some(b),
            (a, 1) => Some(a),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_keeps_memory_where_it_can() {
        assert_eq!(reshape_strides(&[2, 6], &[6, 1], &[2, 2, 3]), Some(dims(&[6, 3, 1])));
        // A column slice of width 4 in rows of 12: the inner dimension may be cut, rows may not merge.
        assert_eq!(reshape_strides(&[3, 4], &[12, 1], &[3, 2, 2]), Some(dims(&[12, 2, 1])));
        assert_eq!(reshape_strides(&[3, 4], &[12, 1], &[12]), None);
        assert_eq!(reshape_strides(&[4, 3], &[1, 4], &[12]), None);
        assert_eq!(reshape_strides(&[1, 4, 1], &[99, 1, 7], &[2, 2]), Some(dims(&[2, 1])));
        assert_eq!(reshape_strides(&[2, 3], &[3, 1], &[1, 6, 1]).unwrap()[1], 1);
    }

    #[test]
    fn a_view_without_elements_is_contiguous() {
        assert!(is_contiguous(&[2, 0], &contiguous_strides(&[2, 0])));
        assert!(!is_contiguous(&[2, 3], &[1, 2]));
    }

    #[test]
    fn broadcasting_aligns_trailing_dimensions() {
        assert_eq!(broadcast(&[4, 1, 3], &[2, 1]), Some(dims(&[4, 2, 3])));
        assert_eq!(broadcast(&[4, 2], &[3]), None);
        assert_eq!(broadcast(&[], &[3]), Some(dims(&[3])));
    }
}
