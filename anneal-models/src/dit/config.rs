//! Configuration and presets of DiT (arXiv 2212.09748, table 1), and their forms in other layouts.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ModelError;

/// The published sizes: name, depth, hidden size, heads. Each exists with patch size 2, 4 and 8.
pub const PRESETS: [(&str, usize, usize, usize); 4] =
    [("DiT-S", 12, 384, 6), ("DiT-B", 12, 768, 12), ("DiT-L", 24, 1024, 16), ("DiT-XL", 28, 1152, 16)];

/// Many times the memory of the largest machines; below it, sizes can be multiplied without overflow.
const MOST_PARAMETERS: f64 = 1e14;
/// Far beyond any network of this kind.
const MOST_BLOCKS: usize = 4096;

/// What defines a DiT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DitConfig {
    /// Height and width of the images it sees, in pixels or latents.
    pub image_size: [usize; 2],
    pub channels: usize,
    pub patch_size: usize,
    pub hidden_size: usize,
    pub depth: usize,
    pub heads: usize,
    pub mlp_ratio: f64,
    pub classes: usize,
    /// Whether a second half of the output interpolates the variance (arXiv 2102.09672, eq. 15).
    pub learn_sigma: bool,
    /// Epsilon of the norm before the feed-forward part: 1e-6 as published; diffusers makes it a setting.
    pub mlp_norm_epsilon: f32,
    /// Timestep frequencies are 10000^(-i / (128 - shift)): 0 as published, 1 as diffusers computes them.
    pub frequency_shift: usize,
    /// Whether each block has timestep and label embedders of its own, which diffusers' class can hold; as
    /// published, all share one pair.
    #[serde(default)]
    pub block_embedders: bool,
}

impl DitConfig {
    /// A published size such as `DiT-S/2`, for 32x32x4 latents and 1000 classes as published.
    ///
    /// # Errors
    /// If the name is none of the twelve.
    pub fn preset(name: &str) -> Result<Self, ModelError> {
        let unknown = || ModelError::UnknownPreset { name: name.into(), known: preset_names().join(", ") };
        let (size, patch) = name.split_once('/').ok_or_else(unknown)?;
        let patch_size =
            ["2", "4", "8"].contains(&patch).then(|| patch.parse().unwrap_or(0)).ok_or_else(unknown)?;
        let (_, depth, hidden_size, heads) =
            *PRESETS.iter().find(|(preset, ..)| *preset == size).ok_or_else(unknown)?;
        Ok(Self {
            image_size: [32, 32],
            channels: 4,
            patch_size,
            hidden_size,
            depth,
            heads,
            mlp_ratio: 4.0,
            classes: 1000,
            learn_sigma: true,
            mlp_norm_epsilon: 1e-6,
            frequency_shift: 0,
            block_embedders: false,
        })
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.image_size.map(|size| size / self.patch_size)
    }

    pub fn output_channels(&self) -> usize {
        if self.learn_sigma { 2 * self.channels } else { self.channels }
    }

    pub fn mlp_hidden_size(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// About how many numbers the model consists of; also for sizes whose products no whole number holds.
    fn parameters(&self) -> f64 {
        let number = |count: usize| count as f64;
        let [rows, columns] = self.grid().map(number);
        let (hidden, patch) = (number(self.hidden_size), number(self.patch_size));
        let block = hidden * hidden * (4.0 + 6.0 + 2.0 * self.mlp_ratio);
        let pixels = patch * patch * 3.0 * number(self.channels);
        block * number(self.depth) + hidden * (rows * columns + pixels + number(self.classes))
    }

    /// Says what does not fit together, or into any machine.
    pub fn check(&self) -> Result<(), ModelError> {
        let [height, width] = self.image_size;
        let (patch, hidden, heads) = (self.patch_size, self.hidden_size, self.heads);
        let fail = |message: String| Err(ModelError::Configuration { message });
        if [height, width, patch, hidden, heads, self.depth, self.channels, self.classes].contains(&0) {
            return fail(format!("every size must be at least 1, found {self:?}"));
        }
        if !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
            return fail(format!("image size {height}x{width} is not a multiple of the patch size {patch}"));
        }
        if !hidden.is_multiple_of(heads) || !hidden.is_multiple_of(4) {
            return fail(format!(
                "hidden size {hidden} must be a multiple of 4 and of the number of heads, {heads}"
            ));
        }
        if self.depth > MOST_BLOCKS {
            return fail(format!("depth {} is too much: at most {MOST_BLOCKS} blocks", self.depth));
        }
        let parameters = self.parameters();
        if parameters > MOST_PARAMETERS {
            return fail(format!(
                "these sizes make a model of {parameters:.1e} parameters, more than any machine can hold: choose smaller ones"
            ));
        }
        if self.mlp_hidden_size() == 0 || self.frequency_shift > 1 {
            return fail("mlp_ratio must be positive and frequency_shift 0 or 1".into());
        }
        Ok(())
    }

    /// From the `config.json` of a diffusers `DiTTransformer2DModel`; see [`Self::with_embedders_of`].
    pub fn from_diffusers(config: &Value) -> Result<Self, ModelError> {
        let number = |key: &str, default: Option<usize>| {
            config.get(key).and_then(Value::as_u64).map(|value| value as usize).or(default).ok_or_else(|| {
                ModelError::Configuration {
                    message: format!("the transformer's config.json has no number '{key}'"),
                }
            })
        };
        let class = config.get("_class_name").and_then(Value::as_str).unwrap_or("DiTTransformer2DModel");
        let norm = config.get("norm_type").and_then(Value::as_str).unwrap_or("ada_norm_zero");
        if class != "DiTTransformer2DModel" || norm != "ada_norm_zero" {
            let message =
                format!("expected a DiTTransformer2DModel with ada_norm_zero, found {class} with {norm}");
            return Err(ModelError::Configuration { message });
        }
        let channels = number("in_channels", Some(4))?;
        let output = number("out_channels", Some(channels))?;
        if output != channels && output != 2 * channels {
            let message = format!("out_channels {output} is neither in_channels {channels} nor twice that");
            return Err(ModelError::Configuration { message });
        }
        let (heads, head) = (number("num_attention_heads", None)?, number("attention_head_dim", None)?);
        let size = number("sample_size", Some(32))?;
        let written = config.get(CLASSES_KEY).and_then(Value::as_u64).map(|classes| classes as usize);
        let result = Self {
            image_size: [size, size],
            channels,
            patch_size: number("patch_size", Some(2))?,
            hidden_size: heads * head,
            depth: number("num_layers", None)?,
            heads,
            mlp_ratio: 4.0,
            classes: written.unwrap_or(number("num_embeds_ada_norm", Some(1000))?),
            learn_sigma: output == 2 * channels,
            mlp_norm_epsilon: config.get("norm_eps").and_then(Value::as_f64).unwrap_or(1e-5) as f32,
            frequency_shift: 1,
            block_embedders: false,
        };
        result.check()?;
        Ok(result)
    }

    /// Finds out from weights in the diffusers layout whether their blocks' embedders differ, which no
    /// configuration says. `read` gives a tensor's values.
    ///
    /// # Errors
    /// Those of `read`; a block that lacks a tensor counts as one that shares it.
    pub fn with_embedders_of<E>(self, read: impl Fn(&str) -> Result<Option<Vec<f32>>, E>) -> Result<Self, E> {
        for part in EMBEDDER_PARTS {
            let of = |block: usize| read(&format!("transformer_blocks.{block}.norm1.emb.{part}"));
            let Some(first) = of(0)? else { continue };
            for block in 1..self.depth {
                if of(block)?.is_some_and(|copy| copy != first) {
                    return Ok(Self { block_embedders: true, ..self });
                }
            }
        }
        Ok(self)
    }

    /// The `config.json` of a diffusers `DiTTransformer2DModel`.
    ///
    /// # Errors
    /// What that class cannot express: other feed-forward ratios than 4, and images that are not square.
    pub fn to_diffusers(&self) -> Result<Value, ModelError> {
        let [height, width] = self.image_size;
        if self.mlp_ratio != 4.0 || height != width {
            let message = format!(
                "the diffusers layout knows square images and mlp_ratio 4 only, not {height}x{width} and {}",
                self.mlp_ratio
            );
            return Err(ModelError::Configuration { message });
        }
        Ok(json!({
            "_class_name": "DiTTransformer2DModel",
            "_diffusers_version": "0.30.0",
            "activation_fn": "gelu-approximate",
            "attention_bias": true,
            "attention_head_dim": self.hidden_size / self.heads,
            "dropout": 0.0,
            "in_channels": self.channels,
            "norm_elementwise_affine": false,
            // As short decimal text; an f32 widened to f64 would show its rounding.
            "norm_eps": self.mlp_norm_epsilon.to_string().parse::<f64>().unwrap_or(1e-6),
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.heads,
            "num_embeds_ada_norm": self.padded_classes(),
            "num_layers": self.depth,
            "out_channels": self.output_channels(),
            "patch_size": self.patch_size,
            "sample_size": height,
            "upcast_attention": false,
            CLASSES_KEY: self.classes,
        }))
    }

    /// Classes of the label table in the diffusers layout: its pipeline takes label 1000 for "none",
    /// so the table is filled up to there.
    pub fn padded_classes(&self) -> usize {
        self.classes.max(1000)
    }

    /// From the shapes of a checkpoint in the original layout. The number of heads cannot be seen in
    /// it: it is `heads`, or that of the preset of this hidden size.
    pub fn infer(
        shape: impl Fn(&str) -> Option<Vec<usize>>,
        heads: Option<usize>,
    ) -> Result<Self, ModelError> {
        let find = |name: &str, rank: usize| {
            shape(name).filter(|shape| shape.len() == rank).ok_or_else(|| ModelError::Configuration {
                message: format!("not a DiT in its original layout: no tensor {name} of {rank} dimensions"),
            })
        };
        let patch = find("x_embedder.proj.weight", 4)?;
        let (hidden_size, channels, patch_size) = (patch[0], patch[1], patch[2]);
        let tokens = find("pos_embed", 3)?[1];
        let side = (tokens as f64).sqrt().round() as usize;
        let labels = find("y_embedder.embedding_table.weight", 2)?[0];
        let output = find("final_layer.linear.weight", 2)?[0] / (patch_size * patch_size).max(1);
        let hidden_mlp = find("blocks.0.mlp.fc1.weight", 2)?[0];
        let depth =
            (0..).take_while(|block| shape(&format!("blocks.{block}.attn.qkv.weight")).is_some()).count();
        let preset = PRESETS.iter().find(|(_, _, hidden, _)| *hidden == hidden_size).map(|preset| preset.3);
        let heads = heads.or(preset).ok_or_else(|| ModelError::Configuration {
            message: format!(
                "the number of heads cannot be seen in the weights, and hidden size {hidden_size} is no preset's: give --heads"
            ),
        })?;
        let result = Self {
            image_size: [side * patch_size; 2],
            channels,
            patch_size,
            hidden_size,
            depth,
            heads,
            mlp_ratio: hidden_mlp as f64 / hidden_size as f64,
            classes: labels.saturating_sub(1),
            learn_sigma: output == 2 * channels,
            mlp_norm_epsilon: 1e-6,
            frequency_shift: 0,
            block_embedders: shape("blocks.1.t_embedder.mlp.0.weight").is_some(),
        };
        result.check()?;
        Ok(result)
    }
}

/// A key of our own in diffusers' config.json, which it ignores: the classes before padding.
const CLASSES_KEY: &str = "anneal_classes";

/// The tensors of a block's embedders in the diffusers layout.
const EMBEDDER_PARTS: [&str; 5] = [
    "timestep_embedder.linear_1.weight",
    "timestep_embedder.linear_1.bias",
    "timestep_embedder.linear_2.weight",
    "timestep_embedder.linear_2.bias",
    "class_embedder.embedding_table.weight",
];

/// The twelve names.
pub fn preset_names() -> Vec<String> {
    PRESETS.iter().flat_map(|(name, ..)| [2, 4, 8].map(|patch| format!("{name}/{patch}"))).collect()
}
