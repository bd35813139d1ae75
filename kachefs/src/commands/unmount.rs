//! `kachefs unmount`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use store::StoreDir;
use wrapper::protocol::Control;

use super::{done, mountpoint};
use crate::daemon::client;

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
        let answer = client::ask(dir, request)?;
        if answer.is_none() && self.all {
            println!("nothing is mounted");
            return Ok(ExitCode::SUCCESS);
        }
        done(answer)?;
        match path {
            Some(path) => println!("unmounted {}", path.display()),
            None => println!("unmounted everything"),
        }
        Ok(ExitCode::SUCCESS)
    }
}
