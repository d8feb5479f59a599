//! From file and overrides to a resolved recipe, and back to YAML.

use std::path::Path;

use serde::Deserialize;

use crate::error::Place;
use crate::node::{self, Node, Origin, Value};
use crate::read::{Problem, ReadError, Reader};
use crate::suggest;
use crate::{GuidanceMode, Recipe, RecipeError};

impl Recipe {
    /// Reads the file, lays the overrides (`optim.lr=2e-4`, `ema.rates=[0.99, 0.999]`, `optim.clip=null`) over it in
    /// their order, fills in defaults and checks it.
    pub fn load(path: impl AsRef<Path>, overrides: &[String]) -> Result<Recipe, RecipeError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|source| RecipeError::Unreadable { path: path.into(), source })?;
        Recipe::from_yaml(&text, &path.to_string_lossy(), overrides)
    }

    /// The same from text; `file` names it in errors, and its stem is the default of `name`.
    pub fn from_yaml(text: &str, file: &str, overrides: &[String]) -> Result<Recipe, RecipeError> {
        let mut tree = node::parse(text, file)?;
        for text in overrides {
            apply_override(&mut tree, text)?;
        }
        expand_guidance_mode(&mut tree, file)?;
        fill_dependent_defaults(&mut tree, file);
        let recipe = Recipe::deserialize(Reader(&tree)).map_err(|error| explain(error, file, &tree))?;
        match recipe.validate() {
            Ok(()) => Ok(recipe),
            Err(RecipeError::Invalid { problems }) => {
                let problems = problems.into_iter().map(|problem| locate(problem, file, &tree)).collect();
                Err(RecipeError::Invalid { problems })
            }
            Err(other) => Err(other),
        }
    }

    /// The recipe with every key written out. [`Recipe::load`] reads it back to an equal one.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).expect("a recipe holds only text, numbers and lists")
    }

    pub(crate) fn tree(&self) -> Node {
        node::parse(&self.to_yaml(), "resolved recipe").expect("what was written as YAML is YAML")
    }
}

fn apply_override(tree: &mut Node, text: &str) -> Result<(), RecipeError> {
    let wrong = |reason: String| RecipeError::Override { text: text.into(), reason };
    let (key, value) =
        text.split_once('=').ok_or_else(|| wrong("write it as key=value, such as optim.lr=2e-4".into()))?;
    let key = key.trim();
    if key.split('.').any(str::is_empty) {
        return Err(wrong("the key has an empty part; write it as section.key=value".into()));
    }
    let mut value = match value.trim() {
        "" => return Err(wrong(format!("no value; write {key}=null to unset the key"))),
        value => {
            node::parse(value, "command line").map_err(|_| wrong("the value is not valid YAML".into()))?
        }
    };
    value.set_origin(Origin::CommandLine);
    let mut place = tree;
    for (depth, part) in key.split('.').enumerate() {
        let found = place.value.describe();
        place = place.entry(part, Origin::CommandLine).ok_or_else(|| {
            let section = key.split('.').take(depth).collect::<Vec<_>>().join(".");
            wrong(format!("'{section}' is {found}, which has no keys in it"))
        })?;
    }
    *place = value;
    Ok(())
}

/// Sets a key that is absent or null; does nothing where the section is not a section, which the reader reports.
fn set_default(tree: &mut Node, section: &str, key: &str, value: Value) {
    set_default_from(tree, section, key, Node { value, origin: Origin::Line(0) });
}

/// The same with the place that the default follows from.
fn set_default_from(tree: &mut Node, section: &str, key: &str, default: Node) {
    let origin = default.origin;
    let parent = if section.is_empty() { Some(tree) } else { tree.entry(section, origin) };
    if let Some(node) =
        parent.and_then(|parent| parent.entry(key, origin)).filter(|node| node.value == Value::Null)
    {
        *node = default;
    }
}

/// Defaults that follow from other keys. Those that do not stand with their fields.
fn fill_dependent_defaults(tree: &mut Node, file: &str) {
    if tree.entries().is_none() {
        return;
    }
    let stem = Path::new(file).file_stem().map_or("run".into(), |stem| stem.to_string_lossy().into_owned());
    set_default(tree, "", "name", Value::Text(stem));
    if let Some(Value::Text(name)) = tree.get("name").map(|node| node.value.clone()) {
        set_default(tree, "", "output", Value::Text(format!("runs/{name}")));
    }
    set_default(tree, "diffusion", "kind", Value::Text("gaussian".into()));
    if tree.get("model").is_some() {
        set_default(tree, "model", "kind", Value::Text("dit".into()));
    }
    for key in ["image_size", "channels"] {
        let of_model = tree.get("model").and_then(|model| model.get(key)).cloned();
        if let Some(default) = of_model.filter(|_| tree.get("data").is_some()) {
            set_default_from(tree, "data", key, default);
        }
    }
    let sampler = if is_flow(tree) { "flow_euler" } else { "ddim" };
    set_default(tree, "sample", "sampler", Value::Text(sampler.into()));
}

/// Writes out a guidance mode in the short form of the command line: `interval:0.2:0.8` as `{interval: {low: 0.2, high: 0.8}}`.
fn expand_guidance_mode(tree: &mut Node, file: &str) -> Result<(), RecipeError> {
    let Some(node) = tree.get("sample").and_then(|sample| sample.get("guidance_mode")) else { return Ok(()) };
    let origin = node.origin;
    let short = match &node.value {
        // A mode that has numbers, without them; other plain names are read as such.
        Value::Text(text) if text.contains(':') || text == "interval" => text.clone(),
        _ => return Ok(()),
    };
    let mode: GuidanceMode = short.parse().map_err(|reason| {
        let problem = format!("sample.guidance_mode: {reason} ({})", place(Some(origin), file));
        RecipeError::Invalid { problems: vec![problem] }
    })?;
    let written = serde_saphyr::to_string(&mode).expect("a mode holds only names and numbers");
    let mut expanded = node::parse(&written, file)?;
    expanded.set_origin(origin);
    if let Some(place) = tree.entry("sample", origin).and_then(|sample| sample.entry("guidance_mode", origin))
    {
        *place = expanded;
    }
    Ok(())
}

fn place(origin: Option<Origin>, file: &str) -> Place {
    match origin {
        Some(Origin::CommandLine) => Place::CommandLine,
        Some(Origin::Line(line)) if line > 0 => Place::File { file: file.into(), line: Some(line) },
        _ => Place::File { file: file.into(), line: None },
    }
}

/// Adds to a problem, which begins with its dotted key, where that key was written.
fn locate(problem: String, file: &str, tree: &Node) -> String {
    let key = problem.split([' ', '[']).next().unwrap_or_default();
    let node = key.split('.').try_fold(tree, |node, key| node.get(key));
    format!("{problem} ({})", place(node.map(|node| node.origin), file))
}

fn explain(error: ReadError, file: &str, tree: &Node) -> RecipeError {
    let path = error.path.join(".");
    let dotted = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    let place = place(error.origin, file);
    match error.problem {
        Problem::UnknownKey { key, known } => {
            let mut known = known.to_vec();
            let section = error.path.iter().try_fold(tree, |node, key| node.get(key));
            if !known.contains(&"kind") && section.is_some_and(|section| section.get("kind").is_some()) {
                known.push("kind");
            }
            let advice = suggest::advice(&path, &key, &known, &known_keys(tree));
            RecipeError::UnknownKey { key: dotted(&key), place, advice }
        }
        Problem::MissingKey { key } if path.is_empty() => {
            RecipeError::MissingSection { key: key.into(), file: file.into() }
        }
        Problem::MissingKey { key } => RecipeError::MissingKey { key: dotted(key), file: file.into() },
        Problem::WrongType { found, expected } => {
            let found = found.unwrap_or_else(|| "something else".into());
            let key = if path.is_empty() { "recipe".into() } else { path };
            RecipeError::WrongType { key, place, found, expected }
        }
        Problem::UnknownValue { found, known } => {
            let advice = match suggest::nearest(&found, known) {
                Some(name) => format!("did you mean '{name}'? (known: {})", known.join(", ")),
                None => format!("known are {}", known.join(", ")),
            };
            RecipeError::UnknownValue { key: path, place, found, advice }
        }
    }
}

/// The shortest valid recipe.
pub(crate) const MINIMAL: &str = "
model: {preset: DiT-S/2, image_size: 32, channels: 4, classes: 10}
data: {kind: latents, path: latents}
train: {steps: 100, batch: 8}
";

/// Every dotted key that a recipe with this kind of diffusion may hold, from the written form of the shortest recipe.
pub(crate) fn known_keys(tree: &Node) -> Vec<String> {
    let kind = match is_flow(tree) {
        true => "diffusion.kind=flow",
        false => "diffusion.kind=gaussian",
    };
    let recipe = Recipe::from_yaml(MINIMAL, "minimal", &[kind.into()]).expect("the shortest recipe is valid");
    recipe.tree().leaves().into_iter().map(|(key, _)| key).collect()
}

fn is_flow(tree: &Node) -> bool {
    let kind = tree.get("diffusion").and_then(|section| section.get("kind"));
    kind.is_some_and(|kind| kind.value == Value::Text("flow".into()))
}
