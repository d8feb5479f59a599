//! What a recipe will do, said before it is done: model, data, steps, memory.

use std::fmt;

use anneal_models::dit::{Dit, DitConfig};
use anneal_nn::ChunkLayout;
use anneal_recipe::{Model, Recipe};
use anneal_tensor::DType;

use crate::data::DataSummary;
use crate::error::{Result, TrainError};
use crate::report::summary::{self, Align, Table};
use crate::settings;

/// Bytes that no machine has; what would need more is a slip.
const MOST_MEMORY: u64 = 1 << 50;

/// A resolved recipe with the figures that follow from it.
#[derive(Clone, Debug)]
pub struct Plan {
    recipe: Recipe,
    config: DitConfig,
    parameters: usize,
    tensors: usize,
    chunks: usize,
    data: Option<DataSummary>,
    pub memory: PredictedMemory,
}

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictedMemory {
    pub weights: usize,
    pub gradients: usize,
    pub optimizer: usize,
    /// At the peak of backward; an estimate, the others are exact.
    pub activations: usize,
}

impl PredictedMemory {
    /// What lasts for the whole run: it is known exactly.
    fn lasting(&self) -> usize {
        self.weights + self.gradients + self.optimizer
    }

    pub fn total(&self) -> usize {
        self.lasting().saturating_add(self.activations)
    }
}

impl Plan {
    /// Describes the model and lays it out, without allocating it.
    ///
    /// # Errors
    /// If the recipe's parts do not fit together, or into any machine.
    pub fn new(recipe: &Recipe) -> Result<Self> {
        let config = settings::model_config(recipe)?;
        settings::objective(recipe)?;
        let (_, parameters) = Dit::new(&config)?;
        let layout = ChunkLayout::new(&parameters, recipe.train.chunk_size.bytes() / size_of::<f32>());
        let element = settings::compute_dtype(recipe).size();
        let elements = |trainable: bool| -> usize {
            let of_kind = layout.chunks().iter().filter(|chunk| chunk.trainable == trainable);
            of_kind.map(|chunk| chunk.elements).sum()
        };
        let trained = elements(true);
        let masters = usize::from(element != DType::F32.size());
        let memory = PredictedMemory {
            weights: (trained + elements(false)) * element,
            gradients: trained * DType::F32.size(),
            optimizer: trained * DType::F32.size() * (2 + masters + recipe.ema.rates.len()),
            activations: activations(recipe, &config, element),
        };
        let total = memory.total() as u64;
        if total > MOST_MEMORY {
            let message = format!(
                "the predicted memory of {} is more than any machine has: choose a smaller train.batch or model",
                summary::bytes(total)
            );
            return Err(TrainError::Settings { message });
        }
        Ok(Self {
            recipe: recipe.clone(),
            config,
            parameters: parameters.elements(),
            tensors: parameters.len(),
            chunks: layout.chunks().len(),
            data: None,
            memory,
        })
    }

    /// The same, with what is known of the data.
    pub fn with_data(self, data: DataSummary) -> Self {
        Self { data: Some(data), ..self }
    }

    /// Compares the recipe's memory limit with the prediction. A warning if it lies below the sum, of which a part is an
    /// estimate.
    ///
    /// # Errors
    /// If it lies below what is known exactly, so that training cannot begin.
    pub fn check_limit(&self) -> Result<Option<String>> {
        let Some(limit) = self.recipe.memory_limit else { return Ok(None) };
        self.compare(limit.0, &format!("the memory limit of {limit}"), "raise it, or ")
    }

    /// The same for the memory that the device has.
    ///
    /// # Errors
    /// If that is less than what is known exactly.
    pub fn check_memory(&self, there: u64) -> Result<Option<String>> {
        let name = format!("the memory of {}, {},", self.recipe.device, summary::bytes(there));
        self.compare(there, &name, "")
    }

    fn compare(&self, limit: u64, name: &str, first: &str) -> Result<Option<String>> {
        let [lasting, total] = [self.memory.lasting(), self.memory.total()].map(|bytes| bytes as u64);
        if limit < lasting {
            let message = format!(
                "{name} lies below the {} of weights, gradients, optimizer and averages: {first}choose a smaller model or fewer ema.rates",
                summary::bytes(lasting)
            );
            return Err(TrainError::Settings { message });
        }
        Ok((limit < total).then(|| {
            format!(
                "{name} lies below the predicted sum of {}: {first}use a smaller batch, train.accumulate, or model.checkpoint_activations=true",
                summary::bytes(total)
            )
        }))
    }

    fn model_line(&self) -> String {
        let DitConfig {
            hidden_size, depth, heads, patch_size, channels, image_size: [height, width], ..
        } = self.config;
        format!(
            "DiT, {} parameters in {} tensors and {}: width {hidden_size}, depth {depth}, {heads} heads, patch {patch_size}, images {channels}x{height}x{width}",
            summary::short_count(self.parameters as u64),
            self.tensors,
            summary::plural(self.chunks as u64, "chunk")
        )
    }

    fn steps_line(&self) -> String {
        let train = &self.recipe.train;
        let parts = match train.accumulate {
            1 => String::new(),
            parts => format!(" in {parts} passes"),
        };
        format!(
            "{} of {}{parts}, {} in all",
            summary::plural(train.steps as u64, "step"),
            summary::plural(train.batch as u64, "image"),
            summary::plural(train.steps.saturating_mul(train.batch) as u64, "image")
        )
    }
}

/// Numbers that one token leaves behind for backward in a block, in units of the hidden size: the two
/// residual sums (2), queries, keys and values (3), attention's output (1) and the two branches (2).
/// On the CPU also the norms of the sums (2), and the feed-forward part before and after its activation (2 times
/// the ratio). A GPU makes the activation again in backward, which costs it less than to read it, and, unless the recipe
/// says otherwise, the norms: there it is the part before the activation alone (1 times the ratio), in all 12 units at a
/// ratio of 4, and attention's logarithms of sums, one f32 number for each head.
fn activations(recipe: &Recipe, config: &DitConfig, element: usize) -> usize {
    let Model::Dit(dit) = &recipe.model;
    let number = |count: usize| count as f64;
    // Any batch can be asked for: where whole numbers would overflow, these saturate.
    let rows = number(recipe.train.batch / recipe.train.accumulate);
    let [height, width] = config.grid().map(number);
    let tokens = rows * height * width;
    let unit = number(config.hidden_size * element);
    let hidden = number(config.mlp_hidden_size() * element);
    let depth = number(config.depth);
    let block = match settings::on_gpu(recipe) {
        true => {
            let norms = if dit.recompute_norms { 0.0 } else { 2.0 };
            tokens * (unit * (8.0 + norms) + hidden + number(config.heads * DType::F32.size()))
        }
        false => tokens * (unit * 10.0 + 2.0 * hidden),
    };
    let kept = match dit.checkpoint_activations {
        true => tokens * unit * 2.0 * depth + block,
        false => block * depth,
    };
    // The gradients in flight at the deepest point, and what is kept outside the blocks.
    let modulation = rows * unit * (6.0 * depth + 2.0);
    let image = tokens
        * number(config.patch_size.pow(2))
        * number((config.output_channels() + 4 * config.channels) * DType::F32.size());
    (kept + modulation + image + tokens * unit * 4.0) as usize
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recipe = &self.recipe;
        let mut table = Table::new([("plan", Align::Left), (&recipe.name, Align::Left)]);
        table.row(["model", &self.model_line()]);
        if let Some(data) = &self.data {
            table.row(["data", &data.to_string()]);
        }
        table.row(["training", &self.steps_line()]);
        table.row(["device", &format!("{}, {:?}", recipe.device, recipe.train.precision).to_lowercase()]);
        table.row(["run folder", &recipe.output.display().to_string()]);
        write!(out, "{table}")?;
        let bytes = |count: usize| summary::bytes(count as u64);
        let mut memory = Table::new([("predicted memory", Align::Left), ("", Align::Right)]);
        memory.row(["weights".into(), bytes(self.memory.weights)]);
        memory.row(["gradients".into(), bytes(self.memory.gradients)]);
        memory.row(["optimizer and averages".into(), bytes(self.memory.optimizer)]);
        memory.row(["activations (estimate)".into(), bytes(self.memory.activations)]);
        memory.row(["sum".into(), bytes(self.memory.total())]);
        write!(out, "{memory}")
    }
}
