//! DiT: the diffusion transformer with adaLN-Zero conditioning (Peebles and Xie, arXiv 2212.09748).

mod config;
mod keys;
mod model;

pub use config::{DitConfig, PRESETS};
pub use keys::{diffusers_keys, original_keys};
pub use model::Dit;
