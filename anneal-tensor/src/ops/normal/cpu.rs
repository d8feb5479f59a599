use anneal_device::ThreadPool;

use crate::Tensor;
use crate::parallel::parts_mut;
use crate::rng::Stream;

/// A row of draws from each stream.
pub(super) fn fill(pool: &ThreadPool, streams: &[Stream], noise: &mut Tensor) {
    let row: usize = noise.dims()[1..].iter().product();
    parts_mut(pool, noise.data_mut::<f32>(), row.max(1), |index, part| {
        streams[index].clone().fill_normal(part);
    });
}
