//! What a person types: one file per command.

mod daemon;
mod doctor;
mod init;
mod mount;
mod stats;
mod unmount;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
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
            Command::Daemon(command) => command.run(&store),
            Command::Doctor(command) => command.run(&store),
        }
    }
}

/// The store of this command: as given, from the environment, or the user's cache.
fn store_dir(given: Option<PathBuf>) -> Result<StoreDir> {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let path = given
        .or_else(|| set("KACHEFS_STORE"))
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("kachefs")))
        .or_else(|| Some(set("HOME")?.join(".cache/kachefs")))
        .context("no store: give --store DIR or set KACHEFS_STORE")?;
    Ok(StoreDir::new(std::path::absolute(path)?))
}

/// The mountpoint a target argument means: absolute, symbolic links resolved as far as the path
/// exists. Resolves the parent, never the target itself: a dead mount there must not be touched.
fn mountpoint(target: &Path) -> Result<PathBuf> {
    let mut path = std::path::absolute(target)?;
    // `target` may be a link to a disk with more room.
    for _ in 0..40 {
        let Ok(link) = std::fs::read_link(&path) else {
            break;
        };
        path = path.parent().unwrap_or(Path::new("/")).join(link);
    }
    let name = path
        .file_name()
        .ok_or_else(|| anyhow!("{} cannot be mounted on", path.display()))?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    let parent = parent
        .canonicalize()
        .with_context(|| format!("no directory {}", parent.display()))?;
    Ok(parent.join(name))
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

    #[test]
    fn the_mountpoint_is_canonical_but_for_itself() {
        let dir = tempfile::tempdir().expect("tempdir");
        let real = dir.path().canonicalize().expect("canonical");
        std::fs::create_dir(real.join("ws")).expect("mkdir");
        std::os::unix::fs::symlink(real.join("ws"), real.join("link")).expect("symlink");
        assert_eq!(
            mountpoint(&real.join("link/target")).expect("ok"),
            real.join("ws/target")
        );
        std::os::unix::fs::symlink("../elsewhere", real.join("ws/target")).expect("symlink");
        assert_eq!(
            mountpoint(&real.join("ws/target")).expect("ok"),
            real.join("elsewhere")
        );
        assert!(mountpoint(&real.join("none/target")).is_err());
        assert!(mountpoint(Path::new("/")).is_err());
    }
}
