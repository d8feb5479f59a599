use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, Completions};
use crate::stdout;

pub fn completions(arguments: &Completions) -> Result<ExitCode> {
    // Into memory first: the generator panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "anneal", &mut script);
    stdout::write_bytes(&script);
    Ok(ExitCode::SUCCESS)
}
