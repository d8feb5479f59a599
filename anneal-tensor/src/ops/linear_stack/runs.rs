//! Which of several matrices lie at equal distances.

use crate::Tensor;

/// Consecutive members of some lists, at equal distances in each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run<const N: usize> {
    pub start: usize,
    pub count: usize,
    /// Of each list, in elements from the start of one member to the start of the next; 0 for a run of one.
    pub distances: [usize; N],
}

/// Cuts lists of equally many tensors into runs, each as long as it can be from where it starts.
pub(super) fn runs<const N: usize>(lists: [&[Tensor]; N]) -> Vec<Run<N>> {
    let mut runs: Vec<Run<N>> = Vec::new();
    for index in 0..lists[0].len() {
        let steps = match index {
            0 => None,
            _ => steps(lists.map(|list| [&list[index - 1], &list[index]])),
        };
        match (runs.last_mut(), steps) {
            (Some(run), Some(steps)) if run.count == 1 || run.distances == steps => {
                run.count += 1;
                run.distances = steps;
            }
            _ => runs.push(Run { start: index, count: 1, distances: [0; N] }),
        }
    }
    runs
}

fn steps<const N: usize>(pairs: [[&Tensor; 2]; N]) -> Option<[usize; N]> {
    let mut steps = [0; N];
    for (step, [first, second]) in steps.iter_mut().zip(pairs) {
        *step = distance(first, second)?;
    }
    Some(steps)
}

/// Elements from one tensor to another of the same layout that lies behind its end.
fn distance(first: &Tensor, second: &Tensor) -> Option<usize> {
    if first.dtype() != second.dtype() || first.dims() != second.dims() || first.strides() != second.strides()
    {
        return None;
    }
    let size = first.dtype().size();
    let bytes = (second.address() as usize).checked_sub(first.address() as usize)?;
    let axes = first.dims().iter().zip(first.strides());
    let last: usize = axes.map(|(size, stride)| size.saturating_sub(1) * stride).sum();
    (bytes.is_multiple_of(size) && bytes / size > last).then_some(bytes / size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device};

    fn pieces(flat: &Tensor, offsets: &[usize]) -> Vec<Tensor> {
        offsets.iter().map(|offset| flat.piece(*offset, &[2, 3]).unwrap()).collect()
    }

    #[test]
    fn runs_are_cut_where_a_distance_changes() {
        let device = Device::cpu(Some(1), None);
        let flat = Tensor::zeros(&device, &[100], DType::F32).unwrap();
        let run = |start, count, distance| Run { start, count, distances: [distance] };
        let of = |offsets: &[usize]| runs([&pieces(&flat, offsets)[..]]);
        assert_eq!(of(&[0, 8, 16, 24]), [run(0, 4, 8)]);
        assert_eq!(of(&[0, 6, 12, 20, 28]), [run(0, 3, 6), run(3, 2, 8)]);
        // Backwards, overlapping and the same.
        assert_eq!(of(&[20, 10]), [run(0, 1, 0), run(1, 1, 0)]);
        assert_eq!(of(&[0, 5, 5, 11]), [run(0, 1, 0), run(1, 1, 0), run(2, 2, 6)]);
        assert_eq!(of(&[]), []);
    }

    #[test]
    fn all_lists_and_layouts_must_agree() {
        let device = Device::cpu(Some(1), None);
        let flat = Tensor::zeros(&device, &[100], DType::F32).unwrap();
        let (even, uneven) = (pieces(&flat, &[0, 8, 16, 24]), pieces(&flat, &[0, 7, 14, 22]));
        let expected =
            [Run { start: 0, count: 3, distances: [8, 7] }, Run { start: 3, count: 1, distances: [0, 0] }];
        assert_eq!(runs([&even[..], &uneven[..]]), expected);
        let other = [flat.piece(0, &[2, 3]).unwrap(), flat.view(8, &[2, 3], &[1, 2])];
        assert_eq!(runs([&other[..]]).len(), 2);
    }
}
