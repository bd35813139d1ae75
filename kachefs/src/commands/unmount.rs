//! `kachefs unmount`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use store::StoreDir;
use wrapper::protocol::Control;

use super::{done, mountpoint};
use crate::daemon::client;
use crate::mount;

/// Unmount a view; its files stay in the store, and the next mount shows them again.
#[derive(Debug, Args)]
pub struct Unmount {
    /// Directory to unmount
    #[arg(default_value = "target", conflicts_with = "all")]
    target: PathBuf,
    /// Unmount every view of the store
    #[arg(long)]
    all: bool,
}

/// Takes away the mount of a daemon that is gone.
fn clear_dead(path: &Path) -> Result<()> {
    let dead = mount::mounted_at(path)?.is_some_and(|line| line.fs_type == mount::FS_TYPE)
        && mount::answers(path).is_err();
    if !dead {
        bail!("{} is not mounted", path.display());
    }
    mount::unmount(path, true).with_context(|| format!("cannot unmount {}", path.display()))
}

impl Unmount {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let path = if self.all {
            None
        } else {
            Some(mountpoint(&self.target)?)
        };
        let request = Control::Unmount {
            path: path
                .clone()
                .map(|p| p.into_os_string().into_encoded_bytes()),
        };
        match (client::ask(dir, request)?, &path) {
            (None, None) => {
                println!("nothing is mounted");
                return Ok(ExitCode::SUCCESS);
            }
            (None, Some(path)) => clear_dead(path)?,
            (answer, _) => drop(done(answer)?),
        }
        match path {
            Some(path) => println!("unmounted {}", path.display()),
            None => println!("unmounted everything"),
        }
        Ok(ExitCode::SUCCESS)
    }
}
