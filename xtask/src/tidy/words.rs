//! Words that do not belong into the repository: notes of unfinished work, switched-off tests, stubs, and paths of one
//! person's machine.

use super::Finding;
use super::repository::Repository;

/// Written in two parts, so that this table is not its own finding.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("TO", "DO", "do it or open an issue"),
    ("FIX", "ME", "fix it or open an issue"),
    ("#[ig", "nore", "make the test pass or delete it"),
    ("to", "do!(", "write it or leave it out"),
    ("unimpl", "emented!(", "write it or return an error that says what is missing"),
    ("/wo", "rk/", "do not name folders of one machine"),
    ("/ho", "me/", "do not name folders of one machine"),
    ("/ro", "ot/", "do not name folders of one machine"),
    ("/Us", "ers/", "do not name folders of one machine"),
];

/// Files that others write.
const EXEMPT: &[&str] = &["Cargo.lock", "LICENSE-APACHE", "LICENSE-MIT"];

pub fn check(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for path in repository.paths().filter(|path| !EXEMPT.contains(path)) {
        let Some(text) = repository.text(path) else { continue };
        for (index, line) in text.lines().enumerate() {
            for (first, second, remedy) in FORBIDDEN {
                let word = format!("{first}{second}");
                if contains(line, &word) {
                    findings.push(Finding::new(path, index + 1, format!("'{word}' stands here"), *remedy));
                }
            }
        }
    }
    findings
}

/// Whether the word stands in the line, not as a part of a longer one (a path such as `network/` is fine).
fn contains(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + word.len()..].chars().next();
        let joins = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let is_relative = before == Some('.') && word.starts_with('/');
        let continues = word.ends_with(char::is_alphabetic) && joins(after);
        !(joins(before) || is_relative || continues)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_forbidden_word_is_found_once() {
        for (first, second, remedy) in FORBIDDEN {
            let text = format!("fine\nhere: {first}{second}\n");
            let found = check(&Repository::of(&[("a/notes.md", &text)]));
            let expected = format!("a/notes.md:2: '{first}{second}' stands here, {remedy}");
            assert_eq!(found.iter().map(Finding::to_string).collect::<Vec<_>>(), [expected]);
        }
    }

    #[test]
    fn longer_words_and_other_peoples_files_are_left_alone() {
        let inside =
            format!("a network/x, my{0}, {0}_LIST, .{1}x\n", ["TO", "DO"].concat(), ["/wo", "rk/"].concat());
        let licence = format!("{}{}\n", "TO", "DO");
        let files = [("a.md", inside.as_str()), ("Cargo.lock", &licence)];
        assert_eq!(check(&Repository::of(&files)), []);
    }
}
