//! A run: the folder, the loop around the step, and what a person sees of it.
//!
//! A run folder holds `recipe.yaml` (resolved), `plan.txt`, `checkpoints/`, `metrics.jsonl`, TensorBoard
//! events, `loss.png` and `samples/`. It has one writer. Running the same recipe again continues it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anneal_nn::ParamStore;
use anneal_recipe::Recipe;
use anneal_weights::{FileError, MadeFolder};

use crate::checkpoint::RunLock;
use crate::error::{Result, TrainError};
use crate::former_files::FormerFiles;
use crate::plan::Plan;
use crate::report::grid::{self, GridOptions};
use crate::report::metrics::{MetricsLog, StepMetrics, curves};
use crate::report::picture::Picture;
use crate::report::plot::TrainingCurves;
use crate::report::progress::{Show, TrainProgress, TrainStatus};
use crate::report::tensorboard::{self, EventWriter, verbatim};
use crate::report::unix_seconds;
use crate::state;
use crate::trainer::{StepOutcome, Trainer};

/// Files of a run folder.
const RECIPE: &str = "recipe.yaml";
const PLAN: &str = "plan.txt";
const METRICS: &str = "metrics.jsonl";

/// Steps skipped in a row that are a divergence where the last one's loss is not finite either, and no step comes after;
/// fewer if they are all but the first.
const DIVERGED_AT_END: u64 = 3;

/// Samples to show: f32 in [-1, 1], `[N, C, H, W]`.
pub struct PreviewImages {
    pub values: Vec<f32>,
    pub count: usize,
    /// Channels, height, width.
    pub shape: [usize; 3],
    /// How they were made, for the picture's own record.
    pub caption: String,
    /// What went otherwise than it should on the way.
    pub warnings: Vec<String>,
}

/// Told how many of all parts of the samples' work are done; may stop it.
pub type DrawingProgress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

/// Draws samples from weights; given by the caller, since this crate does not sample. None if the progress stopped it.
pub type Preview<'a> =
    dyn Fn(Arc<dyn ParamStore>, &mut DrawingProgress<'_>) -> Result<Option<PreviewImages>, String> + 'a;

/// How a run is started.
pub struct RunOptions<'a> {
    pub show: Show,
    /// Set by a signal: the run stops drawing samples, saves a checkpoint and returns.
    pub stop: Arc<AtomicBool>,
    pub preview: &'a Preview<'a>,
    /// Whether the recipe is the run's own, with changes that are meant: it may then differ from the recipe in the run's
    /// folder, and from the checkpoint's, in what it trains.
    pub own_recipe: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RunReport {
    pub folder: PathBuf,
    pub steps: u64,
    /// Those of `steps` that earlier starts had done.
    pub steps_before: u64,
    /// Stopped before the recipe's last step, or before the samples due were drawn.
    pub stopped: bool,
    pub samples: SamplesReport,
    pub last_loss: Option<f64>,
    /// Time in steps since this start, without saving and drawing.
    pub training: Duration,
    pub images_per_second: f64,
    pub peak_memory: usize,
}

/// What became of samples that a stop had come before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplesReport {
    /// There were none.
    Drawn,
    /// Those of the last step are left to the next start.
    Left,
    /// This start has drawn those that an earlier one had left.
    MadeUp,
}

/// Trains a recipe to its end, from the run folder's newest whole checkpoint if there is one.
///
/// # Errors
/// Anything that stops training; the newest checkpoint stays whole. After an error or a stop without any work done, the
/// folder is as it was before: without it, where it was made for the run.
pub fn run(recipe: &Recipe, options: &RunOptions) -> Result<RunReport> {
    let made = MadeFolder::make(&recipe.output)
        .map_err(|error| FileError { action: "make the run folder", ..error })?;
    run_in(&made, recipe, options)
}

fn run_in(made: &MadeFolder, recipe: &Recipe, options: &RunOptions) -> Result<RunReport> {
    let folder = &recipe.output;
    // If another start has the folder by now, what is in it is that start's.
    let lock = RunLock::acquire(folder).inspect_err(|_| made.remove())?;
    let (mut former, mut worked) = (None, false);
    let result = Run::start(recipe, lock.clone(), options, &mut former).and_then(|mut run| {
        let result = run.train();
        worked = run.has_worked();
        result.map(|()| run.finish())
    });
    let in_vain = !worked && result.as_ref().map_or(true, |report| report.stopped);
    // If a newer start has taken over, the files are that one's.
    if in_vain && lock.check().is_ok() {
        if let Some(former) = former {
            former.put_back(is_written_before_steps);
        }
        lock.remove_made_files();
        made.remove();
    }
    result
}

/// Whether a run writes a file of this name before its first step is done.
fn is_written_before_steps(name: &str) -> bool {
    [RECIPE, PLAN, METRICS].contains(&name) || name.starts_with(tensorboard::FILE_PREFIX)
}

struct Run<'a> {
    trainer: Trainer,
    lock: RunLock,
    folder: PathBuf,
    options: &'a RunOptions<'a>,
    metrics: MetricsLog,
    /// None if no step is left.
    events: Option<EventWriter>,
    progress: TrainProgress,
    first_step: u64,
    saved_step: Option<u64>,
    samples: SamplesReport,
    /// Seconds of steps since this start, and in the present logging interval with its images.
    training_seconds: f64,
    interval: (f64, usize),
    last: Option<StepOutcome>,
}

impl<'a> Run<'a> {
    /// `former` takes the folder's files as they are before the first is written.
    fn start(
        recipe: &Recipe,
        lock: RunLock,
        options: &'a RunOptions<'a>,
        former: &mut Option<FormerFiles>,
    ) -> Result<Self> {
        let folder = recipe.output.clone();
        let mut trainer = Trainer::new(recipe)?;
        let mut warnings: Vec<String> = lock.warning().map(str::to_owned).into_iter().collect();
        let resumed = state::resume(&mut trainer, &folder, options.own_recipe)?;
        warnings.extend(resumed.warnings);
        warnings.extend(trainer.data().warning());
        let goes_on = trainer.steps_done() < recipe.train.steps as u64;
        *former = Some(FormerFiles::of(&folder, &[RECIPE, PLAN])?);
        let run = Self::open(trainer, lock, folder, options)?;
        if let Some(changes) = resumed.changes.filter(|_| goes_on) {
            run.progress.screen().tell(&format!("continues with {changes}"));
        }
        for warning in warnings {
            run.progress.screen().tell(&format!("warning: {warning}"));
        }
        Ok(run)
    }

    fn open(trainer: Trainer, lock: RunLock, folder: PathBuf, options: &'a RunOptions<'a>) -> Result<Self> {
        let step = trainer.steps_done();
        let recipe = trainer.recipe().clone();
        let yaml = recipe.to_yaml();
        let plan = Plan::new(&recipe)?.with_data(trainer.data()).to_string();
        let (steps, draw_every) = (recipe.train.steps as u64, recipe.sample.every as u64);
        // Where nothing is left to do, other settings would tell of work that was not done with them.
        if step < steps || lacks_samples(&folder, &recipe, step) || !recipe_path(&folder).exists() {
            anneal_weights::write_atomic(&recipe_path(&folder), yaml.as_bytes())?;
            anneal_weights::write_atomic(&folder.join(PLAN), plan.as_bytes())?;
        }
        let metrics = MetricsLog::open(&folder.join(METRICS), step)?;
        let mut events = (step < steps).then(|| EventWriter::create(&folder, step)).transpose()?;
        if let Some(events) = &mut events {
            events.text(step, "recipe", &verbatim(&yaml))?;
        }
        let progress = TrainProgress::new(options.show, steps, step, draw_every);
        if step == 0 {
            progress.screen().println(&plan);
        } else if step < steps {
            let line = format!("continuing {} after step {step} of {steps}", folder.display());
            progress.screen().println(&line);
        }
        let saved_step = (step > 0).then_some(step);
        Ok(Self {
            trainer,
            lock,
            folder,
            options,
            metrics,
            events,
            progress,
            first_step: step,
            saved_step,
            samples: SamplesReport::Drawn,
            training_seconds: 0.0,
            interval: (0.0, 0),
            last: None,
        })
    }

    fn train(&mut self) -> Result<()> {
        let recipe = self.trainer.recipe().clone();
        let total = recipe.train.steps as u64;
        if lacks_samples(&self.folder, &recipe, self.first_step) {
            self.draw()?;
            if self.samples != SamplesReport::Left {
                self.samples = SamplesReport::MadeUp;
            }
        }
        while self.trainer.steps_done() < total && !self.stopping() {
            self.take_from(Trainer::step)?;
            let step = self.trainer.steps_done();
            if is_due(step, recipe.train.checkpoint.every) {
                self.finish_steps()?;
                self.save()?;
            }
            if is_due(step, recipe.sample.every) && step != total {
                self.finish_steps()?;
                self.draw()?;
            }
        }
        self.finish_steps()?;
        if self.saved_step != Some(self.trainer.steps_done()) && self.trainer.steps_done() > 0 {
            self.save()?;
        }
        self.plot()?;
        if self.trainer.steps_done() == total && self.last.is_some() && recipe.sample.every > 0 {
            self.draw()?;
        }
        Ok(())
    }

    /// Whether a step was done or a picture drawn.
    fn has_worked(&self) -> bool {
        self.last.is_some() || self.samples == SamplesReport::MadeUp
    }

    /// Waits for the steps that are under way.
    fn finish_steps(&mut self) -> Result<()> {
        self.take_from(Trainer::finish_steps)
    }

    /// Reports the outcomes that `advance` has, also when it then fails.
    fn take_from(&mut self, advance: fn(&mut Trainer, &mut Vec<StepOutcome>) -> Result<()>) -> Result<()> {
        let mut outcomes = Vec::new();
        let result = advance(&mut self.trainer, &mut outcomes);
        self.take(&outcomes)?;
        result
    }

    fn take(&mut self, outcomes: &[StepOutcome]) -> Result<()> {
        let (every, total) = (self.trainer.recipe().train.log_every, self.trainer.recipe().train.steps);
        for outcome in outcomes {
            self.note(outcome);
            if is_due(outcome.step, every) || outcome.step == total as u64 {
                self.log(outcome)?;
            }
        }
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.options.stop.load(Ordering::Relaxed)
    }

    fn note(&mut self, outcome: &StepOutcome) {
        for warning in self.trainer.take_warnings() {
            self.progress.screen().tell(&format!("warning: {warning}"));
        }
        if outcome.skipped {
            let step = outcome.step;
            let line = format!(
                "warning: step {step} skipped: its gradient is not finite ({} so far)",
                outcome.skipped_so_far
            );
            self.progress.screen().tell(&line);
        }
        let batch = self.trainer.recipe().train.batch;
        self.training_seconds += outcome.seconds;
        self.interval = (self.interval.0 + outcome.seconds, self.interval.1 + batch);
        self.last = Some(*outcome);
        let (seconds, images) = self.interval;
        self.progress.update(&TrainStatus {
            step: outcome.step,
            loss: outcome.loss as f32,
            grad_norm: outcome.gradient_norm as f32,
            images_per_second: images as f64 / seconds.max(1e-9),
            memory_bytes: self.trainer.device().memory().peak_total as u64,
            nonfinite_skipped: outcome.skipped_so_far,
        });
    }

    /// Before lines may be dropped, which can be long after the start: on a disk without locks a newer start may have
    /// written them.
    fn check_metrics_are_ours(&self) -> Result<()> {
        if self.metrics.is_untouched() {
            self.lock.check()?;
        }
        Ok(())
    }

    fn log(&mut self, outcome: &StepOutcome) -> Result<()> {
        let (seconds, images) = std::mem::take(&mut self.interval);
        let images_per_second = images as f64 / seconds.max(1e-9);
        let memory_bytes = self.trainer.device().memory().peak_total as u64;
        let scales_loss = self.trainer.optimizer().options().scale_loss;
        let extra = scales_loss.then(|| ("loss_scale".to_owned(), outcome.loss_scale)).into_iter().collect();
        self.check_metrics_are_ours()?;
        self.metrics.write(&StepMetrics {
            step: outcome.step,
            time: unix_seconds(),
            loss: outcome.loss as f32,
            grad_norm: outcome.gradient_norm as f32,
            lr: outcome.learning_rate,
            images_per_second,
            memory_bytes,
            nonfinite_skipped: outcome.skipped_so_far,
            extra,
        })?;
        let scalars = [
            ("train/loss", outcome.loss as f32),
            ("train/gradient_norm", outcome.gradient_norm as f32),
            ("train/learning_rate", outcome.learning_rate as f32),
            ("speed/images_per_second", images_per_second as f32),
            ("memory/peak_bytes", memory_bytes as f32),
        ];
        if let Some(events) = &mut self.events {
            events.scalars(outcome.step, &scalars)?;
        }
        Ok(())
    }

    /// Whether training ended in weights worth keeping: a short run can diverge and still stay below the limit of skipped
    /// steps in a row. Warns of what is no error and yet no success.
    fn check_end(&self) -> Result<()> {
        let Some(last) = &self.last else { return Ok(()) };
        let (step, skipped) = (last.step, self.trainer.outcomes.skipped);
        if !last.loss.is_finite() && skipped.in_a_row >= DIVERGED_AT_END.min(step - 1).max(1) {
            return Err(TrainError::Diverged { in_a_row: skipped.in_a_row, step });
        }
        let finite = if last.loss.is_finite() { "" } else { "the last loss is not finite; " };
        if !finite.is_empty() || skipped.in_all * 4 >= step * 3 {
            let skipped = skipped.in_all;
            let line = format!(
                "{finite}{skipped} of {step} steps were skipped, since their gradient was not finite: lower optim.lr, set optim.clip, or look for bad values in the data"
            );
            self.progress.screen().tell(&format!("warning: {line}"));
        }
        Ok(())
    }

    /// A checkpoint. One that fails is reported and tried again at the next; the last must succeed.
    fn save(&mut self) -> Result<()> {
        let step = self.trainer.steps_done();
        if step == self.trainer.recipe().train.steps as u64 {
            self.check_end()?;
        }
        self.check_metrics_are_ours()?;
        self.metrics.sync()?;
        let result = state::save(&self.trainer, &self.lock);
        match result {
            Ok(()) => {
                self.saved_step = Some(step);
                self.plot()
            }
            Err(error) if error.is_stale_writer() => Err(error),
            Err(error) if step < self.trainer.recipe().train.steps as u64 && !self.stopping() => {
                let line = format!(
                    "warning: no checkpoint at step {step}: {error}; training goes on and tries again"
                );
                self.progress.screen().tell(&line);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn plot(&self) -> Result<()> {
        let mut columns = curves(&self.folder.join(METRICS), &["loss", "grad_norm"])?.into_iter();
        let (loss, norm) = (columns.next().unwrap_or_default(), columns.next().unwrap_or_default());
        if loss.len() < 2 {
            return Ok(());
        }
        let title = self.trainer.recipe().name.clone();
        let curves = TrainingCurves { title: &title, loss: &loss, validation: &[], gradient_norm: &norm };
        curves.draw().write_png(&self.folder.join("loss.png"))?;
        Ok(())
    }

    /// Draws samples, or leaves them to the next start if the run is to stop. They have seeds of their own and change
    /// nothing that is trained, so that steps have the same bits whenever samples are drawn.
    fn draw(&mut self) -> Result<()> {
        if self.stopping() {
            self.samples = SamplesReport::Left;
            return Ok(());
        }
        let step = self.trainer.steps_done();
        self.progress.begin_drawing();
        let rate = sampling_rate(self.trainer.recipe());
        self.trainer.release_captured_step();
        let store = self.trainer.sampling_store(rate)?;
        let progress = &self.progress;
        let mut report = |done, all| {
            progress.drawing(done, all);
            if self.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let images = (self.options.preview)(store, &mut report).map_err(TrainError::Preview)?;
        let Some(images) = images else {
            self.samples = SamplesReport::Left;
            return Ok(());
        };
        for warning in &images.warnings {
            progress.screen().tell(&format!("warning: {warning}"));
        }
        let picture = picture(&images)?;
        let file = samples_file(&self.folder, step);
        let samples = file.parent().expect("it lies in a folder");
        std::fs::create_dir_all(samples).map_err(FileError::on("make the folder", samples))?;
        picture.write_png(&file)?;
        if let Some(events) = &mut self.events {
            events.image(step, "samples", &picture)?;
        }
        self.progress.drawn(&file);
        Ok(())
    }

    fn finish(self) -> RunReport {
        self.progress.finish();
        let steps = self.trainer.steps_done();
        let steps_before = self.first_step;
        let images = (steps - steps_before) as f64 * self.trainer.recipe().train.batch as f64;
        RunReport {
            folder: self.folder,
            steps,
            steps_before,
            stopped: steps < self.trainer.recipe().train.steps as u64 || self.samples == SamplesReport::Left,
            samples: self.samples,
            last_loss: self.last.map(|outcome| outcome.loss),
            training: Duration::from_secs_f64(self.training_seconds),
            images_per_second: images / self.training_seconds.max(1e-9),
            peak_memory: self.trainer.device().memory().peak_total,
        }
    }
}

fn is_due(step: u64, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every as u64)
}

/// Whether an earlier start ended before it had drawn the samples of the step that this one goes on from.
fn lacks_samples(folder: &Path, recipe: &Recipe, step: u64) -> bool {
    let every = recipe.sample.every;
    let due = is_due(step, every) || every > 0 && step == recipe.train.steps as u64;
    step > 0 && due && !samples_file(folder, step).exists()
}

fn samples_file(folder: &Path, step: u64) -> PathBuf {
    folder.join("samples").join(format!("step-{step:08}.png"))
}

/// The average that samples are drawn from: the recipe's choice, else the first, else none.
pub fn sampling_rate(recipe: &Recipe) -> Option<f64> {
    recipe.sample.ema.or_else(|| recipe.ema.rates.first().copied())
}

/// A grid of samples, nearly square.
pub fn picture(images: &PreviewImages) -> Result<Picture> {
    let [channels, height, width] = images.shape;
    let pixels = grid::Pixels::Floats(&images.values);
    let batch = grid::Batch { pixels, count: images.count, height, width, channels };
    Ok(grid::grid(&batch, &GridOptions::default())?.with_text("parameters", images.caption.clone()))
}

/// Where a run keeps its resolved recipe.
pub fn recipe_path(run: &Path) -> PathBuf {
    run.join(RECIPE)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checkpoint;

    const TINY: &str = "
model: {hidden_size: 16, depth: 1, heads: 2, patch_size: 2, image_size: 8, channels: 1, classes: 10}
data: {kind: digits, workers: 1}
train: {steps: 2, batch: 8}
sample: {every: 0}
";

    /// A run that is to stop, or not, before its first step.
    fn start(made: &MadeFolder, output: &Path, stop: bool, change: &str) -> Result<RunReport> {
        let overrides = [format!("output={}", output.display()), change.to_owned()];
        let recipe = Recipe::from_yaml(TINY, "tiny.yaml", &overrides).unwrap();
        let preview = |_: Arc<dyn ParamStore>, _: &mut DrawingProgress<'_>| Ok(None);
        let stop = Arc::new(AtomicBool::new(stop));
        let own_recipe = change.starts_with("train.steps");
        let options = RunOptions { show: Show::Nothing, stop, preview: &preview, own_recipe };
        run_in(made, &recipe, &options)
    }

    /// None if there is no such folder.
    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_stop_before_the_first_step_leaves_only_what_others_wrote() {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("run");
        for others in [&[][..], &["note"]] {
            let made = MadeFolder::make(&output).unwrap();
            others.iter().for_each(|name| fs::write(output.join(name), "mine").unwrap());
            let report = start(&made, &output, true, "seed=0").unwrap();
            assert!(report.stopped && report.steps == 0, "{report:?}");
            assert_eq!(names(&output), others);
            assert_eq!(output.exists(), !others.is_empty());
        }
    }

    /// Another start may use a folder between the moment it is made and that when its lock is asked for.
    #[test]
    fn what_another_start_did_in_a_made_folder_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("run");
        let late = MadeFolder::make(&output).unwrap();
        let lock = RunLock::acquire(&output).unwrap();
        start(&late, &output, false, "seed=0").unwrap_err();
        lock.check().unwrap();
        drop(lock);
        fs::remove_dir_all(&output).unwrap();
        let late = MadeFolder::make(&output).unwrap();
        let other = MadeFolder::make(&output).unwrap();
        start(&other, &output, false, "seed=0").unwrap();
        start(&late, &output, false, "model.hidden_size=32").unwrap_err();
        assert_eq!(checkpoint::list(&output).unwrap().len(), 1);
        assert!(recipe_path(&output).exists());
    }

    /// In a folder of a user's own, and in one where an earlier start has trained.
    #[test]
    fn a_start_in_vain_leaves_a_folder_as_it_was() {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("run");
        fs::create_dir(&output).unwrap();
        fs::write(output.join(RECIPE), "mine").unwrap();
        let try_in_vain = |change: &str| {
            let before = (names(&output), fs::read(recipe_path(&output)).unwrap());
            let made = MadeFolder::make(&output).unwrap();
            start(&made, &output, false, change).unwrap_err();
            assert!(start(&made, &output, true, "train.steps=4").unwrap().stopped);
            assert_eq!((names(&output), fs::read(recipe_path(&output)).unwrap()), before);
        };
        try_in_vain("memory_limit=200KiB");
        fs::remove_file(output.join(RECIPE)).unwrap();
        start(&MadeFolder::make(&output).unwrap(), &output, false, "seed=0").unwrap();
        try_in_vain("model.hidden_size=32");
    }
}
