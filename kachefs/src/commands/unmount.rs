//! `kachefs unmount`: takes a view out of the tree, and ends its coming back by itself.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use store::{ManagedTarget, StoreDir};
use wrapper::protocol::Control;

use super::{done, mountpoint};
use crate::daemon::client;
use crate::mount;

/// Unmount a view; its files stay in the store, and the next mount shows them again.
///
/// An unmounted view does not come back by itself. One that is in use stays mounted, and who uses
/// it is named.
#[derive(Debug, Args)]
pub struct Unmount {
    /// Directory to unmount
    #[arg(default_value = "target", conflicts_with = "all")]
    target: PathBuf,
    /// Unmount every view of the store
    #[arg(long)]
    all: bool,
    /// Detach also what is in use: it ends with its last user
    #[arg(long)]
    lazy: bool,
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
            lazy: self.lazy,
        };
        let said = match client::ask(dir, request)? {
            None => without_daemon(dir, path.as_deref())?,
            answer => done(answer)?,
        };
        println!("{said}");
        Ok(ExitCode::SUCCESS)
    }
}

/// What a daemon that is gone has left behind: a dead mount, or a target that would come back.
fn without_daemon(dir: &StoreDir, path: Option<&Path>) -> Result<String> {
    let managed = dir.managed();
    let Some(path) = path else {
        let (targets, _) = managed.all()?;
        for path in targets.iter().map(ManagedTarget::path) {
            clear_dead(&path)?;
            managed.remove(&path)?;
        }
        return Ok(if targets.is_empty() {
            "nothing is mounted".to_owned()
        } else {
            "unmounted everything".to_owned()
        });
    };
    let cleared = clear_dead(path)?;
    let ended = managed.remove(path)?;
    let path = path.display();
    if cleared {
        Ok(format!("unmounted {path}"))
    } else if ended {
        Ok(format!("{path} was not mounted, and stays so from now on"))
    } else {
        bail!("{path} is not mounted")
    }
}

/// Takes away the mount of a daemon that is gone; whether there was one.
fn clear_dead(path: &Path) -> Result<bool> {
    let dead = mount::mounted_at(path)?.is_some_and(|line| line.fs_type == mount::FS_TYPE)
        && mount::answers(path).is_err();
    if dead {
        mount::unmount(path, true).with_context(|| format!("cannot unmount {}", path.display()))?;
    }
    Ok(dead)
}
