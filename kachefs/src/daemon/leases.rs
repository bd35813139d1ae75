//! Keeps the store's lease on what its views show and only the remote has.

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::mounts::Mounts;

/// Writes the lease again and again, for as long as anybody has mounts.
pub fn renew_now_and_then(mounts: &Arc<Mounts>) -> Result<()> {
    let mounts = Arc::downgrade(mounts);
    let renew = move || {
        while let Some(mounts) = mounts.upgrade() {
            let mut shown = HashSet::new();
            for (_, view) in mounts.in_use() {
                shown.extend(view.blobs());
            }
            let storage = Arc::clone(&mounts.storage);
            // While it waits, the store may be closed.
            drop(mounts);
            let lasts = storage.renew_lease(shown);
            let lazy = Arc::clone(&storage.lazy.leases);
            drop(storage);
            lazy.wait(lasts);
        }
    };
    let thread = std::thread::Builder::new()
        .name("leases".into())
        .spawn(renew);
    thread.map(drop).context("cannot start a thread")
}
