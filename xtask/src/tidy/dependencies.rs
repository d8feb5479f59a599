//! The house's table: who may use whom.
//!
//! A row names the crates that a crate may use directly; what those may use it may use too, and nothing else: lower rows
//! never see higher ones. Every crate may use `anneal-testkit` in its tests, and none outside them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Finding;
use super::repository::Repository;

/// Crate, and what it may use. A crate may be listed before it exists.
const TABLE: &[(&str, &[&str])] = &[
    ("anneal-device", &[]),
    ("anneal-tensor", &["anneal-device"]),
    ("anneal-nn", &["anneal-tensor"]),
    ("anneal-models", &["anneal-nn"]),
    ("anneal-diffusion", &["anneal-tensor"]),
    ("anneal-weights", &["anneal-nn"]),
    ("anneal-optim", &["anneal-nn"]),
    ("anneal-comm", &["anneal-device", "anneal-tensor"]),
    ("anneal-shard", &["anneal-comm", "anneal-nn", "anneal-optim"]),
    ("anneal-data", &["anneal-tensor"]),
    ("anneal-recipe", &[]),
    (
        "anneal-train",
        &[
            "anneal-models",
            "anneal-diffusion",
            "anneal-weights",
            "anneal-optim",
            "anneal-comm",
            "anneal-shard",
            "anneal-data",
            "anneal-recipe",
        ],
    ),
    ("anneal-infer", &["anneal-models", "anneal-diffusion", "anneal-weights", "anneal-comm"]),
    ("anneal-serve", &["anneal-infer"]),
    ("anneal-jobs", &["anneal-recipe"]),
    ("anneal", &["anneal-train", "anneal-infer", "anneal-serve", "anneal-jobs"]),
    (TESTKIT, &["anneal-nn"]),
    ("xtask", &["anneal-recipe", "anneal-device", "anneal-tensor", "anneal-optim"]),
];

const TESTKIT: &str = "anneal-testkit";

/// Outside crates that only some may use, and why.
const RESERVED: &[(&str, &[&str], &str)] = &[
    ("cudarc", &["anneal-device"], "go through anneal-device, the only crate that talks to CUDA"),
    ("anyhow", &["anneal", "xtask"], "give the library its own error enum"),
];

/// All that `anneal-recipe` may use from outside: it must stay free of the engine and quick to build.
const OF_RECIPE: &[&str] = &["serde", "serde-saphyr", "strsim", "thiserror"];

/// One crate of the workspace as cargo sees it.
#[derive(Clone, Debug)]
pub struct Crate {
    pub name: String,
    /// Its folder, relative to the root.
    pub folder: String,
    pub dependencies: Vec<Dependency>,
    /// Source roots of its targets (library, binaries, tests, ...), relative to the root.
    pub roots: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Dependency {
    pub name: String,
    /// For tests, benches and examples only.
    pub is_dev: bool,
}

/// Asks cargo about the workspace's own crates; needs no network.
pub fn crates_of_workspace(root: &Path) -> anyhow::Result<Vec<Crate>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    packages.iter().map(|package| read_crate(package, root)).collect()
}

fn read_crate(package: &Value, root: &Path) -> anyhow::Result<Crate> {
    let text = |value: &Value| value.as_str().map(str::to_string).context("cargo metadata lacks a text");
    let list = |key: &str| package[key].as_array().cloned().unwrap_or_default();
    let relative = |path: String| {
        let path = Path::new(&path).strip_prefix(root).map(|path| path.to_string_lossy().into_owned());
        path.context("a crate lies outside the repository")
    };
    let manifest = relative(text(&package["manifest_path"])?)?;
    let dependencies = list("dependencies")
        .iter()
        .map(|dependency| {
            Ok(Dependency { name: text(&dependency["name"])?, is_dev: dependency["kind"] == "dev" })
        })
        .collect::<anyhow::Result<_>>()?;
    let roots = list("targets")
        .iter()
        .map(|target| relative(text(&target["src_path"])?))
        .collect::<anyhow::Result<_>>()?;
    Ok(Crate {
        name: text(&package["name"])?,
        folder: manifest.trim_end_matches("Cargo.toml").trim_end_matches('/').into(),
        dependencies,
        roots,
    })
}

pub fn check(repository: &Repository, crates: &[Crate]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in crates {
        let manifest = format!("{}/Cargo.toml", package.folder);
        let Some((_, row)) = TABLE.iter().find(|(name, _)| *name == package.name) else {
            let what = format!("the crate {} is not in the table of crates", package.name);
            findings.push(Finding::new(&manifest, 1, what, "add its row to xtask/src/tidy/dependencies.rs"));
            continue;
        };
        for dependency in &package.dependencies {
            if let Some((what, remedy)) = refusal(&package.name, row, dependency) {
                let line = line_of(repository.text(&manifest).unwrap_or_default(), &dependency.name);
                findings.push(Finding::new(&manifest, line, what, remedy));
            }
        }
    }
    findings
}

fn refusal(user: &str, row: &[&'static str], dependency: &Dependency) -> Option<(String, String)> {
    let used = dependency.name.as_str();
    if used == TESTKIT {
        let remedy = "move it to [dev-dependencies]".to_string();
        return (!dependency.is_dev).then(|| (format!("{user} uses {TESTKIT} outside of tests"), remedy));
    }
    if let Some((_, users, remedy)) = RESERVED.iter().find(|(name, ..)| *name == used) {
        return (!users.contains(&user)).then(|| (format!("{user} uses {used}"), remedy.to_string()));
    }
    if TABLE.iter().any(|(name, _)| *name == used) {
        let allowed = reachable(row);
        let remedy = match allowed.is_empty() {
            true => "it may use no crate of the house".to_string(),
            false => format!("it may use {}", allowed.iter().copied().collect::<Vec<_>>().join(", ")),
        };
        return (!allowed.contains(used))
            .then(|| (format!("{user} uses {used}, which is not below it"), remedy));
    }
    (user == "anneal-recipe" && !dependency.is_dev && !OF_RECIPE.contains(&used))
        .then(|| (format!("{user} uses {used}"), format!("it may use {}", OF_RECIPE.join(", "))))
}

/// The crates of a row and all below them.
fn reachable(row: &[&'static str]) -> BTreeSet<&'static str> {
    let mut found = BTreeSet::new();
    let mut open = row.to_vec();
    while let Some(name) = open.pop() {
        if found.insert(name)
            && let Some((_, below)) = TABLE.iter().find(|(other, _)| *other == name)
        {
            open.extend(*below);
        }
    }
    found
}

fn line_of(manifest: &str, dependency: &str) -> usize {
    let position = manifest
        .lines()
        .position(|line| line.strip_prefix(dependency).is_some_and(|rest| rest.starts_with(['.', ' ', '='])));
    position.map_or(1, |position| position + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(user: &str, used: &str, is_dev: bool) -> Vec<String> {
        let manifest = format!("[package]\nname = \"{user}\"\n[dependencies]\n{used}.workspace = true\n");
        let repository = Repository::of(&[(&format!("{user}/Cargo.toml"), &manifest)]);
        let package = Crate {
            name: user.into(),
            folder: user.into(),
            dependencies: vec![Dependency { name: used.into(), is_dev }],
            roots: Vec::new(),
        };
        check(&repository, &[package]).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn lower_crates_do_not_see_higher_ones() {
        assert_eq!(
            findings("anneal-tensor", "anneal-nn", false),
            [
                "anneal-tensor/Cargo.toml:4: anneal-tensor uses anneal-nn, which is not below it, it may use anneal-device"
            ]
        );
        assert_eq!(
            findings("anneal-device", "anneal-tensor", true),
            [
                "anneal-device/Cargo.toml:4: anneal-device uses anneal-tensor, which is not below it, it may use no crate of the house"
            ]
        );
        assert_eq!(findings("anneal-infer", "anneal-optim", false).len(), 1, "inference knows no optimizer");
        assert_eq!(findings("anneal-serve", "anneal-train", false).len(), 1, "serving knows no training");
        assert_eq!(
            findings("anneal-diffusion", "anneal-models", false).len(),
            1,
            "diffusion takes a callable"
        );
    }

    #[test]
    fn what_is_below_is_allowed_transitively() {
        for (user, used) in [
            ("anneal-models", "anneal-device"),
            ("anneal", "anneal-tensor"),
            ("anneal-train", "anneal-nn"),
            ("anneal-tensor", "half"),
        ] {
            assert_eq!(findings(user, used, false), Vec::<String>::new());
        }
    }

    #[test]
    fn reserved_crates_have_their_users() {
        assert_eq!(
            findings("anneal-tensor", "cudarc", false),
            [
                "anneal-tensor/Cargo.toml:4: anneal-tensor uses cudarc, go through anneal-device, the only crate that talks to CUDA"
            ]
        );
        assert_eq!(findings("anneal-nn", "cudarc", true).len(), 1);
        assert_eq!(findings("anneal-device", "cudarc", false).len(), 0);
        assert_eq!(findings("anneal-data", "anyhow", false).len(), 1);
        assert_eq!(findings("anneal-recipe", "rayon", false).len(), 1);
    }

    #[test]
    fn the_testkit_is_for_tests() {
        assert_eq!(
            findings("anneal-nn", "anneal-testkit", false),
            [
                "anneal-nn/Cargo.toml:4: anneal-nn uses anneal-testkit outside of tests, move it to [dev-dependencies]"
            ]
        );
        assert_eq!(findings("anneal-nn", "anneal-testkit", true).len(), 0);
    }

    #[test]
    fn a_crate_without_a_row_is_named() {
        assert_eq!(
            findings("anneal-magic", "half", false),
            [
                "anneal-magic/Cargo.toml:1: the crate anneal-magic is not in the table of crates, add its row to xtask/src/tidy/dependencies.rs"
            ]
        );
    }

    #[test]
    fn cargo_tells_the_real_dependencies() {
        let crates = crates_of_workspace(&crate::repository_root()).unwrap();
        let own = crates.iter().find(|package| package.name == "xtask").unwrap();
        assert_eq!(
            (own.folder.as_str(), own.roots.as_slice()),
            ("xtask", ["xtask/src/main.rs".to_string()].as_slice())
        );
        assert!(
            own.dependencies
                .iter()
                .any(|dependency| dependency.name == "anneal-recipe" && !dependency.is_dev)
        );
        let recipe = crates.iter().find(|package| package.name == "anneal-recipe").unwrap();
        assert!(
            recipe.dependencies.iter().any(|dependency| dependency.name == "tempfile" && dependency.is_dev)
        );
    }

    #[test]
    fn the_table_names_only_crates_of_the_table() {
        for (name, row) in TABLE {
            for used in *row {
                assert!(TABLE.iter().any(|(other, _)| other == used), "{name} lists {used}");
            }
            assert!(!reachable(row).contains(name), "{name} would use itself");
        }
    }
}
