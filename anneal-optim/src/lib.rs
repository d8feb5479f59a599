//! The optimizer: AdamW over flat chunks with clipping, EMA and a guard against non-finite
//! gradients in the same pass, and learning-rate schedules.
//!
//! Fp32 masters, moments and averages belong to the optimizer; the store holds what forward reads.
//! Deliberately absent: models, checkpoint files, ranks.

mod adamw;
mod schedule;

pub use adamw::{
    AdamW, AdamWOptions, Decay, DeviceReport, LossScale, PendingReport, Progress, State, StepReport,
    kernel_variants,
};
pub use schedule::{LearningRate, Shape};
