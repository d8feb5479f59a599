//! The network (arXiv 2212.09748, section 3 and figure 3, adaLN-Zero).
//!
//! Letters: `b` batch, `n` patches, `d` hidden size. A block is
//! `x += gate * part(LN(x) * (1 + scale) + shift)`, for attention and for the feed-forward part. The norm that opens a part is computed
//! together with the residual sum that closes the part before, across block boundaries; so the
//! modulation of every block is computed ahead of the blocks, from the conditioning alone.

use std::sync::Arc;

use anneal_nn::{
    Builder, FeedForward, Forward, Init, LabelEmbedding, Linear, ParamId, Parameters, PatchEmbedding,
    ScopeId, SelfAttention, TimestepEmbedding, sincos_positions,
};
use anneal_tensor::ops::{self, Activation};
use anneal_tensor::{DType, Result, Tensor, TensorError};

use super::DitConfig;
use crate::{Conditioning, Denoiser, ModelError};

/// Width of the sinusoidal timestep features.
const TIMESTEP_FEATURES: usize = 256;
/// Epsilon of all norms but the one of [`DitConfig::mlp_norm_epsilon`].
const NORM_EPSILON: f32 = 1e-6;

/// A DiT: parameter ids and sizes, no weights.
pub struct Dit {
    config: DitConfig,
    embedders: ScopeId,
    patches: PatchEmbedding,
    /// One pair for all, or one for each block; the final layer uses the first.
    conditioners: Vec<Conditioner>,
    positions: ParamId,
    modulation: ScopeId,
    /// One for each block, six vectors each; the last, for the final layer, two.
    modulations: Vec<Linear>,
    blocks: Vec<(ScopeId, Arc<Block>)>,
    last: ScopeId,
    output: Linear,
}

/// Makes the conditioning vector.
struct Conditioner {
    timesteps: TimestepEmbedding,
    labels: LabelEmbedding,
}

struct Block {
    attention: SelfAttention,
    feed_forward: FeedForward,
    mlp_norm_epsilon: f32,
}

impl Dit {
    /// Describes the model; initialisers as published (section 3.2 and the original code: Xavier for
    /// linear layers, 0.02 for embeddings, zero for modulations and the output).
    ///
    /// # Errors
    /// If the configuration does not fit together.
    pub fn new(config: &DitConfig) -> Result<(Self, Parameters), ModelError> {
        config.check()?;
        let size = config.hidden_size;
        let mut builder = Builder::new();
        let (embedders, (patches, conditioners, positions)) = builder.scope("embedders", |builder| {
            (
                builder
                    .at("x_embedder", |b| PatchEmbedding::new(b, config.channels, config.patch_size, size)),
                describe_conditioners(builder, config),
                add_positions(builder, config),
            )
        });
        let (modulation, modulations) =
            builder.scope("modulation", |builder| describe_modulations(builder, config));
        let blocks = (0..config.depth)
            .map(|index| {
                let name = format!("blocks.{index}");
                let (scope, block) =
                    builder.scope(&name, |builder| builder.at(&name, |builder| Block::new(builder, config)));
                (scope, Arc::new(block))
            })
            .collect();
        let (last, output) = builder.scope("final_layer", |builder| {
            let outputs = config.patch_size * config.patch_size * config.output_channels();
            builder.at("final_layer.linear", |builder| Linear::new(builder, size, outputs, Init::Zeros))
        });
        let config = config.clone();
        let model = Self {
            config,
            embedders,
            patches,
            conditioners,
            positions,
            modulation,
            modulations,
            blocks,
            last,
            output,
        };
        Ok((model, builder.finish()))
    }

    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Tokens `[b, n, d]`, and of each conditioner the vector `[b, d]`, already through its SiLU.
    fn embed(
        &self,
        forward: &Forward,
        image: &Tensor,
        timesteps: &[f32],
        labels: &[i64],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        forward.scope(self.embedders, |forward| {
            let patches = self.patches.forward(forward, &ops::cast(image, forward.dtype())?)?;
            let tokens = ops::add(&patches, &forward.param(self.positions)?)?;
            let condition = |conditioner: &Conditioner| {
                let timesteps = conditioner.timesteps.forward(forward, timesteps)?;
                let labels = conditioner.labels.forward(forward, labels)?;
                ops::silu(&ops::add(&timesteps, &labels)?)
            };
            Ok((tokens, self.conditioners.iter().map(condition).collect::<Result<_>>()?))
        })
    }

    /// Shifts, scales and gates `[b, d]`: six for each block, in the order shift, scale, gate of
    /// attention, then of the feed-forward part; then shift and scale of the final layer. The layers of blocks with
    /// the same conditioning are one op.
    fn modulate(&self, forward: &Forward, conditionings: &[Tensor]) -> Result<Vec<Vec<Tensor>>> {
        forward.scope(self.modulation, |forward| {
            let (blocks, last) = self.modulations.split_at(self.blocks.len());
            let groups = blocks.chunks(self.blocks.len() / conditionings.len()).zip(conditionings);
            let mut all = Vec::with_capacity(self.modulations.len());
            for (layers, conditioning) in groups {
                let vectors = Linear::forward_all(layers, forward, conditioning, 6)?;
                all.extend(vectors.chunks(6).map(<[Tensor]>::to_vec));
            }
            all.push(Linear::forward_all(last, forward, &conditionings[0], 2)?.into_vec());
            Ok(all)
        })
    }

    fn check_inputs(&self, image: &Tensor, timesteps: &[f32], labels: &[i64]) -> Result<()> {
        let [channels, height, width] = self.image_shape();
        let expected = [timesteps.len(), channels, height, width];
        if image.dims() != expected || labels.len() != timesteps.len() {
            let message = format!(
                "expected an image of shape {expected:?} and as many labels as timesteps, found {:?}, {} labels and {} timesteps",
                image.dims(),
                labels.len(),
                timesteps.len()
            );
            return Err(TensorError::shape("DiT", message));
        }
        Ok(())
    }
}

impl Denoiser for Dit {
    fn forward(
        &self,
        forward: &Forward,
        image: &Tensor,
        timesteps: &[f32],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        self.check_inputs(image, timesteps, conditioning.labels)?;
        let (tokens, conditionings) = self.embed(forward, image, timesteps, conditioning.labels)?;
        let modulations = self.modulate(forward, &conditionings)?;
        let mut normed =
            ops::layer_norm_modulate(&tokens, &modulations[0][0], &modulations[0][1], NORM_EPSILON)?;
        let mut tokens = tokens;
        for (index, (scope, block)) in self.blocks.iter().enumerate() {
            let (own, next) = (&modulations[index], &modulations[index + 1]);
            let block = block.clone();
            let inputs = [&tokens, &normed, &own[2], &own[3], &own[4], &own[5], &next[0], &next[1]];
            let outputs =
                forward.block(*scope, &inputs, move |forward, inputs| block.forward(forward, inputs))?;
            [tokens, normed] = <[Tensor; 2]>::try_from(outputs.into_vec()).expect("a block has two outputs");
        }
        drop(tokens);
        let patches =
            forward.scope(self.last, |forward| self.output.forward(forward, &normed, Activation::None))?;
        let [rows, columns] = self.config.grid();
        let patch = self.config.patch_size;
        let image = ops::unpatchify(&patches, patch, rows, columns, self.config.output_channels())?;
        ops::cast(&image, DType::F32)
    }

    fn image_shape(&self) -> [usize; 3] {
        [self.config.channels, self.config.image_size[0], self.config.image_size[1]]
    }

    fn classes(&self) -> usize {
        self.config.classes
    }

    fn null_label(&self) -> i64 {
        self.conditioners[0].labels.null_label()
    }

    fn learns_sigma(&self) -> bool {
        self.config.learn_sigma
    }
}

impl Block {
    fn new(builder: &mut Builder, config: &DitConfig) -> Self {
        let size = config.hidden_size;
        Self {
            attention: builder.at("attn", |builder| SelfAttention::new(builder, size, config.heads)),
            feed_forward: builder.at("mlp", |builder| {
                FeedForward::new(builder, size, config.mlp_hidden_size(), Activation::GeluTanh)
            }),
            mlp_norm_epsilon: config.mlp_norm_epsilon,
        }
    }

    /// From the tokens, their modulated norm and the modulation, to the tokens after the block and
    /// the modulated norm that the next one begins with.
    fn forward(&self, forward: &Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [tokens, normed, gate_attention, shift, scale, gate_mlp, next_shift, next_scale] = inputs else {
            panic!("a block has eight inputs");
        };
        let attended = self.attention.forward(forward, normed)?;
        let (tokens, normed) = ops::gate_residual_layer_norm_modulate(
            tokens,
            &attended.product,
            Some(&attended.bias),
            gate_attention,
            shift,
            scale,
            self.mlp_norm_epsilon,
        )?;
        drop(attended);
        let fed = self.feed_forward.forward(forward, &normed)?;
        let (tokens, normed) = ops::gate_residual_layer_norm_modulate(
            &tokens,
            &fed.product,
            Some(&fed.bias),
            gate_mlp,
            next_shift,
            next_scale,
            NORM_EPSILON,
        )?;
        Ok(vec![tokens, normed])
    }
}

fn describe_conditioners(builder: &mut Builder, config: &DitConfig) -> Vec<Conditioner> {
    let size = config.hidden_size;
    let describe = |builder: &mut Builder| Conditioner {
        timesteps: builder.at("t_embedder", |builder| {
            TimestepEmbedding::new(builder, TIMESTEP_FEATURES, size, config.frequency_shift)
        }),
        labels: builder.at("y_embedder", |builder| LabelEmbedding::new(builder, config.classes, size)),
    };
    let mut all = vec![describe(builder)];
    if config.block_embedders {
        all.extend((1..config.depth).map(|block| builder.at(&format!("blocks.{block}"), describe)));
    }
    all
}

fn add_positions(builder: &mut Builder, config: &DitConfig) -> ParamId {
    let [rows, columns] = config.grid();
    let table = sincos_positions(rows, columns, config.hidden_size);
    builder.add_frozen("pos_embed", &[1, rows * columns, config.hidden_size], Init::Values(table.into()))
}

fn describe_modulations(builder: &mut Builder, config: &DitConfig) -> Vec<Linear> {
    let size = config.hidden_size;
    let mut add = |path: &str, vectors: usize| {
        let path = format!("{path}.adaLN_modulation.1");
        builder.at(&path, |builder| Linear::new(builder, size, vectors * size, Init::Zeros))
    };
    let mut all: Vec<Linear> = (0..config.depth).map(|index| add(&format!("blocks.{index}"), 6)).collect();
    all.push(add("final_layer", 2));
    all
}
