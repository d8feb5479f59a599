//! The command line: every command, flag and example.

use std::path::PathBuf;
use std::str::FromStr;

use anneal_recipe::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Trains, samples and inspects diffusion transformers.
///
/// One binary, no Python. Start with `anneal quickstart`: it trains a small model on real
/// handwritten digits in little more than a minute on two CPU cores and draws samples.
// Usage lines are written out where a command takes KEY=VALUE: in an error, clap shows whatever was given as required.
#[derive(Debug, Parser)]
#[command(name = "anneal", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Quickstart(Quickstart),
    Train(Train),
    Resume(Resume),
    Sample(Sample),
    VerifyResume(VerifyResume),
    Inspect(Inspect),
    Convert(Convert),
    Doctor(Doctor),
    Bench(Bench),
    Completions(Completions),
}

/// Train on the built-in digits and draw samples: the first thing to run.
///
/// Needs no files: the recipe and the 1797 digits are inside the binary. Writes a run folder
/// with checkpoints, metrics, a loss plot and `samples.png`. Interrupted? Run it again.
#[derive(Debug, Args)]
#[command(
    override_usage = "anneal quickstart [OPTIONS] [KEY=VALUE]...",
    after_help = "Examples:
  anneal quickstart
  anneal quickstart --output runs/mine --device cpu:4
  anneal quickstart --device cuda            (on the first NVIDIA GPU)
  anneal quickstart train.steps=200          (a shorter run, to look around)"
)]
pub struct Quickstart {
    /// Run folder to write
    #[arg(long, default_value = "runs/quickstart")]
    pub output: PathBuf,
    /// Where to compute: cpu, cpu:THREADS, cuda (the first GPU) or cuda:INDEX
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Most memory of the device to use, such as 8GiB, or `none`
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<MemoryLimit>,
    /// Changes to the recipe, as dotted keys
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// Train a model as a recipe says; run the same command again to continue.
///
/// The recipe is a YAML file; any of its keys can be changed on the command line. The resolved
/// recipe, checkpoints, metrics (JSON lines and TensorBoard), plots and sample grids go to the
/// run folder. If that holds checkpoints, training continues from the newest whole one, and ends
/// with the same bits as if it had never stopped. Ctrl-C saves a checkpoint and stops,
/// also while samples are drawn: those are drawn when the run goes on.
#[derive(Debug, Args)]
#[command(
    override_usage = "anneal train [OPTIONS] <RECIPE> [KEY=VALUE]...",
    after_help = "Examples:
  anneal train recipes/digits.yaml
  anneal train recipes/digits.yaml --device cuda --steps 2000
  anneal train recipes/digits.yaml optim.lr=2e-4 train.steps=500 output=runs/slow
  anneal train recipes/image_folder.yaml data.path=photos model.classes=3"
)]
pub struct Train {
    /// Recipe file
    pub recipe: PathBuf,
    #[command(flatten)]
    pub run: RunArguments,
    /// Print the plan (model, data, memory, steps) and stop before training; data and GPU may be another
    /// machine's, which is warned of
    #[arg(long)]
    pub plan: bool,
}

// What `train` and `resume` have in common. No doc comment: clap would show it as theirs.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Changes to the recipe, as dotted keys
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Where to compute: cpu, cpu:THREADS, cuda (the first GPU) or cuda:INDEX; short for device=
    #[arg(long)]
    pub device: Option<String>,
    /// Steps in all; short for train.steps=
    #[arg(long)]
    pub steps: Option<usize>,
    /// Most memory of the device to use, such as 8GiB; `none` takes a limit away; short for memory_limit=
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<MemoryLimit>,
    /// No progress bar
    #[arg(long, short)]
    pub quiet: bool,
}

/// A size, or `none`.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLimit(pub Option<ByteSize>);

impl std::str::FromStr for MemoryLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = if text == "none" { None } else { Some(text.parse()?) };
        Ok(Self(size))
    }
}

/// Continue a run from its folder alone.
///
/// Uses the recipe saved in the folder; flags and keys given here change it, for example to train
/// longer or on another device, and are kept. Other devices go on with the same state; a CPU's bits
/// do not depend on its number of threads, a GPU's differ from them in rounding.
#[derive(Debug, Args)]
#[command(
    override_usage = "anneal resume [OPTIONS] <RUN> [KEY=VALUE]...",
    after_help = "Examples:
  anneal resume runs/digits
  anneal resume runs/digits --steps 3000
  anneal resume runs/digits --device cuda optim.lr=2e-4"
)]
pub struct Resume {
    /// Run folder
    #[arg(value_name = "RUN")]
    pub folder: PathBuf,
    #[command(flatten)]
    pub run: RunArguments,
}

/// Draw samples from a run, a checkpoint or weights.
///
/// The ending of --out decides the form: `.png` one picture with all samples, `.npz` arrays as the
/// ADM evaluator reads them (`arr_0` u8 [N, H, W, C], `arr_1` labels; latents as f32 [N, C, H, W]),
/// no ending a folder of single pictures, which must be new or empty unless --overwrite. A sample depends on
/// its seed and class alone, not on how many are drawn together: sample i has seed --seed + i.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  anneal sample runs/digits
  anneal sample runs/digits --class 3 --num 16 --out threes.png
  anneal sample runs/digits --class all --num 500 --guidance 2 --out samples.npz
  anneal sample dit.safetensors --heads 6 --sampler dpm_solver_2m --steps 25 --out latents.npz")]
pub struct Sample {
    /// Run folder, checkpoint folder, safetensors file (original DiT layout), or diffusers folder
    #[arg(value_name = "RUN_OR_WEIGHTS")]
    pub source: PathBuf,
    /// How many samples [default: 64]
    #[arg(long, short, value_parser = whole_number::<usize>)]
    pub num: Option<usize>,
    /// Classes: one, a list such as 1,4,7, or `all` in equal shares; `none` for no class [default: all]
    #[arg(long, short)]
    pub class: Option<String>,
    /// Seed of the first sample
    #[arg(long, default_value_t = 0, value_parser = whole_number::<u64>)]
    pub seed: u64,
    /// Denoising steps [default: the recipe's, or 50]
    #[arg(long, value_parser = whole_number::<usize>)]
    pub steps: Option<usize>,
    /// ddpm, ddim, dpm_solver_2m, dpm_solver_2m_karras, unipc, euler, heun, or flow_euler for flow models
    /// [default: the recipe's]
    #[arg(long)]
    pub sampler: Option<String>,
    /// Guidance strength; 1 is none [default: the recipe's, or 1]
    #[arg(long, short)]
    pub guidance: Option<f64>,
    /// all, first_three, interval:LOW:HIGH (of the noising time, within 0 to 1), or power_cosine:POWER
    /// [default: the recipe's]
    #[arg(long)]
    pub guidance_mode: Option<String>,
    /// Noise of ddim between 0 (none) and 1 (as ddpm); for no other sampler
    #[arg(long)]
    pub eta: Option<f64>,
    /// Shift of the times of flow_euler; for no other sampler
    #[arg(long)]
    pub shift: Option<f64>,
    /// Which average of a run's weights: a rate such as 0.999, or `none` for the raw weights
    /// [default: the recipe's sample.ema, else the first of its ema.rates]
    #[arg(long)]
    pub ema: Option<String>,
    /// Keep estimates of the clean image within -1..1 on the way; for pixels, not for latents
    #[arg(long)]
    pub clip: bool,
    /// Starting noise from an npz (array `latents` [N, C, H, W] f32, and `labels` [N]) instead of that of seeds, from
    /// which ddpm and ddim with --eta draw further noise all the same; --num is what it holds
    #[arg(long)]
    pub latents: Option<PathBuf>,
    /// Samples computed together
    #[arg(long, default_value_t = 100, value_parser = at_least_one)]
    pub batch: usize,
    /// Where to write [default: samples.png]
    #[arg(long, short)]
    pub out: Option<PathBuf>,
    /// Replace the samples that are in the folder --out; a .png or .npz is replaced with or without it
    #[arg(long)]
    pub overwrite: bool,
    /// Attention heads, for weights that are no preset and do not say
    #[arg(long)]
    pub heads: Option<usize>,
    /// Where to compute: cpu, cpu:THREADS, cuda (the first GPU) or cuda:INDEX
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Most memory of the device to use, such as 8GiB
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<ByteSize>,
    /// fp32 or bf16
    #[arg(long, default_value = "fp32")]
    pub precision: Precision,
}

/// Show that a stopped run continues bit for bit.
///
/// Runs a recipe without a stop, and again with a stop in the middle and with another number of
/// data workers; then compares losses, weights, moments, averages and samples bit by bit.
#[derive(Debug, Args)]
#[command(
    override_usage = "anneal verify-resume [OPTIONS] <RECIPE> [KEY=VALUE]...",
    after_help = "Examples:
  anneal verify-resume recipes/digits.yaml
  anneal verify-resume recipes/flow_digits.yaml --steps 30 --stop-at 11"
)]
pub struct VerifyResume {
    /// Recipe file
    pub recipe: PathBuf,
    /// Changes to the recipe, as dotted keys
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Steps of the uninterrupted run
    #[arg(long, default_value_t = 12)]
    pub steps: u64,
    /// Step after which the other run stops [default: half of --steps]
    #[arg(long)]
    pub stop_at: Option<u64>,
}

/// Show what is in a run, checkpoint or weights file: tensors, sizes, hashes, configuration.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  anneal inspect runs/digits
  anneal inspect model.safetensors --tensors
  anneal inspect exported/ --json")]
pub struct Inspect {
    /// Run folder, checkpoint folder, safetensors file, or diffusers folder
    pub path: PathBuf,
    /// List every tensor
    #[arg(long, short)]
    pub tensors: bool,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Convert weights between layouts: a run or weights to a diffusers folder or an original DiT file.
///
/// The diffusers folder holds the transformer and scheduler of `diffusers.DiTPipeline`, which wants a VAE too: those of a
/// latent model open in it with `vae=...`, those of a model of pixels one by one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  anneal convert runs/digits exported --to diffusers
  anneal convert exported dit.safetensors --to original
  anneal convert DiT-XL-2.safetensors exported --to diffusers")]
pub struct Convert {
    /// Run folder, checkpoint folder, safetensors file (original DiT layout), or diffusers folder
    pub source: PathBuf,
    /// File (original) or folder (diffusers) to write; must not exist
    pub out: PathBuf,
    /// Layout to write
    #[arg(long)]
    pub to: Layout,
    /// Which average of a run's weights: a rate, or `none` for the raw weights
    /// [default: the recipe's sample.ema, else the first of its ema.rates]
    #[arg(long)]
    pub ema: Option<String>,
    /// fp32 or bf16
    #[arg(long, default_value = "fp32")]
    pub precision: Precision,
    /// Attention heads, for weights that are no preset and do not say
    #[arg(long)]
    pub heads: Option<usize>,
}

/// Report what this machine offers and what a run would use.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  anneal doctor")]
pub struct Doctor {
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Measure speed and memory: single ops, a block, a training step, a model evaluation, sampling, data loading.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  anneal bench step --model DiT-S/2 --batch 8
  anneal bench step --hidden 128 --depth 6 --heads 4 --patch 2 --image-size 8 --channels 1 --classes 10 --batch 128
  anneal bench step --model DiT-XL/2 --batch 128 --precision bf16 --device cuda
  anneal bench step --model DiT-XL/2 --batch 128 --precision bf16 --device cuda --profile
  anneal bench op --model DiT-S/2 --batch 8
  anneal bench op --attention 64,16,256,72 --precision bf16 --device cuda
  anneal bench forward --model DiT-S/2 --batch 2 --json
  anneal bench sample --model DiT-S/2 --batch 4 --sampling-steps 50 --guidance 4
  anneal bench data recipes/image_folder.yaml data.path=photos")]
pub struct Bench {
    #[command(subcommand)]
    pub what: BenchWhat,
}

#[derive(Debug, Subcommand)]
pub enum BenchWhat {
    /// Each op of a training step alone, forward and backward
    Op(BenchOp),
    /// One transformer block, forward and backward
    Block(BenchModel),
    /// Whole training steps: forward, backward, AdamW and EMA
    Step(BenchModel),
    /// Single model evaluations, as sampling makes them
    Forward(BenchModel),
    /// Whole sampling runs with guidance
    Sample(BenchSample),
    /// The data pipeline of a recipe, alone and against training on ready tensors
    Data(BenchData),
}

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchModel {
    /// A published size such as DiT-S/2; the flags below change it
    #[arg(long, default_value = "DiT-S/2")]
    pub model: String,
    /// Width of a token
    #[arg(long, value_parser = at_least_one)]
    pub hidden: Option<usize>,
    /// Transformer blocks
    #[arg(long, value_parser = at_least_one)]
    pub depth: Option<usize>,
    /// Attention heads of a block
    #[arg(long, value_parser = at_least_one)]
    pub heads: Option<usize>,
    /// Edge of the square patch that becomes a token, in pixels or cells of a latent
    #[arg(long, value_parser = at_least_one)]
    pub patch: Option<usize>,
    /// Edge of the square images, in pixels or cells of a latent
    #[arg(long, value_parser = at_least_one)]
    pub image_size: Option<usize>,
    /// Channels of an image
    #[arg(long, value_parser = at_least_one)]
    pub channels: Option<usize>,
    /// Classes that the model knows
    #[arg(long, value_parser = at_least_one)]
    pub classes: Option<usize>,
    /// Plain mean squared error, without a learned variance
    #[arg(long)]
    pub no_learn_sigma: bool,
    /// Keep only the inputs of blocks and run them again in backward
    #[arg(long)]
    pub checkpoint_activations: bool,
    /// On a GPU, keep normalised rows for backward instead of making them again: faster, and more memory
    #[arg(long)]
    pub keep_norms: bool,
    /// Images computed together
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    pub batch: usize,
    /// What the model computes in
    #[arg(long, default_value = "fp32")]
    pub precision: ComputePrecision,
    /// Where to compute: cpu, cpu:THREADS, cuda (the first GPU) or cuda:INDEX
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Most memory of the device to use, such as 8GiB
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<ByteSize>,
    /// On a GPU, choose only kernels whose results have the same bits in every run
    #[arg(long)]
    pub deterministic: bool,
    /// On a GPU, send every kernel by itself instead of replaying a captured step
    #[arg(long)]
    pub eager: bool,
    /// On a GPU, show where the time goes, kernel by kernel, in place of the median (implies --eager)
    #[arg(long)]
    pub profile: bool,
    /// Measured repetitions
    #[arg(long, default_value_t = 10, value_parser = at_least_one)]
    pub steps: usize,
    /// Repetitions before measuring; on a GPU at least 3, since steps are captured on the way
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Which ops to measure.
#[derive(Debug, Args)]
pub struct BenchOp {
    #[command(flatten)]
    pub model: BenchModel,
    /// Attention alone, at this shape in place of the model's; may be given several times
    #[arg(long, value_name = "BATCH,HEADS,TOKENS,WIDTH", value_parser = attention_shape)]
    pub attention: Vec<[usize; 4]>,
}

fn whole_number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "a whole number is wanted, 0 or more".into())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a whole number is wanted, 1 or more".into()),
        Ok(number) => Ok(number),
    }
}

fn attention_shape(text: &str) -> Result<[usize; 4], String> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .filter(|shape: &[usize; 4]| shape.iter().all(|size| *size > 0))
        .ok_or_else(|| "four numbers are wanted, such as 64,16,256,72".into())
}

/// Which sampling run to measure.
#[derive(Debug, Args)]
pub struct BenchSample {
    #[command(flatten)]
    pub model: BenchModel,
    /// Denoising steps of a run
    #[arg(long, default_value_t = 250, value_parser = at_least_one)]
    pub sampling_steps: usize,
    /// Guidance strength; 1 is none
    #[arg(long, default_value_t = 4.0)]
    pub guidance: f64,
    /// As for `anneal sample`
    #[arg(long, default_value = "ddim")]
    pub sampler: String,
}

/// Which data pipeline to measure.
#[derive(Debug, Args)]
#[command(override_usage = "anneal bench data [OPTIONS] <RECIPE> [KEY=VALUE]...")]
pub struct BenchData {
    /// Recipe file
    pub recipe: PathBuf,
    /// Changes to the recipe, as dotted keys
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Batches to measure in each epoch
    #[arg(long, default_value_t = 50, value_parser = at_least_one)]
    pub batches: usize,
    /// Machine-readable output
    #[arg(long)]
    pub json: bool,
}

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  anneal completions bash > ~/.local/share/bash-completion/completions/anneal
  anneal completions zsh > ~/.zfunc/_anneal")]
pub struct Completions {
    pub shell: clap_complete::Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    Fp32,
    Bf16,
}

/// The words of a recipe's `train.precision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ComputePrecision {
    Fp32,
    /// fp32 with matrix products in tf32, on GPUs
    Tf32,
    Bf16,
    Fp16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// `model_index.json` with transformer and scheduler folders
    Diffusers,
    /// One safetensors file with the original code's names
    Original,
}
