//! Which sample comes when, and where a run is in that order.
//!
//! The samples of all epochs are one endless sequence; batches are cut from it without regard to
//! the ends of epochs, so every batch is full. An epoch is a permutation drawn from
//! (seed, shuffle, epoch) alone: the order is the same for any number of workers, ranks or resumes.

use crate::DataError;
use anneal_tensor::rng::{Purpose, Stream};
use serde::{Deserialize, Serialize};

/// The place of the next sample to be handed out; part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    pub seed: u64,
    pub epoch: u64,
    /// Samples of this epoch already handed out, by all ranks together.
    pub position: u64,
    /// The length of the data set, to notice that it has changed; 0 before the first batch.
    pub samples: u64,
}

impl Cursor {
    /// The beginning of a run.
    pub fn start(seed: u64) -> Self {
        Self { seed, epoch: 0, position: 0, samples: 0 }
    }
}

/// One place in the sequence: a data set's index and the epoch in which it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Draw {
    pub epoch: u64,
    pub index: usize,
}

/// Walks the sequence from a cursor on.
pub(crate) struct Order {
    cursor: Cursor,
    samples: usize,
    /// The current epoch's permutation; nothing when the order is that of the data set.
    permutation: Option<Vec<usize>>,
}

impl Order {
    /// # Errors
    /// When the cursor was saved with a data set of another length.
    pub(crate) fn new(mut cursor: Cursor, samples: usize, shuffle: bool) -> Result<Self, DataError> {
        if cursor.samples != 0 && cursor.samples != samples as u64 {
            return Err(DataError::Cursor {
                detail: format!(
                    "it was saved with {} samples and the data set now has {samples}; restore the data, or start \
                     a new run",
                    cursor.samples
                ),
            });
        }
        if cursor.position >= samples as u64 {
            return Err(DataError::Cursor {
                detail: format!("its position is {} and an epoch has {samples} samples", cursor.position),
            });
        }
        cursor.samples = samples as u64;
        let permutation = shuffle.then(|| permutation(&cursor, samples));
        Ok(Self { cursor, samples, permutation })
    }

    /// The place of the next sample.
    pub(crate) fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next sample; the following epoch begins where one ends.
    pub(crate) fn next(&mut self) -> Draw {
        let position = self.cursor.position as usize;
        let index = self.permutation.as_ref().map_or(position, |permutation| permutation[position]);
        let draw = Draw { epoch: self.cursor.epoch, index };
        self.cursor.position += 1;
        if self.cursor.position == self.samples as u64 {
            self.cursor.position = 0;
            self.cursor.epoch += 1;
            if let Some(current) = &mut self.permutation {
                *current = permutation(&self.cursor, self.samples);
            }
        }
        draw
    }
}

fn permutation(cursor: &Cursor, samples: usize) -> Vec<usize> {
    Stream::new(cursor.seed, Purpose::Shuffle, cursor.epoch, 0).permutation(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(order: &mut Order, count: usize) -> Vec<Draw> {
        (0..count).map(|_| order.next()).collect()
    }

    #[test]
    fn each_epoch_holds_each_sample_once_in_another_order() {
        let mut order = Order::new(Cursor::start(1), 50, true).unwrap();
        let epochs = [take(&mut order, 50), take(&mut order, 50)];
        for (epoch, draws) in epochs.iter().enumerate() {
            assert!(draws.iter().all(|draw| draw.epoch == epoch as u64));
            let mut indices: Vec<usize> = draws.iter().map(|draw| draw.index).collect();
            indices.sort_unstable();
            assert!(indices.into_iter().eq(0..50));
        }
        let indices = |epoch: usize| epochs[epoch].iter().map(|draw| draw.index).collect::<Vec<_>>();
        assert_ne!(indices(0), indices(1));
    }

    #[test]
    fn an_order_continues_from_its_cursor() {
        for shuffle in [false, true] {
            let mut whole = Order::new(Cursor::start(9), 7, shuffle).unwrap();
            take(&mut whole, 10);
            let mut resumed = Order::new(whole.cursor(), 7, shuffle).unwrap();
            assert_eq!(take(&mut whole, 20), take(&mut resumed, 20));
        }
    }

    #[test]
    fn a_cursor_of_other_data_is_refused() {
        let mut order = Order::new(Cursor::start(0), 7, true).unwrap();
        order.next();
        let message = |cursor, samples| Order::new(cursor, samples, true).err().unwrap().to_string();
        assert_eq!(
            message(order.cursor(), 8),
            "the data cursor does not fit: it was saved with 7 samples and the data set now has 8; restore the \
             data, or start a new run"
        );
        let cursor = Cursor { position: 7, ..Cursor::start(0) };
        assert_eq!(
            message(cursor, 7),
            "the data cursor does not fit: its position is 7 and an epoch has 7 samples"
        );
    }
}
