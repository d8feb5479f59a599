//! Data: sources on disk, decoding, transforms, and the loader that turns them into batches.
//!
//! Contract: batches are plain buffers in the model's layout, in an order that depends on the seed
//! alone; bad samples are skipped, counted and named. This crate knows neither models nor
//! training: its settings are plain structs that a caller fills.
//! Not done here: encoding to latents, video, and sending batches to a device.

mod dataset;
pub mod decode;
mod error;
mod loader;
pub mod npz;
mod order;
mod prepare;
mod transform;

pub use dataset::{BUILTIN_DIGITS, Content, Dataset, Holds, Item, SourceConfig, SourceKind, open};
pub use error::DataError;
pub use loader::{Batch, Loader, LoaderConfig};
pub use order::Cursor;
pub use transform::Crop;
