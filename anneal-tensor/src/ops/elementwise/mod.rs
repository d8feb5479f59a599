//! Element-wise functions: `out[i] = f(a[i], b[i], ..)` for inputs of any float dtypes and strides (zero
//! for a broadcast dimension). The ops give `f`; how memory is walked is here.

pub(crate) mod cpu;
pub(crate) mod cuda;

use smallvec::SmallVec;

use crate::{DType, Dims, Result, Tensor};

/// Dimensions of one size list, merged where every operand allows it; the last one separately.
#[derive(PartialEq)]
pub(crate) struct Walk<const N: usize> {
    pub outer: SmallVec<[(usize, [usize; N]); 6]>,
    pub inner: (usize, [usize; N]),
}

impl<const N: usize> Walk<N> {
    pub fn new(sizes: &[usize], strides: [&[usize]; N]) -> Self {
        let mut axes: SmallVec<[(usize, [usize; N]); 6]> = SmallVec::new();
        for (axis, &size) in sizes.iter().enumerate().filter(|(_, size)| **size != 1) {
            let step = strides.map(|strides| strides[axis]);
            match axes.last_mut() {
                Some((last_size, last)) if (0..N).all(|operand| last[operand] == size * step[operand]) => {
                    *last_size *= size;
                    *last = step;
                }
                _ => axes.push((size, step)),
            }
        }
        let inner = axes.pop().unwrap_or((1, [1; N]));
        Self { outer: axes, inner }
    }

    /// Where each operand's run number `run` of the inner dimension starts.
    fn starts(&self, run: usize) -> [usize; N] {
        let mut rest = run;
        let mut starts = [0; N];
        for (size, steps) in self.outer.iter().rev() {
            let index = rest % size;
            rest /= size;
            (0..N).for_each(|operand| starts[operand] += index * steps[operand]);
        }
        starts
    }
}

/// Strides with which a tensor is read as one of the sizes that it broadcasts to.
pub(crate) fn broadcast_strides(tensor: &Tensor, sizes: &[usize]) -> Dims {
    let missing = sizes.len() - tensor.rank();
    (0..sizes.len())
        .map(|axis| match axis.checked_sub(missing) {
            Some(own) if tensor.size(own) == sizes[axis] => tensor.strides()[own],
            _ => 0,
        })
        .collect()
}

/// Whether the dtype is one that these functions take.
pub(crate) fn check_float(op: &'static str, dtype: DType) -> Result<()> {
    if dtype.is_float() { Ok(()) } else { Err(crate::TensorError::unsupported_dtype(op, dtype)) }
}
