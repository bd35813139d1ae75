//! What a person types: one file per command.

mod daemon;
mod dead_mounts;
mod doctor;
mod explain;
mod init;
mod key;
mod last_build;
mod mount;
mod publish;
mod push;
mod remote;
mod remote_gc;
mod stats;
mod unmount;
mod verify;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use store::StoreDir;
use wrapper::protocol::Answer;

/// Makes cargo's target directory itself the build cache.
///
/// `kachefs mount` puts a view over a content-addressed store where `target/` is. Cargo builds as
/// always; what was compiled before, in any checkout, is pointed at instead of compiled again.
#[derive(Debug, Parser)]
#[command(name = "kachefs", version, max_term_width = 100)]
pub struct Cli {
    /// Store directory [default: $KACHEFS_STORE, else kachefs in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a view at a target directory
    Mount(mount::Mount),
    /// Unmount a view; its files stay in the store
    Unmount(unmount::Unmount),
    /// Show what the cache did
    Stats(stats::Stats),
    /// Show why the last build compiled what it did
    Explain(explain::Explain),
    /// Compile some of the last build's hits again, and compare
    Verify(verify::Verify),
    /// Share what is compiled here by way of a bucket or a directory
    Remote(remote::Remote),
    /// Upload what was made here
    Push(push::Push),
    /// Publish a view under a name
    Publish(publish::Publish),
    /// List the published trees
    Trees(publish::Trees),
    /// Take a published tree back
    Unpublish(publish::Unpublish),
    /// Say who may be believed
    Key(key::Key),
    /// Look after the daemon
    Daemon(daemon::Daemon),
    /// Check that everything kachefs needs is there
    Doctor(doctor::Doctor),
}

impl Cli {
    /// Carries out the command.
    pub fn run(self) -> Result<ExitCode> {
        let store = store_dir(self.store)?;
        match self.command {
            Command::Mount(command) => command.run(&store),
            Command::Unmount(command) => command.run(&store),
            Command::Stats(command) => command.run(&store),
            Command::Explain(command) => command.run(&store),
            Command::Verify(command) => command.run(&store),
            Command::Remote(command) => command.run(&store),
            Command::Push(command) => command.run(&store),
            Command::Publish(command) => command.run(&store),
            Command::Trees(command) => command.run(&store),
            Command::Unpublish(command) => command.run(&store),
            Command::Key(command) => command.run(&store),
            Command::Daemon(command) => command.run(&store),
            Command::Doctor(command) => command.run(&store),
        }
    }
}

/// The store of this command: as given, from the environment, or the user's cache.
fn store_dir(given: Option<PathBuf>) -> Result<StoreDir> {
    let path = given
        .or_else(|| StoreDir::from_environment(|name| env::var_os(name)))
        .context("no store: give --store DIR or set KACHEFS_STORE")?;
    Ok(StoreDir::new(std::path::absolute(path)?))
}

/// The mountpoint a target argument means.
fn mountpoint(target: &Path) -> Result<PathBuf> {
    store::managed::mountpoint(target)
        .with_context(|| format!("{} cannot be mounted on", target.display()))
}

/// The text of a successful answer.
fn done(answer: Option<Answer>) -> Result<String> {
    match answer {
        Some(Answer::Done(text)) => Ok(text),
        Some(Answer::Failed(why)) => bail!(why),
        Some(other) => bail!("unexpected answer from the daemon: {other:?}"),
        None => bail!("no daemon is running for this store"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
