//! From a recipe to a trained model: the plan, the one training loop, checkpoints and reports.
//!
//! Contract: [`run::run`] trains a recipe to its end; the same call continues a stopped run with the
//! same bits. A [`trainer::Trainer`] is one model with its optimizer and data; a step of it depends
//! on the recipe and the step's number alone.
//! Deliberately absent: sampling (the caller gives a [`run::Preview`]), HTTP, the job store.

pub mod checkpoint;
pub mod data;
mod error;
mod former_files;
mod outcomes;
pub mod plan;
pub mod report;
pub mod run;
mod run_folder;
pub mod settings;
pub mod state;
pub mod trainer;
pub mod verify;

pub use error::{Result, TrainError};
pub use run_folder::check_run_folder;
