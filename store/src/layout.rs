//! Where things are in a store directory, and who owns it.
//!
//! ```text
//! lock            held with flock(2) by the one daemon that owns the store
//! keeper.lock     locked (fcntl_locking(2), OFD) by the one process that may start daemons
//! run/            mode 0700: daemon.sock
//! daemon.log, daemon.log.old
//! blobs/xx/<hex>  the CAS
//! scratch/<id>    private backing files, on the same file system as the CAS
//! aside/<name>/   where a compiler writes while it runs
//! index/          RocksDB
//! recompute/      where lost outputs are being made again
//! index.mark      how far the index had come, see `mark.rs`
//! managed/<hex>   the targets that come back by themselves
//! kachefs.toml    what the user configured
//! signing.key     mode 0600: what this store signs with
//! quarantine/     what was found damaged, see `quarantine.rs`
//! ```

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};

use crate::managed::Managed;
use crate::view::ScratchId;

/// The paths of one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreDir {
    root: PathBuf,
}

/// Proof that this process owns the store; the kernel ends it with the process.
#[derive(Debug)]
pub struct StoreLock(Flock<File>);

/// Proof that no other process starts daemons for the store; the kernel ends it with the process.
#[derive(Debug)]
pub struct KeeperLock(#[expect(dead_code, reason = "held for its lock")] File);

/// A store that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// Another process holds the lock.
    #[error("store {} is in use by another daemon", .0.display())]
    InUse(PathBuf),
    /// A directory or file of the store cannot be made or opened.
    #[error("store: cannot prepare {}: {source}", path.display())]
    Io {
        /// What could not be made.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl StoreLock {
    /// Whether the store is still where it was: neither removed, nor moved, nor replaced.
    pub fn is_in(&self, store: &StoreDir) -> bool {
        let ours = self.0.metadata().map(|meta| (meta.dev(), meta.ino()));
        let there = fs::metadata(store.lock_file()).map(|meta| (meta.dev(), meta.ino()));
        match (ours, there) {
            (Ok(ours), Ok(there)) => ours == there,
            (_, Err(error)) => !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ),
            // Nothing is known, so nothing is given up.
            (Err(_), _) => true,
        }
    }
}

impl StoreDir {
    /// A store at `root`, which should be an absolute path. Touches nothing.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The store a person means by these environment variables: `$KACHEFS_STORE`, else `kachefs`
    /// in the user's cache directory.
    pub fn from_environment(get: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
        let set = |name| {
            get(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        set("KACHEFS_STORE")
            .or_else(|| Some(set("XDG_CACHE_HOME")?.join("kachefs")))
            .or_else(|| Some(set("HOME")?.join(".cache/kachefs")))
    }

    /// The store directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.run().join("daemon.sock")
    }

    /// The private run directory.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// What the daemon writes for people.
    pub fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// The blobs.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The private backing files.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    /// One private backing file.
    pub fn scratch_file(&self, id: ScratchId) -> PathBuf {
        self.scratch().join(format!("{:x}", id.0))
    }

    /// Where compilers write, each in a directory of its own.
    pub fn aside(&self) -> PathBuf {
        self.root.join("aside")
    }

    /// Where lost outputs are being made again; nothing in it outlives the daemon.
    pub fn recompute(&self) -> PathBuf {
        self.root.join("recompute")
    }

    /// The RocksDB directory.
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    /// The targets that come back by themselves.
    pub fn managed(&self) -> Managed {
        Managed::new(self.root.join("managed"))
    }

    /// What the user configured for this store.
    pub fn configuration(&self) -> PathBuf {
        self.root.join("kachefs.toml")
    }

    /// The secret key that this store signs with.
    pub fn signing_key(&self) -> PathBuf {
        self.root.join("signing.key")
    }

    /// How far the index had come.
    pub fn mark(&self) -> PathBuf {
        self.root.join("index.mark")
    }

    /// What was found damaged.
    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// Makes the directories that are missing, readable by nobody else.
    pub fn create(&self) -> Result<(), LayoutError> {
        for path in [self.root.clone(), self.run(), self.blobs(), self.scratch()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|source| LayoutError::Io { path, source })?;
        }
        Ok(())
    }

    /// Takes ownership of the store for this process.
    pub fn lock(&self) -> Result<StoreLock, LayoutError> {
        let path = self.lock_file();
        let file = open_lock(&path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(StoreLock(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(LayoutError::InUse(self.root.clone())),
            Err((_, errno)) => Err(LayoutError::Io {
                path,
                source: errno.into(),
            }),
        }
    }

    /// Becomes the one process that may start daemons for this store. It does so for as long as it
    /// lives, daemon or not: what its daemon held must not be taken by a stranger's.
    pub fn lock_keeper(&self) -> Result<KeeperLock, LayoutError> {
        let path = self.keeper_lock();
        let file = open_lock(&path)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => Ok(KeeperLock(file)),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(LayoutError::InUse(self.root.clone())),
            Err(errno) => Err(LayoutError::Io {
                path,
                source: errno.into(),
            }),
        }
    }

    /// Whether some process may start daemons for this store: then one that does not answer will be
    /// followed by another. Takes no lock.
    pub fn has_keeper(&self) -> bool {
        let mut lock = whole_file();
        File::open(self.keeper_lock())
            .is_ok_and(|file| fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok())
            && i32::from(lock.l_type) != nix::libc::F_UNLCK
    }

    fn lock_file(&self) -> PathBuf {
        self.root.join("lock")
    }

    fn keeper_lock(&self) -> PathBuf {
        self.root.join("keeper.lock")
    }

    /// The store whose daemon listens at `socket`.
    pub fn of_socket(socket: &Path) -> Option<Self> {
        Some(Self::new(socket.parent()?.parent()?))
    }
}

/// A file to be locked, made when it is not there.
fn open_lock(path: &Path) -> Result<File, LayoutError> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| LayoutError::Io {
            path: path.to_owned(),
            source,
        })
}

/// A lock for writing on all of a file.
fn whole_file() -> nix::libc::flock {
    nix::libc::flock {
        l_type: short(nix::libc::F_WRLCK),
        l_whence: short(nix::libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Constants that C has as `int` and `struct flock` as `short`.
fn short(value: i32) -> i16 {
    i16::try_from(value).unwrap_or(i16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_the_store() {
        let with = |pairs: &[(&str, &str)]| {
            StoreDir::from_environment(|name| {
                let (_, value) = pairs.iter().find(|(known, _)| *known == name)?;
                Some(OsString::from(value))
            })
        };
        let all = [
            ("KACHEFS_STORE", "/s"),
            ("XDG_CACHE_HOME", "/c"),
            ("HOME", "/h"),
        ];
        assert_eq!(with(&all), Some("/s".into()));
        assert_eq!(with(&all[1..]), Some("/c/kachefs".into()));
        assert_eq!(with(&all[2..]), Some("/h/.cache/kachefs".into()));
        assert_eq!(with(&[("KACHEFS_STORE", "")]), None);
    }

    #[test]
    fn a_store_has_one_owner() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path().join("s"));
        store.create().expect("creates");
        let first = store.lock().expect("locks");
        assert!(matches!(store.lock(), Err(LayoutError::InUse(_))));
        drop(first);
        store.lock().expect("free again");
    }

    #[test]
    fn a_store_that_is_gone_is_noticed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (root, away) = (dir.path().join("s"), dir.path().join("away"));
        let store = StoreDir::new(&root);
        store.create().expect("creates");
        let lock = store.lock().expect("locks");
        assert!(lock.is_in(&store));
        fs::rename(&root, &away).expect("moves");
        assert!(!lock.is_in(&store));
        store.create().expect("creates");
        let _other = store.lock().expect("another store");
        assert!(!lock.is_in(&store));
        fs::remove_dir_all(&root).expect("removes");
        fs::rename(&away, &root).expect("moves back");
        assert!(lock.is_in(&store));
    }

    #[test]
    fn a_store_has_one_keeper() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path().join("s"));
        assert!(!store.has_keeper());
        store.create().expect("creates");
        let first = store.lock_keeper().expect("locks");
        assert!(store.has_keeper());
        assert!(matches!(store.lock_keeper(), Err(LayoutError::InUse(_))));
        assert!(StoreDir::of_socket(&store.socket()).is_some_and(|same| same.has_keeper()));
        drop(first);
        assert!(!store.has_keeper());
        store.lock_keeper().expect("free again");
    }
}
