//! `kachefs daemon`: run, status, stop.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use store::{LayoutError, StoreDir};
use tracing_subscriber::EnvFilter;
use wrapper::protocol::Control;

use super::done;
use crate::daemon::health::{self, End};
use crate::daemon::takeover::{Inherited, Keeper};
use crate::daemon::{Daemon as Running, client, server};
use crate::keeper;

/// How long a daemon may take to let go of its store after it promised to: its last sync point waits
/// for the disk.
const STOP: Duration = Duration::from_mins(3);

/// Look after the daemon that serves a store's views.
#[derive(Debug, Args)]
pub struct Daemon {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say whether a daemon runs
    Status,
    /// Unmount everything and end the daemon
    Stop,
    /// Run the daemon in this process (`kachefs mount` does it for you)
    #[command(hide = true)]
    Run {
        /// Standard input leads to a keeper
        #[arg(long)]
        kept: bool,
    },
    /// Start the daemon, again when it dies, and hold its mounts meanwhile (`kachefs mount` does it
    /// for you)
    #[command(hide = true)]
    Keep,
}

impl Daemon {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        match self.command {
            Command::Status => status(dir),
            Command::Stop => stop(dir),
            Command::Run { kept: false } => run_in_foreground(dir, None),
            Command::Run { kept: true } => {
                keeper::program::name_process();
                let (keeper, inherited) = Keeper::from_stdin()?;
                serve(dir, None, keeper, inherited)
            }
            Command::Keep => keeper::run(dir),
        }
    }
}

fn status(dir: &StoreDir) -> Result<ExitCode> {
    match client::ask(dir, Control::Ping)? {
        None => {
            println!("not running, store {}", dir.root().display());
            // As `systemctl status` has it: 3 means "not running".
            Ok(ExitCode::from(3))
        }
        answer => {
            println!(
                "running, pid {}, store {}",
                done(answer)?,
                dir.root().display()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn stop(dir: &StoreDir) -> Result<ExitCode> {
    let answer = client::ask(dir, Control::Stop)?;
    if answer.is_none() {
        println!("no daemon is running for {}", dir.root().display());
        return Ok(ExitCode::SUCCESS);
    }
    done(answer)?;
    let deadline = Instant::now() + STOP;
    // What else may keep us from locking it, a read-only disk say, is no daemon.
    while dir.has_keeper() || matches!(dir.lock(), Err(LayoutError::InUse(_))) {
        if Instant::now() > deadline {
            bail!(
                "the daemon has unmounted everything but does not end; see {}",
                dir.log().display()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// A log that may fail: on a full disk the daemon goes on, only silently.
struct Careless(std::io::Stderr);

impl std::io::Write for Careless {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(self.0.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A panic in one thread ends the process: a mount that fails with ENOTCONN can be mounted again,
/// one whose server has lost a thread hangs whoever touches it.
fn die_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Runs a daemon here, without a keeper, until it is told to stop; mounts `path` first if there is
/// one.
pub(super) fn run_in_foreground(dir: &StoreDir, path: Option<&Path>) -> Result<ExitCode> {
    dir.create()?;
    let _alone = dir.lock_keeper()?;
    serve(dir, path, Keeper::none(), Vec::new())
}

fn serve(
    dir: &StoreDir,
    path: Option<&Path>,
    keeper: Keeper,
    inherited: Vec<Inherited>,
) -> Result<ExitCode> {
    let filter = EnvFilter::try_from_env("KACHEFS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second subscriber is only possible in tests.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .log_internal_errors(false)
        .with_writer(|| Careless(std::io::stderr()))
        .try_init();
    die_on_panic();
    // Before any thread exists, so that all of them inherit it: inode modes come from requests.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // SIGHUP is taken, not ignored: a closed terminal does not end a daemon.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot take signals")?;
    store::limits::raise();
    let (daemon, listener) = Running::start(dir.clone(), keeper, inherited)?;
    if let Some(path) = path {
        if let Err(error) = daemon.mounts.mount(path) {
            daemon.shut_down();
            return Err(error);
        }
        println!("mounted {}; Ctrl-C unmounts", path.display());
    }
    let ended = Arc::new(AtomicBool::new(false));
    let on_signal = End::new(&ended, &listener)?;
    health::watch(&daemon, End::new(&ended, &listener)?)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in &mut signals {
                if signal == SIGHUP {
                    continue;
                }
                tracing::info!(signal, "ending");
                on_signal.end();
            }
        })?;
    tracing::info!(pid = std::process::id(), store = %dir.root().display(), "daemon runs");
    daemon.keeper.ready();
    server::serve(&daemon, &listener, &ended);
    daemon.shut_down();
    Ok(ExitCode::SUCCESS)
}
