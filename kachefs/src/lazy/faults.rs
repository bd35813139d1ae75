//! Faults: the bytes of a blob are fetched when they are first wanted, once however many want them.
//!
//! A small blob is one request. Of a larger one the frames are fetched that somebody reads (`ranges`),
//! each verified against the digest before anybody sees it. Only when all of it is here does it get its
//! name in the store.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use remote::blob::{self, Damage, Frames};
use remote::{ObjectName, Remote, RemoteError};
use store::{CasError, Counter, Digest, IndexError, Kept, Place};

use super::Gone;
use super::connection::{Connection, EarlyPlace, Haste, Unavailable};
use crate::storage::Storage;

/// A blob of at most so many bytes is fetched in one request.
pub(super) const WHOLE: u64 = 4 << 20;

/// Blobs that are fetched at the same time, when many are wanted.
const AT_ONCE: usize = 16;

/// How often a blob is asked for, each time with all the tries of a call.
const TRIES: u32 = 3;

/// How long a blob that is refused is left before it is asked for again.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);

/// Why the bytes of a blob are not here.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// They may come later.
    #[error("not fetched: {0}")]
    Unavailable(#[from] Unavailable),
    /// The store is being closed.
    #[error("not fetched any more: the daemon ends")]
    Closed,
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

impl FaultError {
    /// Whether the same may succeed a moment later. What became of another thread's try is not known.
    fn is_passing(&self) -> bool {
        match self {
            Self::Unavailable(error) => error.is_passing(),
            Self::Failed => true,
            Self::Closed | Self::Gone(_) | Self::Store(_) | Self::Io(_) | Self::Index(_) => false,
        }
    }
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
                let is_there = |kept: &Kept| {
                    is_somewhere(&kept.place) && !self.lazy.is_gone(digest, &kept.place)
                };
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

    /// Whether the remote that is left alone does not answer, even now and who asks for nothing.
    pub fn is_away(&self) -> bool {
        let connection = self.lazy.connection();
        connection.is_some_and(|connection| connection.is_left_alone() && connection.is_away())
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
            self.bring(digest, size, Haste::Wanted)?;
            self.note_read(digest, true);
        }
        Ok(())
    }

    /// The same, for whoever may read them. Whether they were fetched by this call.
    pub(super) fn bring(
        &self,
        digest: &Digest,
        size: u64,
        haste: Haste,
    ) -> Result<bool, FaultError> {
        // Another one's try is not ours: theirs may have been one that nobody waited for.
        for _ in 0..2 {
            let (connection, kept) = self.kept_for_fault(digest, size)?;
            let source = Source::new(&connection, &kept, haste);
            // Before anybody can wait for it: who reads would have no part in the queue of those who do not.
            let place = match haste {
                Haste::Early if size <= WHOLE => Some(connection.early_place()?),
                Haste::Early | Haste::Wanted => None,
            };
            match self.lazy.faults.take_off(*digest) {
                // Fetched between the look and the take-off?
                Ok(_) if self.cas.has(digest, size) => return Ok(false),
                Ok(_flight) => return self.fetch(source, place.as_ref(), digest).map(|()| true),
                Err(boarding) => {
                    drop(place);
                    boarding.wait(connection.patience(size));
                }
            }
            if self.cas.has(digest, size) {
                return Ok(false);
            }
        }
        Err(FaultError::Failed)
    }

    /// The same for many, some at a time. The first error ends it.
    pub fn fault_all(&self, blobs: &[(Digest, u64)]) -> Result<(), FaultError> {
        in_parallel(blobs, |digest, size| self.fault(digest, size))
    }

    /// The same for who reads none of them.
    pub(super) fn bring_all(&self, blobs: &[(Digest, u64)]) -> Result<(), FaultError> {
        in_parallel(blobs, |digest, size| {
            if self.cas.has(digest, size) {
                return Ok(());
            }
            self.bring(digest, size, Haste::Wanted).map(drop)
        })
    }

    /// Asks for bytes, and once more where they did not come although the remote answers who asks for nothing: who
    /// has the file mapped that they are of is killed when they do not come.
    pub fn ask_twice<T>(
        &self,
        mut ask: impl FnMut() -> Result<T, FaultError>,
    ) -> Result<T, FaultError> {
        match ask() {
            Err(error) if error.is_passing() && !self.is_away() => ask(),
            asked => asked,
        }
    }

    fn fetch(
        &self,
        source: Source<'_>,
        place: Option<&EarlyPlace<'_>>,
        digest: &Digest,
    ) -> Result<(), FaultError> {
        if source.kept.size > WHOLE {
            return self.fetch_rest(source, digest);
        }
        self.fetch_some(source, digest, 1, || {
            let whole = async |remote: Arc<dyn Remote>| whole(&*remote, digest, source.kept).await;
            match place {
                Some(place) => source.connection.call_early(place, whole),
                None => source.connection.call_for(source.haste, whole),
            }
        })
    }

    /// A blob is about to be stored that comes from elsewhere. Counts as a change: it is new since the last
    /// sync point, and there is none after the last.
    fn coming_in(&self) -> Result<impl Sized + '_, FaultError> {
        let change = self.epochs.change();
        if self.lazy.closed.load(Ordering::SeqCst) {
            return Err(FaultError::Closed);
        }
        Ok(change)
    }

    /// Makes a file of this store the blob it holds, which comes from elsewhere.
    pub fn take_file(
        &self,
        path: &Path,
        file: &File,
        digest: Digest,
        size: u64,
    ) -> Result<(), FaultError> {
        let _change = self.coming_in()?;
        // Sealing it is its last change, also by the kernel's clock.
        file.set_modified(SystemTime::now() - Duration::from_secs(1))?;
        self.cas.adopt(path, file, digest, size)?;
        Ok(())
    }

    /// Asks for a blob or some of it. What arrives damaged, or breaks off, may do so on the way: it is asked for
    /// again before anything is concluded from it. What is refused is, once, and a moment later: credentials may
    /// just have been replaced.
    fn ask_for(
        &self,
        kept: &Kept,
        digest: &Digest,
        once: impl Fn() -> Result<Fetched, Unavailable>,
    ) -> Result<Fetched, FaultError> {
        let mut tries = 0..TRIES;
        let mut refused = None;
        loop {
            tries.next();
            match once() {
                Ok(Fetched::Damaged(damage)) if !tries.is_empty() => {
                    tracing::warn!(%digest, %damage, "a blob arrived damaged");
                }
                Err(Unavailable::Remote(error)) if error.is_passing() && !tries.is_empty() => {
                    tracing::warn!(%digest, %error, "a blob did not arrive");
                }
                Err(Unavailable::Remote(error)) if !error.is_passing() && refused.is_some() => {
                    return Err(self.note_refused(digest, kept, &error));
                }
                Err(Unavailable::Remote(error)) if !error.is_passing() && !tries.is_empty() => {
                    tracing::warn!(%digest, %error, "a blob is refused");
                    refused = Some(error);
                    std::thread::sleep(REFUSED_PAUSE);
                }
                asked => {
                    return match (asked, &refused) {
                        // Others were refused as well meanwhile.
                        (Err(Unavailable::LeftAlone), Some(error)) => {
                            Err(self.note_refused(digest, kept, error))
                        }
                        (asked, _) => Ok(asked?),
                    };
                }
            }
        }
    }

    /// What a remote refuses to give counts as lost for a while.
    fn note_refused(&self, digest: &Digest, kept: &Kept, error: &RemoteError) -> FaultError {
        tracing::error!(%digest, %error, "a blob cannot be fetched");
        let refused = Gone::Refused(Instant::now());
        self.lazy.note_gone(digest, kept.place, refused);
        FaultError::Gone(error.to_string())
    }

    /// Fetches a blob or some of it, which counts as so many faults.
    pub(super) fn fetch_some(
        &self,
        source: Source<'_>,
        digest: &Digest,
        faults: u64,
        once: impl Fn() -> Result<Fetched, Unavailable>,
    ) -> Result<(), FaultError> {
        let Source {
            connection, kept, ..
        } = source;
        let fetched = self.ask_for(kept, digest, once)?;
        let count = match fetched {
            Fetched::Whole(bytes) => {
                let _change = self.coming_in()?;
                self.cas.ingest_bytes(&bytes)?;
                bytes.len() as u64
            }
            Fetched::Filed(count) => count,
            Fetched::Unwritten(error) => return Err(error.into()),
            Fetched::Absent => {
                let is_news = !self.lazy.was_gone(digest, &kept.place);
                self.lazy.note_absent(digest, kept.place);
                if is_news {
                    self.lazy.lost_something();
                }
                return self.forget(connection, digest, kept, "it is gone");
            }
            Fetched::Damaged(damage) => {
                self.lazy.note_gone(digest, kept.place, Gone::Unfit);
                self.lazy.found_damage();
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

    /// What a remote does not hold as it should is not looked for there again.
    pub(super) fn forget(
        &self,
        connection: &Connection,
        digest: &Digest,
        kept: &Kept,
        why: &str,
    ) -> Result<(), FaultError> {
        tracing::error!(%digest, remote = connection.place(), why, "a blob cannot be fetched");
        let mut batch = self.index.batch();
        batch.put_lost(connection.id, digest, kept)?;
        batch.commit()?;
        Err(FaultError::Gone(why.to_owned()))
    }
}

/// Does something for many blobs, some at a time. The first error ends it.
fn in_parallel(
    blobs: &[(Digest, u64)],
    work: impl Fn(&Digest, u64) -> Result<(), FaultError> + Sync,
) -> Result<(), FaultError> {
    let share = blobs.len().div_ceil(AT_ONCE).max(1);
    let work = |blobs: &[(Digest, u64)]| {
        let mut blobs = blobs.iter();
        blobs.try_for_each(|(digest, size)| work(digest, *size))
    };
    let work = &work;
    std::thread::scope(|scope| {
        let workers = blobs.chunks(share);
        let workers: Vec<_> = workers
            .map(|blobs| scope.spawn(move || work(blobs)))
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or(Err(FaultError::Failed)))
    })
}

/// Where a blob is, and who asks for it.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub connection: &'a Connection,
    pub kept: &'a Kept,
    pub haste: Haste,
}

impl<'a> Source<'a> {
    pub fn new(connection: &'a Connection, kept: &'a Kept, haste: Haste) -> Self {
        Self {
            connection,
            kept,
            haste,
        }
    }
}

/// Whether a place can be one: others say where blobs are.
fn is_somewhere(place: &Place) -> bool {
    match place {
        Place::Own => true,
        Place::Pack { offset, length, .. } => offset
            .checked_add(*length)
            .is_some_and(|end| end <= i64::MAX.unsigned_abs()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_place_is_behind_the_end_of_everything() {
        let place = |offset, length| Place::Pack {
            pack: Digest::of(b"pack"),
            offset,
            length,
        };
        assert!(is_somewhere(&Place::Own) && is_somewhere(&place(16, 100)));
        assert!(!is_somewhere(&place(u64::MAX - 1, 100)));
        assert!(!is_somewhere(&place(0, u64::MAX)));
    }
}
