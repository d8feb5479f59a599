use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, Completions};

pub fn completions(arguments: &Completions) -> Result<ExitCode> {
    clap_complete::generate(arguments.shell, &mut Cli::command(), "anneal", &mut std::io::stdout());
    Ok(ExitCode::SUCCESS)
}
