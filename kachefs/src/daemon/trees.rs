//! Published trees, as commands ask for them.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use remote::TreeName;
use serde::{Deserialize, Serialize};

use super::Daemon;
use crate::mount::Access;

/// Version of the JSON form.
const SCHEMA: u32 = 1;

/// What `kachefs trees --json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct List {
    /// Version of this form.
    pub schema: u32,
    /// The trees, in the order of their names.
    pub trees: Vec<Row>,
}

/// One published tree.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What of it is no blob, in bytes.
    pub size: u64,
    /// Milliseconds since the epoch when it was published.
    pub published_ms: u64,
}

/// Publishes the view mounted at `path`, and says what was sent.
pub fn publish(daemon: &Daemon, path: &Path, name: &str) -> Result<String> {
    let name: TreeName = name.parse()?;
    daemon.storage.the_writable_remote()?;
    let mounted = daemon.mounts.all();
    let view = mounted.iter().find(|(mounted, _)| mounted == path);
    let (_, view) = view.with_context(|| format!("{} is not mounted", path.display()))?;
    daemon.service.drain();
    // A tree holds nothing that nobody has.
    view.recompute_lost();
    let tree = view.snapshot().map_err(|error| match error {
        Errno::EBUSY => anyhow!("{} is being written to", path.display()),
        error => anyhow!("{}: {error}", path.display()),
    })?;
    let sent = daemon.storage.publish_tree(&name, tree)?;
    Ok(format!(
        "published {name}: {} names, {} bytes, {} blobs were not there yet",
        sent.names, sent.bytes, sent.blobs_sent
    ))
}

/// Shows a published tree at `path`.
pub fn mount(daemon: &Daemon, path: &Path, name: &str, access: Access) -> Result<String> {
    let name: TreeName = name.parse()?;
    let tree = daemon.storage.published_tree(&name)?;
    let names = tree.names.len();
    daemon.mounts.mount_tree(path, tree, access)?;
    daemon.storage.lazy.leases.wake();
    if access == Access::ReadWrite {
        daemon.mounts.manage(path);
    }
    Ok(format!("{names} names of {name}"))
}

/// All published trees, as JSON text.
pub fn list(daemon: &Daemon) -> Result<String> {
    let trees = daemon.storage.published_trees()?;
    let row = |tree: crate::lazy::trees::Published| Row {
        name: tree.name.to_string(),
        size: tree.size,
        published_ms: tree.published_ms,
    };
    let list = List {
        schema: SCHEMA,
        trees: trees.into_iter().map(row).collect(),
    };
    Ok(serde_json::to_string_pretty(&list)?)
}

/// Takes a tree back.
pub fn unpublish(daemon: &Daemon, name: &str) -> Result<String> {
    let name: TreeName = name.parse()?;
    if !daemon.storage.unpublish_tree(&name)? {
        bail!("no tree {name} is published");
    }
    Ok(format!("{name} is not published any more"))
}
