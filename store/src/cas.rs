//! The CAS: immutable blobs on the local disk, named by their digest.
//!
//! A blob enters by rename of a finished file or from bytes in memory, and is read-only from then
//! on. Bytes are hashed before they get a name, so a name never shows other bytes than its own;
//! [`Cas::verify`] checks what the disk made of them since. Never deletes anything: that is GC's
//! business.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::{Digest, hash_reader};
use crate::layout::StoreDir;
use crate::scan::RootScanner;

/// The blobs of one store.
#[derive(Debug)]
pub struct Cas {
    blobs: PathBuf,
    temporary: AtomicU64,
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
        }
    }

    /// Where the blob of that name is or would be: `blobs/xx/<hex>`.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let mut path = self.blobs.join(&hex[..2]);
        path.push(hex);
        path
    }

    /// Hashes `file` from its start, showing every byte to `scanner`, and moves the file at
    /// `path` (the same file, on the same file system, with no writer left) into the store.
    /// On failure the file stays where it was.
    pub fn ingest_file(
        &self,
        path: &Path,
        file: &mut File,
        scanner: Option<&mut RootScanner<'_>>,
    ) -> Result<Ingested, CasError> {
        let (digest, size) = hash_file(path, file, scanner)?;
        self.adopt(path, file, digest, size)
    }

    /// Moves the file at `path`, already known to hash to `digest`, into the store.
    pub fn adopt(
        &self,
        path: &Path,
        file: &File,
        digest: Digest,
        size: u64,
    ) -> Result<Ingested, CasError> {
        let name = self.path(&digest);
        if self.has(&digest, size) {
            fs::remove_file(path).map_err(at("remove duplicate", path))?;
            return Ok(Ingested {
                digest,
                size,
                new: false,
            });
        }
        self.make_fan_out(&name)?;
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(at("seal", path))?;
        fs::rename(path, &name).map_err(at("rename into", &name))?;
        Ok(Ingested {
            digest,
            size,
            new: true,
        })
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

    /// Whether a blob of that name and size is on this disk. Trusts the name, not the bytes.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        fs::symlink_metadata(self.path(digest))
            .is_ok_and(|meta| meta.is_file() && meta.len() == size)
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
        let (found, size) = hash_file(&self.path(digest), &mut file, None)?;
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

fn hash_file(
    path: &Path,
    file: &mut File,
    mut scanner: Option<&mut RootScanner<'_>>,
) -> Result<(Digest, u64), CasError> {
    file.rewind().map_err(at("rewind", path))?;
    hash_reader(&*file, |chunk| {
        if let Some(scanner) = scanner.as_deref_mut() {
            scanner.feed(chunk);
        }
    })
    .map_err(at("read", path))
}

fn list(dir: &Path) -> Result<Vec<fs::DirEntry>, CasError> {
    fs::read_dir(dir)
        .and_then(Iterator::collect)
        .map_err(at("list", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::Root;
    use crate::scan::RootNeedles;

    fn cas() -> (tempfile::TempDir, StoreDir, Cas) {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path());
        store.create().expect("creates");
        let cas = Cas::new(&store);
        (dir, store, cas)
    }

    #[test]
    fn ingest_renames_and_seals() {
        let (_dir, store, cas) = cas();
        let path = store.scratch().join("1");
        fs::write(&path, b"see /home/ann/ws").expect("writes");
        let needles = RootNeedles::new(&[(Root::Cwd, "/home/ann/ws".into())]);
        let mut scanner = needles.scanner();
        let mut file = File::open(&path).expect("opens");
        let ingested = cas
            .ingest_file(&path, &mut file, Some(&mut scanner))
            .expect("ingests");
        assert_eq!(ingested.digest, Digest::of(b"see /home/ann/ws"));
        assert!(ingested.new && !path.exists());
        assert!(scanner.finish().contains(Root::Cwd));
        let blob = cas.path(&ingested.digest);
        let mode = blob.metadata().expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
        assert_eq!(cas.verify(&ingested.digest).expect("verifies"), 16);
        assert_eq!(cas.usage().expect("counts"), (1, 16));
    }

    #[test]
    fn same_bytes_are_kept_once() {
        let (_dir, store, cas) = cas();
        assert!(cas.ingest_bytes(b"abc").expect("ingests").new);
        assert!(!cas.ingest_bytes(b"abc").expect("ingests").new);
        let path = store.scratch().join("1");
        fs::write(&path, b"abc").expect("writes");
        let mut file = File::open(&path).expect("opens");
        assert!(
            !cas.ingest_file(&path, &mut file, None)
                .expect("ingests")
                .new
        );
        assert!(!path.exists());
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

    #[test]
    fn leftovers_go() {
        let (_dir, store, cas) = cas();
        fs::write(store.blobs().join("tmp-1-1"), b"half").expect("writes");
        cas.remove_leftovers().expect("removes");
        assert_eq!(cas.usage().expect("counts"), (0, 0));
        assert!(!store.blobs().join("tmp-1-1").exists());
    }
}
