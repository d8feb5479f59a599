//! How a model's parameters are named and cut in another layout, as data.

use crate::Parameters;

/// Where one parameter is found in a foreign layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    /// Our name.
    pub parameter: String,
    /// Foreign homes of the same values: the first is read, all are written. A home is a list of
    /// tensors that, joined along the first dimension, are the parameter.
    pub homes: Vec<Vec<String>>,
    /// The foreign layout computes these values itself: not written, and ignored where present.
    pub computed: bool,
    /// The foreign tensor has this many rows: when written, our last row is repeated up to it; when
    /// read, our last row is its last row and the rows between are dropped.
    pub padded_rows: Option<usize>,
}

impl KeyEntry {
    /// A parameter under another name.
    pub fn renamed(parameter: impl Into<String>, foreign: impl Into<String>) -> Self {
        Self::joined(parameter, [foreign.into()])
    }

    /// A parameter that is several tensors, joined along the first dimension.
    pub fn joined(parameter: impl Into<String>, foreign: impl IntoIterator<Item = String>) -> Self {
        let homes = vec![foreign.into_iter().collect()];
        Self { parameter: parameter.into(), homes, computed: false, padded_rows: None }
    }

    /// A parameter that the foreign layout computes itself.
    pub fn computed(parameter: impl Into<String>, foreign: impl Into<String>) -> Self {
        Self { computed: true, ..Self::renamed(parameter, foreign) }
    }
}

/// One entry for each parameter of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyMap {
    pub entries: Vec<KeyEntry>,
}

impl KeyMap {
    /// The layout in which every parameter keeps its name.
    pub fn identity(parameters: &Parameters) -> Self {
        let entries = parameters.iter().map(|(_, spec)| KeyEntry::renamed(&spec.name, &spec.name)).collect();
        Self { entries }
    }
}
