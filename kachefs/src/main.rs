//! `kachefs`: parses arguments, runs one command, prints one line when it fails.

use std::process::ExitCode;

use clap::Parser;
use kachefs::commands::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are asked for, and long.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            eprintln!(
                "kachefs: {}; see --help",
                first.trim_start_matches("error: ")
            );
            return ExitCode::from(2);
        }
    };
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kachefs: {error:#}");
            ExitCode::FAILURE
        }
    }
}
