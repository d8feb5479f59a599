//! What a key map says about one model: which foreign tensors, of which shapes, hold each parameter.

use std::collections::BTreeSet;

use anneal_nn::{KeyEntry, KeyMap, ParamId, ParamSpec, Parameters};

use crate::WeightsError;

/// A foreign tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub name: String,
    pub shape: Vec<usize>,
}

/// The foreign homes of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct Homes {
    pub parameter: ParamId,
    pub computed: bool,
    /// Rows of all pieces of a home together; more than the parameter's if it is padded.
    pub rows: usize,
    pub homes: Vec<Vec<Piece>>,
}

/// Resolves a key map; every parameter must have exactly one entry.
pub(crate) fn resolve(parameters: &Parameters, map: &KeyMap) -> Result<Vec<Homes>, WeightsError> {
    let fail = |message: String| Err(WeightsError::KeyMap { message });
    let mut seen = BTreeSet::new();
    let mut resolved = Vec::with_capacity(map.entries.len());
    for entry in &map.entries {
        let Some(parameter) = parameters.find(&entry.parameter) else {
            return fail(format!("the model has no parameter '{}'", entry.parameter));
        };
        if !seen.insert(parameter) {
            return fail(format!("'{}' has two entries", entry.parameter));
        }
        resolved.push(homes(parameter, parameters.spec(parameter), entry)?);
    }
    match parameters.iter().find(|(id, _)| !seen.contains(id)) {
        Some((_, spec)) => fail(format!("'{}' has no entry", spec.name)),
        None => Ok(resolved),
    }
}

fn homes(parameter: ParamId, spec: &ParamSpec, entry: &KeyEntry) -> Result<Homes, WeightsError> {
    let fail = |message: String| Err(WeightsError::KeyMap { message: format!("'{}' {message}", spec.name) });
    let own_rows = spec.shape.first().copied().unwrap_or(1);
    let rows = entry.padded_rows.unwrap_or(own_rows);
    if rows < own_rows || own_rows == 0 {
        return fail(format!("has {own_rows} rows and cannot be stored in {rows}"));
    }
    if entry.homes.is_empty() {
        return fail("has no home".into());
    }
    let mut homes = Vec::with_capacity(entry.homes.len());
    for names in &entry.homes {
        if names.is_empty() || !rows.is_multiple_of(names.len()) {
            return fail(format!("has {rows} rows, which do not divide into {} tensors", names.len()));
        }
        let mut shape = spec.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows / names.len();
        }
        homes.push(names.iter().map(|name| Piece { name: name.clone(), shape: shape.clone() }).collect());
    }
    Ok(Homes { parameter, computed: entry.computed, rows, homes })
}
