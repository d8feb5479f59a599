//! The recipe: one YAML file that says what to train, on what, how, and what to draw on the way.
//!
//! Contract: [`Recipe::load`] reads a file, applies dotted overrides (`optim.lr=2e-4`), fills in every default,
//! checks ranges, and returns plain structs whose fields need no further interpretation. [`Recipe::to_yaml`] writes
//! the resolved recipe, which loads back to an equal one; [`differences`] compares two of them key by key.
//! Every refusal names the key, the file and line (or the command line), and what to write instead.
//!
//! The keys are the fields of the structs and nothing else: suggestions and comparisons are derived from serde, not
//! from a second list.
//!
//! Not done here: no sizes of presets (they belong to the models), no opening of data or devices, no defaults that
//! depend on the machine.

mod data;
mod difference;
mod diffusion;
mod error;
mod load;
mod model;
mod node;
mod optim;
mod read;
mod run;
mod suggest;
#[cfg(test)]
mod tests;
mod units;
mod validate;

pub use data::{Crop, Data, DataKind};
pub use difference::differences;
pub use diffusion::{Diffusion, Flow, Gaussian, NoiseSchedule, Target, TimeDensity};
pub use error::{Place, RecipeError};
pub use model::{Convention, DIT_PRESETS, Dit, DitArchitecture, Model};
pub use optim::{Decay, LearningRateSchedule, Optim, OptimKind};
pub use run::{Checkpoint, Ema, GuidanceMode, Precision, Recipe, Sample, Sampler, Train};
pub use units::{ByteSize, ImageSize};
pub use validate::sampling_problems;

/// An enum of sections that `kind` tells apart: in YAML the key `kind` stands beside the variant's own keys.
///
/// Serde's own internal tagging buffers the section and so loses the path of a wrong value; here the derived reader
/// gets the section without `kind` (see `read`), and only the writer uses serde's tag.
macro_rules! tagged_by_kind {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$doc:meta])* $tag:literal => $variant:ident($content:ty)),+ $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Deserialize)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $tag)] $variant($content)),+
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                #[derive(serde::Serialize)]
                #[serde(tag = "kind")]
                enum Tagged<'a> {
                    $(#[serde(rename = $tag)] $variant(&'a $content)),+
                }
                match self { $($name::$variant(content) => Tagged::$variant(content)),+ }.serialize(serializer)
            }
        }
    };
}
use tagged_by_kind;
