//! `kachefs mount`: start the daemon if needed, mount, set up cargo on first use.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use remote::TreeName;
use store::StoreDir;
use wrapper::environment;
use wrapper::protocol::{Answer, Control};

use super::init::{self, Setup};
use super::{done, mountpoint};
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
    /// Show a published tree; nothing can be written to it
    #[arg(long, value_name = "NAME", conflicts_with_all = ["foreground", "managed", "from"])]
    read_only: Option<TreeName>,
    /// Start from a published tree, in a target directory that is empty
    #[arg(long, value_name = "NAME", conflicts_with_all = ["foreground", "managed"])]
    from: Option<TreeName>,
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
        let setup = if self.no_init || self.managed || self.read_only.is_some() {
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
        if let Some(name) = self.read_only.as_ref().or(self.from.as_ref()) {
            let request = Control::MountTree {
                path: path.clone().into_os_string().into_encoded_bytes(),
                name: name.to_string(),
                read_only: self.read_only.is_some(),
            };
            let said = done(client::ask(dir, request)?)?;
            println!("mounted {} ({said})", path.display());
            return set_up(&path, setup);
        }
        let request = Control::Mount {
            path: path.clone().into_os_string().into_encoded_bytes(),
            environment: environment::own(),
            cwd: std::env::current_dir()
                .unwrap_or_default()
                .into_os_string()
                .into_encoded_bytes(),
        };
        match client::ask(dir, request)? {
            Some(Answer::Done(note)) if note.is_empty() => println!("mounted {}", path.display()),
            Some(Answer::Done(note)) => println!("mounted {} ({note})", path.display()),
            Some(Answer::AlreadyMounted) => println!("{} is mounted already", path.display()),
            Some(Answer::Failed(why)) => bail!(why),
            other => bail!("unexpected answer from the daemon: {other:?}"),
        }
        set_up(&path, setup)
    }
}

/// What is left to do once it is mounted.
fn set_up(path: &Path, setup: Setup) -> Result<ExitCode> {
    crate::mount::answers(path)
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
