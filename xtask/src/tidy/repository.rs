//! The files of the repository, read once.
//!
//! Ignored names are taken from the root's .gitignore, of which only plain names and `*.ending` are understood: no git
//! is needed, and an unpacked archive is checked like a clone.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;

/// Paths relative to the root, with `/`, and the text of those that are UTF-8.
#[derive(Default)]
pub struct Repository {
    files: BTreeMap<String, Option<String>>,
}

impl Repository {
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let ignored = std::fs::read_to_string(root.join(".gitignore")).unwrap_or_default();
        let mut patterns: Vec<&str> = ignored.lines().map(|line| line.trim().trim_matches('/')).collect();
        patterns.retain(|pattern| !pattern.is_empty() && !pattern.starts_with('#'));
        patterns.push(".git");
        let mut repository = Repository::default();
        repository.read_folder(root, "", &patterns)?;
        Ok(repository)
    }

    fn read_folder(&mut self, root: &Path, folder: &str, ignored: &[&str]) -> anyhow::Result<()> {
        let place = root.join(folder);
        let entries =
            std::fs::read_dir(&place).with_context(|| format!("cannot list {}", place.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if ignored.iter().any(|pattern| is_ignored(&name, pattern)) {
                continue;
            }
            let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.read_folder(root, &path, ignored)?;
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).with_context(|| format!("cannot read {path}"))?;
                self.files.insert(path, String::from_utf8(bytes).ok());
            }
        }
        Ok(())
    }

    /// A made-up repository for tests.
    #[cfg(test)]
    pub fn of(files: &[(&str, &str)]) -> Self {
        Repository {
            files: files.iter().map(|(path, text)| (path.to_string(), Some(text.to_string()))).collect(),
        }
    }

    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The text of a file; `None` if it is missing or not text.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path)?.as_deref()
    }

    /// All text files whose name ends in one of `endings`.
    pub fn texts<'a>(&'a self, endings: &'a [&str]) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .filter(|(path, _)| endings.iter().any(|ending| path.ends_with(ending)))
            .filter_map(|(path, text)| Some((path.as_str(), text.as_deref()?)))
    }

    /// Whether the path is a file or a folder of the repository. `.` and the empty path are the root.
    pub fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let folder = format!("{path}/");
        matches!(path, "" | ".")
            || self.files.contains_key(path)
            || self.files.range(folder.clone()..).next().is_some_and(|(next, _)| next.starts_with(&folder))
    }
}

fn is_ignored(name: &str, pattern: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(ending) => name.ends_with(ending),
        None => name == pattern,
    }
}

/// The path that `relative` means when written in the file `from`; `None` if it leaves the repository.
pub fn resolve(from: &str, relative: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[test]
fn folders_count_as_present() {
    let repository = Repository::of(&[("a/b/c.rs", ""), ("a-b", "")]);
    assert!(
        repository.has("a/b") && repository.has("a/") && repository.has("a/b/c.rs") && repository.has(".")
    );
    assert!(!repository.has("a/c") && !repository.has("a/b/c"));
    assert_eq!(resolve("docs/x.md", "../a/./b"), Some("a/b".into()));
    assert_eq!(resolve("x.md", "../a"), None);
}

#[test]
fn ignored_names_are_names_and_endings() {
    assert!(is_ignored("target", "target") && is_ignored("x.pyc", "*.pyc"));
    assert!(!is_ignored("targets", "target") && !is_ignored("x.py", "*.pyc"));
}
