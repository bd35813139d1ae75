//! One handler for each request of the kernel: arguments into our types, one call, the reply.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, INodeNo, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use store::{Ino, Kind};

use super::buffers::with_read_buffer;
use super::convert::{absent, attr, errno, kind_of_mode, number_of, timestamp, whence_of};
use super::tokens::token_of;
use super::{Adapter, GENERATION, TTL, ttl};
use crate::fs::data::Changes;
use crate::fs::names::{NewNode, RenameMode};
use crate::fs::node::Body;
use crate::fs::{FsResult, NAME_MAX, View};

fn reply_entry(result: FsResult<FileAttr>, name: &OsStr, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(ttl(name), &attr, GENERATION),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_empty(result: FsResult<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.shake_hands(config);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.lookup_entry(Ino(parent.0), name) {
            Ok(attr) => reply.entry(ttl(name), &attr, GENERATION),
            // An entry with inode 0 is remembered as absent (libfuse: fuse_entry_param).
            Err(crate::fs::Errno::ENOENT) => {
                let mut absent = absent();
                absent.ino = INodeNo(0);
                reply.entry(&TTL, &absent, GENERATION);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        if token_of(ino).is_none() {
            self.view.forget(Ino(ino.0), count);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let result = match token_of(ino) {
            Some(directory) => self.token_entry(directory),
            None => self.view.getattr(Ino(ino.0)).map(|entry| attr(&entry)),
        };
        match result {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if token_of(ino).is_some() {
            return reply.error(Errno::EPERM);
        }
        let changes = Changes {
            perm: mode.and_then(|mode| u16::try_from(mode & 0o7777).ok()),
            uid,
            gid,
            size,
            atime: atime.map(timestamp),
            mtime: mtime.map(timestamp),
        };
        let answer = move |view: &View| match view.setattr(Ino(ino.0), changes) {
            Ok(entry) => reply.attr(&TTL, &attr(&entry)),
            Err(error) => reply.error(errno(error)),
        };
        match changes.size {
            // What is emptied, or keeps its length, needs no bytes.
            None | Some(0) => answer(&self.view),
            Some(_) => self.once_here(Ino(ino.0), answer),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        if let Some(directory) = token_of(ino) {
            return reply.data(&self.token(directory));
        }
        match self.view.readlink(Ino(ino.0)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = kind_of_mode(mode) else {
            return reply.error(Errno::EINVAL);
        };
        let body = if kind == Kind::File {
            Body::Inline(Vec::new())
        } else {
            Body::Special
        };
        let new = NewNode {
            kind,
            mode,
            rdev,
            body,
        };
        let made = self.make(request, parent, name, new);
        reply_entry(made.map(|entry| attr(&entry)), name, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.make(
            request,
            parent,
            name,
            NewNode::directory(Ino(parent.0), mode),
        );
        reply_entry(made.map(|entry| attr(&entry)), name, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent_ino, bytes) = (Ino(parent.0), name.as_bytes());
        let removed = match number_of(request) {
            (_, true) => self.view.unlink_again(parent_ino, bytes),
            _ => self.view.unlink(parent_ino, bytes),
        };
        if removed.is_ok() {
            self.after_removal(request, parent);
        }
        reply_empty(removed, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent_ino, bytes) = (Ino(parent.0), name.as_bytes());
        let removed = match number_of(request) {
            (_, true) => self.view.rmdir_again(parent_ino, bytes),
            _ => self.view.rmdir(parent_ino, bytes),
        };
        if removed.is_ok() {
            self.after_removal(request, parent);
        }
        reply_empty(removed, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let new = NewNode::symlink(target.as_os_str().as_bytes());
        let made = self.make(request, parent, name, new);
        reply_entry(made.map(|entry| attr(&entry)), name, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = if flags.is_empty() {
            RenameMode::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            RenameMode::NoReplace
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            RenameMode::Exchange
        } else {
            return reply.error(Errno::EINVAL);
        };
        let from = (Ino(parent.0), name.as_bytes());
        let to = (Ino(newparent.0), newname.as_bytes());
        let done = match number_of(request) {
            (number, true) => self.view.rename_again(from, to, mode, number),
            (number, false) => self.view.rename(from, to, mode, number),
        };
        reply_empty(done, reply);
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        if token_of(ino).is_some() {
            return reply.error(Errno::EPERM);
        }
        let (ino, parent, name) = (Ino(ino.0), Ino(newparent.0), newname.as_bytes());
        let made = match number_of(request) {
            (_, true) => self.view.link_again(ino, parent, name),
            _ => self.view.link(ino, parent, name),
        };
        reply_entry(made.map(|entry| attr(&entry)), newname, reply);
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // From the first ENOSYS on the kernel opens and closes files alone (FUSE_NO_OPEN_SUPPORT)
        // and keeps its page cache, which stays true: nobody changes bytes behind its back. Half
        // of the requests of a build that has nothing to do were these. O_TRUNC arrives as a
        // setattr, because ATOMIC_O_TRUNC is not asked for.
        reply.error(Errno::ENOSYS);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.create_file(request, parent, name, mode, flags, reply);
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        with_read_buffer(size as usize, |buffer| {
            match self.view.read_here(Ino(ino.0), offset, buffer) {
                Ok(Some(read)) => reply.data(&buffer[..read]),
                Ok(None) => self.read_elsewhere(Ino(ino.0), offset, size, reply),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let ino = Ino(ino.0);
        let written = |result: FsResult<()>, length: usize| match result {
            Ok(()) => reply.written(u32::try_from(length).unwrap_or(u32::MAX)),
            Err(error) => reply.error(errno(error)),
        };
        if self.view.is_elsewhere(ino) {
            let data = data.to_vec();
            self.once_here(ino, move |view| {
                written(view.write(ino, offset, &data), data.len());
            });
        } else {
            written(self.view.write(ino, offset, data), data.len());
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Writes are already here; ENOSYS spares every later close a round trip.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.view.fsync(Ino(ino.0)), reply);
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // With NO_OPENDIR_SUPPORT this tells the kernel to open, and cache, directories alone.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.fill(Ino(ino.0), offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        match self.fill_plus(Ino(ino.0), offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let synced = self.view.storage.index.sync();
        reply_empty(synced.map_err(|e| crate::fs::index_failed(&e)), reply);
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match nix::sys::statvfs::statvfs(self.view.storage.dir.root()) {
            Ok(disk) => reply.statfs(
                disk.blocks(),
                disk.blocks_free(),
                disk.blocks_available(),
                disk.files(),
                disk.files_free(),
                u32::try_from(disk.block_size()).unwrap_or(4096),
                u32::try_from(NAME_MAX).unwrap_or(255),
                u32::try_from(disk.fragment_size()).unwrap_or(4096),
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn getxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        // ENOSYS is remembered; ENODATA would cost a request per write (security.capability).
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let ino = Ino(ino.0);
        self.once_here(ino, move |view| {
            reply_empty(view.fallocate(ino, offset, length, mode), reply);
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let ino = Ino(ino.0);
        let asked = (u64::try_from(offset), whence_of(whence));
        let (Ok(offset), Some(whence)) = asked else {
            return reply.error(Errno::EINVAL);
        };
        let view = Arc::clone(&self.view);
        let answer = move || match view.seek(ino, offset, whence) {
            Ok(found) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
            Err(error) => reply.error(errno(error)),
        };
        match self.view.may_have_holes(ino) {
            // What was written through a mapping and not yet written back would look like a hole,
            // and a copy would lose it. The kernel sends those writes here while it is asked for
            // them, so a thread of its own asks.
            Ok(true) => {
                let view = Arc::clone(&self.view);
                let asking = std::thread::Builder::new().spawn(move || {
                    view.write_back(ino);
                    answer();
                });
                if let Err(error) = asking {
                    // The answer went with the closure: fuser says EIO for it.
                    tracing::error!(?ino, %error, "cannot start a thread");
                }
            }
            _ => answer(),
        }
    }
}
