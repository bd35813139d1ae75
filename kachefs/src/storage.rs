//! One opened store: the CAS, the index and the scratch area together.
//!
//! Owned by the daemon and shared with every view and the action service.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use parking_lot::Mutex;
use store::{
    Cas, CasError, Content, Digest, Epoch, Index, LayoutError, Quarantine, ScratchId, StoreDir,
    StoreLock, SyncPoint, Timestamp, limits,
};

use crate::clock;
use crate::damage::Damage;
use crate::epochs::Epochs;
use crate::fs::recovery::{self, LastEnd};
use crate::lazy::Lazy;
use crate::sync_points::{self, ScratchName, SyncPoints, retired_name};

/// Scratch ids claimed from the index at a time.
const CLAIM: u64 = 1024;

/// Backing files kept open. The kernel does not tell when a file of a view is opened or closed, so
/// the daemon opens backings when they are first read and closes those not used for longest.
const OPEN_FILES: u64 = 512;

/// How long a daemon that died may seem to own its store: until a child it had just forked has run
/// its program.
const RELEASE: Duration = Duration::from_secs(2);

/// A store this process owns.
pub struct Storage {
    /// Its paths.
    pub dir: StoreDir,
    /// Its blobs.
    pub cas: Cas,
    /// Its facts.
    pub index: Index,
    /// Which changes belong together.
    pub epochs: Epochs,
    pub(crate) sync_points: SyncPoints,
    /// What was wrong with it when it was opened.
    pub damage: Damage,
    /// What only its remote holds.
    pub lazy: Lazy,
    scratch: Mutex<ScratchIds>,
    open_files: Mutex<LruCache<Backing, Arc<File>>>,
    /// Private files that outlive their records: see [`Storage::hold_scratch`].
    pub(crate) held: Mutex<HashSet<ScratchId>>,
    lock: StoreLock,
}

/// A file that holds the bytes of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Backing {
    /// A blob, opened for reading.
    Blob(Digest),
    /// A private file, opened for reading and writing.
    Scratch(ScratchId),
}

struct ScratchIds {
    next: u64,
    claimed: u64,
}

impl Storage {
    /// Opens the store at `dir`, making it when it is not there, and takes ownership.
    pub fn open(dir: StoreDir) -> anyhow::Result<Self> {
        Self::open_in(dir, store::this_boot())
    }

    /// The same in a boot of this name.
    pub fn open_in(dir: StoreDir, boot: Option<String>) -> anyhow::Result<Self> {
        dir.create()?;
        let lock = lock(&dir)?;
        let (index, damage) = Damage::look(&dir, &Quarantine::new(&dir))?;
        let cas = Cas::new(&dir);
        cas.remove_leftovers()?;
        let last_end = LastEnd::of(index.sync_point()?, boot.as_deref());
        let cut = matches!(last_end, LastEnd::Cut(_));
        damage.tell_of_the_log(&last_end);
        if let LastEnd::Cut(last) = &last_end {
            recovery::recover(&dir, &cas, &index, last)?;
        }
        let orphans = Orphans::take(&dir, &index, &damage, cut)?;
        // Ids of files that an index which went back does not know are not given out again.
        let next = index.next_scratch()?.max(orphans.next);
        let point = begin(&dir, &index, last_end, boot)?;
        let open_files = usize::try_from(limits::share(OPEN_FILES)).unwrap_or(usize::MAX);
        let open_files = NonZeroUsize::new(open_files).unwrap_or(NonZeroUsize::MIN);
        let storage = Self {
            epochs: Epochs::new(point.begun),
            sync_points: SyncPoints::new(point, dir.root(), orphans.retired)?,
            lazy: Lazy::new(dir.clone(), index.last_upload()?),
            dir,
            cas,
            index,
            damage,
            scratch: Mutex::new(ScratchIds {
                next,
                claimed: next,
            }),
            open_files: Mutex::new(LruCache::new(open_files)),
            held: Mutex::default(),
            lock,
        };
        Ok(storage)
    }

    /// Whether the store is still in its directory.
    pub fn is_in_place(&self) -> bool {
        self.lock.is_in(&self.dir)
    }

    /// Closes every backing that is not in use, when there are no descriptors left.
    pub fn close_idle(&self) {
        self.open_files.lock().clear();
    }

    /// Lets go of the descriptor of a blob that is not what it should be.
    pub fn close_blob(&self, digest: &Digest) {
        self.open_files.lock().pop(&Backing::Blob(*digest));
    }

    /// A number that no private backing file has had.
    pub fn next_scratch(&self) -> io::Result<ScratchId> {
        let mut ids = self.scratch.lock();
        if ids.next == ids.claimed {
            let mut batch = self.index.batch();
            batch.put_next_scratch(ids.claimed + CLAIM);
            batch.commit().map_err(|error| match error.errno() {
                Some(errno) => errno.into(),
                None => io::Error::other(error),
            })?;
            ids.claimed += CLAIM;
        }
        ids.next += 1;
        Ok(ScratchId(ids.next - 1))
    }

    /// Makes an empty private backing file, opened for reading and writing.
    pub fn new_scratch(&self) -> io::Result<(ScratchId, File)> {
        let id = self.next_scratch()?;
        let create = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.dir.scratch_file(id))
        };
        let file = create().or_else(|error| self.again(error, create));
        match file {
            // Whoever creates a file in a view has no use for the news that the store is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(io::Error::from_raw_os_error(nix::libc::EIO))
            }
            file => Ok((id, file?)),
        }
    }

    /// Once more, when it failed for want of descriptors and some can be closed.
    pub(crate) fn again<T>(
        &self,
        error: io::Error,
        open: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if is_out_of_descriptors(error.raw_os_error()) {
            self.close_idle();
            return open();
        }
        Err(error)
    }

    /// The opened file of a blob; the same for every reader while it is in use.
    pub fn blob(&self, digest: &Digest) -> Result<Arc<File>, CasError> {
        self.opened(Backing::Blob(*digest), || match self.cas.open(digest) {
            Err(error) if is_out_of_descriptors(error.raw_os_error()) => {
                self.close_idle();
                self.cas.open(digest)
            }
            opened => opened,
        })
    }

    /// The opened private backing file; the same for every user while it is in use.
    pub fn scratch(&self, id: ScratchId) -> io::Result<Arc<File>> {
        self.opened(Backing::Scratch(id), || self.open_scratch(id))
    }

    fn opened<E>(
        &self,
        backing: Backing,
        open: impl FnOnce() -> Result<File, E>,
    ) -> Result<Arc<File>, E> {
        if let Some(file) = self.open_files.lock().get(&backing) {
            return Ok(Arc::clone(file));
        }
        // Not under the lock: opening may wait for the disk. Two openers at once do no harm.
        let file = Arc::new(open()?);
        self.open_files.lock().put(backing, Arc::clone(&file));
        Ok(file)
    }

    /// Lets go of the descriptor of a private file that is about to be sealed or removed.
    pub fn close_scratch(&self, id: ScratchId) {
        self.open_files.lock().pop(&Backing::Scratch(id));
    }

    /// Opens a private backing file for reading and writing, with a descriptor of its own.
    pub fn open_scratch(&self, id: ScratchId) -> io::Result<File> {
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(self.dir.scratch_file(id))
        };
        open().or_else(|error| self.again(error, open))
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

    /// Keeps a private file from [`Storage::drop_scratch`]: somebody has it open in a mount that is
    /// gone, whose view is about to be loaded again.
    pub fn hold_scratch(&self, id: ScratchId) {
        self.held.lock().insert(id);
    }

    /// Removes the private file of a record that goes, unless it is held or not there.
    pub fn drop_scratch(&self, id: ScratchId, changed: Epoch, fsynced: bool) {
        if !self.held.lock().contains(&id) && self.dir.scratch_file(id).exists() {
            self.retire_scratch(id, changed, fsynced);
        }
    }

    /// Removes a private backing file nobody names any more.
    pub fn remove_scratch(&self, id: ScratchId) {
        self.close_scratch(id);
        self.held.lock().remove(&id);
        let path = self.dir.scratch_file(id);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove scratch file");
        }
    }
}

/// Backing files that no inode of any view points at: what was unlinked but still open when an
/// earlier daemon died, or waits for its removal.
struct Orphans {
    /// Gone with the next sync point: an earlier state of the index may name them.
    retired: Vec<ScratchId>,
    /// No file has this id or a later one.
    next: u64,
}

impl Orphans {
    /// Where inodes may be missing, what they may have named is set aside instead.
    fn take(dir: &StoreDir, index: &Index, damage: &Damage, cut: bool) -> anyhow::Result<Self> {
        let named = named_files(dir, index)?;
        let mut orphans = Self {
            retired: Vec::new(),
            next: 0,
        };
        let mut aside = 0_u64;
        for entry in fs::read_dir(dir.scratch())? {
            let path = entry?.path();
            let id = match ScratchName::of(&path) {
                ScratchName::Live(id) if named.contains(&path) => id,
                ScratchName::Live(id)
                    if damage.forgot_inodes(cut) && fs::symlink_metadata(&path)?.len() > 0 =>
                {
                    damage.set_aside(&path)?;
                    aside += 1;
                    id
                }
                ScratchName::Live(id) => {
                    fs::rename(&path, retired_name(&path))?;
                    orphans.retired.push(id);
                    id
                }
                ScratchName::Retired(id) => {
                    orphans.retired.push(id);
                    id
                }
                ScratchName::Other => {
                    fs::remove_file(&path)?;
                    continue;
                }
            };
            orphans.next = orphans.next.max(id.0 + 1);
        }
        if aside > 0 {
            tracing::error!(
                aside,
                "private files nobody names any more are in the quarantine"
            );
        }
        Ok(orphans)
    }
}

fn named_files(dir: &StoreDir, index: &Index) -> anyhow::Result<HashSet<PathBuf>> {
    let mut named = HashSet::new();
    for (view, _) in index.views()? {
        index.each_inode(view, |_, record| {
            if let Content::Private(id) = record.content {
                named.insert(dir.scratch_file(id));
            }
        })?;
    }
    Ok(named)
}

/// Notes that the store is in use from now on, and from where on it cannot be vouched for.
fn begin(
    dir: &StoreDir,
    index: &Index,
    last_end: LastEnd,
    boot: Option<String>,
) -> anyhow::Result<SyncPoint> {
    let now = clock::now();
    let begins = |epoch, boot| SyncPoint {
        boot,
        begun: epoch,
        durable: epoch,
        since: now,
        ended: false,
    };
    let (point, vouched) = match last_end {
        // Everything is in the page cache, and as much of it on the disk as there was before.
        LastEnd::SameBoot(last) if last.since <= now => return Ok(last),
        // The clock was set back meanwhile.
        LastEnd::SameBoot(last) => (SyncPoint { since: now, ..last }, true),
        LastEnd::Ended(last) => (begins(last.begun, boot), true),
        LastEnd::Cut(last) => (begins(last.begun.next(), boot), false),
        // Nothing to vouch for, or what a kachefs without sync points left.
        LastEnd::New => (begins(Epoch(1), boot), index.views()?.is_empty()),
    };
    if !vouched {
        nix::unistd::syncfs(File::open(dir.root())?)?;
    }
    sync_points::put(index, &point)?;
    // Before anything changes: a state of the index that ended in order must not be found then.
    index.sync()?;
    Ok(point)
}

/// Whether an operation failed for want of descriptors, which may pass.
pub(crate) fn is_out_of_descriptors(errno: Option<i32>) -> bool {
    matches!(errno, Some(nix::libc::EMFILE | nix::libc::ENFILE))
}

fn lock(dir: &StoreDir) -> Result<StoreLock, LayoutError> {
    let deadline = Instant::now() + RELEASE;
    loop {
        match dir.lock() {
            Err(LayoutError::InUse(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}
