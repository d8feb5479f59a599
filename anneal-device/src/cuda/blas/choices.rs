//! What was measured, in memory and on disk: which of several ways to do the same work is fastest here.
//!
//! On disk a choice is a small text file under `matmul` in the cache folder, in a folder named by GPU, its
//! number of multiprocessors and cuBLASLt's version. A file that cannot be read is measured again. Of processes that
//! measure the same at once the first is right: the others take its choice, so that all of them compute the same bits,
//! now and when they are continued.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::super::compiler::{cache_folder, write_cached, write_cached_first};
use super::super::driver::Properties;
use super::super::transfer::Event;
use super::CudaDevice;
use crate::DeviceError;

/// Timed runs of each of the candidates that are close to the best.
const RUNS: usize = 5;
/// Milliseconds from which on work is timed under load, and how long each candidate is then repeated: a GPU that meets
/// its limit of power lowers its clock within a few milliseconds.
const HEAVY: f32 = 0.05;
const LOAD: f32 = 60.0;

/// Results by name.
#[derive(Default)]
pub(super) struct Choices {
    known: Mutex<HashMap<String, usize>>,
    preferred: Mutex<Option<usize>>,
}

/// The file of a choice; none without a cache folder.
pub(super) fn path(properties: &Properties, version: usize, name: &str) -> Option<PathBuf> {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let gpu: String = properties.name.chars().map(plain).collect();
    let folder = format!("{gpu}-{}-lt{version}", properties.multiprocessors);
    Some(cache_folder()?.join("matmul").join(folder).join(name))
}

/// `key words..` of a file with that key.
pub(super) fn parse<T>(text: &str, key: &str, word: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    let rest = text.strip_suffix('\n')?.strip_prefix(key)?.strip_prefix(' ')?;
    rest.split(' ').map(word).collect()
}

fn choice_of(text: &str) -> Option<usize> {
    let words = parse(text, "choice", |word| word.parse().ok())?;
    <[usize; 1]>::try_from(words).ok().map(|[choice]| choice)
}

/// Keeps what was measured here on disk, and returns what is to be used: the choice of a process that was first, if
/// `parsed` understands its file.
pub(super) fn keep<T>(path: &Path, own: T, text: &str, parsed: impl Fn(&str) -> Option<T>) -> T {
    if !write_cached_first(path, text.as_bytes()) {
        return own;
    }
    let read = || std::fs::read_to_string(path).ok().and_then(|text| parsed(&text));
    read().unwrap_or_else(|| {
        // Damaged: it is replaced, and what then lies there counts, should another process replace it too.
        write_cached(path, text.as_bytes());
        read().unwrap_or(own)
    })
}

impl CudaDevice {
    /// Which of `count` ways to do the same work is fastest on this device: measured where `name` is seen for
    /// the first time, and kept on disk. `run` does the work in one of the ways; it must leave the same result
    /// however often it is called. A way that fails is not chosen. Where nothing may be measured (inside a
    /// captured step, or after [`Self::set_deterministic`]) it is the known choice, else the first way.
    ///
    /// # Errors
    /// If the device fails.
    pub fn choose<E: From<DeviceError>>(
        &self,
        name: &str,
        count: usize,
        run: &mut dyn FnMut(usize) -> Result<(), E>,
    ) -> Result<usize, E> {
        let preferred =
            *self.products.choices.preferred.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(way) = preferred {
            return Ok(way.min(count - 1));
        }
        if self.is_deterministic() {
            return Ok(0);
        }
        if let Some(choice) = self.known(name) {
            return Ok(choice);
        }
        let path = path(self.properties(), super::version(), name);
        let parsed = |text: &str| choice_of(text).filter(|choice| *choice < count);
        let saved = path.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        let choice = match saved.and_then(|text| parsed(&text)) {
            Some(choice) => choice,
            // A captured step must choose the same again when it is replayed: the first way stays.
            _ if self.in_captured_step() => 0,
            _ => {
                let all: Vec<usize> = (0..count).collect();
                let times = self.time_as_in_a_step(&all, &mut |way| run(way).is_ok())?;
                // Where every way failed, the caller meets the error; nothing is kept, for it may pass.
                let Some((choice, _)) = fastest(&times) else { return Ok(0) };
                path.map_or(choice, |path| keep(&path, choice, &format!("choice {choice}\n"), parsed))
            }
        };
        let mut known = self.products.choices.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        known.insert(name.into(), choice);
        Ok(choice)
    }

    /// Makes every [`Self::choose`] take this way, or the last if there are fewer, without measuring: so that tests reach
    /// all of them.
    pub fn prefer_way(&self, way: Option<usize>) {
        *self.products.choices.preferred.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = way;
    }

    fn known(&self, name: &str) -> Option<usize> {
        let known = self.products.choices.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        known.get(name).copied()
    }

    /// The time of each candidate in milliseconds, `None` where it fails, as it would be in a step. Heavy work is
    /// repeated until the GPU has settled: where power is what limits it, the candidate that needs the least is the
    /// fastest, and not the one that would be with the clock at its highest. Light work is timed as it comes.
    pub(super) fn time_as_in_a_step(
        &self,
        candidates: &[usize],
        run: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Vec<Option<f32>>, DeviceError> {
        let times = self.time_each(candidates, RUNS, run)?;
        let Some((_, least)) = fastest(&times).filter(|(_, least)| *least >= HEAVY) else { return Ok(times) };
        let settled = |(candidate, time): (&usize, &Option<f32>)| match time {
            // What is far behind stays so.
            Some(time) if *time <= 1.3 * least => self.time_under_load(*candidate, *time, run).map(Some),
            other => Ok(*other),
        };
        self.unprofiled(|| candidates.iter().zip(&times).map(settled).collect())
    }

    /// One candidate's time over the second half of [`LOAD`].
    fn time_under_load(
        &self,
        candidate: usize,
        time: f32,
        run: &mut dyn FnMut(usize) -> bool,
    ) -> Result<f32, DeviceError> {
        let (ordinal, stream) = (self.ordinal(), self.stream());
        let runs = (LOAD / 2.0 / time).ceil() as usize;
        let (start, end) = (Event::new(ordinal, true)?, Event::new(ordinal, true)?);
        for event in [&start, &end] {
            for _ in 0..runs {
                run(candidate);
            }
            event.record(ordinal, stream)?;
        }
        self.synchronize()?;
        Ok(end.milliseconds_since(ordinal, &start)? / runs as f32)
    }

    /// The median time of each candidate in milliseconds, `None` where it fails; each is run once more
    /// before, to warm up. Waits for the device; the runs are in no profile.
    pub(super) fn time_each(
        &self,
        candidates: &[usize],
        runs: usize,
        run: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Vec<Option<f32>>, DeviceError> {
        self.unprofiled(|| self.time_unprofiled(candidates, runs, run))
    }

    /// Work that is in no profile.
    fn unprofiled<T>(&self, work: impl FnOnce() -> T) -> T {
        let profile = self.profile.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let result = work();
        *self.profile.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = profile;
        result
    }

    fn time_unprofiled(
        &self,
        candidates: &[usize],
        runs: usize,
        run: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Vec<Option<f32>>, DeviceError> {
        let (ordinal, stream) = (self.ordinal(), self.stream());
        let mut events: Vec<Vec<(Event, Event)>> = Vec::with_capacity(candidates.len());
        for &candidate in candidates {
            let mut pairs = Vec::new();
            for _ in 0..if run(candidate) { runs } else { 0 } {
                // Weights come from memory in a step, not from the cache; and while the device clears
                // that much, the host gets ahead, so that its own pace is not measured.
                self.clear_cache()?;
                let pair = (Event::new(ordinal, true)?, Event::new(ordinal, true)?);
                pair.0.record(ordinal, stream)?;
                run(candidate);
                pair.1.record(ordinal, stream)?;
                pairs.push(pair);
            }
            events.push(pairs);
        }
        self.synchronize()?;
        let median = |pairs: &Vec<(Event, Event)>| {
            let mut times = Vec::new();
            for (start, end) in pairs {
                times.push(end.milliseconds_since(ordinal, start)?);
            }
            times.sort_by(f32::total_cmp);
            Ok(times.get(times.len() / 2).copied())
        };
        events.iter().map(median).collect()
    }
}

/// The index of the least time, and that time; of equal ones the first.
pub(super) fn fastest(times: &[Option<f32>]) -> Option<(usize, f32)> {
    let known = times.iter().enumerate().filter_map(|(index, time)| Some((index, (*time)?)));
    known.min_by(|a, b| a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_as_they_are_written_and_damaged_ones_are_not() {
        assert_eq!(choice_of("choice 3\n"), Some(3));
        for damaged in ["", "choice 3", "choice\n", "choice x\n", "other 3\n", "choice 3\n\n", "choice 3 4\n"]
        {
            assert_eq!(choice_of(damaged), None, "{damaged:?}");
        }
        assert_eq!(fastest(&[None, Some(2.0), Some(1.0), Some(1.0)]), Some((2, 1.0)));
        assert_eq!(fastest(&[None]), None);
    }
    #[test]
    fn of_choices_made_at_once_the_first_is_kept() {
        let folder = std::env::temp_dir().join(format!("anneal-choices-test-{}", std::process::id()));
        let settle = |path: &Path, own: usize| keep(path, own, &format!("choice {own}\n"), choice_of);
        for round in 0..50 {
            let path = folder.join(format!("round-{round}"));
            let start = std::sync::Barrier::new(8);
            let used: Vec<usize> = std::thread::scope(|scope| {
                let process = |own| {
                    let (start, path) = (&start, &path);
                    scope.spawn(move || {
                        start.wait();
                        settle(path, own)
                    })
                };
                let all: Vec<_> = (0..8).map(process).collect();
                all.into_iter().map(|process| process.join().unwrap()).collect()
            });
            let kept = choice_of(&std::fs::read_to_string(&path).unwrap()).unwrap();
            assert_eq!(used, [kept; 8]);
            assert_eq!(settle(&path, 9), kept);
            // A damaged file is no choice.
            std::fs::write(&path, "choice").unwrap();
            assert_eq!((settle(&path, 9), settle(&path, 1)), (9, 9));
            // Where nothing can be written, what was measured is used.
            assert_eq!(settle(&path.join("below-a-file"), 5), 5);
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 50, "something temporary was left");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
