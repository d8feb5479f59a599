//! What can be wrong with a recipe, in words that name the key and the place.

use std::fmt;
use std::path::PathBuf;

/// Every refusal of this crate.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("cannot read the recipe {path}: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },

    #[error("{file} is not valid YAML{line}: {reason}", line = at_line(*line))]
    Syntax { file: String, line: Option<u64>, reason: String },

    #[error("unknown key '{key}' {place}: {advice}")]
    UnknownKey { key: String, place: Place, advice: String },

    #[error("missing section '{key}' in {file}: add it")]
    MissingSection { key: String, file: String },

    #[error("missing key '{key}' in {file}: add it, or give {key}=VALUE on the command line")]
    MissingKey { key: String, file: String },

    #[error("wrong value for '{key}' {place}: found {found}, expected {expected}")]
    WrongType { key: String, place: Place, found: String, expected: String },

    #[error("unknown value '{found}' for '{key}' {place}: {advice}")]
    UnknownValue { key: String, place: Place, found: String, advice: String },

    #[error("wrong override '{text}': {reason}")]
    Override { text: String, reason: String },

    /// Values that are well formed and cannot be meant; one line each.
    #[error("{}", .problems.join("\n"))]
    Invalid { problems: Vec<String> },
}

fn at_line(line: Option<u64>) -> String {
    line.map_or(String::new(), |line| format!(" (line {line})"))
}

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file, and in which line if that is known.
    File { file: String, line: Option<u64> },
    /// In an override.
    CommandLine,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { file, line: Some(line) } => write!(formatter, "in {file}, line {line}"),
            Place::File { file, line: None } => write!(formatter, "in {file}"),
            Place::CommandLine => formatter.write_str("on the command line"),
        }
    }
}
