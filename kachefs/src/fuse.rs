//! The FUSE adapter: fuser's calls become calls of [`View`], nothing more.
//!
//! The kernel is asked to remember everything: entries, negative entries and attributes carry
//! long timeouts, because the daemon is the only other writer and says when a name changes
//! ([`KernelInvalidate`]). File handles are inode numbers, so they mean the same to every process
//! that serves the mount.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::unistd::Whence;
use parking_lot::Mutex;
use store::{Ino, Kind, Timestamp};
use wrapper::protocol::{TOKEN_NAME, Token};

use crate::clock;
use crate::fs::data::Changes;
use crate::fs::names::{NewNode, RenameMode};
use crate::fs::node::Body;
use crate::fs::{Caller, Entry, FsResult, Invalidate, NAME_MAX, View};
use crate::keeper::wire::Connection;

/// How long the kernel may remember: until told otherwise.
const TTL: Duration = Duration::from_hours(365 * 24);

/// What cargo knows about the compiler. With it cargo asks the compiler nothing, and a mount whose
/// daemon died is not mended by the wrapper: so the kernel must ask us for this name every time,
/// and fail when nobody answers.
const RUSTC_INFO: &str = ".rustc_info.json";

/// Inodes are never reused, so one generation is enough.
const GENERATION: Generation = Generation(0);

/// Largest read-ahead and write the kernel sends in one request (`fs.fuse.max_pages_limit` allows
/// twice as much). Every worker of every view has a buffer of this length.
pub const MAX_REQUEST: u32 = 512 << 10;

/// Requests the kernel may have under way in the background.
const MAX_BACKGROUND: u16 = 64;

/// Inode numbers with this bit are the tokens of the directories without it.
const TOKEN_BIT: u64 = 1 << 62;

/// Set in the number of a request that an earlier daemon had (`FUSE_UNIQUE_RESEND`).
const RESENT: u64 = 1 << 63;

/// Names read from a directory at a time.
const LIST_BATCH: usize = 256;

/// What workers read into, up to [`MAX_REQUEST`] each: a fresh buffer for every request would be
/// cleared, and its pages given back to the system, each time. Shared by all views, of which few
/// read at once.
static READ_BUFFERS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// How many of them are kept.
const READ_BUFFERS_KEPT: usize = 4;

/// Lends a buffer of this size.
fn with_read_buffer<T>(size: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = READ_BUFFERS.lock().pop().unwrap_or_default();
    if buffer.len() < size {
        buffer.resize(size, 0);
    }
    let value = work(&mut buffer[..size]);
    let mut kept = READ_BUFFERS.lock();
    if kept.len() < READ_BUFFERS_KEPT {
        kept.push(buffer);
    }
    value
}

/// Serves one view to the kernel.
pub struct Adapter {
    view: Arc<View>,
    /// Whether the kernel is asked for passthrough.
    wants_passthrough: bool,
    /// Whether the kernel opens files straight onto their backings for us.
    passthrough: AtomicBool,
    socket: Vec<u8>,
    emptied: Option<Emptied>,
    connection: Arc<OnceLock<Connection>>,
}

/// Told before the kernel is answered that a process has removed the last name of the root, and
/// which process.
pub type Emptied = Box<dyn Fn(&View, u32) + Send + Sync>;

/// Invalidations through the kernel's notification channel.
pub struct KernelInvalidate(pub Notifier);

impl Invalidate for KernelInvalidate {
    fn entry(&self, parent: Ino, name: &[u8]) {
        if let Err(error) = self
            .0
            .inval_entry(INodeNo(parent.0), OsStr::from_bytes(name))
        {
            // ENOENT (nothing remembered) is filtered by fuser; the rest means the mount is gone.
            tracing::debug!(?parent, %error, "invalidation refused");
        }
    }

    fn attributes(&self, ino: Ino) {
        // A negative offset leaves the data alone (fuse_reverse_inval_inode).
        self.inode(ino, -1);
    }

    fn data(&self, ino: Ino) {
        // Offset and length 0 mean all of it; dirty pages are written back first
        // (invalidate_inode_pages2_range).
        self.inode(ino, 0);
    }
}

impl KernelInvalidate {
    fn inode(&self, ino: Ino, offset: i64) {
        if let Err(error) = self.0.inval_inode(INodeNo(ino.0), offset, 0) {
            tracing::debug!(?ino, %error, "invalidation refused");
        }
    }
}

impl Adapter {
    /// An adapter for `view`; `socket` is where its daemon listens.
    pub fn new(view: Arc<View>, socket: &Path) -> Self {
        Self {
            view,
            wants_passthrough: true,
            passthrough: AtomicBool::new(false),
            socket: socket.as_os_str().as_bytes().to_vec(),
            emptied: None,
            connection: Arc::default(),
        }
    }

    /// Sets whether the kernel is asked for passthrough.
    #[must_use]
    pub fn passthrough(mut self, wanted: bool) -> Self {
        self.wants_passthrough = wanted;
        self
    }

    /// Sets who is told that the view was emptied.
    #[must_use]
    pub fn on_emptied(mut self, emptied: Emptied) -> Self {
        self.emptied = Some(emptied);
        self
    }

    fn after_removal(&self, request: &Request, parent: INodeNo) {
        if let Some(emptied) = &self.emptied
            && parent == INodeNo::ROOT
            && self.view.is_empty()
        {
            emptied(&self.view, request.pid());
        }
    }

    /// Where to find, after the handshake, what was agreed upon with the kernel.
    pub fn connection(&self) -> Arc<OnceLock<Connection>> {
        Arc::clone(&self.connection)
    }

    fn token(&self, directory: Ino) -> Vec<u8> {
        let token = Token {
            view: self.view.id.0,
            directory: directory.0,
            socket: self.socket.clone(),
        };
        token.encode()
    }

    /// The token of a directory looks like a symbolic link.
    fn token_entry(&self, directory: Ino) -> FsResult<FileAttr> {
        let mut entry = self.view.getattr(directory)?;
        entry.kind = Kind::Symlink;
        entry.ino = Ino(directory.0 | TOKEN_BIT);
        entry.size = self.token(directory).len() as u64;
        entry.blocks = 0;
        entry.attributes.perm = 0o777;
        entry.attributes.nlink = 1;
        Ok(attr(&entry))
    }

    fn make(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new: NewNode,
    ) -> FsResult<Entry> {
        let (parent, name, caller) = (Ino(parent.0), name.as_bytes(), caller(request));
        if number_of(request).1 {
            self.view.create_again(parent, name, new, caller)
        } else {
            let (_, entry) = self.view.create_node(parent, name, new, caller)?;
            Ok(entry)
        }
    }

    fn lookup_entry(&self, parent: Ino, name: &OsStr) -> FsResult<FileAttr> {
        if name == TOKEN_NAME {
            return self.token_entry(parent);
        }
        self.view
            .lookup(parent, name.as_bytes())
            .map(|entry| attr(&entry))
    }
}

/// How long the kernel may remember what a name means.
fn ttl(name: &OsStr) -> &'static Duration {
    if name == RUSTC_INFO {
        &Duration::ZERO
    } else {
        &TTL
    }
}

/// The number of a request, and whether an earlier daemon had it and may have carried it out.
fn number_of(request: &Request) -> (u64, bool) {
    let number = request.unique().0;
    (number & !RESENT, number & RESENT != 0)
}

fn token_of(ino: INodeNo) -> Option<Ino> {
    (ino.0 & TOKEN_BIT != 0).then_some(Ino(ino.0 & !TOKEN_BIT))
}

fn errno(error: crate::fs::Errno) -> Errno {
    Errno::from_i32(error as i32)
}

fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

fn timestamp(time: TimeOrNow) -> Timestamp {
    let time = match time {
        TimeOrNow::Now => return clock::now(),
        TimeOrNow::SpecificTime(time) => time,
    };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp {
            secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: since.subsec_nanos(),
        },
        // fuser reads seconds before the epoch as if the nanoseconds counted down with them
        // (`system_time_from_time` in its time.rs): -2 s + 0.5 s comes as 2.5 s before. What the
        // kernel sent is the two parts as they are.
        Err(error) => {
            let before = error.duration();
            Timestamp {
                secs: -i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
                nanos: before.subsec_nanos(),
            }
        }
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

fn attr(entry: &Entry) -> FileAttr {
    let attributes = &entry.attributes;
    FileAttr {
        ino: INodeNo(entry.ino.0),
        size: entry.size,
        blocks: entry.blocks,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(entry.kind),
        perm: attributes.perm,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: 4096,
        flags: 0,
    }
}

fn reply_entry(result: FsResult<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, GENERATION),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_empty(result: FsResult<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

/// What to answer when a file that the kernel knows nothing of cannot be created. A hit may have
/// brought it since the kernel looked; then ESTALE makes the kernel look again, and check whether
/// the caller may open what is there. With `O_EXCL` the caller is told.
fn create_error(error: crate::fs::Errno, flags: i32) -> crate::fs::Errno {
    if error == crate::fs::Errno::EEXIST && flags & libc::O_EXCL == 0 {
        crate::fs::Errno::ESTALE
    } else {
        error
    }
}

fn whence_of(whence: i32) -> Option<Whence> {
    match whence {
        libc::SEEK_DATA => Some(Whence::SeekData),
        libc::SEEK_HOLE => Some(Whence::SeekHole),
        _ => None,
    }
}

/// Mode of a regular file, or of what `mknod` was asked for.
fn kind_of_mode(mode: u32) -> Option<Kind> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Some(Kind::File),
        libc::S_IFIFO => Some(Kind::Fifo),
        libc::S_IFSOCK => Some(Kind::Socket),
        libc::S_IFCHR => Some(Kind::CharDevice),
        libc::S_IFBLK => Some(Kind::BlockDevice),
        _ => None,
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without PARALLEL_DIROPS one lookup blocks its whole directory.
        for capability in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        ] {
            if config.add_capabilities(capability).is_err() {
                tracing::info!(?capability, "kernel does without");
            }
        }
        // The kernel then opens files of a compiler straight onto their backings (see
        // `fs::passthrough`); a stack of one is the depth of a plain disk below a view.
        if self.wants_passthrough && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            let allowed = config.set_max_stack_depth(1).is_ok();
            self.passthrough.store(allowed, Ordering::Relaxed);
        }
        for (what, set) in [
            ("max_write", config.set_max_write(MAX_REQUEST).err()),
            ("max_readahead", config.set_max_readahead(MAX_REQUEST).err()),
            (
                "max_background",
                config
                    .set_max_background(MAX_BACKGROUND)
                    .err()
                    .map(u32::from),
            ),
        ] {
            if let Some(nearest) = set {
                tracing::debug!(what, nearest, "kernel limit differs");
            }
        }
        let fuser::Version(major, minor) = config.kernel_abi();
        let connection = Connection {
            abi: (major, minor),
            capabilities: config.capabilities().bits(),
        };
        // There is one handshake.
        let _ = self.connection.set(connection);
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
        match self.view.setattr(Ino(ino.0), changes) {
            Ok(entry) => reply.attr(&TTL, &attr(&entry)),
            Err(error) => reply.error(errno(error)),
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
        reply_entry(made.map(|entry| attr(&entry)), reply);
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
        reply_entry(made.map(|entry| attr(&entry)), reply);
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
        reply_entry(made.map(|entry| attr(&entry)), reply);
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
        reply_entry(made.map(|entry| attr(&entry)), reply);
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
        let again = number_of(request).1;
        if !again
            && self.passthrough.load(Ordering::Relaxed)
            && self.view.is_compiling(Ino(parent.0))
        {
            return self.create_passthrough(request, Ino(parent.0), name, mode, flags, reply);
        }
        match self.make(request, parent, name, NewNode::file(mode)) {
            Ok(entry) => reply.created(
                ttl(name),
                &attr(&entry),
                GENERATION,
                FileHandle(entry.ino.0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(errno(create_error(error, flags))),
        }
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
            match self.view.read(Ino(ino.0), offset, buffer) {
                Ok(read) => reply.data(&buffer[..read]),
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
        match self.view.write(Ino(ino.0), offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(errno(error)),
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
        let listed = self.list(Ino(ino.0), offset, |row| {
            reply.add(INodeNo(row.attr.ino.0), row.cookie, row.attr.kind, row.name)
        });
        match listed {
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
        let directory = Ino(ino.0);
        let listed = self.list(directory, offset, |row| {
            let is_dots = row.name == "." || row.name == "..";
            // The kernel takes a reference to every inode listed this way, dots excepted.
            let attr = if is_dots {
                Ok(row.attr)
            } else {
                self.view
                    .lookup(directory, row.name.as_bytes())
                    .map(|entry| attr(&entry))
            };
            let Ok(attr) = attr else { return false };
            let ttl = ttl(row.name);
            let full = reply.add(attr.ino, row.cookie, row.name, ttl, &attr, GENERATION);
            if full && !is_dots {
                self.view.forget(Ino(attr.ino.0), 1);
            }
            full
        });
        match listed {
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
        reply_empty(self.view.fallocate(Ino(ino.0), offset, length, mode), reply);
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

impl Adapter {
    /// Creates a file that its creator writes past us.
    fn create_passthrough(
        &self,
        request: &Request,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        // Until the file is among those written past us, a sync point waits.
        let _change = self.view.storage.epochs.change();
        let made = self
            .view
            .create_backed(parent, name.as_bytes(), mode, caller(request));
        let (node, entry, backing) = match made {
            Ok(made) => made,
            Err(error) => return reply.error(errno(create_error(error, flags))),
        };
        let (attr, handle) = (attr(&entry), FileHandle(entry.ino.0));
        match reply.open_backing(&backing) {
            Ok(grant) => {
                let (flags, grant) = (FopenFlags::empty(), Arc::new(grant));
                // Before the creator goes on: it may be quick to remove the file again.
                self.view.granted(&node, Box::new(Arc::clone(&grant)));
                reply.created_passthrough(&TTL, &attr, GENERATION, handle, flags, &grant);
            }
            Err(error) => {
                // Not privileged enough, or the store is on a stacked file system.
                tracing::info!(%error, "no passthrough");
                self.passthrough.store(false, Ordering::Relaxed);
                self.view.keep_asking(&node);
                reply.created(
                    &TTL,
                    &attr,
                    GENERATION,
                    handle,
                    FopenFlags::FOPEN_KEEP_CACHE,
                );
            }
        }
    }
}

/// One row on its way into a reply.
struct Row<'a> {
    attr: FileAttr,
    cookie: u64,
    name: &'a OsStr,
}

impl Adapter {
    /// Shows `add` the rows after `cookie` until it says that the reply is full.
    fn list(
        &self,
        directory: Ino,
        mut cookie: u64,
        mut add: impl FnMut(Row<'_>) -> bool,
    ) -> FsResult<()> {
        let dots = [(1, ".", directory), (2, "..", self.view.parent(directory)?)];
        for (dot, name, ino) in dots {
            if cookie < dot {
                let attr = attr(&self.view.getattr(ino)?);
                if add(Row {
                    attr,
                    cookie: dot,
                    name: OsStr::new(name),
                }) {
                    return Ok(());
                }
                cookie = dot;
            }
        }
        loop {
            let rows = self.view.list(directory, cookie, LIST_BATCH)?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            cookie = last.cookie;
            for row in &rows {
                // Removed since it was listed: not an entry any more.
                let Ok(entry) = self.view.getattr(row.ino) else {
                    continue;
                };
                let name = OsStr::from_bytes(&row.name);
                if add(Row {
                    attr: attr(&entry),
                    cookie: row.cookie,
                    name,
                }) {
                    return Ok(());
                }
            }
        }
    }
}

fn absent() -> FileAttr {
    attr(&Entry {
        ino: Ino(0),
        kind: Kind::File,
        attributes: crate::fs::Attributes {
            perm: 0,
            uid: 0,
            gid: 0,
            nlink: 0,
            rdev: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
        },
        size: 0,
        blocks: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::Errno;

    #[test]
    fn what_a_hit_brought_is_looked_up_again() {
        let (any, exclusive) = (libc::O_CREAT | libc::O_RDWR, libc::O_CREAT | libc::O_EXCL);
        assert_eq!(create_error(Errno::EEXIST, any), Errno::ESTALE);
        assert_eq!(create_error(Errno::EEXIST, exclusive), Errno::EEXIST);
        assert_eq!(create_error(Errno::ENOSPC, any), Errno::ENOSPC);
    }

    #[test]
    fn times_before_the_epoch_keep_their_nanoseconds() {
        // What fuser makes of -2 s + 0.5 s, and what it has to be given to say so again.
        let read = UNIX_EPOCH - Duration::new(2, 500_000_000);
        let time = timestamp(TimeOrNow::SpecificTime(read));
        assert_eq!((time.secs, time.nanos), (-2, 500_000_000));
        let shown = UNIX_EPOCH - Duration::from_millis(1500);
        assert_eq!(system_time(time), shown);
    }
}
