//! The CAS: immutable blobs on the local disk, named by their digest.
//!
//! A blob enters as a new name of a finished file or from bytes in memory, and is read-only from then
//! on. Bytes are hashed before they get a name, so a name never shows other bytes than its own, unless
//! the disk or somebody else damaged them since: what is found so is moved to the quarantine, and the
//! name is free again. Never deletes anything: that is GC's business.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::{Digest, hash_reader};
use crate::layout::StoreDir;
use crate::quarantine::{Quarantine, Thing};

/// The blobs of one store.
#[derive(Debug)]
pub struct Cas {
    blobs: PathBuf,
    temporary: AtomicU64,
    quarantine: Quarantine,
}

/// What ingest says of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ingested {
    /// Name of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Whether the store had not held it before.
    pub new: bool,
}

/// A blob that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CasError {
    /// No blob of that name is on this disk.
    #[error("blob {0} is not in the store")]
    Missing(Digest),
    /// The bytes on the disk are not those the name promises.
    #[error("blob {name} is damaged: its bytes hash to {found}")]
    Damaged {
        /// The name asked for.
        name: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// The operating system refused.
    #[error("blob store: {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl CasError {
    /// Turns an I/O error on `path` into one of these.
    pub fn from_io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        at("read", path)
    }

    /// The errno behind the error, as FUSE replies need it.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            Self::Missing(_) | Self::Damaged { .. } => None,
        }
    }
}

fn at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CasError + use<'a> {
    move |source| CasError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

impl Cas {
    /// The blobs of `store`, whose directories exist.
    pub fn new(store: &StoreDir) -> Self {
        Self {
            blobs: store.blobs(),
            temporary: AtomicU64::new(0),
            quarantine: Quarantine::new(store),
        }
    }

    /// Where the blob of that name is or would be: `blobs/xx/<hex>`.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let mut path = self.blobs.join(&hex[..2]);
        path.push(hex);
        path
    }

    /// Gives the finished file at `path`, known to hash to `digest`, its name in the store as
    /// well, and seals it. The caller removes `path` once the fact that names the blob is stored:
    /// a crash in between leaves both names, never none.
    pub fn adopt(
        &self,
        path: &Path,
        file: &File,
        digest: Digest,
        size: u64,
    ) -> Result<Ingested, CasError> {
        if self.has(&digest, size) {
            return Ok(Ingested {
                digest,
                size,
                new: false,
            });
        }
        let name = self.path(&digest);
        self.make_fan_out(&name)?;
        // Sealed before it is a blob, so that no crash leaves a writable one.
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(at("seal", path))?;
        match fs::hard_link(path, &name) {
            // Somebody stored the same meanwhile: `has` has moved a damaged one away.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Ingested {
                digest,
                size,
                new: false,
            }),
            Err(error) => Err(at("link into", &name)(error)),
            Ok(()) => Ok(Ingested {
                digest,
                size,
                new: true,
            }),
        }
    }

    /// Stores `bytes`.
    pub fn ingest_bytes(&self, bytes: &[u8]) -> Result<Ingested, CasError> {
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        if self.has(&digest, size) {
            return Ok(Ingested {
                digest,
                size,
                new: false,
            });
        }
        let name = self.path(&digest);
        self.make_fan_out(&name)?;
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .blobs
            .join(format!("tmp-{}-{number}", std::process::id()));
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&temporary)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| fs::rename(&temporary, &name));
        if let Err(source) = written {
            // The first error is the one to tell; a leftover is removed at the next start.
            let _ = fs::remove_file(&temporary);
            return Err(CasError::Io {
                what: "write",
                path: name,
                source,
            });
        }
        Ok(Ingested {
            digest,
            size,
            new: true,
        })
    }

    /// Whether a blob of that name and size is on this disk, whole as far as its attributes tell. One
    /// that is not goes to the quarantine, so that the same bytes can be stored again.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        let path = self.path(digest);
        let Ok(meta) = fs::symlink_metadata(&path) else {
            return false;
        };
        if meta.is_file() && meta.len() == size && !was_written(&meta) {
            return true;
        }
        // The only look at the bytes: whoever is wrong about the size must not cost us the blob.
        match meta.is_file().then(|| self.verify(digest)) {
            Some(Ok(found)) => {
                if was_written(&meta) {
                    // Moves the time of the last change of attributes: not asked again. If it fails
                    // it is only asked again.
                    let _ = fs::set_permissions(&path, Permissions::from_mode(0o444));
                }
                found == size
            }
            Some(Err(CasError::Damaged { .. })) | None => {
                // A blob that cannot be moved stays what it is: not there.
                let _ = self.quarantine.take(Thing::Blob, &path);
                false
            }
            Some(Err(_)) => false,
        }
    }

    /// Opens a blob for reading.
    pub fn open(&self, digest: &Digest) -> Result<File, CasError> {
        let path = self.path(digest);
        File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CasError::Missing(*digest),
            _ => CasError::Io {
                what: "open",
                path,
                source,
            },
        })
    }

    /// Reads a blob whole and checks that its bytes are those its name promises. Returns its
    /// size.
    pub fn verify(&self, digest: &Digest) -> Result<u64, CasError> {
        let mut file = self.open(digest)?;
        let (found, size) = hash_file(&self.path(digest), &mut file)?;
        if found == *digest {
            Ok(size)
        } else {
            Err(CasError::Damaged {
                name: *digest,
                found,
            })
        }
    }

    /// Number of blobs on this disk and the sum of their sizes in bytes.
    pub fn usage(&self) -> Result<(u64, u64), CasError> {
        let (mut count, mut bytes) = (0, 0);
        for fan in list(&self.blobs)? {
            if !fan.path().is_dir() {
                continue;
            }
            for blob in list(&fan.path())? {
                // A blob that goes while we count is not there to be counted.
                if let Ok(meta) = blob.metadata() {
                    count += 1;
                    bytes += meta.len();
                }
            }
        }
        Ok((count, bytes))
    }

    /// Removes what an earlier process left half-written.
    pub fn remove_leftovers(&self) -> Result<(), CasError> {
        for entry in list(&self.blobs)? {
            if entry.file_name().as_encoded_bytes().starts_with(b"tmp-") {
                let path = entry.path();
                fs::remove_file(&path).map_err(at("remove leftover", &path))?;
            }
        }
        Ok(())
    }

    fn make_fan_out(&self, name: &Path) -> Result<(), CasError> {
        let fan = name.parent().unwrap_or(&self.blobs);
        match fs::create_dir(fan) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(at("create", fan)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a sealed file may have been written: sealing it was its last change.
fn was_written(meta: &fs::Metadata) -> bool {
    (meta.mtime(), meta.mtime_nsec()) >= (meta.ctime(), meta.ctime_nsec())
}

fn hash_file(path: &Path, file: &mut File) -> Result<(Digest, u64), CasError> {
    file.rewind().map_err(at("rewind", path))?;
    hash_reader(&*file, |_| ()).map_err(at("read", path))
}

fn list(dir: &Path) -> Result<Vec<fs::DirEntry>, CasError> {
    fs::read_dir(dir)
        .and_then(Iterator::collect)
        .map_err(at("list", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cas() -> (tempfile::TempDir, StoreDir, Cas) {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path());
        store.create().expect("creates");
        let cas = Cas::new(&store);
        (dir, store, cas)
    }

    fn adopt(cas: &Cas, path: &Path, bytes: &[u8]) -> Ingested {
        fs::write(path, bytes).expect("writes");
        let file = File::open(path).expect("opens");
        cas.adopt(path, &file, Digest::of(bytes), bytes.len() as u64)
            .expect("adopts")
    }

    #[test]
    fn adopting_seals_without_a_copy() {
        let (_dir, store, cas) = cas();
        let path = store.scratch().join("1");
        let adopted = adopt(&cas, &path, b"abc");
        assert!(adopted.new);
        let blob = cas.path(&adopted.digest);
        let meta = blob.metadata().expect("stat");
        assert_eq!(meta.permissions().mode() & 0o7777, 0o444);
        let scratch = path.metadata().expect("the caller removes it");
        assert_eq!(MetadataExt::ino(&meta), MetadataExt::ino(&scratch));
        assert_eq!(cas.verify(&adopted.digest).expect("verifies"), 3);
        assert_eq!(cas.usage().expect("counts"), (1, 3));
    }

    #[test]
    fn same_bytes_are_kept_once() {
        let (_dir, store, cas) = cas();
        assert!(cas.ingest_bytes(b"abc").expect("ingests").new);
        assert!(!cas.ingest_bytes(b"abc").expect("ingests").new);
        assert!(!adopt(&cas, &store.scratch().join("1"), b"abc").new);
        assert_eq!(cas.usage().expect("counts"), (1, 3));
    }

    #[test]
    fn damage_is_named() {
        let (_dir, _store, cas) = cas();
        let digest = cas.ingest_bytes(b"abc").expect("ingests").digest;
        let path = cas.path(&digest);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("chmod");
        fs::write(&path, b"abd").expect("writes");
        assert!(matches!(cas.verify(&digest), Err(CasError::Damaged { .. })));
        assert!(matches!(
            cas.open(&Digest::of(b"other")),
            Err(CasError::Missing(_))
        ));
    }

    /// Changes a blob behind the store's back.
    fn damage(cas: &Cas, digest: &Digest, bytes: &[u8]) {
        let path = cas.path(digest);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("chmod");
        fs::write(&path, bytes).expect("writes");
    }

    #[test]
    fn a_damaged_blob_makes_room_for_the_same_bytes() {
        let (_dir, store, cas) = cas();
        let kept = Quarantine::new(&store);
        let files = || kept.contents().expect("counts").files;
        let digest = cas.ingest_bytes(b"abc").expect("ingests").digest;
        // Truncated, empty, and another byte at the same length; the last two by way of a file.
        for (round, bytes) in [&b"ab"[..], b"", b"abd"].into_iter().enumerate() {
            damage(&cas, &digest, bytes);
            assert!(!cas.has(&digest, 3), "{bytes:?}");
            assert_eq!(files(), round as u64 + 1, "it is in the quarantine");
            let scratch = store.scratch().join(format!("{round}"));
            assert!(adopt(&cas, &scratch, b"abc").new, "{bytes:?}");
            assert_eq!(cas.verify(&digest).expect("whole"), 3);
        }
        damage(&cas, &digest, b"ab");
        assert!(cas.ingest_bytes(b"abc").expect("ingests").new);
        assert_eq!(cas.verify(&digest).expect("whole"), 3);
    }

    #[test]
    fn a_whole_blob_survives_whoever_is_wrong_about_it() {
        let (_dir, store, cas) = cas();
        let digest = cas.ingest_bytes(b"abc").expect("ingests").digest;
        assert!(!cas.has(&digest, 4), "no blob of that size");
        assert!(cas.has(&digest, 3));
        // Written, but with the same bytes.
        damage(&cas, &digest, b"abc");
        assert!(cas.has(&digest, 3));
        let kept = Quarantine::new(&store).contents().expect("counts");
        assert_eq!(kept.files, 0);
    }

    #[test]
    fn leftovers_go() {
        let (_dir, store, cas) = cas();
        fs::write(store.blobs().join("tmp-1-1"), b"half").expect("writes");
        cas.remove_leftovers().expect("removes");
        assert_eq!(cas.usage().expect("counts"), (0, 0));
        assert!(!store.blobs().join("tmp-1-1").exists());
    }
}
