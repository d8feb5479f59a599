//! The words of every refusal to read.

use super::*;

/// The message for one override on a valid recipe.
fn refused(text: &str) -> String {
    message(DIGITS, &[text])
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_name() {
    let yaml = format!("{DIGITS}optim:\n  lr: 1e-3\n  learning_rat: 2\n");
    let expected = "unknown key 'optim.learning_rat' in recipes/x.yaml, line 6: did you mean 'optim.lr'?";
    assert_eq!(message(&yaml, &[]), expected);
    let yaml = format!("{DIGITS}smaple:\n  every: 3\n");
    assert_eq!(message(&yaml, &[]), "unknown key 'smaple' in recipes/x.yaml, line 4: did you mean 'sample'?");
    for (text, key, meant) in [
        ("optim.learning_rate=1", "optim.learning_rate", "'optim.lr'"),
        ("train.batch_size=8", "train.batch_size", "'train.batch'"),
        ("train.checkpoint.keeplast=2", "train.checkpoint.keeplast", "'train.checkpoint.keep_last'"),
        ("model.hiden-size=2", "model.hiden-size", "'model.hidden_size'"),
        ("model.kinds=dit", "model.kinds", "'model.kind'"),
        ("lr=2e-4", "lr", "'optim.lr'"),
        ("learning_rate=2e-4", "learning_rate", "'optim.lr'"),
        ("batch_size=2", "batch_size", "'train.batch'"),
        ("steps=7", "steps", "'diffusion.steps' or 'train.steps' or 'sample.steps'"),
        (
            "sample.guidance_mode={interval: {hihg: 1}}",
            "sample.guidance_mode.interval.hihg",
            "'sample.guidance_mode.interval.high'",
        ),
    ] {
        assert_eq!(refused(text), format!("unknown key '{key}' on the command line: did you mean {meant}?"));
    }
}

#[test]
fn an_unknown_key_with_no_near_name_lists_the_known_ones() {
    let expected =
        "unknown key 'train.checkpoint.zebra' on the command line: 'train.checkpoint' knows every, keep_last";
    assert_eq!(refused("train.checkpoint.zebra=1"), expected);
    let sections = "a recipe knows name, seed, device, memory_limit, output, model, diffusion, data, optim, ema, train, sample";
    assert_eq!(refused("zebra=1"), format!("unknown key 'zebra' on the command line: {sections}"));
    let flow = message(DIGITS, &["diffusion={kind: flow, target: v}"]);
    assert_eq!(flow, "unknown key 'diffusion.target' on the command line: 'diffusion' knows time, kind");
}

#[test]
fn a_wrong_type_names_key_place_found_and_expected() {
    let yaml = format!("{DIGITS}optim:\n  lr: fast\n");
    let expected =
        "wrong value for 'optim.lr' in recipes/x.yaml, line 5: found the text \"fast\", expected a number";
    assert_eq!(message(&yaml, &[]), expected);
    let whole = "a whole number, 0 or more";
    let size = "a size such as 32 or [height, width]";
    for (text, key, found, wanted) in [
        ("train.steps=1.5", "train.steps", "the number 1.5", whole),
        ("train.steps=-1", "train.steps", "the number -1", whole),
        ("train.batch=null", "train.batch", "nothing (null)", whole),
        ("data.flip=no", "data.flip", "the text \"no\"", "true or false"),
        ("ema.rates=[0.9, x]", "ema.rates", "the text \"x\"", "a number"),
        ("ema.rates=0.9", "ema.rates", "the number 0.9", "a list, such as [1, 2]"),
        ("optim.betas=[0.9]", "optim.betas", "a list of length 1", "a list of length 2"),
        ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas", "a list of length 3", "a list of length 2"),
        ("train=5", "train", "the number 5", "a section of keys"),
        ("optim={lr: {a: 1}}", "optim.lr", "a section of keys", "a number"),
        ("name=2024", "name", "the number 2024", "text (in quotes if it looks like a number)"),
        ("output=7", "output", "the number 7", "a path"),
        (
            "train.chunk_size=8G",
            "train.chunk_size",
            "the text \"8G\"",
            "a byte size such as 512MiB, 0.5GiB or 8GB",
        ),
        ("model.image_size=[8]", "model.image_size", "a list of length 1", size),
        ("model.image_size=[8, 8, 1]", "model.image_size", "a list of length 3", size),
        ("train.precision=[1]", "train.precision", "a list", "one of the known names"),
        (
            "diffusion={kind: flow, time: {uniform: {a: 1}}}",
            "diffusion.time",
            "a section of keys",
            "the name alone, which takes no keys",
        ),
    ] {
        let expected =
            format!("wrong value for '{key}' on the command line: found {found}, expected {wanted}");
        assert_eq!(refused(text), expected);
    }
}

#[test]
fn an_unknown_value_is_named_with_the_known_ones() {
    for (text, expected) in [
        (
            "train.precision=fp23",
            "unknown value 'fp23' for 'train.precision' on the command line: did you mean 'fp32'? (known: fp32, tf32, bf16, fp16)",
        ),
        ("optim.kind=lion", "unknown value 'lion' for 'optim.kind' on the command line: known are adamw"),
        (
            "diffusion.kind=flwo",
            "unknown value 'flwo' for 'diffusion.kind' on the command line: did you mean 'flow'? (known: gaussian, flow)",
        ),
    ] {
        assert_eq!(refused(text), expected);
    }
    let wrong = message(&DIGITS.replace("kind: digits", "kind: image_floder"), &[]);
    let expected = "unknown value 'image_floder' for 'data.kind' in recipes/x.yaml, line 2: did you mean 'image_folder'? ";
    assert!(wrong.starts_with(expected), "{wrong}");
}

#[test]
fn missing_parts_are_named() {
    assert_eq!(message("", &[]), "missing section 'model' in recipes/x.yaml: add it");
    let without_train = DIGITS.lines().take(2).collect::<Vec<_>>().join("\n");
    assert_eq!(message(&without_train, &[]), "missing section 'train' in recipes/x.yaml: add it");
    for (from, to, key) in [(", batch: 8", "", "train.batch"), ("kind: digits", "flip: true", "data.kind")] {
        let expected =
            format!("missing key '{key}' in recipes/x.yaml: add it, or give {key}=VALUE on the command line");
        assert_eq!(message(&DIGITS.replace(from, to), &[]), expected);
    }
}

#[test]
fn broken_yaml_is_named_with_its_line() {
    for (yaml, expected) in [
        ("name: x\nmodel: [", "recipes/x.yaml is not valid YAML (line 2): unclosed bracket '['"),
        (
            "name: x\nname: y",
            "recipes/x.yaml is not valid YAML (line 2): the key 'name' stands there twice; remove one",
        ),
        (
            "a: b\n---\nc: d",
            "recipes/x.yaml is not valid YAML (line 3): a second document begins with '---'; a recipe is one document",
        ),
        (
            "- a",
            "wrong value for 'recipe' in recipes/x.yaml, line 1: found a list, expected a section of keys",
        ),
    ] {
        assert_eq!(message(yaml, &[]), expected);
    }
}

#[test]
fn a_malformed_override_is_explained() {
    for (text, reason) in [
        ("optim.lr", "write it as key=value, such as optim.lr=2e-4"),
        ("optim.lr=", "no value; write optim.lr=null to unset the key"),
        ("optim..lr=1", "the key has an empty part; write it as section.key=value"),
        ("=1", "the key has an empty part; write it as section.key=value"),
        ("ema.rates=[1", "the value is not valid YAML"),
        ("data.kind.x=1", "'data.kind' is the text \"digits\", which has no keys in it"),
    ] {
        assert_eq!(refused(text), format!("wrong override '{text}': {reason}"));
    }
}

/// An alias that points to a key which no struct has any more would never be offered: it must go.
#[test]
fn every_alias_points_to_a_key_that_exists_and_is_no_key_itself() {
    let mut keys = known_keys(&load(MINIMAL, &[]).unwrap().tree());
    keys.extend(known_keys(&load(MINIMAL, &["diffusion.kind=flow"]).unwrap().tree()));
    let parts: Vec<&str> = keys.iter().flat_map(|key| key.split('.')).collect();
    for (alias, key) in ALIASES {
        assert!(parts.contains(&key), "alias {alias} points to {key}, which no section knows");
        assert!(!parts.contains(&alias), "{alias} is a key and an alias");
    }
}

#[test]
fn nearest_keeps_quiet_when_nothing_is_near() {
    assert_eq!(nearest("zebra", &["every", "keep_last"]), None);
    assert_eq!(nearest("evry", &["every", "keep_last"]), Some("every"));
    assert_eq!(nearest("learning_rate", &["every"]), None);
}
