//! Budgets: a function has at most 70 lines, a source file at most 600.
//!
//! What counts: a function from its `fn` to its closing brace; a file with all its lines but those of inline
//! `#[cfg(test)]` modules. Free of the function budget is test code (`#[cfg(test)]` modules, `tests.rs`, folders `tests`
//! and `benches`) and a flat table (a body that is one `match` of one-line arms, or one array or `vec!`). Free of the
//! file budget is a Rust file without functions (constants, declarations).
//!
//! `xtask/ratchet.txt` lists what was over its budget when it was last looked at. An entry may only shrink: growth is a
//! finding, and so is an entry that is larger than what is measured (`cargo xtask tidy --tighten` lowers it).

use std::collections::BTreeMap;

use syn::spanned::Spanned;
use syn::visit::Visit;

use super::Finding;
use super::repository::Repository;

pub const RATCHET: &str = "xtask/ratchet.txt";
const FUNCTION_LINES: usize = 70;
const FILE_LINES: usize = 600;
const SOURCES: &[&str] = &[".rs", ".cu", ".py", ".sh"];

/// Something with a budget: what the ratchet calls it, where it is, how long it is.
#[derive(Debug, PartialEq)]
struct Measure {
    key: String,
    path: String,
    line: usize,
    lines: usize,
    budget: usize,
}

pub fn check(repository: &Repository) -> Vec<Finding> {
    let (measures, mut findings) = measure(repository);
    let ratchet = repository.text(RATCHET).unwrap_or_default();
    let (entries, broken) = parse_ratchet(ratchet);
    findings.extend(broken);
    for measure in &measures {
        let Measure { key, path, line, lines, budget } = measure;
        let listed = entries.get(key.as_str()).map(|(_, lines)| *lines);
        if listed.is_none() && lines > budget {
            let remedy = format!("split it: the budget is {budget}");
            findings.push(Finding::new(path, *line, format!("{key} has {lines} lines"), remedy));
        }
        if let Some(listed) = listed.filter(|listed| lines > listed && lines > budget) {
            let what = format!("{key} grew from {listed} to {lines} lines");
            findings.push(Finding::new(
                path,
                *line,
                what,
                "bring it back: entries of the ratchet only shrink",
            ));
        }
    }
    for (key, (line, listed)) in &entries {
        let measured = measures.iter().find(|measure| measure.key == *key);
        let what = match measured {
            None => format!("the entry '{key}' names nothing that exists"),
            Some(measure) if measure.lines <= measure.budget => format!("'{key}' is within its budget"),
            Some(measure) if measure.lines < *listed => format!("'{key}' has only {} lines", measure.lines),
            Some(_) => continue,
        };
        findings.push(Finding::new(RATCHET, *line, what, "run cargo xtask tidy --tighten"));
    }
    findings
}

/// The ratchet with each entry lowered to what is measured, and dropped when it is within the budget or gone.
pub fn tightened(ratchet: &str, repository: &Repository) -> String {
    let (measures, _) = measure(repository);
    let mut text = String::new();
    for line in ratchet.lines() {
        let kept = match parse_entry(line) {
            None => Some(line.to_string()),
            Some((key, listed)) => measures
                .iter()
                .find(|measure| measure.key == key && measure.lines > measure.budget)
                .map(|measure| format!("{key} = {}", measure.lines.min(listed))),
        };
        if let Some(kept) = kept {
            text.push_str(&kept);
            text.push('\n');
        }
    }
    text
}

/// `function PATH NAME = LINES` or `file PATH = LINES`; `None` for comments, blank and malformed lines.
fn parse_entry(line: &str) -> Option<(&str, usize)> {
    let (key, lines) = line.split_once('=')?;
    let key = key.trim();
    let words = key.split(' ').count();
    let known = key.starts_with("function ") && words == 3 || key.starts_with("file ") && words == 2;
    lines.trim().parse().ok().filter(|_| known).map(|lines| (key, lines))
}

/// Entries by key, with the line on which they stand.
fn parse_ratchet(text: &str) -> (BTreeMap<&str, (usize, usize)>, Vec<Finding>) {
    let mut entries = BTreeMap::new();
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        match parse_entry(line) {
            Some((key, lines)) => {
                entries.insert(key, (index + 1, lines));
            }
            None => findings.push(Finding::new(
                RATCHET,
                index + 1,
                format!("cannot read '{line}'"),
                "write 'function PATH NAME = LINES' or 'file PATH = LINES'",
            )),
        }
    }
    (entries, findings)
}

fn measure(repository: &Repository) -> (Vec<Measure>, Vec<Finding>) {
    let mut measures = Vec::new();
    let mut findings = Vec::new();
    for (path, text) in repository.texts(SOURCES) {
        let mut lines = text.lines().count();
        if path.ends_with(".rs") {
            let file = match syn::parse_file(text) {
                Ok(file) => file,
                Err(error) => {
                    let line = error.span().start().line;
                    findings.push(Finding::new(path, line, format!("this is not Rust: {error}"), "mend it"));
                    continue;
                }
            };
            let mut visitor =
                Functions { path, owner: String::new(), measures: Vec::new(), found: 0, test_lines: 0 };
            visitor.visit_file(&file);
            lines = if visitor.found == 0 { 0 } else { lines - visitor.test_lines };
            if !is_test_file(path) {
                measures.extend(visitor.measures);
            }
        }
        measures.push(Measure {
            key: format!("file {path}"),
            path: path.into(),
            line: 1,
            lines,
            budget: FILE_LINES,
        });
    }
    (measures, findings)
}

fn is_test_file(path: &str) -> bool {
    let mut folders = path.split('/');
    let name = folders.next_back().unwrap_or_default();
    name == "tests.rs" || folders.any(|folder| folder == "tests" || folder == "benches")
}

/// Collects the functions of a file outside its test modules.
struct Functions<'a> {
    path: &'a str,
    /// The type whose `impl` or `trait` is being visited.
    owner: String,
    measures: Vec<Measure>,
    /// Functions of every kind, tests and tables too.
    found: usize,
    /// Lines of inline test modules.
    test_lines: usize,
}

impl Functions<'_> {
    fn add(&mut self, signature: &syn::Signature, body: &syn::Block) {
        self.found += 1;
        if is_flat_table(body) {
            return;
        }
        let line = signature.fn_token.span.start().line;
        let end = body.brace_token.span.close().end().line;
        let owner = if self.owner.is_empty() { String::new() } else { format!("{}::", self.owner) };
        self.measures.push(Measure {
            key: format!("function {} {owner}{}", self.path, signature.ident),
            path: self.path.into(),
            line,
            lines: end + 1 - line,
            budget: FUNCTION_LINES,
        });
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        if is_for_tests(&function.attrs) {
            self.found += 1;
            return;
        }
        self.add(&function.sig, &function.block);
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.add(&function.sig, &function.block);
        syn::visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.add(&function.sig, body);
        }
        syn::visit::visit_trait_item_fn(self, function);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let outer = std::mem::replace(&mut self.owner, type_name(&item.self_ty));
        syn::visit::visit_item_impl(self, item);
        self.owner = outer;
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        let outer = std::mem::replace(&mut self.owner, item.ident.to_string());
        syn::visit::visit_item_trait(self, item);
        self.owner = outer;
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if module.content.is_none() || !is_for_tests(&module.attrs) {
            return syn::visit::visit_item_mod(self, module);
        }
        self.found += 1;
        self.test_lines += module.span().end().line + 1 - module.span().start().line;
    }
}

/// Whether `#[test]` or a `#[cfg(...)]` that asks for `test` stands on the item.
fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let asks_for_test = || attribute.parse_args::<syn::Ident>().is_ok_and(|argument| argument == "test");
        attribute.path().is_ident("test") || attribute.path().is_ident("cfg") && asks_for_test()
    })
}

fn type_name(of: &syn::Type) -> String {
    match of {
        syn::Type::Path(path) => {
            path.path.segments.last().map_or(String::new(), |last| last.ident.to_string())
        }
        syn::Type::Reference(reference) => type_name(&reference.elem),
        _ => "_".into(),
    }
}

fn is_flat_table(body: &syn::Block) -> bool {
    let [syn::Stmt::Expr(expression, None)] = body.stmts.as_slice() else {
        return matches!(body.stmts.as_slice(), [syn::Stmt::Macro(call)] if call.mac.path.is_ident("vec"));
    };
    match expression {
        syn::Expr::Array(_) => true,
        syn::Expr::Macro(call) => call.mac.path.is_ident("vec"),
        syn::Expr::Match(table) => table.arms.iter().all(|arm| {
            let span = arm.body.span();
            span.start().line == span.end().line
        }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_function(name: &str, statements: usize) -> String {
        format!("fn {name}() {{\n{}}}\n", "    work();\n".repeat(statements))
    }

    fn findings(files: &[(&str, &str)]) -> Vec<String> {
        check(&Repository::of(files)).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn a_function_over_its_budget_is_found() {
        assert_eq!(findings(&[("a/src/lib.rs", &long_function("fits", 68))]), Vec::<String>::new());
        let text = format!("struct S;\nimpl S {{\n{}}}\n", long_function("long", 69));
        assert_eq!(
            findings(&[("a/src/lib.rs", &text)]),
            ["a/src/lib.rs:3: function a/src/lib.rs S::long has 71 lines, split it: the budget is 70"]
        );
    }

    #[test]
    fn tests_and_flat_tables_have_no_function_budget() {
        let test = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", long_function("long", 90));
        let arms = "        1 => 2,\n".repeat(90);
        let table =
            format!("fn table(x: u32) -> u32 {{\n    match x {{\n{arms}        _ => 0,\n    }}\n}}\n");
        let long = long_function("long", 90);
        let files = [
            ("a/src/x.rs", test.as_str()),
            ("a/src/table.rs", &table),
            ("a/src/tests.rs", &long),
            ("a/tests/y.rs", &long),
        ];
        assert_eq!(findings(&files), Vec::<String>::new());
        let logic = table.replacen("1 => 2,", "1 => {\n            work();\n            2\n        }", 1);
        assert_eq!(findings(&[("a/src/table.rs", &logic)]).len(), 1, "an arm with logic makes it a function");
    }

    #[test]
    fn a_file_over_its_budget_is_found() {
        let long = "fn f() {}\n".repeat(601);
        assert_eq!(
            findings(&[("a/src/lib.rs", &long), ("a/k.py", &"x = 1\n".repeat(601))]),
            [
                "a/k.py:1: file a/k.py has 601 lines, split it: the budget is 600",
                "a/src/lib.rs:1: file a/src/lib.rs has 601 lines, split it: the budget is 600"
            ]
        );
        let constants = "const A: u32 = 1;\n".repeat(700);
        let tests = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{}}}\n", "\n".repeat(700));
        assert_eq!(findings(&[("a/src/lib.rs", &constants), ("a/src/x.rs", &tests)]), Vec::<String>::new());
    }

    #[test]
    fn the_ratchet_only_shrinks() {
        let text = long_function("long", 79);
        let of = |ratchet: &str| findings(&[("a.rs", &text), (RATCHET, ratchet)]);
        assert_eq!(of("# why\nfunction a.rs long = 81\n"), Vec::<String>::new());
        assert_eq!(
            of("function a.rs long = 80\n"),
            [
                "a.rs:1: function a.rs long grew from 80 to 81 lines, bring it back: entries of the ratchet only shrink"
            ]
        );
        assert_eq!(
            of("function a.rs long = 82\nfile b.rs = 700\nfile a.rs = 700\nlong 3\n"),
            [
                "xtask/ratchet.txt:4: cannot read 'long 3', write 'function PATH NAME = LINES' or 'file PATH = LINES'",
                "xtask/ratchet.txt:3: 'file a.rs' is within its budget, run cargo xtask tidy --tighten",
                "xtask/ratchet.txt:2: the entry 'file b.rs' names nothing that exists, run cargo xtask tidy --tighten",
                "xtask/ratchet.txt:1: 'function a.rs long' has only 81 lines, run cargo xtask tidy --tighten",
            ]
        );
    }

    #[test]
    fn tightening_lowers_and_drops_but_never_raises() {
        let text = long_function("long", 79) + &long_function("longer", 99);
        let repository = Repository::of(&[("a.rs", &text)]);
        let ratchet = "# why\nfunction a.rs long = 90\nfunction a.rs longer = 95\nfile b.rs = 700\n";
        assert_eq!(
            tightened(ratchet, &repository),
            "# why\nfunction a.rs long = 81\nfunction a.rs longer = 95\n"
        );
    }

    #[test]
    fn what_is_not_rust_is_found() {
        let found = findings(&[("a.rs", "fn f( {}\n")]);
        assert!(found.len() == 1 && found[0].starts_with("a.rs:1: this is not Rust: "), "{found:?}");
    }
}
