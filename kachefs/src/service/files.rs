//! Digests of files on the disk, each computed once per change.
//!
//! A file is known by path, device, inode, size, mtime and ctime. A memo is only kept when the
//! file had rested for longer than a tick of the file system's clock: a change within the tick
//! would leave all six as they were (what git calls a racy entry). Nor is one kept while somebody
//! has the file open for writing: through a shared mapping, a second store to a page moves no time.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use store::{Digest, FileMemo, Hasher, Timestamp};
use wrapper::lease;

use super::listings::{Identity, Listings, Opened, Wanted};
use crate::flight::Flights;
use crate::storage::Storage;

/// Memos kept in memory; all are kept in the index.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(64 * 1024).expect("not zero");

/// A file of this many bytes is read by one of those who want to know it, while the others wait.
const WORTH_WAITING: u64 = 1 << 20;

/// How long they wait before they read it themselves.
const PATIENCE: Duration = Duration::from_mins(1);

/// Above this many files a directory of the system is known by names, sizes and times.
const HASHED_FILES: usize = 512;

/// What of a `.git` says which commit and branch this is. The rest is large or changes with every
/// command; whether the files are those of the commit, the files themselves say.
const SEEN_OF_GIT: &[&str] = &["HEAD", "packed-refs", "refs", "reftable"];

/// What a directory of caches begins its `CACHEDIR.TAG` with (the Cache Directory Tagging
/// Specification): cargo marks targets so.
const CACHE_TAG: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// Whether the system's packages put the files of this directory there.
pub(super) fn is_system(path: &Path) -> bool {
    let within = |part: &&str| path.starts_with(part);
    ["/usr", "/lib", "/lib64"].iter().any(within) && !path.starts_with("/usr/local")
}

/// Computes and remembers digests.
pub struct FileDigests {
    storage: Arc<Storage>,
    memos: Mutex<LruCache<PathBuf, FileMemo>>,
    listings: Listings,
    reading: Arc<Flights<PathBuf>>,
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
            listings: Listings::default(),
            reading: Arc::default(),
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
        if meta.len() < WORTH_WAITING {
            return self.read(path);
        }
        let flight = self.reading.take_off(path.to_owned());
        if let Err(boarding) = &flight {
            boarding.wait(PATIENCE);
        }
        // One has landed meanwhile.
        match self.remembered(path, meta) {
            Some(digest) => Ok(digest),
            None => self.read(path),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Digest> {
        let file = File::open(path)?;
        // Asked before the bytes are read: who maps the file later moves its mtime with the first
        // store to each page.
        let written = lease::is_written(&file);
        let before = file.metadata()?;
        // As of now: a change while it is read must leave another time than the last one before.
        let rested = Identity::from(&before).rested();
        let (digest, _) = store::digest::hash_reader(&file, |_| ())?;
        let memo = memo_of(&before, digest);
        if !written && memo_of(&file.metadata()?, digest) == memo && rested {
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
    /// its subdirectories. Large directories of the system (`/usr`, `/lib`) are known by the
    /// files' names, sizes and times instead.
    pub fn search_directory(&self, path: &Path) -> io::Result<Digest> {
        self.files_in(path, Wanted::All)
    }

    /// The same of its shared libraries alone.
    pub fn shared_libraries(&self, path: &Path) -> io::Result<Digest> {
        self.files_in(path, Wanted::Shared)
    }

    fn files_in(&self, path: &Path, wanted: Wanted) -> io::Result<Digest> {
        if let Some(digest) = self.listings.get(path, wanted) {
            return Ok(digest);
        }
        let opened = Opened::at(path)?;
        let directory = opened.identity()?;
        // Before it is listed: a change from here on leaves another time.
        let tells = directory.rested() && opened.tells_of_names();
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            let name = entry?.file_name();
            if wanted.holds(&name) {
                // A dangling link is no library.
                let meta = fs::metadata(path.join(&name)).ok();
                names.push((name, meta.filter(Metadata::is_file)));
            }
        }
        names.sort_by(|a, b| a.0.cmp(&b.0));
        let (digest, known) = self.digest_files(path, &names)?;
        if tells && known {
            self.listings.put(path, wanted, directory, &names, digest)?;
        }
        Ok(digest)
    }

    /// The digest of some files of a directory, and whether what it is made of is known by their
    /// attributes from now on.
    fn digest_files(
        &self,
        path: &Path,
        names: &[(OsString, Option<Metadata>)],
    ) -> io::Result<(Digest, bool)> {
        let files = names
            .iter()
            .filter_map(|(name, meta)| Some((name, meta.as_ref()?)));
        let by_attributes = files.clone().count() > HASHED_FILES && is_system(path);
        let mut hasher = Hasher::new("kachefs search directory");
        let mut known = true;
        for (name, meta) in files {
            hasher.field(name.as_bytes());
            if by_attributes {
                hasher.number(meta.len()).field(&meta.mtime().to_le_bytes());
                hasher.field(&meta.mtime_nsec().to_le_bytes());
            } else {
                let path = path.join(name);
                let digest = self.known_file(&path, meta)?;
                hasher.digest(&digest);
                known = known && self.remembered(&path, meta) == Some(digest);
            }
        }
        Ok((hasher.finish(), known))
    }

    /// The digest of everything below a directory, except what `skip` says. Links are followed:
    /// what they lead to can be read through them. Of a `.git`, only HEAD and
    /// the refs count; a directory that is marked as a cache is not there. With the last time
    /// anything in it changed. `None` when it is more than `limits` allow.
    pub fn tree(
        &self,
        root: &Path,
        limits: Limits,
        skip: &dyn Fn(&Path, &Metadata) -> bool,
    ) -> io::Result<Option<(Digest, Timestamp)>> {
        let mut walk = Walk {
            digests: self,
            hasher: Hasher::new("kachefs directory tree"),
            left: limits,
            above: Vec::new(),
            newest: Timestamp::default(),
            skip,
        };
        let whole = walk.directory(root, &fs::metadata(root)?)?;
        Ok(whole.then(|| (walk.hasher.finish(), walk.newest)))
    }
}

/// How much of a tree may be looked at.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Files and directories.
    pub entries: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One walk through a directory tree.
struct Walk<'a> {
    digests: &'a FileDigests,
    hasher: Hasher,
    left: Limits,
    /// Device and inode of the directories on the way here: a link to one of them is a loop.
    above: Vec<(u64, u64)>,
    /// When anything looked at changed last.
    newest: Timestamp,
    skip: &'a dyn Fn(&Path, &Metadata) -> bool,
}

impl Walk<'_> {
    /// Whether everything below fits the limits.
    fn directory(&mut self, path: &Path, meta: &Metadata) -> io::Result<bool> {
        let own = (meta.dev(), meta.ino());
        if self.above.contains(&own) {
            self.hasher.field(b"loop");
            return Ok(true);
        }
        self.above.push(own);
        self.newest = self.newest.max(changed_at(meta));
        let mut entries: Vec<_> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
        if path.file_name() == Some(OsStr::new(".git")) {
            entries.retain(|entry| SEEN_OF_GIT.iter().any(|seen| entry.file_name() == *seen));
        }
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if !self.entry(&entry)? {
                return Ok(false);
            }
        }
        self.hasher.field(b"end");
        self.above.pop();
        Ok(true)
    }

    fn entry(&mut self, entry: &fs::DirEntry) -> io::Result<bool> {
        let path = entry.path();
        let meta = fs::metadata(&path);
        // Nothing is opened in what is skipped: that may be a view of our own.
        if let Ok(meta) = &meta
            && meta.is_dir()
            && !(self.skip)(&path, meta)
            && is_cache(&path)
        {
            return Ok(true);
        }
        self.hasher.field(entry.file_name().as_bytes());
        let Ok(meta) = meta else {
            let target = fs::read_link(&path)?;
            self.hasher
                .field(b"dangling")
                .field(target.as_os_str().as_bytes());
            return Ok(true);
        };
        if (self.skip)(&path, &meta) {
            return Ok(true);
        }
        let (Some(entries), Some(bytes)) = (
            self.left.entries.checked_sub(1),
            self.left
                .bytes
                .checked_sub(if meta.is_file() { meta.len() } else { 0 }),
        ) else {
            return Ok(false);
        };
        self.left = Limits { entries, bytes };
        if meta.is_dir() {
            self.hasher.field(b"directory");
            return self.directory(&path, &meta);
        }
        self.newest = self.newest.max(changed_at(&meta));
        if meta.is_file() {
            let digest = self.digests.known_file(&path, &meta)?;
            self.hasher.field(b"file").digest(&digest);
        }
        Ok(true)
    }
}

/// Whether a directory says of itself that it holds nothing but what can be made again.
fn is_cache(directory: &Path) -> bool {
    let tag = directory.join("CACHEDIR.TAG");
    // A FIFO, say, must not be waited for.
    if !fs::metadata(&tag).is_ok_and(|meta| meta.is_file()) {
        return false;
    }
    let mut start = Vec::new();
    let tag = File::open(tag);
    let read = tag.and_then(|tag| tag.take(CACHE_TAG.len() as u64).read_to_end(&mut start));
    read.is_ok() && start == CACHE_TAG
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
    fn a_file_open_for_writing_is_read_every_time() {
        let _unharmed = lease::Unharmed::start();
        let (dir, digests) = digests();
        let path = dir.path().join("f");
        fs::write(&path, b"abc").expect("writes");
        let writer = File::options().write(true).open(&path).expect("opens");
        std::thread::sleep(std::time::Duration::from_millis(100));
        let digest = digests.file(&path).expect("hashes");
        let meta = fs::metadata(&path).expect("stat");
        assert_eq!(digests.remembered(&path, &meta), None);
        drop(writer);
        assert_eq!(digests.file(&path).expect("hashes"), digest);
        assert_eq!(digests.remembered(&path, &meta), Some(digest));
    }

    const MANY: Limits = Limits {
        entries: 100,
        bytes: 1 << 20,
    };

    #[test]
    fn trees_notice_every_change() {
        let (dir, digests) = digests();
        let root = dir.path().join("p");
        fs::create_dir_all(root.join("a/target")).expect("mkdir");
        fs::write(root.join("a/f"), b"1").expect("writes");
        let skip = |path: &Path, _: &Metadata| path.ends_with("target");
        let mut seen = std::collections::HashSet::new();
        let mut note = || {
            seen.insert(
                digests
                    .tree(&root, MANY, &skip)
                    .expect("hashes")
                    .expect("small")
                    .0,
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
        fs::create_dir(dir.path().join("shared")).expect("mkdir");
        std::os::unix::fs::symlink("../shared", root.join("link")).expect("links");
        std::os::unix::fs::symlink("..", root.join("a/loop")).expect("links");
        assert!(note(), "links");
        fs::write(dir.path().join("shared/x"), b"").expect("writes");
        assert!(note(), "a file behind a link");
        assert!(
            digests
                .tree(&root, Limits { entries: 2, ..MANY }, &skip)
                .expect("hashes")
                .is_none()
        );
    }
}
