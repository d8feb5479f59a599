//! The section `model`: which network, and the tensor that it sees.

use serde::{Deserialize, Serialize};

use crate::{ImageSize, tagged_by_kind};

tagged_by_kind! {
    /// The network, told apart by `model.kind` (default `dit`).
    pub enum Model {
        /// The diffusion transformer of arXiv 2212.09748.
        "dit" => Dit(Dit),
    }
}

/// The names that `model.preset` takes: size and patch edge, arXiv 2212.09748 table 4. Their sizes live with the model.
pub const DIT_PRESETS: [&str; 12] = [
    "DiT-S/2", "DiT-S/4", "DiT-S/8", "DiT-B/2", "DiT-B/4", "DiT-B/8", "DiT-L/2", "DiT-L/4", "DiT-L/8",
    "DiT-XL/2", "DiT-XL/4", "DiT-XL/8",
];

/// `kind: dit`. Give either `preset`, or `hidden_size`, `depth`, `heads` and `patch_size`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dit {
    /// One of [`DIT_PRESETS`], for example `DiT-S/2`.
    #[serde(default)]
    pub preset: Option<String>,
    /// Width of a token; a multiple of 4 and of `heads`.
    #[serde(default)]
    pub hidden_size: Option<usize>,
    /// Number of transformer blocks.
    #[serde(default)]
    pub depth: Option<usize>,
    /// Attention heads in each block.
    #[serde(default)]
    pub heads: Option<usize>,
    /// Edge of the square patch that becomes one token, in cells of the tensor.
    #[serde(default)]
    pub patch_size: Option<usize>,
    /// Width of the feed-forward layer as a multiple of `hidden_size`; 4 when left out.
    #[serde(default)]
    pub mlp_ratio: Option<f64>,
    /// Size of the tensor that the transformer sees: pixels, or cells of the latent.
    pub image_size: ImageSize,
    /// Channels of that tensor: 1 grey, 3 colour, 4 for the usual latents.
    pub channels: usize,
    /// Number of classes; use 1 for images without labels.
    pub classes: usize,
    /// Share of training labels replaced by "no label", which guidance needs. 0 to below 1.
    #[serde(default = "default_label_dropout")]
    pub label_dropout: f64,
    /// Predict the variance too (twice the output channels); for `diffusion.kind: gaussian` only.
    #[serde(default)]
    pub learn_sigma: bool,
    /// Which of the two published codes' timestep embedding the network has.
    #[serde(default)]
    pub convention: Convention,
    /// Recompute each block's activations in the backward pass: less memory, about a third more time.
    #[serde(default)]
    pub checkpoint_activations: bool,
    /// On a GPU, make normalised rows again in the backward pass: a seventh less activations, 1 to 3 percent more time. The
    /// bits are the same. The CPU keeps them.
    #[serde(default = "default_recompute_norms")]
    pub recompute_norms: bool,
}

fn default_recompute_norms() -> bool {
    true
}

fn default_label_dropout() -> f64 {
    0.1
}

/// The frequencies of the timestep embedding, in which the published codes differ: weights trained with one give noise
/// with the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// As in the original DiT code and weights.
    Original,
    /// As in diffusers, so that the converted folder opens there and gives the same images.
    #[default]
    Diffusers,
}

/// What a valid [`Dit`] section says about the network's size.
#[derive(Clone, Debug, PartialEq)]
pub enum DitArchitecture {
    /// A published preset, by name.
    Preset(String),
    /// Sizes given in the recipe; `mlp_ratio` with its default filled in.
    Free { hidden_size: usize, depth: usize, heads: usize, patch_size: usize, mlp_ratio: f64 },
}

impl Dit {
    /// The network's size: a preset's name or numbers. `None` if the section gives neither fully, which
    /// [`crate::Recipe::validate`] reports in words.
    pub fn architecture(&self) -> Option<DitArchitecture> {
        if let Some(preset) = &self.preset {
            return Some(DitArchitecture::Preset(preset.clone()));
        }
        Some(DitArchitecture::Free {
            hidden_size: self.hidden_size?,
            depth: self.depth?,
            heads: self.heads?,
            patch_size: self.patch_size?,
            mlp_ratio: self.mlp_ratio.unwrap_or(4.0),
        })
    }

    /// Edge of a patch: given, or the number after the slash of the preset's name.
    pub fn patch_size(&self) -> Option<usize> {
        let of_preset = |preset: &String| preset.rsplit_once('/').and_then(|(_, edge)| edge.parse().ok());
        self.patch_size.or_else(|| self.preset.as_ref().and_then(of_preset))
    }
}

impl Model {
    /// Size of the tensor that the network sees.
    pub fn image_size(&self) -> ImageSize {
        match self {
            Model::Dit(dit) => dit.image_size,
        }
    }

    /// Channels of the tensor that the network sees.
    pub fn channels(&self) -> usize {
        match self {
            Model::Dit(dit) => dit.channels,
        }
    }

    /// Number of classes that the network can be asked for.
    pub fn classes(&self) -> usize {
        match self {
            Model::Dit(dit) => dit.classes,
        }
    }
}
