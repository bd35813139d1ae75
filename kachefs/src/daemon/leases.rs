//! Keeps the store's lease on what its views show and only the remote has; and looks for all of it where
//! some was gone, so that one build makes everything again that is lost, not one for each step towards it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use store::Digest;

use super::mounts::Mounts;
use crate::lazy::leases::AGAIN;
use crate::storage::Storage;

/// How long until what is lost where nobody builds is looked for again, at most.
const LONGEST: Duration = Duration::from_hours(1);

/// Writes the lease again and again, for as long as anybody has mounts.
pub fn renew_now_and_then(mounts: &Arc<Mounts>) -> Result<()> {
    let mounts = Arc::downgrade(mounts);
    let renew = move || {
        let mut pause = AGAIN;
        while let Some(mounts) = mounts.upgrade() {
            let mut shown = HashSet::new();
            for (_, view) in mounts.in_use() {
                shown.extend(view.blobs());
            }
            let storage = Arc::clone(&mounts.storage);
            let looks = &storage.lazy.looks;
            let is_done = looks.look(|| look_for(&mounts, &storage, &shown));
            let is_lost = look_again(&mounts, &storage);
            // While it waits, the store may be closed.
            drop(mounts);
            let mut lasts = storage.renew_lease(shown);
            if !is_done {
                lasts = lasts.min(AGAIN);
            }
            if is_lost {
                lasts = lasts.min(pause);
                pause = (pause * 2).min(LONGEST);
            } else {
                pause = AGAIN;
            }
            let leases = Arc::clone(&storage.lazy.leases);
            drop(storage);
            leases.wait(lasts);
        }
    };
    let thread = std::thread::Builder::new()
        .name("leases".into())
        .spawn(renew);
    thread.map(drop).context("cannot start a thread")
}

/// Looks whether what is lost is there again that is shown where nobody builds: it is made by nobody, but may be
/// put back. Whether anything is lost there.
fn look_again(mounts: &Mounts, storage: &Storage) -> bool {
    let views = mounts.in_use().into_iter().map(|(_, view)| view);
    let lost = views.filter(|view| view.is_read_only());
    let lost: HashSet<_> = lost.flat_map(|view| view.lost_blobs()).collect();
    let lost: Vec<_> = lost.into_iter().collect();
    match storage.find_again(&lost) {
        Ok(0) => {}
        Ok(found) => tracing::info!(found, "what was lost is there again"),
        Err(error) => tracing::debug!(%error, "nobody knows what is there again"),
    }
    !lost.is_empty()
}

/// Takes away the names of what only the remote had and it has no more, and has the rest fetched. Whether it
/// is known what that is.
fn look_for(mounts: &Mounts, storage: &Arc<Storage>, shown: &HashSet<(Digest, u64)>) -> bool {
    let looked = storage.find_lost(shown.iter().copied());
    if let Err(error) = &looked {
        tracing::debug!(%error, "nobody knows what else is gone");
    }
    // Also what others have found.
    for (_, view) in mounts.in_use() {
        view.doubt_lost();
        view.drop_suspects();
    }
    storage.rescue(shown.iter().copied());
    looked.is_ok()
}
