//! Model calls, captured on a GPU where their shape comes again.
//!
//! Contract: the output of a call is overwritten by the next one of the same number of rows. Samplers
//! and guidance combine it into tensors of their own at once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anneal_device::cuda::RepeatedWork;
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::Forward;
use anneal_tensor::{Device, Result, Tensor, ops};

/// A model over its weights.
pub(crate) struct ModelCalls<'a> {
    model: &'a dyn Denoiser,
    forward: Forward,
    /// By the number of rows.
    captured: BTreeMap<usize, CapturedCall>,
}

/// A call as one captured piece of work. Its inputs lie where they lay when it was captured: timesteps
/// and labels because they are uploads, the image because it is copied there before each call.
struct CapturedCall {
    image: Tensor,
    work: RepeatedWork,
}

impl<'a> ModelCalls<'a> {
    pub fn new(model: &'a dyn Denoiser, forward: Forward) -> Self {
        Self { model, forward, captured: BTreeMap::new() }
    }

    /// `image [B, C, H, W]` in f32, a timestep and a label for each row, to the model's output.
    pub fn call(&mut self, image: &Tensor, timesteps: &[f32], labels: &[i64]) -> Result<Tensor> {
        let conditioning = Conditioning { labels };
        let (model, forward) = (self.model, &self.forward);
        let Device::Cuda(cuda) = forward.device() else {
            return model.forward(forward, image, timesteps, &conditioning);
        };
        let CapturedCall { image: fixed, work } = match self.captured.entry(timesteps.len()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let image = Tensor::empty(image.device(), image.dims(), image.dtype())?;
                entry.insert(CapturedCall { image, work: RepeatedWork::default() })
            }
        };
        ops::overwrite(fixed, image)?;
        work.run(cuda, || model.forward(forward, fixed, timesteps, &conditioning))
    }

    /// Why calls are no longer captured; told once.
    pub fn take_warnings(&mut self) -> Vec<String> {
        let problems = self.captured.values_mut().filter_map(|call| call.work.take_problem());
        let told = |why| format!("model calls are no longer captured, which costs time: {why}");
        problems.map(told).collect()
    }
}
