//! Keeps the store's lease on what its views show and only the remote has; and looks for all of it where
//! some was gone, so that one build makes everything again that is lost, not one for each step towards it.

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::{Context, Result};
use store::Digest;

use super::mounts::Mounts;
use crate::storage::Storage;

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
            let leases = &storage.lazy.leases;
            leases.look(|| look_for(&mounts, &storage, &shown));
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

/// Takes away the names of what only the remote had and it has no more.
fn look_for(mounts: &Mounts, storage: &Storage, shown: &HashSet<(Digest, u64)>) {
    match storage.find_lost(shown.iter().copied()) {
        Ok(lost) if lost.is_empty() => {}
        Ok(lost) => {
            for (_, view) in mounts.in_use() {
                view.doubt_blobs(&lost);
                view.drop_suspects();
            }
        }
        Err(error) => tracing::debug!(%error, "nobody knows what else is gone"),
    }
}
