//! Names in ARCHITECTURE.md that no longer exist. A map that lies is worse than none.
//!
//! Checked is what stands in backticks, by its form: paths (with `/` or a known ending), crates (`anneal...`), and items
//! of the code (`CamelCase`, `snake_case`, `Type::method`, `function()`). Placeholders (`<op>`, `*`, `...`), commands
//! (with blanks) and everything in code fences are left alone. What is planned is written without backticks.

use super::Finding;
use super::dead_files::has_word;
use super::links::lines_outside_fences;
use super::repository::Repository;

const DOCUMENT: &str = "ARCHITECTURE.md";
const ENDINGS: &[&str] = &[".rs", ".cu", ".md", ".yaml", ".toml", ".py", ".txt", ".npz", ".safetensors"];

pub fn check(repository: &Repository) -> Vec<Finding> {
    let Some(text) = repository.text(DOCUMENT) else { return Vec::new() };
    let code: Vec<&str> = repository.texts(&[".rs", ".cu"]).map(|(_, text)| text).collect();
    let mut findings = Vec::new();
    for (number, line) in lines_outside_fences(text) {
        for name in line.split('`').skip(1).step_by(2) {
            if let Some(what) = problem(name, repository, &code) {
                findings.push(Finding::new(DOCUMENT, number, what, "correct the name or take it out"));
            }
        }
    }
    findings
}

fn problem(name: &str, repository: &Repository, code: &[&str]) -> Option<String> {
    let name = name.trim();
    if name.is_empty() || name.contains([' ', '<', '*', '{', '$', '=', '"']) || name.contains("...") {
        return None;
    }
    if name.contains('/') || ENDINGS.iter().any(|ending| name.ends_with(ending)) {
        return path_problem(name, repository);
    }
    if name == "anneal" || name.starts_with("anneal-") {
        let manifest = format!("{name}/Cargo.toml");
        return (!repository.has(&manifest)).then(|| format!("the crate `{name}` does not exist"));
    }
    let item = name.trim_end_matches("()");
    if !item.contains("::") && item == name && !looks_like_item(item) {
        return None;
    }
    let words = item.split("::").filter(|part| part.chars().all(|c| c.is_alphanumeric() || c == '_'));
    let mut missing = words.filter(|word| !code.iter().any(|text| has_word(text, word)));
    missing.next().map(|word| format!("`{name}`: nothing in the code is called {word}"))
}

/// A path from the root, or the end of one (`mod.rs`, `cpu/simd.rs`).
fn path_problem(name: &str, repository: &Repository) -> Option<String> {
    if name.starts_with(['/', '~']) || name.contains("://") {
        return None;
    }
    let name = name.trim_end_matches('/');
    let end = format!("/{name}");
    let inside = format!("/{name}/");
    let exists =
        repository.has(name) || repository.paths().any(|path| path.ends_with(&end) || path.contains(&inside));
    (!exists).then(|| format!("the path `{name}` does not exist"))
}

/// `CamelCase` or `snake_case`, but no abbreviation and no plain word.
fn looks_like_item(name: &str) -> bool {
    let plain = name.chars().all(|character| character.is_ascii_alphanumeric() || character == '_');
    let starts_as_name = name.starts_with(|character: char| character.is_ascii_alphabetic());
    let camel = name.starts_with(|character: char| character.is_ascii_uppercase())
        && name.chars().any(|character| character.is_ascii_lowercase());
    plain && starts_as_name && (camel || name.contains('_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(document: &str) -> Vec<String> {
        let files = [
            (DOCUMENT, document),
            ("anneal-tensor/Cargo.toml", ""),
            (
                "anneal-tensor/src/ops/linear/mod.rs",
                "pub struct ParamStore;\nimpl ParamStore { fn enter(&self) {} }",
            ),
        ];
        check(&Repository::of(&files)).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn what_exists_is_quiet() {
        let document = "`anneal-tensor` has `anneal-tensor/src/ops/`, `ops/linear/mod.rs`, `mod.rs`, `ParamStore`,\n\
            `ParamStore::enter`, `enter()`; `cargo xtask tidy`, `ops/<op>/mod.rs`, `kind`, `NVRTC`, `~/.cache/x`\n\
            ```\n`GoneLongAgo`\n```\n";
        assert_eq!(findings(document), Vec::<String>::new());
    }

    #[test]
    fn what_is_gone_is_found() {
        let document = "`anneal-tensor`\n`anneal-gone` and `src/gone.rs`\n`GoneStore`, `ParamStore::leave`, `leave()`, `gone_too`\n";
        let path = "correct the name or take it out";
        assert_eq!(
            findings(document),
            [
                format!("ARCHITECTURE.md:2: the crate `anneal-gone` does not exist, {path}"),
                format!("ARCHITECTURE.md:2: the path `src/gone.rs` does not exist, {path}"),
                format!("ARCHITECTURE.md:3: `GoneStore`: nothing in the code is called GoneStore, {path}"),
                format!(
                    "ARCHITECTURE.md:3: `ParamStore::leave`: nothing in the code is called leave, {path}"
                ),
                format!("ARCHITECTURE.md:3: `leave()`: nothing in the code is called leave, {path}"),
                format!("ARCHITECTURE.md:3: `gone_too`: nothing in the code is called gone_too, {path}"),
            ]
        );
    }
}
