//! Batches in a fixed order, made by worker threads ahead of the step.
//!
//! Contract: the batches are a function of (data set, settings, cursor); the number of workers and
//! what is cached change only the speed. `cursor` is the state after the batch handed out last:
//! a loader made with it continues bit for bit. At most `prefetch` batches wait, and buffers go
//! round: a batch is lent until the next call and then filled again.
//! Workers share the rows of a batch, so the first batch comes as soon as all of them can make it.
//! Not done: sending batches to a device.

use crate::DataError;
use crate::dataset::{Dataset, Holds};
use crate::order::{Cursor, Draw, Order};
use crate::prepare::{Cache, Preparer};
use crate::transform::{Crop, PixelMap, Scaler};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How batches are made.
#[derive(Clone, Debug)]
pub struct LoaderConfig {
    /// Samples in a batch over all ranks.
    pub batch: usize,
    /// This loader's share: rows `rank * batch / world` up to the next rank's.
    pub rank: usize,
    pub world: usize,
    /// Threads that prepare batches; 0 prepares them within `next_batch`.
    pub workers: usize,
    /// Batches that may wait.
    pub prefetch: usize,
    pub shuffle: bool,
    /// Mirrors each sample of each epoch with probability 1/2.
    pub flip: bool,
    pub crop: Crop,
    /// [height, width]; `None` takes the data set's own size.
    pub size: Option<[usize; 2]>,
    /// 1 (grey) or 3 (RGB) for images; `None` takes the data set's own, or 3.
    pub channels: Option<usize>,
    /// The values that become -1 and 1; `None` is [0, 255] for 8-bit images and no change for floating-point data.
    pub range: Option<[f32; 2]>,
    /// How many different samples may be unusable before that is an error.
    pub max_bad: usize,
    /// Memory for decoded and resized images, so that later epochs need not decode; 0 for none.
    pub cache_bytes: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self {
            batch: 32,
            rank: 0,
            world: 1,
            workers: 2,
            prefetch: 2,
            shuffle: true,
            flip: false,
            crop: Crop::Center,
            size: None,
            channels: None,
            range: None,
            max_bad: 100,
            cache_bytes: 1 << 30,
        }
    }
}

/// This rank's rows of one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// [rows, channels, height, width].
    pub images: Vec<f32>,
    /// [rows]; 0 where the data set has no labels.
    pub labels: Vec<i64>,
    /// [rows]: the samples' indices in the data set (of the replacement, for an unusable one).
    pub indices: Vec<u64>,
    /// [rows]; empty where there is none.
    pub captions: Vec<String>,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

/// Hands out batches; see the module's head.
pub struct Loader {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// For `workers: 0`.
    scaler: Scaler,
    current: Batch,
    cursor: Cursor,
    bad: HashSet<usize>,
    last_bad: Option<Arc<str>>,
    warnings: Vec<String>,
}

struct Shared {
    preparer: Preparer,
    /// The whole batch and this rank's rows of it.
    batch: usize,
    rows: Range<usize>,
    /// Rows that a worker takes at a time.
    stride: usize,
    depth: usize,
    state: Mutex<State>,
    /// Told when there may be rows to take.
    work: Condvar,
    /// Told when a batch is complete.
    ready: Condvar,
}

struct State {
    order: Order,
    /// Batches in order, the oldest first.
    pending: VecDeque<Pending>,
    /// The number of the oldest pending batch.
    first: u64,
    /// Buffers to use again.
    spare: Vec<Batch>,
    stopping: bool,
    worker_died: bool,
}

/// A batch that is being made.
struct Pending {
    work: Arc<Work>,
    taken: usize,
    done: usize,
}

struct Work {
    draws: Vec<Draw>,
    /// The state after this batch.
    end: Cursor,
    output: Mutex<Output>,
}

struct Output {
    batch: Batch,
    /// For each row, the samples passed over.
    bad: Vec<Vec<(usize, Arc<str>)>>,
    /// Rows for which nothing was found.
    missing: bool,
}

/// Rows of a pending batch for one worker.
struct Task {
    number: u64,
    work: Arc<Work>,
    rows: Range<usize>,
}

impl Loader {
    /// Starts the workers.
    ///
    /// # Errors
    /// Settings that contradict each other or the data set, and a cursor of other data.
    pub fn new(dataset: Arc<dyn Dataset>, config: &LoaderConfig, cursor: Cursor) -> Result<Self, DataError> {
        let shape_chw = check_settings(&*dataset, config)?;
        let samples = dataset.len();
        let order = Order::new(cursor, samples, config.shuffle)?;
        let warnings = dataset.warnings().to_vec();
        let preparer = Preparer {
            dataset,
            seed: cursor.seed,
            shape_chw,
            crop: config.crop,
            flip: config.flip,
            value_range: config.range,
            pixel_map: PixelMap::new(config.range.unwrap_or([0.0, 255.0])),
            max_bad: config.max_bad,
            cache: Cache::new(samples, config.cache_bytes),
            known_bad: Mutex::new(HashMap::new()),
        };
        let share = config.batch / config.world;
        let shared = Arc::new(Shared {
            preparer,
            batch: config.batch,
            rows: config.rank * share..(config.rank + 1) * share,
            stride: share.div_ceil(4 * config.workers.max(1)).max(1),
            depth: if config.workers == 0 { 1 } else { config.prefetch.max(1) },
            state: Mutex::new(State {
                order,
                pending: VecDeque::new(),
                first: 0,
                spare: Vec::new(),
                stopping: false,
                worker_died: false,
            }),
            work: Condvar::new(),
            ready: Condvar::new(),
        });
        let mut loader = Self {
            shared,
            workers: Vec::new(),
            scaler: Scaler::new(),
            current: Batch::default(),
            cursor,
            bad: HashSet::new(),
            last_bad: None,
            warnings,
        };
        for worker in 0..config.workers {
            let shared = loader.shared.clone();
            let thread = std::thread::Builder::new().name(format!("anneal-data-{worker}"));
            let handle = thread.spawn(move || shared.serve()).map_err(|error| {
                DataError::settings(format!("worker {worker} cannot start ({error}); ask for fewer"))
            })?;
            loader.workers.push(handle);
        }
        Ok(loader)
    }

    pub fn dataset(&self) -> &dyn Dataset {
        &*self.shared.preparer.dataset
    }

    /// [channels, height, width] of every row.
    pub fn shape(&self) -> [usize; 3] {
        self.shared.preparer.shape_chw
    }

    /// The next batch, lent until the next call. There is always one: epochs follow each other.
    ///
    /// # Errors
    /// When more samples are unusable than `max_bad`, or none at all is usable.
    pub fn next_batch(&mut self) -> Result<&Batch, DataError> {
        // A call after the one that failed fails again.
        self.check_bad()?;
        let work = self.next_complete()?;
        let mut output = lock(&work.output);
        let bad = std::mem::take(&mut output.bad);
        for (index, reason) in bad.into_iter().flatten() {
            self.note_bad(index, reason);
            self.check_bad()?;
        }
        assert!(!output.missing, "a row without a sample passed the limit on bad samples");
        std::mem::swap(&mut self.current, &mut output.batch);
        let used = std::mem::take(&mut output.batch);
        drop(output);
        lock(&self.shared.state).spare.push(used);
        self.cursor = work.end;
        Ok(&self.current)
    }

    /// The state after the batch handed out last.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// What has been noticed since the last call, one line each: oddities of the source, samples
    /// that were skipped. A sample is reported once.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// How many different samples were unusable so far, in this process and on this rank.
    pub fn bad_samples(&self) -> usize {
        self.bad.len()
    }

    /// The bytes of decoded images that are kept for later epochs.
    pub fn cached_bytes(&self) -> usize {
        self.shared.preparer.cache.used()
    }

    fn next_complete(&mut self) -> Result<Arc<Work>, DataError> {
        if self.workers.is_empty() {
            loop {
                // A statement of its own, so that the lock ends before the rows are made.
                let task = self.shared.take_task(&mut lock(&self.shared.state));
                let Some(task) = task else { break };
                self.shared.perform(task, &mut self.scaler);
            }
        }
        let mut state = lock(&self.shared.state);
        loop {
            if state.worker_died {
                return Err(DataError::WorkerDied);
            }
            if state.pending.front().is_some_and(|front| front.done == front.work.draws.len()) {
                let front = state.pending.pop_front().expect("there is a front");
                state.first += 1;
                self.shared.work.notify_all();
                return Ok(front.work);
            }
            state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn note_bad(&mut self, index: usize, reason: Arc<str>) {
        if self.bad.insert(index) {
            let (count, limit) = (self.bad.len(), self.shared.preparer.max_bad);
            self.warnings.push(format!("skipped {reason} ({count} skipped; the limit is {limit})"));
            self.last_bad = Some(reason);
        }
    }

    fn check_bad(&self) -> Result<(), DataError> {
        let Some(last) = &self.last_bad else { return Ok(()) };
        let (count, limit) = (self.bad.len(), self.shared.preparer.max_bad);
        if count > limit {
            return Err(DataError::TooManyBad { count, limit, last: last.to_string() });
        }
        if count == self.shared.preparer.dataset.len() {
            return Err(DataError::AllBad { count, last: last.to_string() });
        }
        Ok(())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        lock(&self.shared.state).stopping = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
    }
}

/// Checks the settings against the data set and gives the rows' [channels, height, width].
fn check_settings(dataset: &dyn Dataset, config: &LoaderConfig) -> Result<[usize; 3], DataError> {
    let LoaderConfig { batch, rank, world, .. } = *config;
    if batch == 0 || world == 0 || batch % world != 0 || rank >= world {
        return Err(DataError::settings(format!(
            "batch {batch} for rank {rank} of {world}: the batch must be a multiple of the number of ranks, and at \
             least 1"
        )));
    }
    if let Some([low, high]) = config.range
        && !(low < high && low.is_finite() && high.is_finite())
    {
        return Err(DataError::settings(format!(
            "range [{low}, {high}]: the first must be below the second"
        )));
    }
    if config.flip && !Preparer::can_flip(dataset.holds()) {
        return Err(DataError::settings(
            "flip: a mirrored latent is not the latent of the mirrored image; turn flip off, or encode both",
        ));
    }
    let own = dataset.shape();
    let Some([height, width]) = config.size.or(own.map(|[_, height, width]| [height, width])) else {
        return Err(DataError::settings(
            "the images have no common size of their own; give the size to train at",
        ));
    };
    if height == 0 || width == 0 {
        return Err(DataError::settings(format!("size {height} x {width}: both must be at least 1")));
    }
    let shape_chw = [config.channels.or(own.map(|[channels, ..]| channels)).unwrap_or(3), height, width];
    if dataset.holds() == Holds::Images {
        if ![1, 3].contains(&shape_chw[0]) {
            return Err(DataError::settings(format!(
                "{} channels: images have 1 (grey) or 3 (RGB)",
                shape_chw[0]
            )));
        }
    } else if own != Some(shape_chw) {
        return Err(DataError::settings(format!(
            "the samples are {:?} (channels, height, width) and {shape_chw:?} is asked; floating-point data are not \
             resized, so set size and channels to the data's",
            own.unwrap_or_default()
        )));
    }
    Ok(shape_chw)
}

impl Shared {
    /// A worker's life.
    fn serve(&self) {
        let mut notice = DeathNotice { shared: self, armed: true };
        let mut scaler = Scaler::new();
        let mut state = lock(&self.state);
        while !state.stopping {
            match self.take_task(&mut state) {
                Some(task) => {
                    drop(state);
                    self.perform(task, &mut scaler);
                    state = lock(&self.state);
                }
                None => state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
        notice.armed = false;
    }

    /// The next rows to make, beginning a batch if there is room for one more.
    fn take_task(&self, state: &mut State) -> Option<Task> {
        let waiting = state.pending.iter().position(|pending| pending.taken < pending.work.draws.len());
        let position = match waiting {
            Some(position) => position,
            None if state.pending.len() < self.depth => {
                let work = Arc::new(self.begin(state));
                state.pending.push_back(Pending { work, taken: 0, done: 0 });
                state.pending.len() - 1
            }
            None => return None,
        };
        let number = state.first + position as u64;
        let pending = &mut state.pending[position];
        let start = pending.taken;
        pending.taken = (start + self.stride).min(pending.work.draws.len());
        Some(Task { number, work: pending.work.clone(), rows: start..pending.taken })
    }

    fn begin(&self, state: &mut State) -> Work {
        let draws: Vec<Draw> = (0..self.batch).map(|_| state.order.next()).collect();
        let draws = draws[self.rows.clone()].to_vec();
        let rows = draws.len();
        let [channels, height, width] = self.preparer.shape_chw;
        let mut batch = state.spare.pop().unwrap_or_default();
        batch.images.resize(rows * channels * height * width, 0.0);
        batch.labels.resize(rows, 0);
        batch.indices.resize(rows, 0);
        batch.captions.resize(rows, String::new());
        (batch.channels, batch.height, batch.width) = (channels, height, width);
        let output = Output { batch, bad: vec![Vec::new(); rows], missing: false };
        Work { draws, end: state.order.cursor(), output: Mutex::new(output) }
    }

    fn perform(&self, task: Task, scaler: &mut Scaler) {
        let size = self.preparer.shape_chw.iter().product::<usize>();
        for row in task.rows.clone() {
            let draw = task.work.draws[row];
            let found = self.preparer.find(draw.index, scaler);
            let mut output = lock(&task.work.output);
            output.bad[row] = found.bad;
            let Some((index, prepared)) = found.sample else {
                output.missing = true;
                continue;
            };
            let batch = &mut output.batch;
            batch.labels[row] = self.preparer.label(index);
            batch.indices[row] = index as u64;
            let image = &mut batch.images[row * size..(row + 1) * size];
            self.preparer.write(draw, &prepared, image, &mut batch.captions[row]);
        }
        let mut state = lock(&self.state);
        let position = (task.number - state.first) as usize;
        let pending = &mut state.pending[position];
        pending.done += task.rows.len();
        if pending.done == pending.work.draws.len() {
            self.ready.notify_one();
        }
    }
}

/// Wakes the caller when a worker unwinds, which it only does by a defect of ours.
struct DeathNotice<'a> {
    shared: &'a Shared,
    armed: bool,
}

impl Drop for DeathNotice<'_> {
    fn drop(&mut self) {
        if self.armed {
            lock(&self.shared.state).worker_died = true;
            self.shared.ready.notify_all();
        }
    }
}

/// A lock poisoned by a panicking worker still guards whole values; the panic itself is reported.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
