//! Digests of files on the disk, each computed once per change.
//!
//! A file is known by path, device, inode, size, mtime and ctime. A memo is only kept when the
//! file had rested for longer than a tick of the file system's clock: a change within the tick
//! would leave all six as they were (what git calls a racy entry).

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use store::{Digest, FileMemo, Hasher, Timestamp};

use crate::clock;
use crate::storage::Storage;

/// Memos kept in memory; all are kept in the index.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(64 * 1024).expect("not zero");

/// Longer than any tick of a file system's clock.
const RESTED_MS: i64 = 50;

/// Above this many files a directory outside our roots is known by names, sizes and times.
const HASHED_FILES: usize = 512;

/// Computes and remembers digests.
pub struct FileDigests {
    storage: Arc<Storage>,
    memos: Mutex<LruCache<PathBuf, FileMemo>>,
    /// Digests of large directories, by the directory's own attributes.
    listings: Mutex<HashMap<PathBuf, FileMemo>>,
}

/// When a file last changed, in a form to compare.
pub fn changed_at(meta: &Metadata) -> Timestamp {
    Timestamp {
        secs: meta.ctime(),
        nanos: u32::try_from(meta.ctime_nsec()).unwrap_or(0),
    }
}

impl FileDigests {
    /// Nothing in memory yet.
    pub fn new(storage: Arc<Storage>) -> Self {
        Self {
            storage,
            memos: Mutex::new(LruCache::new(REMEMBERED)),
            listings: Mutex::default(),
        }
    }

    /// The digest of a regular file's bytes, following symbolic links.
    pub fn file(&self, path: &Path) -> io::Result<Digest> {
        let meta = fs::metadata(path)?;
        self.known_file(path, &meta)
    }

    /// The same, for a file whose attributes the caller has just read.
    pub fn known_file(&self, path: &Path, meta: &Metadata) -> io::Result<Digest> {
        if !meta.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        if let Some(digest) = self.remembered(path, meta) {
            return Ok(digest);
        }
        let file = File::open(path)?;
        let before = file.metadata()?;
        let (digest, _) = store::digest::hash_reader(&file, |_| ())?;
        let memo = memo_of(&before, digest);
        if memo_of(&file.metadata()?, digest) == memo && rested(&memo) {
            self.remember(path, memo);
        }
        Ok(digest)
    }

    fn remembered(&self, path: &Path, meta: &Metadata) -> Option<Digest> {
        let fits = |memo: FileMemo| (memo_of(meta, memo.digest) == memo).then_some(memo.digest);
        if let Some(memo) = self.memos.lock().get(path).copied() {
            return fits(memo);
        }
        match self.storage.index.file_memo(path.as_os_str().as_bytes()) {
            Ok(memo) => {
                let memo = memo?;
                self.memos.lock().put(path.to_owned(), memo);
                fits(memo)
            }
            Err(error) => {
                tracing::warn!(%error, "file memo");
                None
            }
        }
    }

    fn remember(&self, path: &Path, memo: FileMemo) {
        self.memos.lock().put(path.to_owned(), memo);
        let mut batch = self.storage.index.batch();
        let stored = batch
            .put_file_memo(path.as_os_str().as_bytes(), &memo)
            .and_then(|()| batch.commit());
        if let Err(error) = stored {
            tracing::warn!(%error, "file memo");
        }
    }

    /// The digest of a directory that a linker searches: names and contents of its files, not of
    /// its subdirectories. A directory of the system with very many files is known by their
    /// names, sizes and times instead, looked at again when the directory changed: package
    /// managers replace files, they do not write into them.
    pub fn search_directory(&self, path: &Path) -> io::Result<Digest> {
        let own = fs::metadata(path)?;
        if let Some(memo) = self.listings.lock().get(path)
            && memo_of(&own, memo.digest) == *memo
        {
            return Ok(memo.digest);
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // A dangling link is no library.
            if let Ok(meta) = fs::metadata(entry.path())
                && meta.is_file()
            {
                files.push((entry.file_name(), meta));
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        let mut hasher = Hasher::new("kachefs search directory");
        for (name, meta) in &files {
            hasher.field(name.as_bytes());
            if files.len() > HASHED_FILES {
                hasher.number(meta.len()).field(&meta.mtime().to_le_bytes());
                hasher.field(&meta.mtime_nsec().to_le_bytes());
            } else {
                hasher.digest(&self.known_file(&path.join(name), meta)?);
            }
        }
        let memo = memo_of(&own, hasher.finish());
        if files.len() > HASHED_FILES && rested(&memo) {
            self.listings.lock().insert(path.to_owned(), memo);
        }
        Ok(memo.digest)
    }

    /// The digest of everything below a directory, except what `skip` says. `None` when there
    /// are more than `limit` files.
    pub fn tree(
        &self,
        root: &Path,
        limit: usize,
        skip: &dyn Fn(&Path) -> bool,
    ) -> io::Result<Option<Digest>> {
        let mut hasher = Hasher::new("kachefs directory tree");
        let mut budget = limit;
        let whole = self.subtree(root, &mut hasher, &mut budget, skip)?;
        Ok(whole.then(|| hasher.finish()))
    }

    fn subtree(
        &self,
        directory: &Path,
        hasher: &mut Hasher,
        budget: &mut usize,
        skip: &dyn Fn(&Path) -> bool,
    ) -> io::Result<bool> {
        let mut entries: Vec<_> = fs::read_dir(directory)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            if skip(&path) {
                continue;
            }
            let Some(left) = budget.checked_sub(1) else {
                return Ok(false);
            };
            *budget = left;
            hasher.field(entry.file_name().as_bytes());
            let meta = entry.metadata()?;
            if meta.is_dir() {
                hasher.field(b"directory");
                if !self.subtree(&path, hasher, budget, skip)? {
                    return Ok(false);
                }
                hasher.field(b"end");
            } else if meta.is_symlink() {
                hasher
                    .field(b"link")
                    .field(fs::read_link(&path)?.as_os_str().as_bytes());
                // What the link leads to can be read through it.
                if let Ok(digest) = self.file(&path) {
                    hasher.digest(&digest);
                }
            } else if meta.is_file() {
                hasher
                    .field(b"file")
                    .digest(&self.known_file(&path, &meta)?);
            }
        }
        Ok(true)
    }
}

fn memo_of(meta: &Metadata, digest: Digest) -> FileMemo {
    FileMemo {
        dev: meta.dev(),
        ino: meta.ino(),
        size: meta.len(),
        mtime: Timestamp {
            secs: meta.mtime(),
            nanos: u32::try_from(meta.mtime_nsec()).unwrap_or(0),
        },
        ctime: changed_at(meta),
        digest,
    }
}

fn rested(memo: &FileMemo) -> bool {
    let now = clock::now();
    let age = (now.secs - memo.ctime.secs).saturating_mul(1000)
        + (i64::from(now.nanos) - i64::from(memo.ctime.nanos)) / 1_000_000;
    age > RESTED_MS
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::StoreDir;

    fn digests() -> (tempfile::TempDir, FileDigests) {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage = Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens");
        let digests = FileDigests::new(Arc::new(storage));
        (dir, digests)
    }

    #[test]
    fn a_quick_change_of_equal_length_is_seen() {
        let (dir, digests) = digests();
        let path = dir.path().join("f");
        for round in 0..50_u8 {
            fs::write(&path, [round]).expect("writes");
            assert_eq!(digests.file(&path).expect("hashes"), Digest::of(&[round]));
        }
    }

    #[test]
    fn a_rested_file_is_read_once() {
        let (dir, digests) = digests();
        let path = dir.path().join("f");
        fs::write(&path, b"abc").expect("writes");
        std::thread::sleep(std::time::Duration::from_millis(100));
        let digest = digests.file(&path).expect("hashes");
        let meta = fs::metadata(&path).expect("stat");
        assert_eq!(digests.remembered(&path, &meta), Some(digest));
    }

    #[test]
    fn trees_notice_every_change() {
        let (dir, digests) = digests();
        let root = dir.path().join("p");
        fs::create_dir_all(root.join("a/target")).expect("mkdir");
        fs::write(root.join("a/f"), b"1").expect("writes");
        let skip = |path: &Path| path.ends_with("target");
        let mut seen = std::collections::HashSet::new();
        let mut note = || {
            seen.insert(
                digests
                    .tree(&root, 100, &skip)
                    .expect("hashes")
                    .expect("small"),
            )
        };
        assert!(note());
        fs::write(root.join("a/target/x"), b"").expect("writes");
        assert!(!note(), "skipped directories do not matter");
        fs::write(root.join("a/g"), b"").expect("writes");
        assert!(note(), "a new file");
        fs::rename(root.join("a/g"), root.join("g")).expect("renames");
        assert!(note(), "a moved file");
        fs::write(root.join("a/f"), b"2").expect("writes");
        assert!(note(), "a changed file");
        assert!(digests.tree(&root, 2, &skip).expect("hashes").is_none());
    }
}
