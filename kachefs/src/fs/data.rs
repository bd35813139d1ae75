//! Operations on bytes and attributes: read, write, truncate, preallocate, set.
//!
//! A blob is never written. The first change to an inode that points at one gives the inode a
//! private copy (reflink where the disk can), or nothing at all when it is emptied.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, copy_file_range, fallocate};
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use nix::unistd::{Whence, lseek};
use store::{Digest, Ino, Kind, Timestamp};

use super::node::{Body, Node, State};
use super::passthrough::mtime;
use super::view::{Entry, View};
use super::{Errno, FsResult, INLINE_MAX, errno};
use crate::clock;
use crate::lazy::FaultError;

nix::ioctl_write_int! {
    /// `FICLONE` (ioctl_ficlone(2)): make the file share the bytes of another.
    ficlone, 0x94, 9
}

/// Largest file, as ext4 with 4 KiB blocks has it.
const MAX_SIZE: u64 = 1 << 44;

/// What `setattr` is asked to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Permission bits.
    pub perm: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<Timestamp>,
    /// Last change of the content.
    pub mtime: Option<Timestamp>,
}

/// What became of a read.
enum Read {
    /// This many bytes.
    Done(usize),
    /// The blob of this name and length is missing or ended early.
    Doubtful(Digest, u64),
}

fn blob_failed(error: &store::CasError) -> Errno {
    tracing::error!(%error, "blob");
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn io_failed(what: &str, error: &io::Error) -> Errno {
    tracing::error!(%error, "{what}");
    errno(error)
}

/// A length of bytes that are in memory; longer ones do not occur.
fn in_memory(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// Copies what there is from `offset` on, and returns how much that was.
fn copy_out(bytes: &[u8], offset: u64, into: &mut [u8]) -> usize {
    let rest = bytes.get(in_memory(offset)..).unwrap_or_default();
    let count = rest.len().min(into.len());
    into[..count].copy_from_slice(&rest[..count]);
    count
}

/// Sets when a backing file was last written.
fn stamp(file: &File, mtime: Timestamp) -> io::Result<()> {
    let mtime = TimeSpec::new(mtime.secs, i64::from(mtime.nanos));
    futimens(file, &TimeSpec::UTIME_OMIT, &mtime)?;
    Ok(())
}

/// Makes `to` hold the bytes of `from`, sharing them where the disk can.
pub(super) fn copy_all(from: &File, to: &File, size: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let source = u64::try_from(from.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: both descriptors are open for the call; FICLONE takes the source descriptor by
    // value and touches no memory of ours.
    if unsafe { ficlone(to.as_raw_fd(), source) }.is_ok() {
        return Ok(());
    }
    let (mut read_at, mut write_at) = (0_i64, 0_i64);
    let mut left = size;
    while left > 0 {
        let wanted = in_memory(left);
        let (source, target) = (Some(&mut read_at), Some(&mut write_at));
        let copied = copy_file_range(from.as_fd(), source, to.as_fd(), target, wanted)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= copied as u64;
    }
    Ok(())
}

impl View {
    /// The backing of a locked inode. `None` for content that has none.
    pub(super) fn backing(&self, state: &State) -> FsResult<Option<Arc<File>>> {
        match &state.body {
            Body::Blob { digest, .. } => {
                let file = self.storage.blob(digest);
                file.map(Some).map_err(|e| blob_failed(&e))
            }
            Body::Private { id, .. } => {
                let file = self.storage.scratch(*id);
                file.map(Some)
                    .map_err(|e| io_failed("open private file", &e))
            }
            _ => Ok(None),
        }
    }

    /// Keeps the content of an inode whatever becomes of its names, until [`View::unpin`].
    pub fn pin(&self, node: &Node) {
        node.state.lock().pins += 1;
    }

    /// Ends one [`View::pin`].
    pub fn unpin(&self, node: &Arc<Node>) {
        {
            let mut state = node.state.lock();
            state.pins = state.pins.saturating_sub(1);
        }
        self.reap(node);
    }

    /// Fills `into` from `offset` on and returns how many bytes that were; fewer than asked for
    /// only at the end of the file. What is not on this machine is waited for. EIO when the store has
    /// lost it (see [`super::check`]).
    pub fn read(&self, ino: Ino, offset: u64, into: &mut [u8]) -> FsResult<usize> {
        if let Some(count) = self.read_here(ino, offset, into)? {
            return Ok(count);
        }
        if let Some(count) = self.read_part(ino, offset, into)? {
            return Ok(count);
        }
        self.fault(ino)?;
        self.read_here(ino, offset, into)?.ok_or(Errno::EIO)
    }

    /// The same of what is on this machine; `None` for what has to come from elsewhere first
    /// ([`View::fault`]).
    pub fn read_here(&self, ino: Ino, offset: u64, into: &mut [u8]) -> FsResult<Option<usize>> {
        let node = self.node(ino)?;
        match self.read_once(&node, offset, into)? {
            Read::Done(count) => Ok(Some(count)),
            Read::Doubtful(digest, size) => {
                self.storage.close_blob(&digest);
                if !self.storage.cas.has(&digest, size) {
                    if self.storage.kept(&digest, size).is_some() {
                        let read = self.storage.read_part(&digest, offset, into);
                        return read.map_err(|e| io_failed("read a part", &e));
                    }
                    if self.is_hopeful(&node) {
                        return Ok(None);
                    }
                    self.doubt_blob(&node, &digest);
                    return Err(Errno::EIO);
                }
                // Somebody has just stored it again.
                match self.read_once(&node, offset, into)? {
                    Read::Done(count) => Ok(Some(count)),
                    Read::Doubtful(..) => Err(Errno::EIO),
                }
            }
        }
    }

    /// Fetches what is read of a large file, and waits for it; `None` where all of it has to be fetched
    /// first.
    fn read_part(&self, ino: Ino, offset: u64, into: &mut [u8]) -> FsResult<Option<usize>> {
        let node = self.node(ino)?;
        let Body::Blob { digest, size } = node.state.lock().body else {
            return Ok(None);
        };
        let fetch = || self.storage.fetch_part(&digest, size, offset, into);
        match self.storage.ask_twice(fetch) {
            Ok(read) => Ok(read),
            // What follows from that, follows where all of it is wanted.
            Err(FaultError::Gone(_)) => Ok(None),
            Err(error) => {
                tracing::error!(?ino, %digest, offset, %error, "fault");
                self.suspect([ino]);
                Err(Errno::EIO)
            }
        }
    }

    /// Makes sure that the bytes of a file are on this machine, and waits for them. EIO when they do
    /// not come; a file whose bytes will not come loses its names.
    pub fn fault(&self, ino: Ino) -> FsResult<()> {
        let node = self.node(ino)?;
        let Body::Blob { digest, size } = node.state.lock().body else {
            return Ok(());
        };
        match self.storage.ask_twice(|| self.storage.fault(&digest, size)) {
            Err(_) if self.recompute(&node, &digest, size) => Ok(()),
            fetched => fetched.map_err(|error| {
                tracing::error!(?ino, %digest, %error, "fault");
                self.suspect([ino]);
                Errno::EIO
            }),
        }
    }

    /// Whether the bytes of a file have to come from elsewhere before they can be changed or copied.
    pub fn is_elsewhere(&self, ino: Ino) -> bool {
        let Ok(node) = self.node(ino) else {
            return false;
        };
        let Body::Blob { digest, size } = node.state.lock().body else {
            return false;
        };
        !self.storage.cas.has(&digest, size)
            && (self.storage.kept(&digest, size).is_some() || self.is_hopeful(&node))
    }

    fn read_once(&self, node: &Node, offset: u64, into: &mut [u8]) -> FsResult<Read> {
        let (file, blob) = {
            let mut state = node.state.lock();
            self.note_read(&mut state);
            match &state.body {
                Body::Inline(bytes) => return Ok(Read::Done(copy_out(bytes, offset, into))),
                Body::Stored { .. } => {
                    let bytes = self.stored_bytes(node)?;
                    return Ok(Read::Done(copy_out(&bytes, offset, into)));
                }
                Body::Blob { digest, size } => match self.storage.blob(digest) {
                    Ok(file) => (file, Some((*digest, *size))),
                    Err(store::CasError::Missing(_)) => return Ok(Read::Doubtful(*digest, *size)),
                    Err(error) => return Err(blob_failed(&error)),
                },
                Body::Private { id, .. } => match self.storage.scratch(*id) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        self.suspect([node.ino]);
                        return Err(Errno::EIO);
                    }
                    file => (file.map_err(|e| io_failed("open private file", &e))?, None),
                },
                _ => return Err(Errno::EINVAL),
            }
        };
        if let Some((digest, _)) = blob {
            self.storage.note_read(&digest, false);
        }
        let mut filled = 0;
        while filled < into.len() {
            match file.read_at(&mut into[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_failed("read", &error)),
            }
        }
        match blob {
            Some((digest, size)) if filled < into.len() && offset + (filled as u64) < size => {
                Ok(Read::Doubtful(digest, size))
            }
            _ => Ok(Read::Done(filled)),
        }
    }

    /// Writes all of `data` at `offset`.
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8]) -> FsResult<()> {
        let node = self.node(ino)?;
        if data.is_empty() {
            // write(2): no effect on a regular file, not even on its length.
            return Ok(());
        }
        let mut state = node.state.lock();
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= MAX_SIZE);
        let end = end.ok_or(Errno::EFBIG)?;
        let _change = self.change(&node, &mut state)?;
        let now = clock::now();
        self.fetch(&node, &mut state)?;
        if let Body::Inline(bytes) = &state.body
            && end <= INLINE_MAX as u64
        {
            let (offset, end) = (in_memory(offset), in_memory(end));
            let mut new = bytes.clone();
            if new.len() < end {
                new.resize(end, 0);
            }
            new[offset..end].copy_from_slice(data);
            self.note_small(data.len());
            // The bytes live in the record: it must be stored before the write is acknowledged.
            return self.replace_bytes(&node, &mut state, new, now).map(drop);
        }
        self.make_private(&node, &mut state, u64::MAX)?;
        let before = state.attributes.clone();
        state.touch_content(now);
        let file = self.backing(&state)?.ok_or(Errno::EINVAL)?;
        // The record follows later; until then the file itself says when it was written.
        let written = file
            .write_all_at(data, offset)
            .and_then(|()| stamp(&file, now));
        if let Body::Private { size, sparse, .. } = &mut state.body {
            *sparse |= offset > *size;
            // A write that failed may have come some of the way.
            *size = if written.is_ok() {
                end.max(*size)
            } else {
                file.metadata().map_or(*size, |meta| meta.len())
            };
        }
        if written.is_err()
            && file
                .metadata()
                .is_ok_and(|meta| mtime(&meta) == before.mtime)
        {
            // It has not come anywhere.
            state.attributes = before;
        }
        self.mark_dirty(&node, &mut state);
        written.map_err(|e| io_failed("write", &e))
    }

    /// Gives an inode other bytes in its record, and returns the body it had. When the record cannot
    /// be stored the inode is what it was.
    fn replace_bytes(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        bytes: Vec<u8>,
        now: Timestamp,
    ) -> FsResult<Body> {
        let (attributes, origin) = (state.attributes.clone(), state.origin.clone());
        let old = std::mem::replace(&mut state.body, Body::Inline(bytes));
        state.touch_content(now);
        match self.save(node, state) {
            Ok(()) => Ok(old),
            Err(error) => {
                state.body = old;
                state.attributes = attributes;
                state.origin = origin;
                Err(error)
            }
        }
    }

    /// Gives the inode a private backing file, keeping at most the first `keep` bytes.
    fn make_private(&self, node: &Arc<Node>, state: &mut State, keep: u64) -> FsResult<()> {
        self.fetch(node, state)?;
        let size = match &state.body {
            Body::Private { .. } => return Ok(()),
            Body::Inline(_) | Body::Blob { .. } => state.size().min(keep),
            _ => return Err(Errno::EINVAL),
        };
        let source = self.backing(state)?;
        let had_holes = matches!(state.body, Body::Blob { .. });
        let made = self
            .storage
            .new_scratch()
            .map_err(|e| io_failed("create private file", &e));
        let (id, mut file) = made?;
        let copied = match (&state.body, source) {
            (Body::Inline(bytes), _) => file.write_all(&bytes[..in_memory(size)]),
            (_, Some(source)) => copy_all(&source, &file, size).and_then(|()| file.set_len(size)),
            (_, None) => Ok(()),
        };
        if let Err(error) = copied {
            if let Body::Blob { digest, size } = state.body
                && !self.storage.cas.has(&digest, size)
            {
                self.doubt_blob(node, &digest);
            }
            self.storage.remove_scratch(id);
            return Err(io_failed("copy up", &error));
        }
        if let Err(error) = self.sync_moved(state, id, &file) {
            self.storage.remove_scratch(id);
            return Err(error);
        }
        state.body = Body::Private {
            id,
            size,
            sparse: had_holes,
            passthrough: false,
        };
        state.generation += 1;
        state.forget_digest();
        state.origin = None;
        // The pointer must be stored before anything is acknowledged that only the new file has.
        self.save(node, state)
    }

    fn resize(&self, node: &Arc<Node>, state: &mut State, size: u64) -> FsResult<()> {
        if size > MAX_SIZE {
            return Err(Errno::EFBIG);
        }
        let now = clock::now();
        let passthrough = matches!(
            state.body,
            Body::Private {
                passthrough: true,
                ..
            }
        );
        // A backing the kernel may write to stays.
        if size == 0 && !passthrough {
            // What the old bytes are in is left as it is: nothing to announce.
            let change = self.storage.epochs.change();
            let before = std::mem::replace(&mut state.changed, change.epoch);
            match self.replace_bytes(node, state, Vec::new(), now) {
                Ok(Body::Private { id, .. }) => {
                    self.storage.retire_scratch(id, before, state.fsynced);
                }
                Ok(_) => {}
                Err(error) => {
                    state.changed = before;
                    return Err(error);
                }
            }
            return Ok(());
        }
        let _change = self.change(node, state)?;
        self.fetch(node, state)?;
        if let Body::Inline(bytes) = &state.body
            && size <= INLINE_MAX as u64
        {
            let mut new = bytes.clone();
            new.resize(in_memory(size), 0);
            return self.replace_bytes(node, state, new, now).map(drop);
        }
        self.make_private(node, state, size)?;
        let file = self.backing(state)?.ok_or(Errno::EINVAL)?;
        file.set_len(size).map_err(|e| io_failed("truncate", &e))?;
        if let Body::Private {
            size: length,
            sparse,
            ..
        } = &mut state.body
        {
            *sparse |= size > *length;
            *length = size;
        }
        state.touch_content(now);
        self.save(node, state)
    }

    /// Changes attributes.
    pub fn setattr(&self, ino: Ino, changes: Changes) -> FsResult<Entry> {
        let node = self.node(ino)?;
        let mut state = node.state.lock();
        if let Some(size) = changes.size {
            if node.kind != Kind::File {
                return Err(if node.kind == Kind::Dir {
                    Errno::EISDIR
                } else {
                    Errno::EINVAL
                });
            }
            self.resize(&node, &mut state, size)?;
        }
        let now = clock::now();
        let attributes = &mut state.attributes;
        let before = attributes.clone();
        attributes.perm = changes.perm.unwrap_or(attributes.perm);
        attributes.uid = changes.uid.unwrap_or(attributes.uid);
        attributes.gid = changes.gid.unwrap_or(attributes.gid);
        attributes.atime = changes.atime.unwrap_or(attributes.atime);
        attributes.mtime = changes.mtime.unwrap_or(attributes.mtime);
        attributes.ctime = now;
        if let Err(error) = self.save(&node, &mut state) {
            state.attributes = before;
            return Err(error);
        }
        Ok(self.entry(&node, &state))
    }

    /// Preallocates, extends, or punches a hole (fallocate(2)).
    pub fn fallocate(&self, ino: Ino, offset: u64, length: u64, mode: i32) -> FsResult<()> {
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let node = self.node(ino)?;
        if node.kind != Kind::File {
            return Err(Errno::ENODEV);
        }
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= MAX_SIZE)
            .ok_or(Errno::EFBIG)?;
        let (Ok(from), Ok(count)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(Errno::EFBIG);
        };
        let mut state = node.state.lock();
        let _change = self.change(&node, &mut state)?;
        self.make_private(&node, &mut state, u64::MAX)?;
        let file = self.backing(&state)?.ok_or(Errno::EINVAL)?;
        fallocate(file.as_fd(), flags, from, count)?;
        if let Body::Private { size, sparse, .. } = &mut state.body {
            // Preallocated or punched: either way not what the length says.
            *sparse = true;
            // Collapse and insert move the end: the file itself knows best.
            *size = file.metadata().map_or((*size).max(end), |meta| meta.len());
        }
        state.touch_content(clock::now());
        self.save(&node, &mut state)
    }

    /// Whether the file may have holes. What is mapped and was not written back yet lies in none,
    /// and only the kernel knows of it: see [`View::seek`].
    pub fn may_have_holes(&self, ino: Ino) -> FsResult<bool> {
        let node = self.node(ino)?;
        let state = node.state.lock();
        Ok(matches!(state.body, Body::Private { sparse: true, .. }))
    }

    /// The next data or hole from `offset` on (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).
    ///
    /// Tells what the backing holds: before it is asked of a file that may have holes, the kernel
    /// must be told to write back what it has ([`super::Invalidate::data`]).
    pub fn seek(&self, ino: Ino, offset: u64, whence: Whence) -> FsResult<u64> {
        let node = self.node(ino)?;
        if node.kind != Kind::File {
            return Err(Errno::EINVAL);
        }
        let (file, size) = {
            let state = node.state.lock();
            let file = match state.body {
                Body::Private { sparse: true, .. } => self.backing(&state)?,
                _ => None,
            };
            (file, state.size())
        };
        match (file, whence) {
            (Some(file), Whence::SeekData | Whence::SeekHole) => {
                // Nobody else relies on where the descriptor stands: all reads and writes say
                // their offset.
                let from = i64::try_from(offset).map_err(|_| Errno::ENXIO)?;
                let found = lseek(file.as_fd(), from, whence)?;
                u64::try_from(found).map_err(|_| Errno::EIO)
            }
            (None, _) if offset >= size => Err(Errno::ENXIO),
            (None, Whence::SeekData) => Ok(offset),
            (None, Whence::SeekHole) => Ok(size),
            _ => Err(Errno::EINVAL),
        }
    }
}
