//! Two resolved recipes compared key by key.

use crate::Recipe;

/// One line for each key whose value differs, in the order of the keys: `optim.lr: 0.0001 -> 0.0002`. A key that only
/// one recipe has (another kind of model or diffusion) reads `absent` on the other side.
pub fn differences(before: &Recipe, after: &Recipe) -> Vec<String> {
    let (before, after) = (before.tree(), after.tree());
    let (before, after) = (before.leaves(), after.leaves());
    let value_in = |leaves: &[(String, &crate::node::Node)], key: &str| {
        leaves
            .iter()
            .find(|(other, _)| other == key)
            .map_or("absent".to_string(), |(_, node)| node.value.to_string())
    };
    let only_after = after.iter().filter(|(key, _)| !before.iter().any(|(other, _)| other == key));
    before
        .iter()
        .chain(only_after)
        .map(|(key, _)| (key, value_in(&before, key), value_in(&after, key)))
        .filter(|(_, before, after)| before != after)
        .map(|(key, before, after)| format!("{key}: {before} -> {after}"))
        .collect()
}
