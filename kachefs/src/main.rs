//! `kachefs`: parses arguments, runs one command, prints one line when it fails.

use std::process::ExitCode;

use clap::Parser;
use kachefs::commands::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kachefs: {error:#}");
            ExitCode::FAILURE
        }
    }
}
