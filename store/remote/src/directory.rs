//! A remote in a directory: of this machine, of NFS, or of a bucket that somebody mounted.
//!
//! An object is a file. It is written beside its place and then moved there, so nobody sees a part of
//! one; where files cannot be moved (a mounted bucket) it is written in its place, and whoever reads half
//! of it finds that it is not what its name promises. Others write here as well, not all of them friends:
//! nothing but a file is opened as an object, and no link in its place. A directory above it may be a link:
//! who can put one there can as well write the objects.
//!
//! A mount point where nothing is mounted is an empty directory. What tells a remote from one is the
//! directory of the layout, which is made on purpose ([`DirectoryRemote::make`]) and by no other call: where
//! that is missing, the remote does not answer, and nothing in it is gone.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use nix::libc::{O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK, O_PATH};

use crate::error::{self, RemoteError};
use crate::name::{Kind, LAYOUT, ObjectName};
use crate::{Body, Limits, Object, Put, Remote, Written};

/// How many objects a call of `list` returns.
const PAGE: usize = 1000;

/// What is not an object yet. No name of one starts so.
const PART: &str = ".part-";

/// What keeps the directory of the layout there while it has no objects: a bucket has no directories that
/// hold nothing. No name of an object starts so.
const KEEPER: &str = ".kachefs";

/// A remote in a directory.
#[derive(Clone, Debug)]
pub struct DirectoryRemote {
    root: PathBuf,
    limits: Limits,
    /// Whether files can be moved, as far as anybody has found out.
    moves: Arc<AtomicBool>,
}

impl DirectoryRemote {
    /// The remote in `root`. Where there is none, it does not answer: it may be mounted later.
    pub fn new(root: PathBuf, limits: Limits) -> Self {
        let moves = Arc::new(AtomicBool::new(true));
        Self {
            root,
            limits,
            moves,
        }
    }

    /// Whether there is a remote in a directory, be it an empty one.
    pub fn is_one(root: &Path) -> Result<bool, RemoteError> {
        let opened = Layout::open(root).map_err(|source| told(root, root, source))?;
        Ok(opened.is_some())
    }

    /// Makes an empty remote in a directory, where there is none.
    pub fn make(root: &Path) -> Result<(), RemoteError> {
        let layout = root.join(LAYOUT);
        let make = || match fs::create_dir(&layout) {
            // Another machine was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && layout.is_dir() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => File::create_new(layout.join(KEEPER))
                .map(drop)
                .inspect_err(|_| {
                    let _ = fs::remove_dir(&layout);
                }),
        };
        make().map_err(|source| told(root, &layout, source))
    }

    /// Does what blocks with what has that name, for as long as a call that moves so many bytes may take: a
    /// dead NFS server lets nobody go.
    async fn blocking<T: Send + 'static>(
        &self,
        bytes: u64,
        name: &str,
        what: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, RemoteError> {
        let (root, limit) = (self.root.clone(), self.limits.moving(bytes));
        let name = name.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let path = root.join(&name);
            let layout = Layout::open(&root).map_err(|source| told(&root, &path, source))?;
            let layout = layout.ok_or_else(|| not_mounted(&root))?;
            let below = layout
                .path(&name)
                .map_err(|source| told(&root, &path, source))?;
            what(&below).map_err(|source| told(&root, &path, source))
        });
        match tokio::time::timeout(limit, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(panicked)) => Err(told(&self.root, &self.root, io::Error::other(panicked))),
            Err(_) => Err(RemoteError::TimedOut {
                place: self.root.display().to_string(),
                limit,
            }),
        }
    }
}

/// The directory of the layout, held open: what is done in it is done there, also when something is mounted or
/// unmounted meanwhile.
struct Layout(File);

impl Layout {
    /// `None` where there is none.
    fn open(root: &Path) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(O_PATH | O_DIRECTORY);
        match options.open(root.join(LAYOUT)) {
            Ok(file) => Ok(Some(Self(file))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where what has that name is, while this is open. An error where `/proc` does not show this process:
    /// everything would seem to be gone.
    fn path(&self, name: &str) -> io::Result<PathBuf> {
        let below = name.strip_prefix(LAYOUT).unwrap_or(name);
        let open = PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()));
        fs::read_link(&open).map_err(|_| io::Error::other("/proc does not show this process"))?;
        Ok(open.join(below.trim_start_matches('/')))
    }
}

fn not_mounted(root: &Path) -> RemoteError {
    RemoteError::Unreachable {
        place: root.display().to_string(),
        reason: format!(
            "it has no directory {LAYOUT}, so it is not mounted, or was never set (kachefs remote set)"
        ),
    }
}

/// What an error of a file means for the remote it is in.
fn told(root: &Path, path: &Path, source: io::Error) -> RemoteError {
    let place = root.display().to_string();
    let reason = format!("{}: {source}", path.display());
    match source.kind() {
        io::ErrorKind::PermissionDenied => RemoteError::Denied { place, reason },
        // Whoever serves the file system is gone: a program (FUSE), or a machine.
        io::ErrorKind::NotConnected
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::TimedOut
        | io::ErrorKind::StaleNetworkFileHandle => RemoteError::Unreachable { place, reason },
        _ => RemoteError::Io {
            path: path.display().to_string(),
            source,
        },
    }
}

#[async_trait]
impl Remote for DirectoryRemote {
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        let read = move |path: &Path| read(path, range, most);
        match self.blocking(most, name.as_str(), read).await? {
            Found::Nothing => Ok(None),
            Found::TooLarge => Err(RemoteError::TooLarge {
                name: name.clone(),
                most,
            }),
            Found::Bytes(bytes) => Ok(Some(bytes)),
        }
    }

    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError> {
        let size = error::size(&body).await?;
        let moves = Arc::clone(&self.moves);
        let write = move |path: &Path| {
            if moves.load(Ordering::Relaxed) {
                match write(path, &body, mode) {
                    Err(error) if cannot_move(&error) => moves.store(false, Ordering::Relaxed),
                    written => return written,
                }
            }
            write_in_place(path, &body, mode)
        };
        self.blocking(size, name.as_str(), write).await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        let found = name.clone();
        let look = move |path: &Path| match fs::symlink_metadata(path) {
            Ok(meta) => Ok(Some(Object {
                name: found,
                size: meta.len(),
                modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            })),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        };
        self.blocking(0, name.as_str(), look).await
    }

    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError> {
        let after = after
            .map(|name| name.as_str().to_owned())
            .unwrap_or_default();
        let prefix = kind.prefix();
        let walk = move |path: &Path| {
            let mut found = Vec::new();
            walk(path, &prefix, &after, &mut found)?;
            Ok(found)
        };
        self.blocking(0, &kind.prefix(), walk).await
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError> {
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(error) if is_absent(&error) => Ok(()),
            result => result,
        };
        self.blocking(0, name.as_str(), remove).await
    }

    async fn unfinished(&self, before: SystemTime, remove: bool) -> Result<Vec<u64>, RemoteError> {
        let mut all = Vec::new();
        // A call each, so that none takes as long as all of them.
        for kind in Kind::ALL {
            let look = move |directory: &Path| {
                let mut found = Vec::new();
                parts(directory, before, remove, &mut found)?;
                Ok(found)
            };
            all.extend(self.blocking(0, &kind.prefix(), look).await?);
        }
        Ok(all)
    }
}

enum Found {
    Nothing,
    TooLarge,
    Bytes(Bytes),
}

fn read(path: &Path, range: Option<Range<u64>>, most: u64) -> io::Result<Found> {
    let mut options = OpenOptions::new();
    // A pipe would keep us waiting for who writes to it.
    options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let size = meta.len();
    let range = range.unwrap_or(0..size);
    let wanted = range.start.min(size)..range.end.min(size);
    let length = wanted.end.saturating_sub(wanted.start);
    if length > most {
        return Ok(Found::TooLarge);
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, wanted.start)?;
    Ok(Found::Bytes(bytes.into()))
}

fn write(path: &Path, body: &Body, mode: Put) -> io::Result<Written> {
    if mode == Put::IfAbsent && fs::symlink_metadata(path).is_ok() {
        return Ok(Written::Existed);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut part = tempfile::Builder::new()
        .prefix(PART)
        // For everybody, less the umask.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(without_path)?;
    copy(body, part.as_file_mut())?;
    part.as_file().sync_all()?;
    let moved = match mode {
        Put::Replace => part.persist(path).map(drop),
        Put::IfAbsent => part.persist_noclobber(path).map(drop),
    };
    match moved {
        Ok(()) => {}
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            return Ok(Written::Existed);
        }
        Err(error) => return Err(error.error),
    }
    // What names it must not be there before it. Not every file system can.
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
    Ok(Written::New)
}

/// The error of a temporary file without its path, which says nothing to anybody.
fn without_path(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|error| error.source());
    let inner = inner.and_then(|error| error.downcast_ref::<io::Error>());
    match inner.and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error,
    }
}

/// Whether the file system moves no files at all.
fn cannot_move(error: &io::Error) -> bool {
    use nix::libc::{ENOSYS, EOPNOTSUPP};
    matches!(error.raw_os_error(), Some(ENOSYS | EOPNOTSUPP))
}

fn write_in_place(path: &Path, body: &Body, mode: Put) -> io::Result<Written> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(O_NOFOLLOW);
    match mode {
        Put::Replace => options.create(true).truncate(true),
        Put::IfAbsent => options.create_new(true),
    };
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let mut file = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(Written::Existed),
        file => file?,
    };
    let written = copy(body, &mut file).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half of it would keep the whole away.
        let _ = fs::remove_file(path);
    }
    written.map(|()| Written::New)
}

fn copy(body: &Body, to: &mut File) -> io::Result<()> {
    match body {
        Body::Bytes(bytes) => to.write_all(bytes),
        Body::File(path) => io::copy(&mut File::open(path)?, to).map(drop),
    }
}

/// Finds objects behind `after`, in the order of their names: those of a directory as if it had a `/` at
/// its end, as S3 sorts them.
fn walk(directory: &Path, prefix: &str, after: &str, found: &mut Vec<Object>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        // What is not UTF-8 is no object.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let ending = if entry.file_type()?.is_dir() { "/" } else { "" };
        names.push(format!("{prefix}{name}{ending}"));
    }
    names.sort_unstable();
    for name in names {
        if found.len() >= PAGE {
            break;
        }
        let path = directory.join(&name[prefix.len()..]);
        if name.ends_with('/') {
            if name.as_str() > after || after.starts_with(&name) {
                walk(&path, &name, after, found)?;
            }
        } else if name.as_str() > after
            && let Ok(name) = name.parse()
            // Else it was removed meanwhile.
            && let Ok(meta) = fs::symlink_metadata(&path)
            && meta.is_file()
        {
            found.push(Object {
                name,
                size: meta.len(),
                modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
    }
    Ok(())
}

/// Finds what was last written before that time and never moved to its place.
fn parts(
    directory: &Path,
    before: SystemTime,
    remove: bool,
    found: &mut Vec<u64>,
) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory {
            parts(&entry.path(), before, remove, found)?;
        } else if entry.file_name().as_bytes().starts_with(PART.as_bytes())
            // Else it was moved or removed meanwhile.
            && let Ok(meta) = entry.metadata()
            && meta.is_file()
            && meta.modified()? < before
        {
            if remove {
                fs::remove_file(entry.path()).or_else(|error| match error {
                    error if is_absent(&error) => Ok(()),
                    error => Err(error),
                })?;
            }
            found.push(meta.len());
        }
    }
    Ok(())
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use nix::libc::{EHOSTUNREACH, EIO, ENETUNREACH, ENOTCONN, ESTALE, ETIMEDOUT};

    use super::*;

    #[test]
    fn a_file_system_without_its_server_does_not_answer() {
        let root = Path::new("/mnt/shared");
        let told = |code| told(root, root, io::Error::from_raw_os_error(code));
        for code in [ENOTCONN, EHOSTUNREACH, ENETUNREACH, ESTALE, ETIMEDOUT] {
            let error = told(code);
            assert!(error.is_passing(), "{error}");
        }
        assert!(!told(EIO).is_passing(), "it answers");
    }
}
