//! Faults: the bytes of a blob are fetched when they are first wanted, once however many want them.
//!
//! A small blob is one request. Of a larger one the frames are fetched that somebody reads (`ranges`),
//! each verified against the digest before anybody sees it. Only when all of it is here does it get its
//! name in the store.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use remote::blob::{self, Damage, Frames};
use remote::{ObjectName, Remote, RemoteError};
use store::{CasError, Counter, Digest, IndexError, Kept, Place};

use super::connection::{Connection, Unavailable};
use super::containers::Container;
use super::reliance;
use crate::storage::Storage;

/// A blob of at most so many bytes is fetched in one request.
pub(super) const WHOLE: u64 = 4 << 20;

/// Blobs that are fetched at the same time, when many are wanted.
const AT_ONCE: usize = 16;

/// How often a blob is asked for, each time with all the tries of a call.
const TRIES: u32 = 3;

/// Why the bytes of a blob are not here.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// They may come later.
    #[error("not fetched: {0}")]
    Unavailable(#[from] Unavailable),
    /// Another thread tried, and they did not come.
    #[error("not fetched by another thread, either")]
    Failed,
    /// No remote has them, or not as they should be: they will not come.
    #[error("no remote has it: {0}")]
    Gone(String),
    /// This machine cannot take them.
    #[error(transparent)]
    Store(#[from] CasError),
    /// Nor write them.
    #[error("cannot write it: {0}")]
    Io(#[from] io::Error),
    /// The index refuses.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// What came of asking for a blob.
pub(super) enum Fetched {
    /// All of it, verified.
    Whole(Vec<u8>),
    /// What was wanted is in the file; so many bytes were new there.
    Filed(u64),
    /// It is not there.
    Absent,
    /// It is not what it should be.
    Damaged(Damage),
    /// It cannot be written here.
    Unwritten(io::Error),
}

impl Storage {
    /// Where the store's remote holds a blob of this size, if it is known to.
    pub fn kept(&self, digest: &Digest, size: u64) -> Option<(Arc<Connection>, Kept)> {
        let connection = self.lazy.connection()?;
        match self.index.kept(connection.id, digest) {
            Ok(kept) => {
                let is_there = |kept: &Kept| !self.lazy.is_gone(digest, &kept.place);
                let kept = kept.filter(|kept| kept.size == size).filter(is_there)?;
                Some((connection, kept))
            }
            Err(error) => {
                tracing::warn!(%digest, %error, "place of a blob");
                None
            }
        }
    }

    /// Whether a blob is on this disk, or known to be in the remote.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        self.cas.has(digest, size) || self.kept(digest, size).is_some()
    }

    /// Whether the bytes of a blob can be had now: from this disk, or from a remote that answers.
    pub fn is_within_reach(&self, digest: &Digest, size: u64) -> bool {
        self.cas.has(digest, size)
            || self
                .kept(digest, size)
                .is_some_and(|(connection, _)| !connection.is_left_alone())
    }

    /// Where the store's remote holds a blob, for who has to have it.
    pub(super) fn kept_for_fault(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<(Arc<Connection>, Kept), FaultError> {
        let nowhere = || FaultError::Gone("it is known to be nowhere".to_owned());
        self.kept(digest, size).ok_or_else(nowhere)
    }

    /// Makes sure that the bytes of a blob are on this disk, for who reads them. Waits for them, within the
    /// limits of the remote.
    pub fn fault(&self, digest: &Digest, size: u64) -> Result<(), FaultError> {
        if !self.cas.has(digest, size) {
            self.bring(digest, size)?;
            self.note_read(digest, true);
        }
        Ok(())
    }

    /// The same, for whoever may read them. Whether they were fetched by this call.
    pub(super) fn bring(&self, digest: &Digest, size: u64) -> Result<bool, FaultError> {
        let (connection, kept) = self.kept_for_fault(digest, size)?;
        match self.lazy.faults.take_off(*digest) {
            // Fetched between the look and the take-off?
            Ok(_) if self.cas.has(digest, size) => Ok(false),
            Ok(_flight) => self.fetch(&connection, digest, &kept).map(|()| true),
            Err(boarding) => {
                boarding.wait(connection.patience(size));
                if self.cas.has(digest, size) {
                    Ok(false)
                } else {
                    Err(FaultError::Failed)
                }
            }
        }
    }

    /// The same for many, some at a time. The first error ends it.
    pub fn fault_all(&self, blobs: &[(Digest, u64)]) -> Result<(), FaultError> {
        let wanted: Vec<_> = blobs
            .iter()
            .filter(|(digest, size)| !self.cas.has(digest, *size))
            .collect();
        let share = wanted.len().div_ceil(AT_ONCE).max(1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = wanted
                .chunks(share)
                .map(|blobs| {
                    scope.spawn(|| {
                        blobs
                            .iter()
                            .try_for_each(|(digest, size)| self.fault(digest, *size))
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or(Err(FaultError::Failed)))
        })
    }

    fn fetch(
        &self,
        connection: &Connection,
        digest: &Digest,
        kept: &Kept,
    ) -> Result<(), FaultError> {
        if kept.size > WHOLE {
            return self.fetch_rest(connection, digest, kept);
        }
        self.fetch_some(connection, digest, kept, 1, || {
            connection.call(async |remote| whole(&*remote, digest, kept).await)
        })
    }

    /// Fetches a blob or some of it, which counts as so many faults. What arrives damaged, or breaks off,
    /// may do so on the way: it is asked for again before anything is concluded from it.
    pub(super) fn fetch_some(
        &self,
        connection: &Connection,
        digest: &Digest,
        kept: &Kept,
        faults: u64,
        once: impl Fn() -> Result<Fetched, Unavailable>,
    ) -> Result<(), FaultError> {
        let mut tries = 0..TRIES;
        let fetched = loop {
            tries.next();
            match once() {
                Ok(Fetched::Damaged(damage)) if !tries.is_empty() => {
                    tracing::warn!(%digest, %damage, "a blob arrived damaged");
                }
                Err(Unavailable::Remote(error)) if error.is_passing() && !tries.is_empty() => {
                    tracing::warn!(%digest, %error, "a blob did not arrive");
                }
                // What this one blob is refused with, no other try changes.
                Err(Unavailable::Remote(error)) if !error.is_passing() => {
                    tracing::error!(%digest, %error, "a blob cannot be fetched");
                    self.lazy.gone.lock().put((*digest, kept.place), ());
                    return Err(FaultError::Gone(error.to_string()));
                }
                fetched => break fetched?,
            }
        };
        let count = match fetched {
            Fetched::Whole(bytes) => {
                // Counts as a change: a blob is new since the last sync point.
                let _change = self.epochs.change();
                self.cas.ingest_bytes(&bytes)?;
                bytes.len() as u64
            }
            Fetched::Filed(count) => count,
            Fetched::Unwritten(error) => return Err(error.into()),
            Fetched::Absent => {
                self.lazy.leases.doubt();
                return self.forget(connection, digest, kept, "it is gone");
            }
            Fetched::Damaged(damage) => {
                let why = format!("it is damaged: {damage}");
                return self.forget(connection, digest, kept, &why);
            }
        };
        let mut batch = self.index.batch();
        let counted = [(Counter::Faults, faults), (Counter::BytesFaulted, count)];
        batch.count(&counted, None);
        batch.commit()?;
        Ok(())
    }

    /// Which of these blobs, where only a remote has them, it has no more.
    pub fn find_lost(
        &self,
        shown: impl IntoIterator<Item = (Digest, u64)>,
    ) -> Result<HashSet<Digest>, FaultError> {
        let mut lost = HashSet::new();
        let Some(connection) = self.lazy.connection() else {
            return Ok(lost);
        };
        let mut held: HashMap<Container, Vec<(Digest, Kept)>> = HashMap::new();
        for (digest, size) in shown {
            if !self.cas.has(&digest, size)
                && let Some((_, kept)) = self.kept(&digest, size)
            {
                let container = Container::of(&digest, &kept.place);
                held.entry(container).or_default().push((digest, kept));
            }
        }
        let containers = held.keys().copied().collect();
        let gone = connection.send(async |remote| reliance::absent(&remote, containers).await)?;
        for (digest, kept) in gone
            .iter()
            .filter_map(|container| held.get(container))
            .flatten()
        {
            match self.forget(&connection, digest, kept, "it is gone, too") {
                Ok(()) | Err(FaultError::Gone(_)) => lost.insert(*digest),
                Err(error) => return Err(error),
            };
        }
        Ok(lost)
    }

    /// What a remote does not hold as it should is not looked for there again.
    fn forget(
        &self,
        connection: &Connection,
        digest: &Digest,
        kept: &Kept,
        why: &str,
    ) -> Result<(), FaultError> {
        tracing::error!(%digest, remote = connection.place(), why, "a blob cannot be fetched");
        self.lazy.gone.lock().put((*digest, kept.place), ());
        let mut batch = self.index.batch();
        batch.delete_kept(connection.id, digest);
        batch.commit()?;
        Err(FaultError::Gone(why.to_owned()))
    }
}

/// The object a blob is in, and which part of it.
pub(super) fn place_of(digest: &Digest, kept: &Kept) -> (ObjectName, Option<Range<u64>>) {
    match kept.place {
        Place::Own => (ObjectName::blob(digest), None),
        Place::Pack {
            pack,
            offset,
            length,
        } => {
            let range = offset..offset.saturating_add(length);
            (ObjectName::pack(&pack), Some(range))
        }
    }
}

async fn whole(remote: &dyn Remote, digest: &Digest, kept: &Kept) -> Result<Fetched, RemoteError> {
    let (name, range) = place_of(digest, kept);
    // No frame is longer than what it holds.
    let most = Frames::of(kept.size).map_or(0, |frames| frames.header_len() + kept.size);
    match remote.get(&name, range, most).await {
        Ok(Some(object)) => Ok(match blob::unpack(&object, *digest, kept.size) {
            Ok(bytes) => Fetched::Whole(bytes),
            Err(damage) => Fetched::Damaged(damage),
        }),
        Ok(None) => Ok(Fetched::Absent),
        Err(RemoteError::TooLarge { .. }) => Ok(Fetched::Damaged(Damage::Size(kept.size))),
        Err(error) => Err(error),
    }
}
