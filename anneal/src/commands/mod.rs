//! One file for each command.

pub mod bench;
pub mod completions;
pub mod convert;
pub mod doctor;
pub mod inspect;
pub mod sample;
pub mod train;
pub mod verify_resume;
