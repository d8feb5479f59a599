//! Initial values, drawn from the counter generator.

use std::sync::{Arc, Mutex};

use anneal_tensor::rng::{Purpose, Stream};

use crate::{ParamId, ParamSpec};

/// How a parameter starts.
#[derive(Clone, Debug)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0.
    Normal {
        standard_deviation: f32,
    },
    /// Uniform within plus or minus sqrt(6 / (fan in + fan out)) (Glorot and Bengio, 2010, eq. 16),
    /// of a weight [out, in...] seen as a matrix [out, product of the rest].
    XavierUniform,
    /// Given values, such as a table of positions.
    Values(Arc<[f32]>),
}

impl Init {
    /// The values of a parameter under a seed; they depend on seed and id alone.
    ///
    /// # Panics
    /// If given values do not fill the shape.
    pub fn values(&self, seed: u64, id: ParamId, spec: &ParamSpec) -> Vec<f32> {
        let count = spec.elements();
        let stream = Stream::new(seed, Purpose::Initialisation, 0, id.0 as u64);
        match self {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Normal { standard_deviation } => {
                // A normal number takes one word.
                in_pieces(count, |start, piece| {
                    stream.at(start).fill_normal(piece);
                    piece.iter_mut().for_each(|value| *value *= standard_deviation);
                })
            }
            Init::XavierUniform => {
                let fan_out = spec.shape[0];
                let fan_in = count / fan_out.max(1);
                let bound = (6.0 / (fan_in + fan_out) as f64).sqrt();
                // A uniform number takes two words.
                in_pieces(count, |start, piece| {
                    let mut stream = stream.at(2 * start);
                    piece.fill_with(|| ((stream.uniform() * 2.0 - 1.0) * bound) as f32);
                })
            }
            Init::Values(values) => {
                assert_eq!(values.len(), count, "initial values of {}", spec.name);
                values.to_vec()
            }
        }
    }
}

/// Values made in pieces on all cores: large models have hundreds of millions. `fill` gets the index of its
/// piece's first value, so the result does not depend on how many cores there are.
fn in_pieces(count: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    const PIECE: usize = 1 << 16;
    let mut values = vec![0.0; count];
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let pieces = Mutex::new(values.chunks_mut(PIECE).enumerate());
    let work = || loop {
        // Taken in a statement of its own, so that the lock is free while the piece is filled.
        let next = pieces.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
        let Some((index, piece)) = next else { break };
        fill(index * PIECE, piece);
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count.div_ceil(PIECE)) {
            scope.spawn(work);
        }
        work();
    });
    values
}
