//! The recipe itself and the sections `ema`, `train` and `sample`.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, Data, Diffusion, Model, Optim};

/// A whole recipe with every default filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run; the file's name when left out.
    pub name: String,
    /// Seed of every random draw.
    #[serde(default)]
    pub seed: u64,
    /// Device: `cpu` (all cores), `cpu:2` (two threads), `cuda` (the first GPU), `cuda:1`.
    #[serde(default = "default_device")]
    pub device: String,
    /// Most memory of the device to use, such as `8GiB`. Null: all there is.
    #[serde(default)]
    pub memory_limit: Option<ByteSize>,
    /// Folder of the run: checkpoints, metrics, pictures; `runs/<name>` when left out.
    pub output: PathBuf,
    pub model: Model,
    #[serde(default)]
    pub diffusion: Diffusion,
    pub data: Data,
    #[serde(default)]
    pub optim: Optim,
    #[serde(default)]
    pub ema: Ema,
    pub train: Train,
    pub sample: Sample,
}

fn default_device() -> String {
    "cpu".into()
}

/// Moving averages of the weights, from which samples are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ema {
    /// One average for each rate: average = rate * average + (1 - rate) * weights. Empty: none.
    pub rates: Vec<f64>,
    /// Use min(rate, (1 + step) / (10 + step)), so that the first weights are soon forgotten.
    pub warmup: bool,
}

impl Default for Ema {
    fn default() -> Self {
        Ema { rates: vec![0.9999], warmup: false }
    }
}

/// The course of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps in all.
    pub steps: usize,
    /// Images in one optimizer step.
    pub batch: usize,
    /// Passes in which a step's images are computed, to save memory; divides `batch`.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Format of activations and matrix products; weights, moments and sums are always fp32.
    #[serde(default)]
    pub precision: Precision,
    /// Size of the flat buffers that hold parameters and gradients.
    #[serde(default = "default_chunk_size")]
    pub chunk_size: ByteSize,
    /// Steps between lines of the metrics.
    #[serde(default = "default_log_every")]
    pub log_every: usize,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Steps with a non-finite loss or gradient that are skipped in a row before the run stops.
    #[serde(default = "default_nonfinite_limit")]
    pub nonfinite_limit: usize,
    /// On a GPU, choose only kernels whose results have the same bits in every run.
    #[serde(default)]
    pub deterministic: bool,
    /// On a GPU, capture a whole step once and replay it as one piece of work.
    #[serde(default = "yes")]
    pub capture_steps: bool,
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}
fn default_chunk_size() -> ByteSize {
    ByteSize(32 << 20)
}
fn default_log_every() -> usize {
    10
}
fn default_nonfinite_limit() -> usize {
    20
}

/// When the run is saved. It is always saved at its end and when it is asked to stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between checkpoints.
    pub every: usize,
    /// How many of the newest are kept.
    pub keep_last: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 1000, keep_last: 3 }
    }
}

/// Format of activations and matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    Fp32,
    /// fp32, with the inputs of matrix products rounded to tf32 where the device has it (NVIDIA GPUs).
    Tf32,
    Bf16,
    /// With a loss scale that adapts itself (arXiv 1710.03740, section 3.2).
    Fp16,
}

/// The grid of samples drawn during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Steps between grids; 0 draws none.
    #[serde(default = "default_sample_every")]
    pub every: usize,
    /// Images in the grid.
    #[serde(default = "default_sample_num")]
    pub num: usize,
    /// Classes to draw, taken in turn; empty draws all of them in turn.
    #[serde(default)]
    pub classes: Vec<usize>,
    /// Sampler; `ddim` for gaussian diffusion and `flow_euler` for flow matching when left out.
    pub sampler: Sampler,
    /// Sampling steps.
    #[serde(default = "default_sample_steps")]
    pub steps: usize,
    /// Noise that DDIM adds anew: 0 none, 1 as much as DDPM; 0 for other samplers.
    #[serde(default)]
    pub eta: f64,
    /// Time shift of `flow_euler`; above 1 spends more steps at the noisy end; 1 for other samplers.
    #[serde(default = "unit")]
    pub shift: f64,
    /// Strength of classifier-free guidance; 1 is none.
    #[serde(default = "unit")]
    pub guidance: f64,
    /// Where and to what guidance applies; in a recipe also as on the command line, `interval:0.2:0.8`.
    #[serde(default)]
    pub guidance_mode: GuidanceMode,
    /// Rate of the average to draw from, one of `ema.rates`. Null: the first, or the weights themselves if there is none.
    #[serde(default)]
    pub ema: Option<f64>,
}

fn default_sample_every() -> usize {
    1000
}
fn default_sample_num() -> usize {
    64
}
fn default_sample_steps() -> usize {
    50
}
fn unit() -> f64 {
    1.0
}

/// The samplers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Ancestral sampling on respaced steps (arXiv 2102.09672).
    Ddpm,
    /// arXiv 2010.02502, with `eta`.
    Ddim,
    /// DPM-Solver++ 2M (arXiv 2211.01095).
    #[serde(rename = "dpm_solver_2m")]
    DpmSolver2m,
    /// DPM-Solver++ 2M on Karras noise levels (arXiv 2206.00364, equation 5).
    #[serde(rename = "dpm_solver_2m_karras")]
    DpmSolver2mKarras,
    /// arXiv 2302.04867.
    Unipc,
    /// First order on noise levels.
    Euler,
    /// Second order on noise levels; two model calls a step.
    Heun,
    /// First order along the flow, with `shift`.
    FlowEuler,
}

impl Sampler {
    /// Refuses a setting, named as the user knows it, that is for one sampler alone and not for this one.
    ///
    /// # Errors
    /// The sentence that says so.
    pub fn check_has(self, setting: &str, only: Sampler) -> Result<(), String> {
        match self == only {
            true => Ok(()),
            false => Err(format!("{setting} does not apply to the sampler {self}: it is for {only} alone")),
        }
    }
}

/// The name in recipes.
impl fmt::Display for Sampler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

/// Where and to what classifier-free guidance applies.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GuidanceMode {
    /// All channels, all steps.
    #[default]
    All,
    /// The first three channels only, as the published DiT samples were drawn.
    FirstThree,
    /// Only while the share of the noising time lies within [low, high] of 0 to 1.
    Interval { low: f64, high: f64 },
    /// The strength rises from 1 to `guidance` as (1 - cos(pi * (1 - t)^power)) / 2 over the noising time t of 1 to 0
    /// (arXiv 2303.14389).
    PowerCosine {
        #[serde(default = "default_power")]
        power: f64,
    },
}

fn default_power() -> f64 {
    4.0
}

/// From the short form: `all`, `first_three`, `interval:LOW:HIGH`, `power_cosine` or `power_cosine:POWER`.
impl std::str::FromStr for GuidanceMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let numbers = parts
            .map(|part| part.parse().map_err(|_| format!("'{part}' in '{text}' is not a number")))
            .collect::<Result<Vec<f64>, String>>()?;
        let form = match (name, numbers.as_slice()) {
            ("all", []) => return Ok(GuidanceMode::All),
            ("first_three", []) => return Ok(GuidanceMode::FirstThree),
            ("interval", &[low, high]) => return Ok(GuidanceMode::Interval { low, high }),
            ("power_cosine", []) => return Ok(GuidanceMode::PowerCosine { power: default_power() }),
            ("power_cosine", &[power]) => return Ok(GuidanceMode::PowerCosine { power }),
            ("all" | "first_three", _) => name,
            ("interval", _) => "interval:LOW:HIGH",
            ("power_cosine", _) => "power_cosine:POWER",
            _ => {
                return Err(format!(
                    "unknown guidance mode '{text}': choose all, first_three, interval:LOW:HIGH or power_cosine:POWER"
                ));
            }
        };
        Err(format!("guidance mode '{text}': write it as {form}"))
    }
}
