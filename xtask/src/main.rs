//! Chores of the repository, as `cargo xtask CHORE`.

mod kernels;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Checks what the compiler does not: crate dependencies, sizes of functions and files, dead files, names and links
    /// in the documents, words that do not belong into the repository. Prints one line for each finding.
    Tidy {
        /// Lower the entries of xtask/ratchet.txt to what is measured now; never raises one or adds one.
        #[arg(long)]
        tighten: bool,
    },
    /// Compiles every CUDA kernel for the architectures that Anneal supports; needs NVRTC
    /// (`pip install nvidia-cuda-nvrtc`), but no GPU.
    Kernels {
        /// Architectures such as sm_90a, separated by commas.
        #[arg(long, value_delimiter = ',', default_values = kernels::ARCHITECTURES)]
        architectures: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().chore) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore) -> anyhow::Result<ExitCode> {
    let root = repository_root();
    match chore {
        Chore::Kernels { architectures } => {
            let count = kernels::compile_all(&architectures)?;
            println!("kernels: {count} variants compile for {}", architectures.join(", "));
            Ok(ExitCode::SUCCESS)
        }
        Chore::Tidy { tighten } => {
            if tighten {
                tidy::tighten(&root)?;
            }
            let findings = tidy::check(&root)?;
            for finding in &findings {
                println!("{finding}");
            }
            if findings.is_empty() {
                println!("tidy: nothing to do");
                return Ok(ExitCode::SUCCESS);
            }
            println!("tidy: {} findings", findings.len());
            Ok(ExitCode::FAILURE)
        }
    }
}

fn repository_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask lies in the repository's root").to_path_buf()
}
