//! `cargo xtask tidy`: the house rules that can be checked by reading the repository.
//!
//! Contract: each check is a function from a [`Repository`] (and what cargo says about its crates) to findings; it reads
//! no file by itself, so that every check is tested on small made-up repositories. A finding is one line: where, what,
//! what to do.

mod architecture;
mod budgets;
mod dead_files;
mod dependencies;
mod links;
mod repository;
mod words;

use std::fmt;
use std::path::Path;

use anyhow::Context;

use repository::Repository;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    path: String,
    line: usize,
    what: String,
    remedy: String,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { path: path.into(), line, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}, {}", self.path, self.line, self.what, self.remedy)
    }
}

/// Runs every check on the repository at `root`.
pub fn check(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let repository = Repository::read(root)?;
    let crates = dependencies::crates_of_workspace(root)?;
    let mut findings = dependencies::check(&repository, &crates);
    findings.extend(budgets::check(&repository));
    findings.extend(dead_files::check(&repository, &crates));
    findings.extend(architecture::check(&repository));
    findings.extend(words::check(&repository));
    findings.extend(links::check(&repository));
    findings.sort();
    findings.dedup();
    Ok(findings)
}

/// Lowers the ratchet's entries to what is measured.
pub fn tighten(root: &Path) -> anyhow::Result<()> {
    let repository = Repository::read(root)?;
    if let Some(text) = repository.text(budgets::RATCHET) {
        let tightened = budgets::tightened(text, &repository);
        std::fs::write(root.join(budgets::RATCHET), tightened)
            .with_context(|| format!("cannot write {}", budgets::RATCHET))?;
    }
    Ok(())
}

#[test]
fn the_workspace_is_tidy() {
    let findings = check(&crate::repository_root()).unwrap();
    let lines: Vec<String> = findings.iter().map(Finding::to_string).collect();
    assert!(lines.is_empty(), "cargo xtask tidy has findings:\n{}", lines.join("\n"));
}
