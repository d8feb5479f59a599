//! From files into a model's parameters.

use std::collections::BTreeSet;

use anneal_nn::{KeyMap, ParamSpec, ParamStore, Parameters};

use crate::homes::{Homes, Piece, resolve};
use crate::{TensorFiles, WeightsError};

/// Lines of each kind in a list of what does not fit.
const LISTED: usize = 20;

/// What loading found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Parameters that were written.
    pub parameters: usize,
    /// Parameters that this layout computes: they keep their initial values.
    pub computed: Vec<String>,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

/// Writes the tensors of `files` into the parameters, by `map`. Values are rounded to the store's dtype.
///
/// Where a layout keeps copies of a parameter, the first is read, and those that differ from it are
/// named in a warning.
///
/// # Errors
/// Before anything is written, one error that lists all missing, extra and misshapen tensors. Later only
/// if the disk fails.
pub fn load(store: &dyn ParamStore, map: &KeyMap, files: &TensorFiles) -> Result<LoadReport, WeightsError> {
    let parameters = store.parameters();
    let resolved = resolve(parameters, map)?;
    check(parameters, &resolved, files)?;
    let mut report = LoadReport::default();
    for homes in &resolved {
        let spec = parameters.spec(homes.parameter);
        if homes.computed {
            report.computed.push(spec.name.clone());
            continue;
        }
        let [first, copies @ ..] = homes.homes.as_slice() else { unreachable!("resolved maps have homes") };
        let foreign = read_home(first, files)?;
        let mut different = Vec::new();
        for copy in copies.iter().filter(|copy| copy.iter().all(|piece| files.contains(&piece.name))) {
            if !same_bits(&read_home(copy, files)?, &foreign) {
                different.push(names(copy));
            }
        }
        if !different.is_empty() {
            report.warnings.push(difference(&names(first), &different, copies.len()));
        }
        store.write(homes.parameter, &without_padding(foreign, spec, homes.rows))?;
        report.parameters += 1;
    }
    Ok(report)
}

fn read_home(home: &[Piece], files: &TensorFiles) -> Result<Vec<f32>, WeightsError> {
    let mut values = files.read_f32(&home[0].name)?;
    for piece in &home[1..] {
        values.extend(files.read_f32(&piece.name)?);
    }
    Ok(values)
}

/// Bits, because NaN equals itself here.
fn same_bits(left: &[f32], right: &[f32]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(left, right)| left.to_bits() == right.to_bits())
}

fn difference(read: &str, different: &[String], copies: usize) -> String {
    let listed = different.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = different.len().saturating_sub(LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let count = different.len();
    format!("{read} was read, and {count} of its {copies} copies differ from it and were not: {listed}{more}")
}

fn names(home: &[Piece]) -> String {
    home.iter().map(|piece| piece.name.as_str()).collect::<Vec<_>>().join(" + ")
}

/// Of `rows` rows keeps those of the parameter: its first ones, and the last.
fn without_padding(mut values: Vec<f32>, spec: &ParamSpec, rows: usize) -> Vec<f32> {
    let row = values.len() / rows;
    let own = spec.elements();
    if own < values.len() {
        values.copy_within((rows - 1) * row.., own - row);
        values.truncate(own);
    }
    values
}

/// Compares names and shapes, and lists all that does not fit.
fn check(parameters: &Parameters, resolved: &[Homes], files: &TensorFiles) -> Result<(), WeightsError> {
    let mut known = BTreeSet::new();
    let (mut missing, mut misshapen, mut wrong_type) = (Vec::new(), Vec::new(), Vec::new());
    let mut found = 0;
    for homes in resolved {
        for (index, piece) in homes
            .homes
            .iter()
            .enumerate()
            .flat_map(|(index, home)| home.iter().map(move |piece| (index, piece)))
        {
            known.insert(piece.name.as_str());
            if homes.computed {
                continue;
            }
            match files.spec(&piece.name) {
                None if index == 0 => missing.push(format!("{} {:?}", piece.name, piece.shape)),
                None => {}
                Some(there) if there.shape != piece.shape => misshapen.push(format!(
                    "{}: the file has {:?}, the model needs {:?}",
                    piece.name, there.shape, piece.shape
                )),
                Some(there) if !there.dtype.is_float() => {
                    wrong_type
                        .push(format!("{}: the file has {}, not floating point", piece.name, there.dtype));
                }
                Some(_) => found += 1,
            }
        }
    }
    let extra: Vec<String> = files
        .names()
        .filter(|name| !known.contains(name))
        .map(|name| format!("{name} {:?}", files.shape(name).unwrap_or_default()))
        .collect();
    let mut list = String::new();
    for (kind, lines) in
        [("missing", missing), ("extra", extra), ("misshapen", misshapen), ("of another type", wrong_type)]
    {
        add_lines(&mut list, kind, &lines);
    }
    if list.is_empty() {
        return Ok(());
    }
    if found == 0 && !parameters.is_empty() {
        list.push_str("  no tensor fits: these are weights of another model, or in another layout\n");
    }
    Err(WeightsError::Mismatch { path: files.path().to_path_buf(), list: list.trim_end().to_string() })
}

fn add_lines(list: &mut String, kind: &str, lines: &[String]) {
    for line in lines.iter().take(LISTED) {
        list.push_str(&format!("  {kind}: {line}\n"));
    }
    if lines.len() > LISTED {
        list.push_str(&format!("  {kind}: and {} more\n", lines.len() - LISTED));
    }
}
