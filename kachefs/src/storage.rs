//! One opened store: the CAS, the index and the scratch area together.
//!
//! Owned by the daemon and shared with every view and the action service.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use parking_lot::Mutex;
use store::{Cas, Content, Index, ScratchId, StoreDir, StoreLock, Timestamp};

/// Scratch ids claimed from the index at a time.
const CLAIM: u64 = 1024;

/// A store this process owns.
pub struct Storage {
    /// Its paths.
    pub dir: StoreDir,
    /// Its blobs.
    pub cas: Cas,
    /// Its facts.
    pub index: Index,
    scratch: Mutex<ScratchIds>,
    _lock: StoreLock,
}

struct ScratchIds {
    next: u64,
    claimed: u64,
}

impl Storage {
    /// Opens the store at `dir`, making it when it is not there, and takes ownership.
    pub fn open(dir: StoreDir) -> anyhow::Result<Self> {
        dir.create()?;
        let lock = dir.lock()?;
        let index = Index::open(&dir.index())?;
        let cas = Cas::new(&dir);
        cas.remove_leftovers()?;
        let next = index.next_scratch()?;
        let scratch = Mutex::new(ScratchIds {
            next,
            claimed: next,
        });
        let storage = Self {
            dir,
            cas,
            index,
            scratch,
            _lock: lock,
        };
        storage.remove_orphans()?;
        Ok(storage)
    }

    /// Makes an empty private backing file, opened for reading and writing.
    pub fn new_scratch(&self) -> io::Result<(ScratchId, File)> {
        let id = {
            let mut ids = self.scratch.lock();
            if ids.next == ids.claimed {
                let mut batch = self.index.batch();
                batch.put_next_scratch(ids.claimed + CLAIM);
                batch.commit().map_err(io::Error::other)?;
                ids.claimed += CLAIM;
            }
            ids.next += 1;
            ScratchId(ids.next - 1)
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.dir.scratch_file(id))?;
        Ok((id, file))
    }

    /// Opens a private backing file for reading and writing.
    pub fn open_scratch(&self, id: ScratchId) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.dir.scratch_file(id))
    }

    /// Sets when a private backing file was last written, as its inode says.
    pub fn stamp_scratch(&self, id: ScratchId, mtime: Timestamp) -> io::Result<()> {
        let mtime = TimeSpec::new(mtime.secs, i64::from(mtime.nanos));
        utimensat(
            AT_FDCWD,
            &self.dir.scratch_file(id),
            &TimeSpec::UTIME_OMIT,
            &mtime,
            UtimensatFlags::NoFollowSymlink,
        )?;
        Ok(())
    }

    /// Removes a private backing file nobody names any more.
    pub fn remove_scratch(&self, id: ScratchId) {
        let path = self.dir.scratch_file(id);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove scratch file");
        }
    }

    /// Removes backing files that no inode of any view points at: what was unlinked but still
    /// open when an earlier daemon died.
    fn remove_orphans(&self) -> anyhow::Result<()> {
        let mut named = HashSet::new();
        for (view, _) in self.index.views()? {
            for (_, record) in self.index.inodes(view)? {
                if let Content::Private(id) = record.content {
                    named.insert(self.dir.scratch_file(id));
                }
            }
        }
        for entry in fs::read_dir(self.dir.scratch())? {
            let path = entry?.path();
            if !named.contains(&path) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}
