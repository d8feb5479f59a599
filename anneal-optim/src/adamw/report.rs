//! What a step did, first on the device that did it and then here.

use anneal_device::Device;
use anneal_tensor::{DType, Pending, Purpose, Result, Tensor, ops};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Global norm of the gradient before clipping, without the loss scale.
    pub gradient_norm: f64,
    /// The norm was not finite: weights, moments and averages are as before.
    pub skipped: bool,
    /// What the step's loss was multiplied by.
    pub loss_scale: f64,
}

/// A step's report where the step was made; a captured step writes it to the same place each time.
pub struct DeviceReport {
    /// i64 [2]: the bits of the norm and of the loss scale, both f64.
    bits: Tensor,
}

impl DeviceReport {
    /// Memory for a report of unspecified contents.
    pub(super) fn empty(device: &Device) -> Result<Self> {
        Ok(Self { bits: Tensor::empty_for(device, &[2], DType::I64, Purpose::Workspace)? })
    }

    pub(super) fn of(device: &Device, norm: f64, loss_scale: f64) -> Result<Self> {
        let bits = [norm, loss_scale].map(|value| value.to_bits() as i64);
        Ok(Self { bits: Tensor::from_slice(device, &bits, &[2])? })
    }

    pub(super) fn address(&self) -> *mut u8 {
        self.bits.address()
    }

    /// Asks for the report without waiting for the device. Not inside a captured step.
    pub fn read_later(&self) -> Result<PendingReport> {
        self.bits.read_later().map(PendingReport)
    }

    /// The report; waits for the device.
    pub fn wait(&self) -> Result<StepReport> {
        self.read_later()?.wait()
    }
}

/// A report on its way.
pub struct PendingReport(Pending<i64>);

impl PendingReport {
    /// Whether it has arrived, so that [`Self::wait`] does not wait.
    pub fn ready(&self) -> Result<bool> {
        self.0.ready()
    }

    pub fn wait(self) -> Result<StepReport> {
        let values = self.0.wait()?;
        let [gradient_norm, loss_scale] = [values[0], values[1]].map(|bits| f64::from_bits(bits as u64));
        Ok(StepReport { gradient_norm, skipped: !gradient_norm.is_finite(), loss_scale })
    }
}

/// How far an optimizer has come: what a checkpoint keeps of it beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Steps that changed the weights.
    pub steps: u64,
    pub loss_scale: super::LossScale,
}

/// [`Progress`] on the device of the weights, so that a step decides there what it does.
pub(super) struct DeviceProgress {
    /// i64 [2]: steps that changed the weights, and good steps of the loss scale.
    pub counts: Tensor,
    /// f32 [1].
    pub loss_scale: Tensor,
}

impl DeviceProgress {
    pub fn new(device: &Device) -> Result<Self> {
        let zeros = |count: usize, dtype| Tensor::zeros_for(device, &[count], dtype, Purpose::Optimizer);
        Ok(Self { counts: zeros(2, DType::I64)?, loss_scale: zeros(1, DType::F32)? })
    }

    /// Waits for the device.
    pub fn read(&self) -> Result<Progress> {
        let (counts, scale) = (self.counts.to_vec::<i64>()?, self.loss_scale.to_vec::<f32>()?);
        let loss_scale = super::LossScale { scale: scale[0], good_steps: counts[1] as u32 };
        Ok(Progress { steps: counts[0] as u64, loss_scale })
    }

    pub fn write(&self, progress: Progress) -> Result<()> {
        let device = self.counts.device();
        let counts = [progress.steps as i64, i64::from(progress.loss_scale.good_steps)];
        ops::overwrite(&self.counts, &Tensor::from_slice(device, &counts, &[2])?)?;
        ops::overwrite(&self.loss_scale, &Tensor::from_slice(device, &[progress.loss_scale.scale], &[1])?)
    }
}
