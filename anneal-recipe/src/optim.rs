//! The section `optim`: the optimizer and its learning rate.

use serde::{Deserialize, Serialize};

/// The optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optim {
    /// Which optimizer.
    pub kind: OptimKind,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Memory of the first and second moment, each from 0 to below 1.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step multiplies weights by 1 - lr * weight_decay.
    pub weight_decay: f64,
    /// The parameters that decay.
    pub decay: Decay,
    /// Largest global L2 norm of the gradient; larger ones are scaled down to it. Null: never.
    pub clip: Option<f64>,
    /// Course of the learning rate after the warm-up.
    pub schedule: LearningRateSchedule,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup: usize,
    /// Learning rate at the last step of the cosine.
    pub min_lr: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Optim {
            kind: OptimKind::Adamw,
            lr: 1e-4,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            decay: Decay::Matrices,
            clip: None,
            schedule: LearningRateSchedule::Constant,
            warmup: 0,
            min_lr: 0.0,
        }
    }
}

/// The optimizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimKind {
    /// Adam with decoupled weight decay (arXiv 1711.05101).
    Adamw,
}

/// Which parameters decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// All of them.
    All,
    /// Those of rank 2 and more: no biases, no norm weights.
    Matrices,
}

/// The learning rate's course.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LearningRateSchedule {
    /// `lr` to the end.
    Constant,
    /// Half a cosine from `lr` down to `min_lr` at `train.steps`.
    Cosine,
}
