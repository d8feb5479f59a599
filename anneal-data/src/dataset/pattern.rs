//! Names of shards from a pattern: `{000..127}`, `{train,extra}`, `*` and `?`.
//!
//! Brace ranges keep the width of their first number, as webdataset's do. A wildcard stands in the
//! last part of the path only and never matches a separator.

use super::shard::folder_files;
use crate::DataError;
use std::path::{Path, PathBuf};

/// The files that a path or pattern means, in order: braces as written, wildcards by name, and a
/// folder as its files with this ending.
///
/// # Errors
/// When a file is missing, a wildcard matches nothing, or a folder has no file with the ending.
pub(super) fn shard_files(pattern: &str, ending: &str) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for name in expand_braces(pattern) {
        let path = PathBuf::from(&name);
        if path.is_dir() {
            files.extend(folder_files(&path)?.into_iter().filter(|file| {
                file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(ending))
            }));
        } else if name.contains(['*', '?']) && !path.exists() {
            files.extend(matching_files(&path)?);
        } else {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(DataError::Empty {
            source_name: pattern.to_owned(),
            expected: format!("no .{ending} file matches"),
        });
    }
    Ok(files)
}

fn matching_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let pattern: Vec<char> = path.file_name().unwrap_or_default().to_string_lossy().chars().collect();
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let matches = |file: &PathBuf| {
        let name: Vec<char> = file.file_name().unwrap_or_default().to_string_lossy().chars().collect();
        wildcard_matches(&pattern, &name)
    };
    Ok(folder_files(folder)?.into_iter().filter(matches).collect())
}

fn wildcard_matches(pattern: &[char], name: &[char]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some(('*', rest)) => (0..=name.len()).any(|skipped| wildcard_matches(rest, &name[skipped..])),
        Some((wanted, rest)) => name
            .split_first()
            .is_some_and(|(first, tail)| (*wanted == '?' || wanted == first) && wildcard_matches(rest, tail)),
    }
}

/// All names that the braces of a pattern stand for, leftmost varying slowest.
fn expand_braces(pattern: &str) -> Vec<String> {
    let Some((before, rest)) = pattern.split_once('{') else { return vec![pattern.to_owned()] };
    let Some((inside, after)) = rest.split_once('}') else { return vec![pattern.to_owned()] };
    let tails = expand_braces(after);
    let choices = number_range(inside).unwrap_or_else(|| inside.split(',').map(str::to_owned).collect());
    choices
        .iter()
        .flat_map(|choice| tails.iter().map(move |tail| format!("{before}{choice}{tail}")))
        .collect()
}

fn number_range(inside: &str) -> Option<Vec<String>> {
    let (first, last) = inside.split_once("..")?;
    let width = first.len();
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some((first..=last).map(|number| format!("{number:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_expand_to_ranges_and_alternatives() {
        assert_eq!(expand_braces("s/{098..101}.tar"), ["s/098.tar", "s/099.tar", "s/100.tar", "s/101.tar"]);
        assert_eq!(expand_braces("{a,b}-{0..1}"), ["a-0", "a-1", "b-0", "b-1"]);
        assert_eq!(expand_braces("plain{.tar"), ["plain{.tar"]);
        assert!(expand_braces("{5..4}").is_empty());
    }

    #[test]
    fn wildcards_match_whole_names() {
        let matches = |pattern: &str, name: &str| {
            wildcard_matches(&pattern.chars().collect::<Vec<_>>(), &name.chars().collect::<Vec<_>>())
        };
        assert!(matches("*.tar", "00.tar") && matches("0?.tar", "00.tar") && matches("*", ""));
        assert!(!matches("*.tar", "00.tar.gz") && !matches("0?.tar", "0.tar") && !matches("", "a"));
    }
}
