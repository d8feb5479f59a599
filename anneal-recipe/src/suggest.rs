//! The nearest known name for a wrong one.

/// Names that other programs use for our keys. Only suggestions come from here: a name that no struct knows (any more)
/// is never offered, because candidates are first compared with the keys that serde reports.
pub(crate) const ALIASES: [(&str, &str); 43] = [
    ("accumulation", "accumulate"),
    ("base_lr", "lr"),
    ("batch_size", "batch"),
    ("beta_schedule", "schedule"),
    ("cfg", "guidance"),
    ("cfg_scale", "guidance"),
    ("class_dropout", "label_dropout"),
    ("ckpt", "checkpoint"),
    ("dtype", "precision"),
    ("ema_decay", "rates"),
    ("embed_dim", "hidden_size"),
    ("epsilon", "eps"),
    ("folder", "path"),
    ("grad_accum", "accumulate"),
    ("grad_clip", "clip"),
    ("gradient_accumulation_steps", "accumulate"),
    ("gradient_checkpointing", "checkpoint_activations"),
    ("guidance_scale", "guidance"),
    ("hidden_dim", "hidden_size"),
    ("horizontal_flip", "flip"),
    ("in_channels", "channels"),
    ("input_size", "image_size"),
    ("iterations", "steps"),
    ("keep", "keep_last"),
    ("layers", "depth"),
    ("learning_rate", "lr"),
    ("max_grad_norm", "clip"),
    ("max_steps", "steps"),
    ("noise_schedule", "schedule"),
    ("num_classes", "classes"),
    ("num_heads", "heads"),
    ("num_layers", "depth"),
    ("num_samples", "num"),
    ("num_steps", "steps"),
    ("num_workers", "workers"),
    ("optimizer", "optim"),
    ("prediction_type", "target"),
    ("resolution", "image_size"),
    ("root", "path"),
    ("timesteps", "steps"),
    ("type", "kind"),
    ("warmup_steps", "warmup"),
    ("width", "hidden_size"),
];

/// The known name that `name` most probably means, if one is near.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let name = name.to_lowercase().replace('-', "_");
    let aliases = ALIASES
        .iter()
        .filter_map(|(alias, key)| known.iter().find(|known| *known == key).map(|known| (*alias, *known)));
    let itself = known.iter().map(|known| (*known, *known));
    itself
        .chain(aliases)
        .map(|(candidate, known)| {
            (strsim::damerau_levenshtein(&name, &candidate.to_lowercase()), candidate, known)
        })
        .filter(|(distance, candidate, _)| *distance <= candidate.len().max(name.len()) / 3)
        .min_by_key(|(distance, _, _)| *distance)
        .map(|(_, _, known)| known)
}

/// What to do about the unknown `name`: the nearest name, or all names there are. `path` is the dotted section.
pub(crate) fn advice(path: &str, name: &str, known: &[&str], elsewhere: &[String]) -> String {
    let dotted = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    if let Some(key) = nearest(name, known) {
        return format!("did you mean '{}'?", dotted(key));
    }
    let meant = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, key)| key);
    let moved: Vec<String> = elsewhere
        .iter()
        .filter(|key| key.rsplit('.').next() == Some(meant))
        .map(|key| format!("'{key}'"))
        .collect();
    if !moved.is_empty() {
        return format!("did you mean {}?", moved.join(" or "));
    }
    let place = if path.is_empty() { "a recipe".to_string() } else { format!("'{path}'") };
    format!("{place} knows {}", known.join(", "))
}
