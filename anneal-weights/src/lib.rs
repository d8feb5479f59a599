//! Weights in files: safetensors (single and sharded), diffusers folders, and the way between a
//! layout's tensors and a model's parameters.
//!
//! Contract: nothing is half done. A file or folder appears whole or not at all ([`files`]); a file
//! that is not whole is refused with the byte counts; [`load`] compares all names and shapes before
//! it writes the first value, and lists everything that does not fit.
//! A layout comes in as data ([`anneal_nn::KeyMap`]); no model is known by name here.
//! Deliberately absent: pickled files, adapters, and downloads.

mod diffusers;
mod error;
pub mod files;
mod hash;
mod homes;
mod load;
mod made_folder;
mod safetensors;
mod save;

pub use diffusers::{Component, DiffusersFolder, DiffusersWriter};
pub use error::WeightsError;
pub use files::{Appender, FileError, StagedFolder, write_atomic, write_atomic_unsynced};
pub use hash::{sha256, sha256_of_file};
pub use load::{LoadReport, load};
pub use made_folder::MadeFolder;
pub use safetensors::{
    StoredDType, TensorFiles, TensorSink, TensorSpec, WrittenFile, shard_name, write_file, write_sharded,
    write_shards,
};
pub use save::{SaveOptions, Target, save};
