//! Directories of libraries whose digest is known, and a quick way to see that it still holds.
//!
//! What is remembered is the directory's identity, every name in it, and the identity of the file
//! behind each: device, inode, size and both times. One stat for the directory and one for each name,
//! relative to it, then show that nothing changed: names cannot come or go without moving the
//! directory's times, and a file cannot change without moving its own. Nothing is remembered that had
//! not rested, or whose bytes are not remembered themselves (see `files`).

use std::ffi::{CString, OsStr, OsString};
use std::fs::Metadata;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, fstatfs, open, statat};
use store::{Digest, Timestamp};

use crate::clock;

/// Directories remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Longer than any tick of a file system that counts nanoseconds.
const RESTED_MS: i64 = 50;
/// Longer than the tick of one that does not.
const COARSE_MS: i64 = 2_500;

/// File systems by their magic numbers (statfs(2)): btrfs, ext4, F2FS, overlay, squashfs, tmpfs, XFS.
const TELLING: [i64; 7] = [
    0x9123_683e,
    0xef53,
    0xf2f5_2010,
    0x794c_7630,
    0x7371_7368,
    0x0102_1994,
    0x5846_5342,
];

/// Which files of a directory count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// All.
    All,
    /// Those a loader may take for shared libraries.
    Shared,
}

/// What is remembered.
pub struct Listings(Mutex<LruCache<(PathBuf, Wanted), Arc<Listing>>>);

/// One directory as it was.
pub struct Listing {
    directory: Identity,
    files: Vec<(CString, Option<Identity>)>,
    digest: Digest,
}

/// What tells one state of a file from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    dev: u64,
    ino: u64,
    size: u64,
    /// When its bytes changed last.
    pub mtime: Timestamp,
    /// When anything of it did.
    pub ctime: Timestamp,
}

/// A directory that is open.
pub struct Opened(OwnedFd);

impl Opened {
    /// Opens a directory, not to be read.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(open(path, flags, Mode::empty())?))
    }

    /// The directory's own identity.
    pub fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&fstat(&self.0)?))
    }

    /// Whether it lies on a file system of this machine's kernel that moves a directory's times with
    /// each name that comes or goes; of others that is not known.
    pub fn tells_of_names(&self) -> bool {
        fstatfs(&self.0).is_ok_and(|info| TELLING.contains(&info.f_type))
    }

    /// The identity of the regular file that a name leads to; `None` when it leads to none.
    pub fn file(&self, name: &CString) -> Option<Identity> {
        let stat = statat(self.0.as_fd(), name, AtFlags::empty()).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
        is_file.then(|| Identity::of(&stat))
    }
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        let time = |secs, nanos| Timestamp {
            secs,
            nanos: u32::try_from(nanos).unwrap_or(0),
        };
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(u64::MAX),
            mtime: time(
                stat.st_mtime,
                i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
            ),
            ctime: time(
                stat.st_ctime,
                i64::try_from(stat.st_ctime_nsec).unwrap_or(0),
            ),
        }
    }

    /// Whether a change from now on would leave another time.
    pub fn rested(&self) -> bool {
        // Without nanoseconds the file system may count in seconds, FAT in pairs of them.
        let tick = if self.ctime.nanos == 0 && self.mtime.nanos == 0 {
            COARSE_MS
        } else {
            RESTED_MS
        };
        let now = clock::now();
        let age = (now.secs - self.ctime.secs).saturating_mul(1000)
            + (i64::from(now.nanos) - i64::from(self.ctime.nanos)) / 1_000_000;
        age > tick
    }
}

impl From<&Metadata> for Identity {
    fn from(meta: &Metadata) -> Self {
        let time = |secs, nanos| Timestamp {
            secs,
            nanos: u32::try_from(nanos).unwrap_or(0),
        };
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.len(),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Wanted {
    /// Whether a file of this name counts.
    pub fn holds(self, name: &OsStr) -> bool {
        match self {
            Self::All => true,
            Self::Shared => name.as_bytes().windows(3).any(|part| part == b".so"),
        }
    }
}

impl Default for Listings {
    /// Nothing known yet.
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

impl Listings {
    /// The digest of a directory, if nothing of it changed.
    pub fn get(&self, path: &Path, wanted: Wanted) -> Option<Digest> {
        let key = (path.to_owned(), wanted);
        let known = Arc::clone(self.0.lock().get(&key)?);
        let opened = Opened::at(path).ok()?;
        let same = opened.identity().ok()? == known.directory
            && known
                .files
                .iter()
                .all(|(name, identity)| opened.file(name) == *identity);
        same.then_some(known.digest)
    }

    /// Remembers a directory: its identity before it was listed, and what each name led to before
    /// anything was read.
    pub fn put(
        &self,
        path: &Path,
        wanted: Wanted,
        directory: Identity,
        names: &[(OsString, Option<Metadata>)],
        digest: Digest,
    ) -> io::Result<()> {
        let file = |(name, meta): &(OsString, Option<Metadata>)| {
            let name = CString::new(name.as_bytes())?;
            Ok((name, meta.as_ref().map(Identity::from)))
        };
        let listing = Listing {
            directory,
            files: names.iter().map(file).collect::<io::Result<_>>()?,
            digest,
        };
        let key = (path.to_owned(), wanted);
        self.0.lock().put(key, Arc::new(listing));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    /// As `files` does, without what needs a store.
    fn note(listings: &Listings, path: &Path) -> Digest {
        let directory = Opened::at(path).and_then(|opened| opened.identity());
        let names: Vec<_> = fs::read_dir(path)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| {
                let meta = fs::metadata(path.join(&name)).ok();
                (name, meta.filter(Metadata::is_file))
            })
            .collect();
        let digest = Digest::of(format!("{names:?}").as_bytes());
        let directory = directory.expect("its identity");
        listings
            .put(path, Wanted::All, directory, &names, digest)
            .expect("remembers");
        digest
    }

    #[test]
    fn every_change_is_seen() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (lib, other) = (dir.path().join("lib"), dir.path().join("other"));
        fs::create_dir(&lib).expect("mkdir");
        fs::write(lib.join("a"), b"1").expect("writes");
        fs::write(&other, b"1").expect("writes");
        symlink(&other, lib.join("link")).expect("links");
        symlink(dir.path().join("later"), lib.join("dangling")).expect("links");
        fs::create_dir(lib.join("below")).expect("mkdir");
        let listings = Listings::default();
        let changes: [(&str, &dyn Fn()); 8] = [
            ("written in place, and its time set back", &|| {
                let path = lib.join("a");
                let mtime = fs::metadata(&path).and_then(|meta| meta.modified());
                fs::write(&path, b"3").expect("writes");
                let file = fs::File::options().write(true).open(&path).expect("opens");
                file.set_modified(mtime.expect("a time"))
                    .expect("sets the time");
            }),
            ("written in place", &|| {
                fs::write(lib.join("a"), b"2").expect("writes");
            }),
            ("a new name", &|| {
                fs::write(lib.join("b"), b"").expect("writes");
            }),
            ("a name gone", &|| {
                fs::remove_file(lib.join("b")).expect("removes");
            }),
            ("written behind a link", &|| {
                fs::write(&other, b"2").expect("writes");
            }),
            ("what dangled leads somewhere", &|| {
                fs::write(dir.path().join("later"), b"").expect("writes");
            }),
            ("a file becomes a directory", &|| {
                fs::remove_file(lib.join("a")).expect("removes");
                fs::create_dir(lib.join("a")).expect("mkdir");
            }),
            ("another directory", &|| {
                fs::rename(&lib, dir.path().join("old")).expect("renames");
                fs::create_dir(&lib).expect("mkdir");
            }),
        ];
        for (what, change) in changes {
            let digest = note(&listings, &lib);
            assert_eq!(listings.get(&lib, Wanted::All), Some(digest), "{what}");
            assert_eq!(listings.get(&lib, Wanted::Shared), None, "{what}");
            std::thread::sleep(Duration::from_millis(20));
            change();
            assert_eq!(listings.get(&lib, Wanted::All), None, "{what}");
        }
    }

    #[test]
    fn what_just_changed_has_not_rested() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        fs::write(&path, b"").expect("writes");
        let identity = Identity::from(&fs::metadata(&path).expect("stat"));
        assert!(!identity.rested());
        std::thread::sleep(Duration::from_millis(100));
        assert!(identity.rested());
    }
}
