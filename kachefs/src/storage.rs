//! One opened store: the CAS, the index and the scratch area together.
//!
//! Owned by the daemon and shared with every view and the action service.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use parking_lot::Mutex;
use store::{
    Cas, CasError, Content, Digest, Index, LayoutError, ScratchId, StoreDir, StoreLock, Timestamp,
};

/// Scratch ids claimed from the index at a time.
const CLAIM: u64 = 1024;

/// Backing files kept open. The kernel does not tell when a file of a view is opened or closed, so
/// the daemon opens backings when they are first read and closes those not used for longest.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

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
    scratch: Mutex<ScratchIds>,
    open_files: Mutex<LruCache<Backing, Arc<File>>>,
    /// Private files that outlive their records: see [`Storage::hold_scratch`].
    held: Mutex<HashSet<ScratchId>>,
    _lock: StoreLock,
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
        dir.create()?;
        let lock = lock(&dir)?;
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
            open_files: Mutex::new(LruCache::new(OPEN_FILES)),
            held: Mutex::default(),
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

    /// The opened file of a blob; the same for every reader while it is in use.
    pub fn blob(&self, digest: &Digest) -> Result<Arc<File>, CasError> {
        self.opened(Backing::Blob(*digest), || self.cas.open(digest))
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

    /// Keeps a private file from [`Storage::drop_scratch`]: somebody has it open in a mount that is
    /// gone, whose view is about to be loaded again.
    pub fn hold_scratch(&self, id: ScratchId) {
        self.held.lock().insert(id);
    }

    /// Removes the private file of a record that goes, unless it is held or not there.
    pub fn drop_scratch(&self, id: ScratchId) {
        if !self.held.lock().contains(&id) && self.dir.scratch_file(id).exists() {
            self.remove_scratch(id);
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

    /// Removes backing files that no inode of any view points at: what was unlinked but still
    /// open when an earlier daemon died.
    fn remove_orphans(&self) -> anyhow::Result<()> {
        let mut named = HashSet::new();
        for (view, _) in self.index.views()? {
            self.index.each_inode(view, |_, record| {
                if let Content::Private(id) = record.content {
                    named.insert(self.dir.scratch_file(id));
                }
            })?;
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
