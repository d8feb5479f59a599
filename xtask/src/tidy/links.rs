//! Relative links of the documents: the file must exist, and the heading too where one is named.

use super::Finding;
use super::repository::{Repository, resolve};

pub fn check(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in repository.texts(&[".md"]) {
        for (number, line) in lines_outside_fences(text) {
            for target in targets(line) {
                if let Some(what) = problem(repository, path, target) {
                    findings.push(Finding::new(path, number, what, "correct the link"));
                }
            }
        }
    }
    findings
}

/// The numbered lines that are not in ``` fences.
pub fn lines_outside_fences(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_fenced ^= is_fence;
        (!is_fence && !is_fenced).then_some((index + 1, line))
    })
}

/// Targets of `[text](target)`, `![text](target)`, `src="target"` and `href="target"` outside of backticks.
fn targets(line: &str) -> Vec<&str> {
    let mut targets = Vec::new();
    for outside_code in line.split('`').step_by(2) {
        for (opening, closing) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
            let rests = outside_code.split(opening).skip(1);
            let found = rests.filter_map(|rest| rest.split(closing).next()?.split_whitespace().next());
            targets.extend(found);
        }
    }
    targets
}

fn problem(repository: &Repository, from: &str, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, heading) =
        target.split_once('#').map_or((target, None), |(file, heading)| (file, Some(heading)));
    let path = if file.is_empty() { Some(from.to_string()) } else { resolve(from, file) };
    let Some(path) = path.filter(|path| repository.has(path)) else {
        return Some(format!("the link to {target} leads nowhere"));
    };
    let (heading, text) = (heading?, repository.text(&path).filter(|_| path.ends_with(".md"))?);
    let has_heading =
        lines_outside_fences(text).any(|(_, line)| line.starts_with('#') && anchor(line) == heading);
    (!has_heading).then(|| format!("{path} has no heading for the link to {target}"))
}

/// The anchor that the usual renderers make of a heading.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept =
        words.chars().filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'));
    kept.map(|character| if character == ' ' { '-' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(text: &str) -> Vec<String> {
        let files =
            [("docs/a.md", text), ("README.md", "# Bad input, and `errors`\n"), ("docs/picture.png", "")];
        check(&Repository::of(&files)).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn links_that_lead_somewhere_are_quiet() {
        let text = "# Own heading\n[a](../README.md) ![b](picture.png) [c](#own-heading) [d](https://example.org/x)\n\
            [e](../README.md#bad-input-and-errors \"title\") [f](../docs/) <img src=\"picture.png\"> `[g](gone.md)`\n\
            ```\n[h](gone.md)\n```\n";
        assert_eq!(findings(text), Vec::<String>::new());
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let text =
            "[a](gone.md)\n\n<img src=\"gone.png\"> [b](#gone) [c](../README.md#gone) [d](../../x.md)\n";
        assert_eq!(
            findings(text),
            [
                "docs/a.md:1: the link to gone.md leads nowhere, correct the link",
                "docs/a.md:3: docs/a.md has no heading for the link to #gone, correct the link",
                "docs/a.md:3: README.md has no heading for the link to ../README.md#gone, correct the link",
                "docs/a.md:3: the link to ../../x.md leads nowhere, correct the link",
                "docs/a.md:3: the link to gone.png leads nowhere, correct the link",
            ]
        );
    }
}
