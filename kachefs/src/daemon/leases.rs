//! Keeps the store's lease on what its views show and only the remote has; and looks for all of it where
//! some was gone, so that one build makes everything again that is lost, not one for each step towards it. What
//! a read-only view has lost, where nobody makes anything, is looked for now and then: it may be put back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use store::{Digest, ViewId};

use super::mounts::Mounts;
use crate::lazy::FaultError;
use crate::lazy::leases::AGAIN;
use crate::storage::Storage;

/// How long until something is tried again that was in vain, at most.
const LONGEST: Duration = Duration::from_hours(1);

/// Writes the lease again and again, for as long as anybody has mounts.
pub fn renew_now_and_then(mounts: &Arc<Mounts>) -> Result<()> {
    let mounts = Arc::downgrade(mounts);
    let renew = move || {
        let (mut looks, mut again) = (Patience::default(), Again::default());
        while let Some(mounts) = mounts.upgrade() {
            let mut shown = HashSet::new();
            for (_, view) in mounts.in_use() {
                shown.extend(view.blobs());
            }
            let storage = Arc::clone(&mounts.storage);
            let lazy = &storage.lazy;
            let looked = |is_doubtful: bool| {
                let doubtful = is_doubtful.then_some(&shown).into_iter().flatten();
                let is_known = withdraw(&mounts, &storage, doubtful.copied());
                // Begun before anybody goes on who waits for the look.
                storage.rescue(shown.iter().copied());
                is_known
            };
            let looked = looks.after(lazy.looks.look(looked));
            let found = again.look(&mounts, &storage);
            // While it waits, the store may be closed.
            drop(mounts);
            storage.rescue(shown.iter().copied());
            let losing = lazy.looks.losing_since().map(|_| AGAIN);
            let lasts = storage.renew_lease(shown);
            let sooner = [looked, found, losing].into_iter().flatten();
            let lasts = sooner.fold(lasts, Duration::min);
            let leases = Arc::clone(&lazy.leases);
            drop(storage);
            leases.wait(lasts);
        }
    };
    let thread = std::thread::Builder::new()
        .name("leases".into())
        .spawn(renew);
    thread.map(drop).context("cannot start a thread")
}

/// How long until something is tried again: longer each time.
struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(AGAIN)
    }
}

impl Patience {
    /// How long that is, if it is to be tried again.
    fn after(&mut self, is_done: bool) -> Option<Duration> {
        if is_done {
            *self = Self::default();
            return None;
        }
        let longer = (self.0 * 2).min(LONGEST);
        Some(std::mem::replace(&mut self.0, longer))
    }
}

/// What is lost where nobody builds: it is made by nobody, but may be put back.
#[derive(Default)]
struct Again {
    views: Vec<ViewId>,
    lost: usize,
    patience: Patience,
    due: Option<Instant>,
}

impl Again {
    /// Looks whether it is there again, if it is time, or something else is shown or lost. Returns how long it
    /// is until it is time, if anything is lost.
    fn look(&mut self, mounts: &Mounts, storage: &Storage) -> Option<Duration> {
        let views = mounts.in_use().into_iter().map(|(_, view)| view);
        let views: Vec<_> = views.filter(|view| view.is_read_only()).collect();
        let lost: HashSet<_> = views.iter().flat_map(|view| view.lost_blobs()).collect();
        let views = views.iter().map(|view| view.id).collect();
        let now = Instant::now();
        let is_new = views != self.views || lost.len() > self.lost;
        (self.views, self.lost) = (views, lost.len());
        if lost.is_empty() || is_new {
            self.patience = Patience::default();
            self.due = None;
        }
        if let Some(due) = self.due.filter(|due| now < *due) {
            return Some(due - now);
        }
        let lost: Vec<_> = lost.into_iter().collect();
        match storage.find_again(&lost) {
            Ok(0) => {}
            Ok(found) => tracing::info!(found, "what was lost is there again"),
            Err(error) => tracing::debug!(%error, "nobody knows what is there again"),
        }
        let pause = self.patience.after(lost.is_empty());
        self.due = pause.map(|pause| now + pause);
        pause
    }
}

/// Takes away the names of what is lost, and of what of these blobs only the remote had and it has no more.
/// Whether that is known.
fn withdraw(
    mounts: &Mounts,
    storage: &Storage,
    doubtful: impl IntoIterator<Item = (Digest, u64)>,
) -> bool {
    let looked = storage.find_lost(doubtful);
    // Also what others have found.
    for (_, view) in mounts.in_use() {
        view.doubt_lost();
        view.drop_suspects();
    }
    match looked {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%error, "nobody knows what else is gone");
            // Who is not told will not be told next time.
            matches!(&error, FaultError::Unavailable(error) if !error.is_passing())
        }
    }
}
