//! The ops of a training step, at a model's shapes.
//!
//! Letters: `b` batch, `n` tokens, `d` hidden size.

use anneal_diffusion::Objective;
use anneal_models::dit::DitConfig;
use anneal_tensor::ops::{self, Activation, AttentionInput};
use anneal_tensor::{Outputs, Tensor};
use anyhow::Result;

const EPSILON: f32 = 1e-6;

type Run = Box<dyn Fn(&[Tensor]) -> Result<Outputs>>;

/// An op with the shapes of its inputs.
pub struct Case {
    pub name: String,
    pub inputs: Vec<Vec<usize>>,
    /// Multiply-adds of its forward, and how many times as many its backward has.
    pub products: f64,
    pub backward_products: f64,
    /// How often a training step has it.
    pub times: usize,
    /// Whether it computes in f32 whatever the model computes in.
    pub single: bool,
    /// Whether a training step goes back through it.
    pub differentiated: bool,
    pub run: Run,
}

impl Case {
    fn new(
        name: &str,
        times: usize,
        inputs: Vec<Vec<usize>>,
        run: impl Fn(&[Tensor]) -> Result<Outputs> + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            inputs,
            products: 0.0,
            backward_products: 2.0,
            times,
            single: false,
            differentiated: true,
            run: Box::new(run),
        }
    }

    fn linear(name: &str, times: usize, x: &[usize], outputs: usize) -> Self {
        let inner = x[x.len() - 1];
        let inputs = vec![x.to_vec(), vec![outputs, inner], vec![outputs]];
        let products = (x.iter().product::<usize>() * outputs) as f64;
        let case = Self::new(name, times, inputs, |t| {
            Ok(one(ops::linear(&t[0], &t[1], t.get(2), Activation::None)?))
        });
        Self { products, ..case }
    }

    /// A linear layer's bias left to the op behind it.
    fn without_bias(mut self) -> Self {
        self.inputs.truncate(2);
        self
    }

    /// The modulations of all blocks: layers over the same conditioning, each cut into six vectors.
    fn modulations(layers: usize, [b, d]: [usize; 2]) -> Self {
        let of_each = |sizes: &[usize]| vec![sizes.to_vec(); layers];
        let inputs = [vec![vec![b, d]], of_each(&[6 * d, d]), of_each(&[6 * d])].concat();
        let case = Self::new("linear_stack", 1, inputs, move |t| {
            let all: Vec<&Tensor> = t.iter().collect();
            let (weights, biases) = all[1..].split_at(layers);
            Ok(ops::linear_stack(all[0], weights, biases, 6)?)
        });
        Self { products: (layers * b * 6 * d * d) as f64, ..case }
    }

    /// Self-attention over packed queries, keys and values. Its backward multiplies five times where the
    /// forward does twice: it computes the scores again.
    pub fn attention(name: &str, times: usize, [b, heads, n, width]: [usize; 4]) -> Self {
        let case = Self::new(name, times, vec![vec![b, n, 3, heads, width]], move |t| {
            let scale = 1.0 / (width as f32).sqrt();
            Ok(one(ops::attention(AttentionInput::Packed(&t[0]), None, None, scale)?))
        });
        Self { products: 2.0 * (b * heads * n * n * width) as f64, backward_products: 2.5, ..case }
    }
}

fn one(tensor: Tensor) -> Outputs {
    std::iter::once(tensor).collect()
}

/// Every op of a training step, in its order; the optimizer is not among them.
pub fn of_step(config: &DitConfig, objective: &Objective, batch: usize) -> Vec<Case> {
    let [ends, block] = [of_ends(config, objective, batch), of_block(config, batch)];
    ends.into_iter().chain(block).collect()
}

/// What comes once: noise, patches, modulation, output and loss.
fn of_ends(config: &DitConfig, objective: &Objective, b: usize) -> Vec<Case> {
    let DitConfig { channels, hidden_size: d, depth, patch_size, image_size: [height, width], .. } = *config;
    let ([rows, columns], outputs) = (config.grid(), config.output_channels());
    let n = rows * columns;
    let patch = patch_size * patch_size;
    let image = vec![b, channels, height, width];
    let timesteps: Vec<f64> = (0..b).map(|row| (row * 997 % 1000) as f64).collect();
    let noising = (objective.clone(), timesteps.clone());
    let losing = (objective.clone(), timesteps);
    let noised = Case::new("noised input", 1, vec![image.clone(), image.clone()], move |t| {
        Ok(one(noising.0.noised(&t[0], &t[1], &noising.1)?))
    });
    let loss_inputs = vec![vec![b, outputs, height, width], image.clone(), image.clone()];
    let loss = Case::new("diffusion_loss", 1, loss_inputs, move |t| {
        // Clean images and noise have no gradient.
        let losses = losing.0.loss(&t[0], &t[1].detach(), &t[2].detach(), &losing.1)?;
        Ok(one(losses.total))
    });
    vec![
        Case { single: true, differentiated: false, ..noised },
        Case {
            differentiated: false,
            ..Case::new("patchify", 1, vec![image], move |t| Ok(one(ops::patchify(&t[0], patch_size)?)))
        },
        Case::linear("linear patches", 1, &[b, n, patch * channels], d),
        Case::new("silu", 1, vec![vec![b, d]], |t| Ok(one(ops::silu(&t[0])?))),
        Case::modulations(depth, [b, d]),
        Case::new("layer_norm_modulate", 1, vec![vec![b, n, d], vec![b, d], vec![b, d]], |t| {
            Ok(one(ops::layer_norm_modulate(&t[0], &t[1], &t[2], EPSILON)?))
        }),
        Case::linear("linear output", 1, &[b, n, d], patch * outputs),
        Case::new("unpatchify", 1, vec![vec![b, n, patch * outputs]], move |t| {
            Ok(one(ops::unpatchify(&t[0], patch_size, rows, columns, outputs)?))
        }),
        Case { single: true, ..loss },
    ]
}

/// What every block has.
fn of_block(config: &DitConfig, b: usize) -> Vec<Case> {
    let [rows, columns] = config.grid();
    let DitConfig { hidden_size: d, depth, heads, .. } = *config;
    let (n, hidden) = (rows * columns, config.mlp_hidden_size());
    let (x, vector) = (vec![b, n, d], vec![b, d]);
    let gate_inputs = vec![x.clone(), x.clone(), vec![d], vector.clone(), vector.clone(), vector];
    let feed_inputs = vec![x.clone(), vec![hidden, d], vec![hidden], vec![d, hidden]];
    let feed_forward = Case::new("feed_forward", depth, feed_inputs, |t| {
        Ok(one(ops::feed_forward(&t[0], &t[1], &t[2], &t[3], Activation::GeluTanh)?))
    });
    vec![
        Case::linear("linear qkv", depth, &x, 3 * d),
        Case::attention("attention", depth, [b, heads, n, d / heads]),
        Case::linear("linear proj", depth, &x, d).without_bias(),
        Case::new("gate_residual_layer_norm_modulate", 2 * depth, gate_inputs, |t| {
            let [x, branch, bias, gate, shift, scale] = t else { panic!("six inputs") };
            let (x, h) =
                ops::gate_residual_layer_norm_modulate(x, branch, Some(bias), gate, shift, scale, EPSILON)?;
            Ok([x, h].into_iter().collect())
        }),
        Case { products: 2.0 * (b * n * d * hidden) as f64, ..feed_forward },
    ]
}
