//! The binary as a person meets it: whole commands in fresh folders, judged by exit code, words and files.

mod bad_checkpoints;
mod bad_data;
mod bad_input;
mod bad_weights;
mod commands;
mod conversion;
mod harness;
mod hindrances;
mod resume;
mod sampling;
