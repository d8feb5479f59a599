//! From a model's parameters into files.

use std::collections::BTreeMap;
use std::path::Path;

use anneal_nn::{KeyMap, ParamId, ParamStore};

use crate::homes::resolve;
use crate::{StoredDType, TensorSpec, WeightsError, WrittenFile, diffusers, write_file, write_sharded};

/// How to write weights.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// A floating-point type.
    pub dtype: StoredDType,
    /// Text entries of every file's header.
    pub metadata: BTreeMap<String, String>,
    /// Of a [`Target::Component`]: larger weights are cut into shards.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// f32, the entry that other libraries expect, and their shard size of 10 GB.
    fn default() -> Self {
        Self {
            dtype: StoredDType::F32,
            metadata: BTreeMap::from([("format".into(), "pt".into())]),
            max_shard_bytes: 10_000_000_000,
        }
    }
}

/// Where to write weights.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// One file; it appears whole.
    File(&'a Path),
    /// A component's folder inside a diffusers folder that is being written.
    Component { folder: &'a Path, variant: Option<&'a str> },
}

/// Writes the parameters in the layout of `map`: every home of each, and none that the layout computes.
///
/// # Errors
/// If the disk refuses; a single file is then as it was.
pub fn save(
    store: &dyn ParamStore,
    map: &KeyMap,
    options: &SaveOptions,
    target: Target<'_>,
) -> Result<Vec<WrittenFile>, WeightsError> {
    if !options.dtype.is_float() {
        return Err(WeightsError::StorageType { dtype: options.dtype.name() });
    }
    let parameters = store.parameters();
    let mut specs = Vec::new();
    let mut sources = Vec::new();
    for homes in resolve(parameters, map)?.iter().filter(|homes| !homes.computed) {
        for (index, piece) in homes.homes.iter().flat_map(|home| home.iter().enumerate()) {
            specs.push(TensorSpec::new(&piece.name, options.dtype, &piece.shape));
            sources.push(Source { parameter: homes.parameter, rows: homes.rows, piece: index });
        }
    }
    let mut reader = Reader { store, last: None };
    let data = |index: usize, sink: &mut crate::TensorSink<'_>| {
        let Source { parameter, rows, piece } = sources[index];
        let values = reader.padded(parameter, rows)?;
        let elements = sink.spec().elements();
        sink.f32(&values[piece * elements..(piece + 1) * elements])
    };
    match target {
        Target::File(path) => Ok(vec![write_file(path, &specs, &options.metadata, data)?]),
        Target::Component { folder, variant } => write_sharded(
            folder,
            diffusers::WEIGHTS_STEM,
            variant,
            &specs,
            &options.metadata,
            options.max_shard_bytes,
            data,
        ),
    }
}

/// Where a stored tensor comes from.
#[derive(Clone, Copy)]
struct Source {
    parameter: ParamId,
    /// With padding.
    rows: usize,
    piece: usize,
}

/// Keeps the last parameter, whose pieces and copies follow each other.
struct Reader<'a> {
    store: &'a dyn ParamStore,
    last: Option<(ParamId, Vec<f32>)>,
}

impl Reader<'_> {
    /// A parameter's values with its last row repeated up to `rows`.
    fn padded(&mut self, parameter: ParamId, rows: usize) -> Result<&[f32], WeightsError> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != parameter) {
            let mut values = self.store.read(parameter)?;
            let own_rows = self.store.parameters().spec(parameter).shape.first().copied().unwrap_or(1);
            let row = values.len() / own_rows;
            for _ in own_rows..rows {
                values.extend_from_within(values.len() - row..);
            }
            self.last = Some((parameter, values));
        }
        Ok(&self.last.as_ref().expect("it was just set").1)
    }
}
