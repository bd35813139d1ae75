//! Looks after the store of a running daemon: whether it is still there, and whether its index takes
//! writes.
//!
//! A store that was removed or moved away cannot be served: what is written would be lost with the
//! last descriptor. So the daemon unmounts everything and ends, and builds go on in plain directories.
//! An index that met a read-only disk, or ran out of descriptors, goes on refusing when all is well
//! again: then the keeper starts the next daemon, which goes on with the mounts. One thread, once a
//! second; serves nobody.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use super::Daemon;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks in a row at which an index refuses before it is given up: RocksDB tries again by itself.
const REFUSALS: u32 = 3;

/// Ends the accept loop of a daemon.
pub struct End {
    ended: Arc<AtomicBool>,
    listener: UnixListener,
}

impl End {
    /// The end of the loop that accepts from `listener` until `ended` says so.
    pub fn new(ended: &Arc<AtomicBool>, listener: &UnixListener) -> io::Result<Self> {
        Ok(Self {
            ended: Arc::clone(ended),
            listener: listener.try_clone()?,
        })
    }

    /// Ends it. Needs no path: the socket may be gone with the store.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        // It fails when the loop has ended already.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
    }
}

/// Starts the thread.
pub fn watch(daemon: &Arc<Daemon>, end: End) -> Result<()> {
    let daemon = Arc::downgrade(daemon);
    let watch = move || {
        let mut refusals = 0;
        while let Some(daemon) = daemon.upgrade() {
            if !daemon.storage.is_in_place() {
                let store = daemon.storage.dir.root().display();
                tracing::error!(%store, "the store is gone: unmounting everything");
                end.end();
                return;
            }
            refusals = if is_stuck(&daemon) { refusals + 1 } else { 0 };
            if refusals == REFUSALS && daemon.keeper.pid().is_some() {
                tracing::error!("the disk takes writes and the index does not: starting again");
                // As `kill -9`, which the next daemon is made for.
                std::process::abort();
            }
            drop(daemon);
            std::thread::sleep(INTERVAL);
        }
    };
    std::thread::Builder::new()
        .name("health".into())
        .spawn(watch)
        .context("cannot start a thread")?;
    Ok(())
}

/// Whether the index refuses what the disk would take.
fn is_stuck(daemon: &Daemon) -> bool {
    let index = &daemon.storage.index;
    if !index.is_refusing() || takes_writes(&daemon.storage.dir.run()).is_err() {
        return false;
    }
    match index.probe() {
        Ok(()) => false,
        // RocksDB looks by itself whether there is room again.
        Err(error) => !matches!(error.errno(), Some(Errno::ENOSPC | Errno::EDQUOT)),
    }
}

fn takes_writes(directory: &Path) -> io::Result<()> {
    let probe = directory.join("probe");
    fs::write(&probe, "writable?")?;
    fs::remove_file(&probe)
}
