//! Parameters, the stores that hold them, and the layers built on them.
//!
//! A layer holds [`ParamId`]s, never weights. A [`ParamStore`] decides where the bytes of
//! each parameter live; a [`Forward`] hands them to layers inside the [scope](ScopeId) of
//! their block, and records on a tape if there is one. The same `forward` serves training,
//! sampling and recomputation.
//! Deliberately absent: files, ranks, diffusion, and any concrete network.

mod attention;
mod chunks;
mod embedding;
mod forward;
mod init;
mod keys;
mod layers;
mod parameters;
mod store;

pub use attention::{AttentionExchange, Exchanged, LocalAttention, SelfAttention};
pub use chunks::{ChunkLayout, ChunkSpec, Slot};
pub use embedding::{LabelEmbedding, PatchEmbedding, TimestepEmbedding, sincos_positions};
pub use forward::Forward;
pub use init::Init;
pub use keys::{KeyEntry, KeyMap};
pub use layers::{Branch, FeedForward, Linear};
pub use parameters::{Builder, ParamId, ParamSpec, Parameters, ScopeId};
pub use store::{Chunk, ParamStore, ResidentStore, StoreOptions};
