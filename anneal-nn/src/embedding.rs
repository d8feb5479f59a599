//! Embeddings of patches, positions, timesteps and labels.

use anneal_tensor::ops::{self, Activation};
use anneal_tensor::{Result, Tensor, TensorError};

use crate::{Builder, Forward, Init, Linear, ParamId};

/// Cuts an image into patches and projects each (a convolution whose stride is its size).
#[derive(Clone, Debug)]
pub struct PatchEmbedding {
    projection: Linear,
    patch: usize,
}

impl PatchEmbedding {
    /// Adds `proj.weight` [size, channels, patch, patch] and `proj.bias` under the builder's path.
    pub fn new(builder: &mut Builder, channels: usize, patch: usize, size: usize) -> Self {
        builder.at("proj", |builder| {
            let weight = builder.add("weight", &[size, channels, patch, patch], Init::XavierUniform);
            let bias = builder.add("bias", &[size], Init::Zeros);
            Self { projection: Linear::of(weight, bias), patch }
        })
    }

    /// `[B, C, H, W]` to `[B, H/patch * W/patch, size]`.
    pub fn forward(&self, forward: &Forward, image: &Tensor) -> Result<Tensor> {
        let patches = ops::patchify(image, self.patch)?;
        self.projection.forward(forward, &patches, Activation::None)
    }
}

/// The fixed table of positions of a grid, `[rows * columns, size]` in row-major order:
/// the first half of the features encodes the column, the second the row, each as
/// sines then cosines of position * 10000^(-2i / (size / 2)) (Vaswani et al. 2017, section 3.5, in 2D).
///
/// # Panics
/// If `size` is not a multiple of 4.
pub fn sincos_positions(rows: usize, columns: usize, size: usize) -> Vec<f32> {
    assert!(size.is_multiple_of(4), "positions need a size that is a multiple of 4, not {size}");
    let quarter = size / 4;
    let mut table = Vec::with_capacity(rows * columns * size);
    for row in 0..rows {
        for column in 0..columns {
            for position in [column, row] {
                let angle = |i: usize| position as f64 * 10000f64.powf(-(i as f64) / quarter as f64);
                table.extend((0..quarter).map(|i| angle(i).sin() as f32));
                table.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    table
}

/// Sinusoidal features of a timestep through a two-layer network.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    first: Linear,
    second: Linear,
    features: usize,
    /// Frequencies are 10000^(-i / (half - shift)): 0 as published, 1 as in diffusers.
    frequency_shift: usize,
}

impl TimestepEmbedding {
    /// Adds `mlp.0` and `mlp.2` under the builder's path. `features` is even.
    pub fn new(builder: &mut Builder, features: usize, size: usize, frequency_shift: usize) -> Self {
        let init = Init::Normal { standard_deviation: 0.02 };
        let first = builder.at("mlp.0", |builder| Linear::new(builder, features, size, init.clone()));
        let second = builder.at("mlp.2", |builder| Linear::new(builder, size, size, init));
        Self { first, second, features, frequency_shift }
    }

    /// Timesteps (one a sample, fractions allowed) to `[B, size]`.
    pub fn forward(&self, forward: &Forward, timesteps: &[f32]) -> Result<Tensor> {
        let half = self.features / 2;
        // In f32 like the public implementations: at t near 1000 the rounding of t * frequency shows.
        let span = (half - self.frequency_shift) as f32;
        let frequency = |i: usize| f64::from(-(10000f64.ln() as f32) * i as f32 / span).exp() as f32;
        let mut values = Vec::with_capacity(timesteps.len() * self.features);
        for timestep in timesteps {
            values.extend((0..half).map(|i| (timestep * frequency(i)).cos()));
            values.extend((0..half).map(|i| (timestep * frequency(i)).sin()));
        }
        let features = Tensor::from_slice(forward.device(), &values, &[timesteps.len(), self.features])?;
        let features = ops::cast(&features, forward.dtype())?;
        let hidden = self.first.forward(forward, &features, Activation::Silu)?;
        self.second.forward(forward, &hidden, Activation::None)
    }
}

/// A table of label vectors whose last row stands for "no label".
#[derive(Clone, Debug)]
pub struct LabelEmbedding {
    table: ParamId,
    classes: usize,
}

impl LabelEmbedding {
    /// Adds `embedding_table.weight` [classes + 1, size] under the builder's path.
    pub fn new(builder: &mut Builder, classes: usize, size: usize) -> Self {
        let init = Init::Normal { standard_deviation: 0.02 };
        let table = builder.add("embedding_table.weight", &[classes + 1, size], init);
        Self { table, classes }
    }

    /// The label that stands for "no label".
    pub fn null_label(&self) -> i64 {
        self.classes as i64
    }

    /// Labels (one a sample) to `[B, size]`.
    ///
    /// # Errors
    /// If a label is not in `0..=classes`.
    pub fn forward(&self, forward: &Forward, labels: &[i64]) -> Result<Tensor> {
        if let Some(label) = labels.iter().find(|label| !(0..=self.null_label()).contains(*label)) {
            let message =
                format!("label {label} is not in 0..={} ({} is no label)", self.classes, self.classes);
            return Err(TensorError::Shape { op: "label embedding", message });
        }
        let labels = Tensor::from_slice(forward.device(), labels, &[labels.len()])?;
        ops::embedding(&forward.param(self.table)?, &labels)
    }
}
