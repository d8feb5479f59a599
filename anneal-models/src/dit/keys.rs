//! The names of DiT's parameters in other layouts. Ours are those of the original code.

use anneal_nn::{KeyEntry, KeyMap, Parameters};

use super::DitConfig;

/// The original layout, with the table of positions among the weights.
pub fn original_keys(parameters: &Parameters) -> KeyMap {
    KeyMap::identity(parameters)
}

/// The layout of diffusers' `DiTTransformer2DModel`.
///
/// There, queries, keys and values are three tensors; every block carries a copy of the embedders,
/// or embedders of its own ([`DitConfig::block_embedders`]);
/// positions are computed; and the label table is filled up for its pipeline
/// ([`DitConfig::padded_classes`]).
pub fn diffusers_keys(config: &DitConfig, parameters: &Parameters) -> KeyMap {
    let entries = parameters.iter().map(|(_, spec)| entry(config, &spec.name)).collect();
    KeyMap { entries }
}

fn entry(config: &DitConfig, ours: &str) -> KeyEntry {
    let sharing = if config.block_embedders { 1 } else { config.depth };
    let in_every_block = |tail: &str| KeyEntry {
        homes: (0..sharing)
            .map(|block| vec![format!("transformer_blocks.{block}.norm1.emb.{tail}")])
            .collect(),
        ..KeyEntry::renamed(ours, "")
    };
    let (path, kind) = ours.rsplit_once('.').unwrap_or((ours, ""));
    match path {
        "pos_embed" => KeyEntry::computed(ours, "pos_embed.pos_embed"),
        "x_embedder.proj" => KeyEntry::renamed(ours, format!("pos_embed.proj.{kind}")),
        "t_embedder.mlp.0" => in_every_block(&format!("timestep_embedder.linear_1.{kind}")),
        "t_embedder.mlp.2" => in_every_block(&format!("timestep_embedder.linear_2.{kind}")),
        "y_embedder.embedding_table" => KeyEntry {
            padded_rows: Some(config.padded_classes() + 1),
            ..in_every_block("class_embedder.embedding_table.weight")
        },
        "final_layer.adaLN_modulation.1" => KeyEntry::renamed(ours, format!("proj_out_1.{kind}")),
        "final_layer.linear" => KeyEntry::renamed(ours, format!("proj_out_2.{kind}")),
        _ => block_entry(config, ours, path, kind),
    }
}

fn block_entry(config: &DitConfig, ours: &str, path: &str, kind: &str) -> KeyEntry {
    let (block, part) = path
        .strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'))
        .unwrap_or_else(|| panic!("{ours} has no place in the diffusers layout"));
    let theirs = |part: &str| format!("transformer_blocks.{block}.{part}.{kind}");
    match part {
        "attn.qkv" => KeyEntry::joined(ours, ["attn1.to_q", "attn1.to_k", "attn1.to_v"].map(theirs)),
        "attn.proj" => KeyEntry::renamed(ours, theirs("attn1.to_out.0")),
        "mlp.fc1" => KeyEntry::renamed(ours, theirs("ff.net.0.proj")),
        "mlp.fc2" => KeyEntry::renamed(ours, theirs("ff.net.2")),
        "adaLN_modulation.1" => KeyEntry::renamed(ours, theirs("norm1.linear")),
        "t_embedder.mlp.0" => KeyEntry::renamed(ours, theirs("norm1.emb.timestep_embedder.linear_1")),
        "t_embedder.mlp.2" => KeyEntry::renamed(ours, theirs("norm1.emb.timestep_embedder.linear_2")),
        "y_embedder.embedding_table" => KeyEntry {
            padded_rows: Some(config.padded_classes() + 1),
            ..KeyEntry::renamed(ours, theirs("norm1.emb.class_embedder.embedding_table"))
        },
        _ => panic!("{ours} has no place in the diffusers layout"),
    }
}
