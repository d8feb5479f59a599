//! `sample`: weights to pictures or arrays.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anneal_data::npz::{Npz, Values};
use anneal_diffusion::Process;
use anneal_infer::{Pipeline, Request};
use anneal_models::Denoiser;
use anneal_recipe::{ByteSize, GuidanceMode, Sampler};
use anneal_tensor::Device;
use anneal_train::report::progress::{Progress, Show};
use anneal_train::report::summary;
use anyhow::{Context, Error, Result, anyhow, bail};

use crate::cli::Sample;
use crate::machine;
use crate::output::Target;
use crate::sampling::{self, SamplingSettings};
use crate::scheduler;
use crate::source::{self, Opening, Source};

/// Samples when nothing else is said.
const DEFAULT_COUNT: usize = 64;
const DEFAULT_STEPS: usize = 50;

/// What to draw, and how.
pub struct Drawing {
    pub settings: SamplingSettings,
    pub labels: Vec<i64>,
    pub first_seed: u64,
    pub latents: Option<Vec<f32>>,
    pub batch: usize,
}

pub fn sample(arguments: &Sample) -> Result<ExitCode> {
    let out = arguments.out.clone().unwrap_or_else(|| PathBuf::from("samples.png"));
    let target = Target::new(&out, arguments.overwrite)?;
    let device = Device::parse(&arguments.device, arguments.memory_limit.map(ByteSize::bytes))?;
    let opening = Opening {
        ema: arguments.ema.as_deref(),
        heads: arguments.heads,
        precision: arguments.precision,
        device,
    };
    let source = source::open(&arguments.source, &opening)?;
    for warning in &source.warnings {
        eprintln!("warning: {warning}");
    }
    let drawing = drawing(arguments, &source)?;
    for line in source.scheduler.iter().flat_map(|it| scheduler::not_followed(it, &drawing.settings)) {
        eprintln!("warning: {line}");
    }
    draw(&source, &drawing, &target)?;
    println!(
        "{} from {} in {}   ({})",
        summary::plural(drawing.labels.len() as u64, "sample"),
        source.description,
        out.display(),
        drawing.settings.caption()
    );
    Ok(ExitCode::SUCCESS)
}

/// Draws and writes, with a progress bar.
pub fn draw(source: &Source, drawing: &Drawing, target: &Target) -> Result<()> {
    let (sampler, guidance) = drawing.settings.options(&source.objective)?;
    let count = drawing.labels.len() as u64;
    let request = Request {
        seeds: (drawing.first_seed..drawing.first_seed + count).collect(),
        labels: drawing.labels.clone(),
        latents: drawing.latents.clone(),
        sampler,
        guidance,
        batch: drawing.batch,
    };
    let pipeline = Pipeline {
        model: source.model.clone(),
        store: source.store.clone(),
        objective: source.objective.clone(),
    };
    let mut progress: Option<(Progress, usize)> = None;
    let samples = pipeline.sample(&request, &mut |done, all| {
        let (bar, shown) =
            progress.get_or_insert_with(|| (Progress::new(Show::Auto, "sampling", Some(all as u64)), 0));
        bar.add((done - *shown) as u64);
        *shown = done;
        ControlFlow::Continue(())
    })?;
    if let Some((bar, _)) = progress {
        bar.finish();
    }
    for warning in &samples.warnings {
        eprintln!("warning: {warning}");
    }
    target.write(&samples, &drawing.settings.caption())
}

fn drawing(arguments: &Sample, source: &Source) -> Result<Drawing> {
    let (latents, given_labels) = match &arguments.latents {
        Some(path) => read_latents(path)?,
        None => (None, None),
    };
    let size: usize = source.model.image_shape().iter().product();
    let given = latents.as_ref().map(|values| values.len() / size);
    if let (Some(num), Some(given)) = (arguments.num, given)
        && num != given
    {
        bail!("--num is {num}, but --latents holds {given}: leave --num out");
    }
    let count = arguments.num.or(given).unwrap_or(DEFAULT_COUNT);
    if count == 0 {
        bail!("--num must be at least 1");
    }
    let [channels, height, width] = source.model.image_shape();
    let what = format!("--num {count} of images of {channels}x{height}x{width}");
    machine::check_fits(&what, [&[count, channels, height, width][..]])?;
    if arguments.seed.checked_add(count as u64).is_none() {
        bail!("--seed {} leaves no seeds for {count} images: choose less", arguments.seed);
    }
    let labels = match (given_labels, &arguments.class) {
        (Some(labels), None) => labels,
        (_, class) => sampling::labels(class.as_deref().unwrap_or("all"), count, source.model.classes())?,
    };
    let settings = settings(arguments, source)?;
    Ok(Drawing { settings, labels, first_seed: arguments.seed, latents, batch: arguments.batch })
}

/// The settings of the run that the weights come from, if it is known, with the command line's changes.
fn settings(arguments: &Sample, source: &Source) -> Result<SamplingSettings> {
    let mut settings = match &source.sampling {
        Some(settings) => settings.clone(),
        None => SamplingSettings {
            sampler: match source.objective.process() {
                Process::Diffusion(_) => Sampler::Ddim,
                Process::Flow => Sampler::FlowEuler,
            },
            steps: DEFAULT_STEPS,
            eta: 0.0,
            shift: 1.0,
            guidance: 1.0,
            guidance_mode: GuidanceMode::All,
            clip: None,
            spacing: None,
        },
    };
    if let Some(scheduler) = source.scheduler.as_ref() {
        scheduler::apply(scheduler, &mut settings);
    }
    if let Some(name) = &arguments.sampler {
        settings.sampler = sampling::sampler_named(name)?;
    }
    if let Some(text) = &arguments.guidance_mode {
        settings.guidance_mode = text.parse().map_err(|reason| anyhow!("--guidance-mode: {reason}"))?;
    }
    if arguments.clip {
        settings.clip = Some(1.0);
    }
    settings.steps = arguments.steps.unwrap_or(settings.steps);
    settings.guidance = arguments.guidance.unwrap_or(settings.guidance);
    let of_one = [
        ("--eta", arguments.eta, Sampler::Ddim, &mut settings.eta),
        ("--shift", arguments.shift, Sampler::FlowEuler, &mut settings.shift),
    ];
    for (flag, value, only, setting) in of_one {
        let Some(value) = value else { continue };
        settings.sampler.check_has(flag, only).map_err(Error::msg)?;
        *setting = value;
    }
    settings.check()?;
    Ok(settings)
}

type Latents = (Option<Vec<f32>>, Option<Vec<i64>>);

fn read_latents(path: &Path) -> Result<Latents> {
    let mut file = Npz::read(path)?;
    let Values::F32(latents) = file.take("latents")?.into_values() else {
        bail!("{}: the array `latents` must be f32", path.display());
    };
    if !file.contains("labels") {
        return Ok((Some(latents), None));
    }
    match file.take("labels")?.into_values() {
        Values::I64(labels) => Ok((Some(latents), Some(labels))),
        _ => Err(anyhow::anyhow!("expected i64"))
            .with_context(|| format!("{}: the array `labels`", path.display())),
    }
}
