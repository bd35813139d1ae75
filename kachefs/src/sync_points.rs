//! Sync points: moments up to which everything in the store is known to be on the disk, and what
//! must wait for one.
//!
//! What the index says and what private files hold reach the disk on different schedules. So a
//! backing file that an earlier state of the index may name is not removed before the next sync
//! point, and recovery after a power cut (`fs::recovery`) trusts only what changed before the last
//! one. When to make one is the daemon's business (`daemon::pace`).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use parking_lot::Mutex;
use store::{Digest, Epoch, Index, IndexError, ScratchId, SyncPoint, Timestamp};

use crate::clock;
use crate::storage::Storage;

/// How much earlier than it was a sync point is said to be, where times are compared: far more than
/// clocks differ by.
const SLACK: i64 = 2;

/// What a private file is called while it waits for its removal.
const RETIRED: &str = "retired";

/// The sync points of one store.
pub(crate) struct SyncPoints {
    /// The last one; held while one is made.
    last: Mutex<SyncPoint>,
    /// Open from the start to the end: `syncfs` tells each descriptor once what failed.
    disk: File,
    /// Set when bytes were lost on the way to the disk: nothing can be vouched for any more.
    failed: AtomicBool,
    retired: Mutex<Vec<ScratchId>>,
    retired_bytes: AtomicU64,
}

impl SyncPoints {
    /// Goes on after `last`. `retired` are private files that wait for their removal already.
    pub(crate) fn new(last: SyncPoint, root: &Path, retired: Vec<ScratchId>) -> io::Result<Self> {
        Ok(Self {
            last: Mutex::new(last),
            disk: File::open(root)?,
            failed: AtomicBool::new(false),
            retired: Mutex::new(retired),
            retired_bytes: AtomicU64::new(0),
        })
    }
}

/// Some seconds before `time`.
fn before(time: Timestamp, seconds: i64) -> Timestamp {
    Timestamp {
        secs: time.secs.saturating_sub(seconds),
        ..time
    }
}

/// Stores a sync point, without a sync.
pub(crate) fn put(index: &Index, point: &SyncPoint) -> Result<(), IndexError> {
    let mut batch = index.batch();
    batch.put_sync_point(point)?;
    batch.commit()
}

/// The name of a private file that waits for its removal.
pub(crate) fn retired_name(file: &Path) -> PathBuf {
    file.with_extension(RETIRED)
}

/// What a name in the scratch area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScratchName {
    /// A private file.
    Live(ScratchId),
    /// One that waits for its removal.
    Retired(ScratchId),
    /// Something half made.
    Other,
}

impl ScratchName {
    pub(crate) fn of(path: &Path) -> Self {
        let id = path.file_stem().and_then(|stem| stem.to_str());
        let id = id.and_then(|stem| u64::from_str_radix(stem, 16).ok());
        match (id, path.extension()) {
            (Some(id), None) => Self::Live(ScratchId(id)),
            (Some(id), Some(extension)) if extension == RETIRED => Self::Retired(ScratchId(id)),
            _ => Self::Other,
        }
    }
}

impl Storage {
    /// Removes a private file that the index names no more, whose bytes changed last in `changed`.
    ///
    /// At once when an earlier state of the index that names it would have it dropped anyway;
    /// otherwise with the next sync point, because after a power cut that state may be the one there
    /// is, and the file would be missing from it.
    pub fn retire_scratch(&self, id: ScratchId, changed: Epoch, fsynced: bool) {
        if changed >= self.epochs.current() && !fsynced {
            self.remove_scratch(id);
            return;
        }
        self.close_scratch(id);
        self.held.lock().remove(&id);
        let path = self.dir.scratch_file(id);
        let size = fs::metadata(&path).map_or(0, |meta| meta.blocks() * 512);
        match fs::rename(&path, retired_name(&path)) {
            Ok(()) => {
                self.sync_points.retired.lock().push(id);
                self.sync_points
                    .retired_bytes
                    .fetch_add(size, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot retire scratch file");
            }
        }
    }

    /// Bytes that the next sync point will free, and whether there is anything at all.
    pub fn retired(&self) -> (u64, bool) {
        let waits = !self.sync_points.retired.lock().is_empty();
        let bytes = self.sync_points.retired_bytes.load(Ordering::Relaxed);
        (bytes, waits)
    }

    /// Makes a sync point. `save` stores the records that are behind, and is given the epoch that
    /// has just begun.
    pub fn sync_point(&self, save: impl FnOnce(Epoch) -> Result<()>, ended: bool) -> Result<()> {
        let points = &self.sync_points;
        let mut last = points.last.lock();
        if points.failed.load(Ordering::Relaxed) {
            bail!("the disk has lost bytes before");
        }
        let since = before(clock::now(), SLACK);
        // Those whose end is in the log already.
        let retired = std::mem::take(&mut *points.retired.lock());
        let bytes = points.retired_bytes.swap(0, Ordering::Relaxed);
        let made = self
            .begin_epoch(&mut last)
            .and_then(|epoch| self.vouch(&last, save, epoch, since, ended));
        match made {
            Ok(point) => *last = point,
            // Waiting for their removal until there is room again would be waiting for ever.
            Err(error) if is_disk_full(&error) => {
                self.remove_retired(retired);
                return Err(error);
            }
            Err(error) => {
                points.retired.lock().extend(retired);
                points.retired_bytes.fetch_add(bytes, Ordering::Relaxed);
                return Err(error);
            }
        }
        self.remove_retired(retired);
        Ok(())
    }

    fn remove_retired(&self, retired: Vec<ScratchId>) {
        for id in retired {
            let path = retired_name(&self.dir.scratch_file(id));
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove");
            }
        }
    }

    fn begin_epoch(&self, last: &mut SyncPoint) -> Result<Epoch> {
        // In the log before anything that belongs to the epoch.
        let begun = SyncPoint {
            begun: self.epochs.current().next(),
            ..last.clone()
        };
        put(&self.index, &begun)?;
        *last = begun;
        Ok(self.epochs.advance())
    }

    fn vouch(
        &self,
        last: &SyncPoint,
        save: impl FnOnce(Epoch) -> Result<()>,
        epoch: Epoch,
        since: Timestamp,
        ended: bool,
    ) -> Result<SyncPoint> {
        save(epoch)?;
        if let Err(error) = nix::unistd::syncfs(self.sync_points.disk.as_fd()) {
            // What was lost stays lost, and is reported once.
            self.sync_points.failed.store(true, Ordering::Relaxed);
            return Err(error).context("syncfs");
        }
        let point = SyncPoint {
            durable: epoch,
            begun: epoch,
            since,
            ended,
            ..last.clone()
        };
        put(&self.index, &point)?;
        self.index.sync()?;
        Ok(point)
    }

    /// The clock was set back: times of blobs no longer say that they were stored since the last
    /// sync point, so more of them are to be verified after a power cut.
    pub fn clock_went_back(&self, seconds: i64) -> Result<()> {
        let mut last = self.sync_points.last.lock();
        let since = before(clock::now(), SLACK + seconds);
        if since < last.since {
            last.since = since;
            put(&self.index, &last)?;
            self.index.sync()?;
        }
        Ok(())
    }

    /// Makes a blob and its name survive a power cut.
    pub fn sync_blob(&self, digest: &Digest) -> io::Result<()> {
        let path = self.cas.path(digest);
        File::open(&path)?.sync_all()?;
        let fan = path.parent().unwrap_or(&path);
        File::open(fan)?.sync_all()?;
        File::open(self.dir.blobs())?.sync_all()
    }
}

fn is_disk_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_index = cause.downcast_ref::<IndexError>();
        of_index.and_then(IndexError::errno) == Some(Errno::ENOSPC)
            || cause.downcast_ref() == Some(&Errno::ENOSPC)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_scratch_area() {
        let of = |name: &str| ScratchName::of(&Path::new("/s").join(name));
        assert_eq!(of("1f"), ScratchName::Live(ScratchId(0x1f)));
        assert_eq!(of("1f.retired"), ScratchName::Retired(ScratchId(0x1f)));
        assert_eq!(of("1f.import"), ScratchName::Other);
        assert_eq!(of("x"), ScratchName::Other);
        let path = Path::new("/s/1f");
        assert_eq!(ScratchName::of(&retired_name(path)), of("1f.retired"));
    }
}
