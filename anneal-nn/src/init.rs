//! Initial values, drawn from the counter generator.

use std::sync::Arc;

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
        let mut stream = Stream::new(seed, Purpose::Initialisation, 0, id.0 as u64);
        match self {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Normal { standard_deviation } => {
                let mut values = vec![0.0; count];
                stream.fill_normal(&mut values);
                values.iter_mut().for_each(|value| *value *= standard_deviation);
                values
            }
            Init::XavierUniform => {
                let fan_out = spec.shape[0];
                let fan_in = count / fan_out.max(1);
                let bound = (6.0 / (fan_in + fan_out) as f64).sqrt();
                (0..count).map(|_| ((stream.uniform() * 2.0 - 1.0) * bound) as f32).collect()
            }
            Init::Values(values) => {
                assert_eq!(values.len(), count, "initial values of {}", spec.name);
                values.to_vec()
            }
        }
    }
}
