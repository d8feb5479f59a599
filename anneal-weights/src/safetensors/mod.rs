//! The safetensors format: reading one file or many as one, writing one file or shards.
//!
//! Source: the format's description at <https://github.com/huggingface/safetensors>, and the index
//! file of sharded weights as Hugging Face's libraries write it.
//! Files are read by position, never mapped: a file that another process cuts off is an error, not
//! a signal. Data is little endian.

mod dtype;
mod header;
mod read;
mod write;

pub use dtype::StoredDType;
pub use read::TensorFiles;
pub(crate) use read::{FILE_ENDING, INDEX_PART, file_names};
pub(crate) use write::index_name;
pub use write::{TensorSink, WrittenFile, shard_name, write_file, write_sharded, write_shards};

/// Name, element type and shape of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: StoredDType,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, dtype: impl Into<StoredDType>, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype: dtype.into(), shape: shape.to_vec() }
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.size()) as u64
    }
}
