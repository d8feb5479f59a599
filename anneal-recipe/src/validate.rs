//! Ranges, and keys that contradict each other. Every problem is one line that names its key, what it is and what it
//! must be; all of them are reported at once.

use crate::{
    DIT_PRESETS, Data, DataKind, Diffusion, Dit, Ema, Flow, Gaussian, GuidanceMode, ImageSize, Model, Optim,
    Recipe, RecipeError, Sample, Sampler, TimeDensity, Train, suggest,
};

/// More is a slip: tables of all steps, samples and threads are made before the first of them is used.
const MOST_DIFFUSION_STEPS: usize = 1_000_000;
const MOST_SAMPLES: usize = 1_000_000;
const MOST_WORKERS: usize = 1024;

/// Collects problems, one line each.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn require(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.0.push(problem());
        }
    }

    fn at_least(&mut self, key: &str, value: usize, least: usize) {
        self.require(value >= least, || format!("{key} is {value}; it must be at least {least}"));
    }

    fn at_most(&mut self, key: &str, value: usize, most: usize) {
        self.require(value <= most, || format!("{key} is {value}; it must be at most {most}"));
    }

    /// `range` in words stands in the message.
    fn number(&mut self, key: &str, value: f64, holds: bool, range: &str) {
        self.require(holds && value.is_finite(), || format!("{key} is {value}; it must be {range}"));
    }

    fn positive(&mut self, key: &str, value: f64) {
        self.number(key, value, value > 0.0, "above 0");
    }

    fn not_negative(&mut self, key: &str, value: f64) {
        self.number(key, value, value >= 0.0, "0 or more");
    }

    fn size(&mut self, key: &str, size: ImageSize) {
        self.require(size.height > 0 && size.width > 0, || {
            format!("{key} is {size}; both sides must be at least 1")
        });
    }
}

impl Recipe {
    /// Checks ranges and contradictions.
    ///
    /// # Errors
    /// [`RecipeError::Invalid`] with every problem found.
    pub fn validate(&self) -> Result<(), RecipeError> {
        let mut problems = Problems::default();
        problems.require(!self.name.trim().is_empty(), || "name is empty; give the run a name".into());
        problems
            .require(!self.device.trim().is_empty(), || "device is empty; write cpu, cpu:2 or cuda".into());
        problems
            .require(!self.output.as_os_str().is_empty(), || "output is empty; name the run's folder".into());
        problems.require(self.memory_limit.is_none_or(|limit| limit.0 > 0), || {
            "memory_limit is 0; write a size such as 8GiB, or null for none".into()
        });
        match &self.model {
            Model::Dit(dit) => check_dit(dit, &mut problems),
        }
        match &self.diffusion {
            Diffusion::Gaussian(gaussian) => check_gaussian(gaussian, &mut problems),
            Diffusion::Flow(flow) => check_flow(flow, &self.model, &mut problems),
        }
        check_data(&self.data, &self.model, &mut problems);
        check_optim(&self.optim, self.train.steps, &mut problems);
        check_ema(&self.ema, &mut problems);
        check_train(&self.train, &mut problems);
        self.check_sample(&mut problems);
        if problems.0.is_empty() { Ok(()) } else { Err(RecipeError::Invalid { problems: problems.0 }) }
    }

    /// Settings without effect, a sentence each. They are no errors: recipes within checkpoints may hold them.
    pub fn without_effect(&self) -> Vec<String> {
        let Sample { sampler, eta, shift, .. } = &self.sample;
        // A resolved recipe holds the keys of all samplers: given is what is not as when left out.
        let of_one =
            [("sample.eta", *eta == 0.0, Sampler::Ddim), ("sample.shift", *shift == 1.0, Sampler::FlowEuler)];
        let given = of_one.into_iter().filter(|(_, is_default, _)| !is_default);
        given.filter_map(|(key, _, only)| sampler.check_has(key, only).err()).collect()
    }

    fn check_sample(&self, problems: &mut Problems) {
        let Sample { num, classes, sampler, steps, eta, shift, guidance, guidance_mode, ema, .. } =
            &self.sample;
        problems.at_least("sample.num", *num, 1);
        problems.at_most("sample.num", *num, MOST_SAMPLES);
        problems.at_least("sample.steps", *steps, 1);
        let named = |key: &str| format!("sample.{key}");
        problems.0.extend(sampling_problems(*eta, *shift, *guidance, *guidance_mode, named));
        let count = self.model.classes();
        for class in classes.iter().filter(|class| **class >= count) {
            problems.0.push(format!(
                "sample.classes holds {class}; model.classes is {count}, so write 0 to {}",
                count.max(1) - 1
            ));
        }
        if let Diffusion::Gaussian(Gaussian { steps: training, .. }) = &self.diffusion {
            problems.require(steps <= training, || {
                format!("sample.steps is {steps}; it must be at most diffusion.steps, which is {training}")
            });
        }
        let (kind, fits) = match self.diffusion {
            Diffusion::Gaussian(_) => ("gaussian", *sampler != Sampler::FlowEuler),
            Diffusion::Flow(_) => ("flow", *sampler == Sampler::FlowEuler),
        };
        problems.require(fits, || {
            let use_instead = if kind == "flow" { "flow_euler" } else { "ddim or another than flow_euler" };
            format!("sample.sampler does not fit diffusion.kind {kind}; use {use_instead}")
        });
        let Model::Dit(dit) = &self.model;
        problems.require(*guidance == 1.0 || dit.label_dropout > 0.0, || {
            format!("sample.guidance is {guidance}, which needs model.label_dropout above 0; use guidance 1 or dropout 0.1")
        });
        if let Some(rate) = ema {
            problems.require(self.ema.rates.contains(rate), || {
                format!("sample.ema is {rate}; it must be one of ema.rates, which are {:?}", self.ema.rates)
            });
        }
    }
}

/// What is out of range of how samples are drawn, wherever it was said: `named` makes of a key such as `guidance_mode.interval` the
/// name by which its user knows it.
pub fn sampling_problems(
    eta: f64,
    shift: f64,
    guidance: f64,
    mode: GuidanceMode,
    named: impl Fn(&str) -> String,
) -> Vec<String> {
    let mut problems = Problems::default();
    problems.number(&named("eta"), eta, (0.0..=1.0).contains(&eta), "from 0 to 1");
    problems.positive(&named("shift"), shift);
    problems.not_negative(&named("guidance"), guidance);
    match mode {
        GuidanceMode::Interval { low, high } => problems
            .require((0.0..high).contains(&low) && high <= 1.0, || {
                format!("{} is {low} to {high}; it must rise within 0 to 1", named("guidance_mode.interval"))
            }),
        GuidanceMode::PowerCosine { power } => {
            problems.positive(&named("guidance_mode.power_cosine.power"), power)
        }
        GuidanceMode::All | GuidanceMode::FirstThree => {}
    }
    problems.0
}

fn check_dit(dit: &Dit, problems: &mut Problems) {
    problems.size("model.image_size", dit.image_size);
    problems.at_least("model.channels", dit.channels, 1);
    problems.at_least("model.classes", dit.classes, 1);
    let dropout = dit.label_dropout;
    problems.number("model.label_dropout", dropout, (0.0..1.0).contains(&dropout), "from 0 to below 1");
    let sizes = [
        ("hidden_size", dit.hidden_size),
        ("depth", dit.depth),
        ("heads", dit.heads),
        ("patch_size", dit.patch_size),
    ];
    match &dit.preset {
        Some(preset) => check_preset(preset, dit, &sizes, problems),
        None => {
            let missing: Vec<_> =
                sizes.iter().filter(|(_, size)| size.is_none()).map(|(key, _)| *key).collect();
            problems.require(missing.is_empty(), || {
                format!("model lacks {}; give them, or a preset such as DiT-S/2", missing.join(", "))
            });
        }
    }
    for (key, size) in sizes {
        problems.at_least(&format!("model.{key}"), size.unwrap_or(1), 1);
    }
    if let Some(ratio) = dit.mlp_ratio {
        problems.positive("model.mlp_ratio", ratio);
    }
    if let (Some(width), Some(heads @ 1..)) = (dit.hidden_size, dit.heads) {
        problems.require(width % heads == 0, || {
            format!("model.heads is {heads}, which does not divide model.hidden_size {width}")
        });
        problems.require(width % 4 == 0, || {
            format!("model.hidden_size is {width}; it must be a multiple of 4 for the position embedding")
        });
    }
    if let Some(patch @ 1..) = dit.patch_size() {
        let ImageSize { height, width } = dit.image_size;
        problems.require(height % patch == 0 && width % patch == 0, || {
            format!("model.image_size is {}, which patches of {patch} do not divide", dit.image_size)
        });
    }
}

fn check_preset(preset: &str, dit: &Dit, sizes: &[(&str, Option<usize>)], problems: &mut Problems) {
    problems.require(DIT_PRESETS.contains(&preset), || match suggest::nearest(preset, &DIT_PRESETS) {
        Some(name) => format!("model.preset is '{preset}'; did you mean '{name}'?"),
        None => format!("model.preset is '{preset}'; known are {}", DIT_PRESETS.join(", ")),
    });
    let ratio = dit.mlp_ratio.map(|_| "mlp_ratio");
    let given = sizes.iter().filter(|(_, size)| size.is_some()).map(|(key, _)| *key).chain(ratio);
    for key in given {
        problems.0.push(format!("model.{key} contradicts model.preset, which sets it; give one of the two"));
    }
}

fn check_gaussian(gaussian: &Gaussian, problems: &mut Problems) {
    problems.at_least("diffusion.steps", gaussian.steps, 2);
    problems.at_most("diffusion.steps", gaussian.steps, MOST_DIFFUSION_STEPS);
    if let Some(gamma) = gaussian.min_snr_gamma {
        problems.positive("diffusion.min_snr_gamma", gamma);
    }
}

fn check_flow(flow: &Flow, model: &Model, problems: &mut Problems) {
    if let TimeDensity::LogitNormal { mean, std } = flow.time {
        problems.number("diffusion.time.logit_normal.mean", mean, true, "finite");
        problems.positive("diffusion.time.logit_normal.std", std);
    }
    let Model::Dit(dit) = model;
    problems.require(!dit.learn_sigma, || {
        "model.learn_sigma is true, but flow matching has no variance to learn; set it to false".into()
    });
}

fn check_data(data: &Data, model: &Model, problems: &mut Problems) {
    let kind = data.kind;
    match (&data.path, kind) {
        (Some(_), DataKind::Digits) => {
            problems
                .0
                .push("data.path does not apply to data.kind digits, which is built in; remove it".into());
        }
        (None, DataKind::Digits) | (Some(_), _) => {}
        (None, _) => problems.0.push("data.path is missing; name the file or folder of the data".into()),
    }
    problems.size("data.image_size", data.image_size);
    problems.require(data.image_size == model.image_size(), || {
        format!(
            "data.image_size is {}, but model.image_size is {}; make them equal",
            data.image_size,
            model.image_size()
        )
    });
    problems.require(data.channels == model.channels(), || {
        format!(
            "data.channels is {}, but model.channels is {}; make them equal",
            data.channels,
            model.channels()
        )
    });
    let is_picture = matches!(kind, DataKind::ImageFolder | DataKind::Webdataset | DataKind::Cifar10);
    problems.require(!is_picture || matches!(data.channels, 1 | 3), || {
        format!("data.channels is {}; pictures have 1 (grey) or 3 (colour)", data.channels)
    });
    if kind == DataKind::Digits {
        problems.require(data.image_size == ImageSize::square(8) && data.channels == 1, || {
            format!(
                "model is {} with {} channels, but the built-in digits are 8x8 with 1",
                data.image_size, data.channels
            )
        });
        problems.require(model.classes() >= 10, || {
            format!("model.classes is {}, but the built-in digits have 10", model.classes())
        });
    }
    if let Some([low, high]) = data.range {
        problems.require(low < high && low.is_finite() && high.is_finite(), || {
            format!("data.range is [{low}, {high}]; it must rise")
        });
    }
    problems.positive("data.scale", data.scale);
    problems.require(data.scale == 1.0 || kind == DataKind::Latents, || {
        format!("data.scale is {}, which applies to data.kind latents only; use data.range", data.scale)
    });
    problems.require(data.scale == 1.0 || data.range.is_none(), || {
        format!("data.scale is {} and data.range is given; give one of the two", data.scale)
    });
    for (key, name) in [("images", &data.images), ("labels", &data.labels)] {
        problems.require(name.is_none() || kind == DataKind::Npz, || {
            format!("data.{key} names an array, which applies to data.kind npz only; remove it")
        });
    }
    problems.at_least("data.prefetch", data.prefetch, 1);
    problems.at_most("data.workers", data.workers, MOST_WORKERS);
}

fn check_optim(optim: &Optim, steps: usize, problems: &mut Problems) {
    problems.positive("optim.lr", optim.lr);
    for (index, beta) in optim.betas.into_iter().enumerate() {
        problems.number(
            &format!("optim.betas[{index}]"),
            beta,
            (0.0..1.0).contains(&beta),
            "from 0 to below 1",
        );
    }
    problems.positive("optim.eps", optim.eps);
    problems.not_negative("optim.weight_decay", optim.weight_decay);
    if let Some(clip) = optim.clip {
        problems.positive("optim.clip", clip);
    }
    problems.not_negative("optim.min_lr", optim.min_lr);
    problems.require(optim.min_lr <= optim.lr || optim.lr.is_nan(), || {
        format!("optim.min_lr is {}; it must not exceed optim.lr, which is {}", optim.min_lr, optim.lr)
    });
    problems.require(optim.warmup <= steps, || {
        format!(
            "optim.warmup is {}; it must not exceed train.steps, which is {steps}: add optim.warmup={}",
            optim.warmup,
            steps / 10
        )
    });
}

fn check_ema(ema: &Ema, problems: &mut Problems) {
    for (index, &rate) in ema.rates.iter().enumerate() {
        problems.number("ema.rates", rate, 0.0 < rate && rate < 1.0, "between 0 and 1");
        problems.require(!ema.rates[..index].contains(&rate), || format!("ema.rates holds {rate} twice"));
    }
}

fn check_train(train: &Train, problems: &mut Problems) {
    problems.at_least("train.steps", train.steps, 1);
    problems.at_least("train.batch", train.batch, 1);
    problems.at_least("train.accumulate", train.accumulate, 1);
    problems.require(train.accumulate == 0 || train.batch.is_multiple_of(train.accumulate), || {
        format!("train.accumulate is {}, which does not divide train.batch {}", train.accumulate, train.batch)
    });
    problems.require(train.chunk_size.0 >= 1024, || {
        format!("train.chunk_size is {}; it must be at least 1KiB", train.chunk_size)
    });
    problems.at_least("train.log_every", train.log_every, 1);
    problems.at_least("train.checkpoint.every", train.checkpoint.every, 1);
    problems.at_least("train.checkpoint.keep_last", train.checkpoint.keep_last, 1);
    problems.at_least("train.nonfinite_limit", train.nonfinite_limit, 1);
}
