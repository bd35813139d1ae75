//! What a store is after a power cut: what cannot be vouched for goes.
//!
//! The index is an earlier state of itself (its log is a prefix), the bytes of files are whatever
//! the disk had. So what changed since the last sync point is dropped from every view, fingerprints
//! with it: cargo believes a fingerprint without looking at all it stands for, and one that is newer
//! than a lost file would keep that file lost for ever. Absent is what cargo can deal with.
//!
//! Called once, before anything is served; never after a mere death of the daemon, when the page
//! cache has everything.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use store::{
    Cas, CasError, Content, Digest, Epoch, Index, InodeRecord, Kind, Quarantine, RemoteId,
    StoreDir, SyncPoint, Thing, Timestamp, ViewId,
};

use crate::clock;
use crate::remote_config::RemoteConfig;
use crate::sync_points::ScratchName;

/// How long blobs are verified: compilers wait meanwhile. What is not verified by then counts as
/// damaged, which costs a compile.
const VERIFY: Duration = Duration::from_secs(30);

/// Threads that verify: one reads while another hashes.
const VERIFIERS: usize = 4;

/// How the last daemon of a store ended, as its last sync point tells.
#[derive(Debug, PartialEq, Eq)]
pub enum LastEnd {
    /// It never had one.
    New,
    /// The daemon died in this boot: what it wrote is in the page cache.
    SameBoot(SyncPoint),
    /// The daemon ended in order.
    Ended(SyncPoint),
    /// The machine went down with a daemon running.
    Cut(SyncPoint),
}

impl LastEnd {
    /// Looks at the last sync point. A boot without a name is never the same.
    pub fn of(last: Option<SyncPoint>, boot: Option<&str>) -> Self {
        match last {
            None => Self::New,
            Some(point) if point.ended => Self::Ended(point),
            Some(point) if boot.is_some() && point.boot.as_deref() == boot => Self::SameBoot(point),
            Some(point) => Self::Cut(point),
        }
    }
}

/// Drops what was not durable at `last`, from a store nobody uses yet.
pub fn recover(dir: &StoreDir, cas: &Cas, index: &Index, last: &SyncPoint) -> Result<()> {
    restore_retired(dir)?;
    let since = if last.since > clock::now() {
        // The clock was set back, before the cut or after it: the times of blobs tell nothing.
        Timestamp {
            secs: i64::MIN,
            nanos: 0,
        }
    } else {
        last.since
    };
    let suspects = stored_since(dir, since)?;
    let damaged = verify(cas, &suspects, Instant::now() + VERIFY);
    let quarantine = Quarantine::new(dir);
    for digest in &damaged {
        quarantine
            .take(Thing::Blob, &cas.path(digest))
            .with_context(|| format!("cannot set blob {digest} aside"))?;
    }
    let mut dropped = 0;
    let here = Here {
        dir,
        cas,
        index,
        remote: configured(dir),
    };
    for (view, _) in index.views()? {
        dropped += drop_from(&here, view, last.durable)?;
    }
    // A source that was being written may have bytes its times do not tell of.
    let mut batch = index.batch();
    batch.forget_file_memos()?;
    batch.commit()?;
    tracing::warn!(
        verified = suspects.len(),
        damaged = damaged.len(),
        dropped,
        "the machine went down without an end of the daemon"
    );
    Ok(())
}

/// What waited for its removal may be named again.
fn restore_retired(dir: &StoreDir) -> Result<()> {
    for entry in fs::read_dir(dir.scratch())? {
        let path = entry?.path();
        if let ScratchName::Retired(id) = ScratchName::of(&path) {
            let name = dir.scratch_file(id);
            fs::rename(&path, &name)
                .with_context(|| format!("cannot restore {}", name.display()))?;
        }
    }
    Ok(())
}

/// The blobs that got their names at or after this time.
fn stored_since(dir: &StoreDir, since: Timestamp) -> Result<Vec<Digest>> {
    let mut found = Vec::new();
    for fan in fs::read_dir(dir.blobs())? {
        let fan = fan?.path();
        if !fan.is_dir() {
            continue;
        }
        for blob in fs::read_dir(&fan)? {
            let blob = blob?;
            let name = blob.file_name();
            let Some(digest) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let meta = blob.metadata()?;
            let named = Timestamp {
                secs: meta.ctime(),
                nanos: u32::try_from(meta.ctime_nsec()).unwrap_or(0),
            };
            if named >= since {
                found.push(digest);
            }
        }
    }
    Ok(found)
}

/// Those of the blobs that are not what their names say, or not verified before the deadline.
fn verify(cas: &Cas, suspects: &[Digest], deadline: Instant) -> Vec<Digest> {
    let left = Mutex::new(suspects.iter());
    let damaged = Mutex::new(Vec::new());
    let next = || left.lock().ok().and_then(|mut left| left.next());
    std::thread::scope(|scope| {
        for _ in 0..VERIFIERS.min(suspects.len()) {
            scope.spawn(|| {
                while let Some(digest) = next() {
                    let whole = Instant::now() < deadline && is_whole(cas, digest);
                    if !whole && let Ok(mut damaged) = damaged.lock() {
                        damaged.push(*digest);
                    }
                }
            });
        }
    });
    damaged.into_inner().unwrap_or_else(|_| suspects.to_vec())
}

fn is_whole(cas: &Cas, digest: &Digest) -> bool {
    match cas.verify(digest) {
        Ok(_) => true,
        Err(error @ CasError::Damaged { .. }) => {
            tracing::warn!(%error, "set aside");
            false
        }
        Err(error) => {
            tracing::error!(%error, "cannot be verified: set aside");
            false
        }
    }
}

/// The store being recovered.
struct Here<'a> {
    dir: &'a StoreDir,
    cas: &'a Cas,
    index: &'a Index,
    remote: Option<RemoteId>,
}

impl Here<'_> {
    /// Whether the store's remote holds a blob.
    fn is_kept(&self, digest: &Digest, size: u64) -> bool {
        let kept = self.remote.map(|remote| self.index.kept(remote, digest));
        matches!(kept, Some(Ok(Some(kept))) if kept.size == size)
    }
}

/// The remote a store has, if anybody can tell.
fn configured(dir: &StoreDir) -> Option<RemoteId> {
    let config = RemoteConfig::load(dir).ok()??;
    Some(RemoteId::of(&config.location.to_string()))
}

/// Takes every name away from the files of a view that did not survive; says how many.
fn drop_from(here: &Here<'_>, view: ViewId, durable: Epoch) -> Result<usize> {
    let index = here.index;
    let lost: HashSet<_> = index
        .inodes(view)?
        .into_iter()
        .filter(|(_, record)| !survives(here, record, durable))
        .map(|(ino, _)| ino)
        .collect();
    if lost.is_empty() {
        return Ok(0);
    }
    let mut batch = index.batch();
    for name in index.dentries(view)? {
        if lost.contains(&name.ino) {
            let shown = String::from_utf8_lossy(&name.name);
            tracing::debug!(view = view.0, ino = ?name.ino, name = %shown, "dropped");
            batch.delete_dentry(view, name.parent, &name.name);
        }
    }
    for ino in &lost {
        batch.delete_inode(view, *ino);
    }
    batch.commit()?;
    Ok(lost.len())
}

/// Whether a file is whole, and may be there without anything that was dropped.
fn survives(here: &Here<'_>, record: &InodeRecord, durable: Epoch) -> bool {
    let vouched = record.fsynced || record.changed < durable;
    match &record.content {
        _ if record.kind != Kind::File => true,
        // Suspects that are still in the CAS were verified.
        Content::Blob { digest, size } => {
            here.cas.has(digest, *size) || here.is_kept(digest, *size)
        }
        Content::Private(id) => vouched && is_file(&here.dir.scratch_file(*id)),
        _ => vouched,
    }
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(boot: Option<&str>, ended: bool) -> SyncPoint {
        SyncPoint {
            boot: boot.map(str::to_owned),
            begun: Epoch(1),
            durable: Epoch(1),
            since: Timestamp::default(),
            ended,
        }
    }

    #[test]
    fn what_a_sync_point_tells() {
        let of = |point: &SyncPoint, boot| LastEnd::of(Some(point.clone()), boot);
        let here = point(Some("a"), false);
        assert_eq!(of(&here, Some("a")), LastEnd::SameBoot(here.clone()));
        assert_eq!(of(&here, Some("b")), LastEnd::Cut(here.clone()));
        assert_eq!(of(&here, None), LastEnd::Cut(here.clone()));
        let nameless = point(None, false);
        assert_eq!(of(&nameless, None), LastEnd::Cut(nameless.clone()));
        let ended = point(Some("a"), true);
        assert_eq!(of(&ended, Some("b")), LastEnd::Ended(ended.clone()));
        assert_eq!(of(&ended, None), LastEnd::Ended(ended.clone()));
        assert_eq!(LastEnd::of(None, Some("a")), LastEnd::New);
    }
}
