//! The one binary: reads the command line, calls the crates, prints.
//!
//! Exit codes: 0 done; 1 an error, in one line; 2 a wrong command line; 128 plus the signal's number if a
//! signal stopped a run, after its checkpoint.

mod cli;
mod commands;
mod output;
mod sampling;
mod scheduler;
mod signals;
mod source;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Quickstart(arguments) => commands::train::quickstart(arguments),
        Command::Train(arguments) => commands::train::train(arguments),
        Command::Resume(arguments) => commands::train::resume(arguments),
        Command::Sample(arguments) => commands::sample::sample(arguments),
        Command::VerifyResume(arguments) => commands::verify_resume::verify_resume(arguments),
        Command::Inspect(arguments) => commands::inspect::inspect(arguments),
        Command::Convert(arguments) => commands::convert::convert(arguments),
        Command::Doctor(arguments) => commands::doctor::doctor(arguments),
        Command::Bench(arguments) => commands::bench::bench(arguments),
        Command::Completions(arguments) => commands::completions::completions(arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", message(&error));
        ExitCode::FAILURE
    })
}

/// The error and its causes. Most of the crates' messages already include their cause's.
fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}
