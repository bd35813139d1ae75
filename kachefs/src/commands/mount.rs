//! `kachefs mount`: start the daemon if needed, mount, set up cargo on first use.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use store::StoreDir;
use wrapper::protocol::{Answer, Control};

use super::init::{self, Setup};
use super::mountpoint;
use crate::daemon::client;

/// Mount a view at a target directory.
///
/// What the directory holds already is taken over into the view. The first mount also sets
/// `build.rustc-wrapper` in cargo's configuration.
#[derive(Debug, Args)]
pub struct Mount {
    /// Directory to mount at
    #[arg(default_value = "target")]
    target: PathBuf,
    /// Serve in this process until Ctrl-C instead of starting a daemon
    #[arg(long)]
    foreground: bool,
    /// Leave cargo's configuration alone
    #[arg(long)]
    no_init: bool,
    /// Mount again what was mounted before, as the compiler wrapper asks; else do nothing
    #[arg(long, hide = true, conflicts_with = "foreground")]
    managed: bool,
}

impl Mount {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let path = mountpoint(&self.target)?;
        // What cannot be understood is said before anything is done.
        let setup = if self.no_init || self.managed {
            Setup::nothing()
        } else {
            init::plan(&path)?
        };
        if self.foreground {
            setup.apply()?;
            return super::daemon::run_in_foreground(dir, Some(&path));
        }
        client::ensure_running(dir)?;
        if self.managed {
            let path = path.into_os_string().into_encoded_bytes();
            return match client::ask(dir, Control::Remount { path })? {
                Some(Answer::Failed(why)) => bail!(why),
                _ => Ok(ExitCode::SUCCESS),
            };
        }
        let request = Control::Mount {
            path: path.clone().into_os_string().into_encoded_bytes(),
        };
        match client::ask(dir, request)? {
            Some(Answer::Done(note)) if note.is_empty() => println!("mounted {}", path.display()),
            Some(Answer::Done(note)) => println!("mounted {} ({note})", path.display()),
            Some(Answer::AlreadyMounted) => println!("{} is mounted already", path.display()),
            Some(Answer::Failed(why)) => bail!(why),
            other => bail!("unexpected answer from the daemon: {other:?}"),
        }
        crate::mount::answers(&path)
            .with_context(|| format!("{} is mounted but does not answer", path.display()))?;
        setup.apply().with_context(|| {
            format!(
                "{} is mounted, but cargo is not set up; set RUSTC_WRAPPER={}",
                path.display(),
                init::WRAPPER
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
