//! Files that nothing reaches: Rust files outside every module tree, kernels that no op embeds, recipes that do not
//! load, golden files and benchmark files that no text names.

use std::collections::BTreeSet;

use super::Finding;
use super::dependencies::Crate;
use super::repository::{Repository, resolve};

const GOLDEN: &str = "anneal-testkit/golden/";
const BENCHMARKS: &str = "benchmarks/";
const RECIPES: &str = "recipes/";

pub fn check(repository: &Repository, crates: &[Crate]) -> Vec<Finding> {
    let mut findings = dead_modules(repository, crates);
    findings.extend(dead_kernels(repository));
    findings.extend(broken_recipes(repository));
    findings.extend(unnamed_files(repository));
    findings
}

fn dead_modules(repository: &Repository, crates: &[Crate]) -> Vec<Finding> {
    let mut reached = BTreeSet::new();
    for root in crates.iter().flat_map(|package| &package.roots) {
        follow(repository, root, &folder_of(root), &mut reached);
    }
    let in_a_crate =
        |path: &str| crates.iter().any(|package| path.starts_with(&format!("{}/", package.folder)));
    repository
        .paths()
        .filter(|path| path.ends_with(".rs") && in_a_crate(path) && !reached.contains(*path))
        .map(|path| Finding::new(path, 1, "no module declares this file", "declare it with mod or delete it"))
        .collect()
}

fn folder_of(path: &str) -> String {
    path.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.into())
}

/// Marks `file` and the files of the modules that it declares; `folder` is where those lie.
fn follow(repository: &Repository, file: &str, folder: &str, reached: &mut BTreeSet<String>) {
    let Some(text) = repository.text(file) else { return };
    if !reached.insert(file.into()) {
        return;
    }
    // A file that does not parse is a finding of the budgets.
    if let Ok(parsed) = syn::parse_file(text) {
        follow_items(repository, file, &parsed.items, folder, reached);
    }
    for included in text.split("include!(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
        if let Some(path) = resolve(file, included) {
            follow(repository, &path, &folder_of(&path), reached);
        }
    }
}

fn follow_items(
    repository: &Repository,
    file: &str,
    items: &[syn::Item],
    folder: &str,
    reached: &mut BTreeSet<String>,
) {
    for item in items {
        let syn::Item::Mod(module) = item else { continue };
        let name = module.ident.to_string();
        let inner = format!("{folder}/{name}");
        match (&module.content, path_attribute(&module.attrs)) {
            (Some((_, items)), _) => follow_items(repository, file, items, &inner, reached),
            (None, Some(path)) => {
                if let Some(path) = resolve(file, &path) {
                    follow(repository, &path, &folder_of(&path), reached);
                }
            }
            (None, None) => {
                for path in [format!("{inner}.rs"), format!("{inner}/mod.rs")] {
                    follow(repository, &path, &inner, reached);
                }
            }
        }
    }
}

/// The text of `#[path = "..."]`.
fn path_attribute(attributes: &[syn::Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(path), .. }) => Some(path.value()),
            _ => None,
        },
        _ => None,
    })
}

fn dead_kernels(repository: &Repository) -> Vec<Finding> {
    let mut embedded = BTreeSet::new();
    for (file, text) in repository.texts(&[".rs"]) {
        let names = text.split("include_str!(\"").skip(1).filter_map(|rest| rest.split('"').next());
        embedded.extend(names.filter_map(|name| resolve(file, name)));
    }
    repository
        .paths()
        .filter(|path| path.ends_with(".cu") && !embedded.contains(*path))
        .map(|path| Finding::new(path, 1, "no include_str! embeds this kernel", "embed it or delete it"))
        .collect()
}

fn broken_recipes(repository: &Repository) -> Vec<Finding> {
    let recipes = repository.texts(&[".yaml", ".yml"]).filter(|(path, _)| path.starts_with(RECIPES));
    let broken = recipes.filter_map(|(path, text)| {
        let error = anneal_recipe::Recipe::from_yaml(text, path, &[]).err()?.to_string();
        let error = error.replace('\n', "; ");
        Some(Finding::new(path, 1, format!("the recipe does not load: {error}"), "mend it"))
    });
    broken.collect()
}

/// A golden file is named by the stem of its file, or its folder, in Rust code; a benchmark file by its name, its stem
/// or its folder in any text but its own.
fn unnamed_files(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    let code: Vec<_> = repository.texts(&[".rs"]).collect();
    let texts: Vec<_> = repository.texts(&[".rs", ".md", ".py", ".sh", ".yaml", "/run"]).collect();
    for path in repository.paths() {
        if let Some(name) = path.strip_prefix(GOLDEN) {
            let top = name.split('/').next().unwrap_or(name);
            let stem = top.split('.').next().unwrap_or(top);
            if is_document(top) || code.iter().any(|(_, text)| has_word(text, stem)) {
                continue;
            }
            let top = format!("{GOLDEN}{top}");
            findings.push(Finding::new(
                &top,
                1,
                "no test names this golden file",
                "test against it or delete it",
            ));
        }
        if let Some(name) = path.strip_prefix(BENCHMARKS) {
            let mut parts: Vec<&str> = name.split('/').collect();
            let file = parts.pop().unwrap_or(name);
            let stem = file.split('.').next().unwrap_or(file);
            parts.extend([file, stem]);
            let named = |(other, text): &(&str, &str)| {
                *other != path && parts.iter().any(|part| has_word(text, part))
            };
            if is_document(file) || texts.iter().any(named) {
                continue;
            }
            findings.push(Finding::new(
                path,
                1,
                "no text names this benchmark file",
                "say in benchmarks/README.md what it is or delete it",
            ));
        }
    }
    // The files of a folder stand together.
    findings.dedup();
    findings
}

fn is_document(name: &str) -> bool {
    name.ends_with(".md") || name.starts_with("LICENSE")
}

/// Whether `word` stands in the text with no letter, digit or underscore beside it.
pub fn has_word(text: &str, word: &str) -> bool {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    text.match_indices(word).any(|(start, _)| {
        let before = text[..start].chars().next_back();
        let after = text[start + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(roots: &[&str]) -> Crate {
        let roots = roots.iter().map(|root| root.to_string()).collect();
        Crate { name: "a".into(), folder: "a".into(), dependencies: Vec::new(), roots }
    }

    fn findings(files: &[(&str, &str)], roots: &[&str]) -> Vec<String> {
        check(&Repository::of(files), &[package(roots)]).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn a_file_without_a_module_is_found() {
        let files = [
            (
                "a/src/lib.rs",
                "mod one;\nmod two;\nmod inline { mod deep; }\n#[path = \"odd/name.rs\"]\nmod other;\n",
            ),
            ("a/src/one.rs", "mod below;\n"),
            ("a/src/one/below.rs", "include!(\"data.rs\");"),
            ("a/src/one/data.rs", ""),
            ("a/src/two/mod.rs", "mod three;"),
            ("a/src/two/three.rs", ""),
            ("a/src/inline/deep.rs", ""),
            ("a/src/odd/name.rs", ""),
            ("a/tests/golden.rs", ""),
            ("a/src/forgotten.rs", ""),
            ("a/src/two/old.rs", ""),
        ];
        assert_eq!(
            findings(&files, &["a/src/lib.rs", "a/tests/golden.rs"]),
            [
                "a/src/forgotten.rs:1: no module declares this file, declare it with mod or delete it",
                "a/src/two/old.rs:1: no module declares this file, declare it with mod or delete it"
            ]
        );
    }

    #[test]
    fn a_kernel_that_no_op_embeds_is_found() {
        let code = "const KERNEL: &str = include_str!(\"kernel.cu\");";
        let files = [("a/src/op/mod.rs", code), ("a/src/op/kernel.cu", ""), ("a/src/old/kernel.cu", "")];
        assert_eq!(
            findings(&files, &["a/src/op/mod.rs"]),
            ["a/src/old/kernel.cu:1: no include_str! embeds this kernel, embed it or delete it"]
        );
    }

    #[test]
    fn a_recipe_that_does_not_load_is_found() {
        let good = "model: {preset: DiT-S/2, image_size: 32, channels: 4, classes: 10}\n\
            data: {kind: latents, path: x}\ntrain: {steps: 1, batch: 1}\n";
        let bad = good.replace("batch", "bach");
        let files = [("recipes/good.yaml", good), ("recipes/bad.yaml", &bad), ("elsewhere.yaml", "x: [")];
        assert_eq!(
            findings(&files, &[]),
            [
                "recipes/bad.yaml:1: the recipe does not load: unknown key 'train.bach' in recipes/bad.yaml, line 3: did you mean 'train.batch'?, mend it"
            ]
        );
    }

    #[test]
    fn a_golden_file_that_no_test_names_is_found() {
        let files = [
            ("a/tests/t.rs", "golden(\"used\"); folder(\"pipeline\"); \"unused_too\";"),
            ("anneal-testkit/golden/used.safetensors", ""),
            ("anneal-testkit/golden/pipeline/model.json", ""),
            ("anneal-testkit/golden/README.md", "unused"),
            ("anneal-testkit/golden/unused.safetensors", ""),
            ("anneal-testkit/golden/unnamed_folder/a.json", ""),
            ("anneal-testkit/golden/unnamed_folder/b.json", ""),
        ];
        assert_eq!(
            findings(&files, &["a/tests/t.rs"]),
            [
                "anneal-testkit/golden/unnamed_folder:1: no test names this golden file, test against it or delete it",
                "anneal-testkit/golden/unused.safetensors:1: no test names this golden file, test against it or delete it"
            ]
        );
    }

    #[test]
    fn a_benchmark_file_that_no_text_names_is_found() {
        let files = [
            ("benchmarks/README.md", "`peers/step.py` and the raw data in `2025-01-02/`"),
            ("benchmarks/peers/step.py", "import model"),
            ("benchmarks/peers/model.py", ""),
            ("benchmarks/2025-01-02/raw.json", ""),
            ("benchmarks/forgotten.py", "forgotten"),
        ];
        assert_eq!(
            findings(&files, &[]),
            [
                "benchmarks/forgotten.py:1: no text names this benchmark file, say in benchmarks/README.md what it is or delete it"
            ]
        );
    }
}
