//! `kachefs publish`, `trees` and `unpublish`: views that other machines mount.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use remote::TreeName;
use store::StoreDir;
use wrapper::protocol::{Answer, Control};

use super::stats::bytes;
use super::{done, mountpoint};
use crate::daemon::client;
use crate::daemon::trees::List;

/// Publish a view under a name.
///
/// Its tree goes to the store's remote, with the blobs that are not there yet. Other machines mount it:
/// `kachefs mount --read-only NAME DIR` shows it, `kachefs mount --from NAME TARGET` starts from it. What is
/// in the directory is sent as it is, as if it were copied.
#[derive(Debug, Args)]
pub struct Publish {
    /// The mounted view
    #[arg(default_value = "target")]
    target: PathBuf,
    /// The name: letters, digits, `.`, `_` and `-`. A tree that has it is replaced
    #[arg(long)]
    name: TreeName,
}

/// List the published trees.
#[derive(Debug, Args)]
pub struct Trees {
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

/// Take a published tree back.
///
/// Who has it mounted keeps what is fetched already.
#[derive(Debug, Args)]
pub struct Unpublish {
    /// Its name
    name: TreeName,
}

impl Publish {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let path = mountpoint(&self.target)?;
        let request = Control::Publish {
            path: path.into_os_string().into_encoded_bytes(),
            name: self.name.to_string(),
        };
        println!("{}", done(client::ask(dir, request)?)?);
        Ok(ExitCode::SUCCESS)
    }
}

impl Trees {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let json = match client::ask(dir, Control::Trees)? {
            Some(Answer::Report(json)) => json,
            Some(Answer::Failed(why)) => bail!(why),
            None => bail!("no daemon is running for this store; `kachefs mount` starts one"),
            other => bail!("unexpected answer from the daemon: {other:?}"),
        };
        if self.json {
            println!("{json}");
            return Ok(ExitCode::SUCCESS);
        }
        let list: List = serde_json::from_str(&json)?;
        for tree in &list.trees {
            println!("{:<32}{}", tree.name, bytes(tree.size));
        }
        if list.trees.is_empty() {
            println!("nothing is published");
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Unpublish {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let name = self.name.to_string();
        println!("{}", done(client::ask(dir, Control::Unpublish { name })?)?);
        Ok(ExitCode::SUCCESS)
    }
}
