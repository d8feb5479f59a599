//! The one binary: reads the command line, calls the crates, prints.
//!
//! Exit codes: 0 done; 1 an error, in one line; 2 a wrong command line; 128 plus the signal's number if a
//! signal stopped a run, after its checkpoint.

#[macro_use]
mod stdout;

mod cli;
mod commands;
mod machine;
mod output;
mod sampling;
mod scheduler;
mod scratch;
mod signals;
mod source;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches};

use cli::{Cli, Command};

fn main() -> ExitCode {
    let matches = with_negative_numbers(Cli::command()).try_get_matches();
    let result = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => run(&cli),
        Err(wrong) if wrong.use_stderr() => wrong.exit(),
        // What was asked for: help, or the version.
        Err(text) => {
            stdout::note(text.print());
            Ok(ExitCode::SUCCESS)
        }
    };
    // What a signal has stopped keeps its code: the terminal that it printed to may be closed.
    let result = result.and_then(|code| match code == ExitCode::SUCCESS {
        true => stdout::finish().map(|()| code),
        false => Ok(code),
    });
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", message(&error));
        ExitCode::FAILURE
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.command {
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
    }
}

/// Lets `--guidance -3` reach the check of the value. The parser would take `-3` for a flag that is not known, and advise
/// what does not help.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| {
            let has_value = !argument.is_positional() && argument.get_action().takes_values();
            if has_value { argument.allow_negative_numbers(true) } else { argument }
        })
        .mut_subcommands(with_negative_numbers)
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
