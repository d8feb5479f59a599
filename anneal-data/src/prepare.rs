//! One sample, from the data set to its row of a batch.
//!
//! Contract: a row depends on (seed, epoch, index) and the data alone, never on the worker that
//! makes it nor on what the cache holds. A sample that cannot be used is replaced by the next one
//! in the data set's own order that can be (after the last comes the first): in class folders
//! that is nearly always one of the same class. The row reports every sample that it passed over.

use crate::DataError;
use crate::dataset::{Content, Dataset, Holds};
use crate::decode::{Pixels, decode};
use crate::order::Draw;
use crate::transform::{Crop, PixelMap, Placement, Scaler, mirrored, normalised};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Beyond this ratio of the enlarged sides an image would take vast memory for a sliver of it.
const MAX_RATIO: f64 = 64.0;

/// What a row needs before flips and random crops, which differ from epoch to epoch.
pub(crate) struct Prepared {
    body: Body,
    caption: String,
}

enum Body {
    /// At the target size, or larger where the crop is random.
    Pixels(Pixels),
    /// [channels, height, width].
    Values(Vec<f32>),
}

/// The sample found for a row, and those that were passed over for it, each with the reason.
pub(crate) struct Found {
    pub sample: Option<(usize, Arc<Prepared>)>,
    pub bad: Vec<(usize, Arc<str>)>,
}

/// How samples become rows; shared by the workers.
pub(crate) struct Preparer {
    pub dataset: Arc<dyn Dataset>,
    pub seed: u64,
    /// [channels, height, width] of a row.
    pub shape_chw: [usize; 3],
    pub crop: Crop,
    pub flip: bool,
    /// For floating-point values; `None` leaves them as they are.
    pub value_range: Option<[f32; 2]>,
    pub pixel_map: PixelMap,
    pub max_bad: usize,
    pub cache: Cache,
    pub known_bad: Mutex<HashMap<usize, Arc<str>>>,
}

impl Preparer {
    /// The sample for a place in the order, or its replacement.
    pub(crate) fn find(&self, index: usize, scaler: &mut Scaler) -> Found {
        let mut found = Found { sample: None, bad: Vec::new() };
        // One more than the limit is certain to end the run, so there is no need to look further.
        let tries = self.dataset.len().min(self.max_bad.saturating_add(1));
        for offset in 0..tries {
            let candidate = (index + offset) % self.dataset.len();
            match self.usable(candidate, scaler) {
                Ok(sample) => {
                    found.sample = Some((candidate, sample));
                    break;
                }
                Err(reason) => found.bad.push((candidate, reason)),
            }
        }
        found
    }

    fn usable(&self, index: usize, scaler: &mut Scaler) -> Result<Arc<Prepared>, Arc<str>> {
        if let Some(prepared) = self.cache.get(index) {
            return Ok(prepared);
        }
        let known_bad = || self.known_bad.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = known_bad().get(&index) {
            return Err(reason.clone());
        }
        // Decoders are other people's code over untrusted bytes: their panics are bad samples too.
        let prepared = catch_unwind(AssertUnwindSafe(|| self.prepare(index, scaler))).unwrap_or_else(|_| {
            *scaler = Scaler::new();
            Err(DataError::bad(self.dataset.sample_name(index), "its decoder panicked"))
        });
        prepared.map_err(|error| known_bad().entry(index).or_insert(error.to_string().into()).clone())
    }

    fn prepare(&self, index: usize, scaler: &mut Scaler) -> Result<Arc<Prepared>, DataError> {
        let [channels, height, width] = self.shape_chw;
        let item = self.dataset.load(index)?;
        let name = || self.dataset.sample_name(index);
        let (pixels, worth_keeping) = match item.content {
            Content::Values(mut values) => {
                if let Some(position) = values.iter().position(|value| !value.is_finite()) {
                    let reason = format!("holds {} at element {position}", values[position]);
                    return Err(DataError::bad(name(), reason));
                }
                if let Some(range) = self.value_range {
                    values.iter_mut().for_each(|value| *value = normalised(*value, range));
                }
                return Ok(Arc::new(Prepared { body: Body::Values(values), caption: item.caption }));
            }
            Content::Encoded(bytes) => (decode(&name(), &bytes, channels)?, true),
            Content::Pixels(pixels) => {
                let resized = (pixels.height, pixels.width) != (height, width);
                (pixels.with_channels(channels), resized)
            }
        };
        let (tall, wide) = (pixels.height as f64 / height as f64, pixels.width as f64 / width as f64);
        if tall / wide > MAX_RATIO || wide / tall > MAX_RATIO {
            let reason = format!("is {} x {} pixels, too narrow to be cropped", pixels.width, pixels.height);
            return Err(DataError::bad(name(), reason));
        }
        let mut pixels = scaler.cover(pixels, height, width);
        if self.crop == Crop::Center && (pixels.height, pixels.width) != (height, width) {
            pixels = Placement::center(&pixels, height, width).cut(&pixels);
        }
        let prepared = Arc::new(Prepared { body: Body::Pixels(pixels), caption: item.caption });
        if worth_keeping {
            self.cache.keep(index, &prepared);
        }
        Ok(prepared)
    }

    /// Writes a row. The flip and the crop are drawn for the place in the order, so that a
    /// replacement does not repeat its own row of the same epoch.
    pub(crate) fn write(&self, draw: Draw, prepared: &Prepared, row: &mut [f32], caption: &mut String) {
        let [_, height, width] = self.shape_chw;
        let sample = draw.index as u64;
        let mirrored = self.flip && mirrored(self.seed, draw.epoch, sample);
        match &prepared.body {
            Body::Pixels(pixels) => {
                let part = match self.crop {
                    Crop::Center => Placement::center(pixels, height, width),
                    Crop::Random => Placement::random(pixels, height, width, self.seed, draw.epoch, sample),
                };
                self.pixel_map.write(pixels, Placement { mirrored, ..part }, row);
            }
            Body::Values(values) => {
                row.copy_from_slice(values);
                if mirrored {
                    row.chunks_exact_mut(width).for_each(<[f32]>::reverse);
                }
            }
        }
        caption.clone_from(&prepared.caption);
    }

    pub(crate) fn label(&self, index: usize) -> i64 {
        self.dataset.label(index)
    }

    /// Whether a horizontal flip means the same as mirroring the image.
    pub(crate) fn can_flip(holds: Holds) -> bool {
        holds != Holds::Latents
    }
}

/// Decoded and resized samples, up to a number of bytes.
///
/// Nothing is ever evicted: every sample comes once in an epoch, so what came first is as
/// likely to be wanted next as anything else.
pub(crate) struct Cache {
    slots: Vec<OnceLock<Arc<Prepared>>>,
    used: AtomicUsize,
    limit: usize,
}

impl Cache {
    pub(crate) fn new(samples: usize, limit: usize) -> Self {
        let slots = if limit == 0 { 0 } else { samples };
        Self {
            slots: std::iter::repeat_with(OnceLock::new).take(slots).collect(),
            used: AtomicUsize::new(0),
            limit,
        }
    }

    fn get(&self, index: usize) -> Option<Arc<Prepared>> {
        self.slots.get(index)?.get().cloned()
    }

    fn keep(&self, index: usize, prepared: &Arc<Prepared>) {
        let Some(slot) = self.slots.get(index) else { return };
        let Body::Pixels(pixels) = &prepared.body else { return };
        let size = pixels.bytes.len() + prepared.caption.len() + size_of::<Prepared>();
        // Counted before it is kept, so that the limit holds with any number of workers.
        let fits = self.used.fetch_add(size, Ordering::Relaxed).saturating_add(size) <= self.limit;
        if !fits || slot.set(prepared.clone()).is_err() {
            self.used.fetch_sub(size, Ordering::Relaxed);
        }
    }

    /// The bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}
