//! Weights files that are damaged or belong to another model.

use serde_json::{Map, Value, json};

use crate::harness::Folder;

/// A safetensors file taken apart: its header and its data.
struct Weights {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Weights {
    fn of(bytes: &[u8]) -> Self {
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&rest[..length]).unwrap();
        Self { header, data: rest[length..].to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()
    }

    /// A further tensor of zeros at the end.
    fn add(&mut self, name: &str, shape: &[usize]) {
        let bytes = 4 * shape.iter().product::<usize>();
        let start = self.data.len();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, start + bytes]});
        self.header.insert(name.into(), entry);
        self.data.resize(start + bytes, 0);
    }

    fn rename(&mut self, from: &str, to: &str) {
        let entry = self.header.remove(from).unwrap_or_else(|| panic!("no {from}"));
        self.header.insert(to.into(), entry);
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        serde_json::from_value(self.header[name]["shape"].clone()).unwrap()
    }
}

/// A folder with `whole.safetensors`, in the original layout.
fn converted() -> (Folder, Weights) {
    let folder = Folder::new();
    folder.train("run", &["train.steps=2"]).succeeds(&[]);
    folder
        .anneal(&["convert", "run", "whole.safetensors", "--to", "original"])
        .succeeds(&["-> whole.safetensors"]);
    let weights = Weights::of(&folder.read("whole.safetensors"));
    (folder, weights)
}

#[test]
fn missing_extra_and_misshapen_tensors_are_all_listed() {
    let (folder, mut weights) = converted();
    let bias = "final_layer.linear.bias";
    let shape = weights.shape(bias);
    weights.rename("t_embedder.mlp.0.bias", "stranger.bias");
    weights.rename(bias, "other_stranger.weight");
    weights.add(bias, &[shape[0] + 1]);
    weights.rename("blocks.0.attn.qkv.weight", "blocks.7.attn.qkv.weight");
    folder.write("wrong.safetensors", &weights.bytes());
    let words = [
        "wrong.safetensors does not fit the model:",
        "missing: t_embedder.mlp.0.bias [16]",
        "missing: blocks.0.attn.qkv.weight [48, 16]",
        "extra: stranger.bias [16]",
        "extra: other_stranger.weight [4]",
        "extra: blocks.7.attn.qkv.weight [48, 16]",
        "misshapen: final_layer.linear.bias: the file has [5], the model needs [4]",
    ];
    let failed = folder.anneal(&["sample", "wrong.safetensors"]).fails(&words);
    assert_eq!(failed.err.matches("error: ").count(), 1, "one error: {failed:#?}");
    folder.anneal(&["convert", "wrong.safetensors", "out", "--to", "diffusers"]).fails(&words);
    assert!(!folder.path("out").exists());
    assert!(!folder.path("samples.png").exists());
}

#[test]
fn a_truncated_or_foreign_file_is_named() {
    let (folder, weights) = converted();
    let whole = weights.bytes();
    folder.write("short.safetensors", &whole[..whole.len() - 100]);
    folder.anneal(&["sample", "short.safetensors"]).fails(&["short.safetensors", "damaged", "bytes"]);
    folder.write("header.safetensors", &whole[..100]);
    folder.anneal(&["sample", "header.safetensors"]).fails(&["header.safetensors"]);
    folder.write("empty.safetensors", b"");
    folder.anneal(&["sample", "empty.safetensors"]).fails(&["empty.safetensors"]);
    folder.write("text.safetensors", b"this is a letter to a friend, and no weights at all");
    folder.anneal(&["inspect", "text.safetensors"]).fails(&["text.safetensors is not a safetensors file"]);
    std::fs::create_dir(folder.path("nothing")).unwrap();
    folder.anneal(&["sample", "nothing"]).fails(&[
        "nothing is neither a run",
        ".safetensors",
        "model_index.json",
    ]);
}

#[test]
fn weights_of_another_program_say_what_they_need() {
    let (folder, mut weights) = converted();
    weights.header.remove("__metadata__");
    folder.write("bare.safetensors", &weights.bytes());
    folder
        .anneal(&["sample", "bare.safetensors"])
        .fails(&["bare.safetensors cannot be opened as a DiT", "heads"]);
    let sample = ["sample", "bare.safetensors", "--heads", "2", "--num", "2", "--out", "bare.npz"];
    folder.anneal(&sample).succeeds(&["2 samples"]);
    folder.anneal(&["sample", "bare.safetensors", "--heads", "3"]).fails(&["heads"]);
    let mut other = Weights { header: Map::new(), data: Vec::new() };
    other.add("encoder.weight", &[4, 4]);
    folder.write("other.safetensors", &other.bytes());
    folder.anneal(&["sample", "other.safetensors"]).fails(&["other.safetensors cannot be opened as a DiT"]);
}
