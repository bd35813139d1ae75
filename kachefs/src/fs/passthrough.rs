//! Files a compiler writes, past the daemon.
//!
//! Where the kernel lets us (FUSE passthrough), a file that is created in a directory compilers
//! write to (or by an assembler or archiver where a build script runs) is opened straight onto its
//! backing: the megabytes of objects, rlibs and linked programs go to the disk as without a view.
//! Nobody else gets such a handle, and every other open reads through the page cache of the view as
//! ever.
//!
//! While such a handle may be open, length and times of the inode are those of the backing, and
//! its content has no digest to remember. That ends when the inode is *settled*: at the end of
//! the compile for its outputs, for the rest when no compiler runs in the directory any more, and
//! never while somebody has the backing open for writing, which the kernel tells (`wrapper::lease`).

use std::any::Any;
use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{Digest, Ino, Kind, ScratchId, Timestamp};
use wrapper::lease;

use super::names::NewNode;
use super::node::{Body, Node, Stamp, State};
use super::view::{Caller, Entry, View};
use super::{Errno, FsResult, INLINE_MAX, errno};
use crate::clock;

/// What keeps the kernel's reference to a backing file.
pub type Grant = Box<dyn Any + Send + Sync>;

/// The kernel looks a grant up when the process that created the file goes on, which is long
/// after the reply on a machine under load.
const GRANT_LIFE: Duration = Duration::from_mins(1);

/// Longest time between two ticks of the kernel's coarse clock (`CONFIG_HZ=100`), in nanoseconds.
const TICK: i128 = 10_000_000;

/// How often to look whether the coarse clock has moved on.
const GLANCE: Duration = Duration::from_micros(500);

/// By then a process whose file was created has it open, and the kernel tells who writes.
const OPENED: Duration = Duration::from_secs(1);

/// Directories between a file and one named as a compiler's: rustc makes `rmetaXXXX/` in its
/// out-dir, and `<crate>/<session>/` in its incremental directory.
const DEPTH: usize = 3;

/// The same below a build script's `OUT_DIR`: libraries are built in trees of their own.
const SCRIPT_DEPTH: usize = 8;

/// What writes a file from end to end and is gone before anybody reads it: binutils as gcc and cc run
/// them. Others in a build script may read what another still writes, which needs the page cache.
const TOOLS: [&str; 3] = ["as", "ar", "ranlib"];

/// Which files of a view are written past the daemon.
#[derive(Default)]
pub(super) struct Passthrough {
    /// Directories compilers write to now, and how many of them.
    compiling: HashMap<Ino, u32>,
    /// Where build scripts run now, and how many.
    scripts: HashMap<Ino, u32>,
    open: HashMap<Ino, (Instant, Arc<Node>)>,
    /// The latest time of a backing that anybody was told of.
    latest: Timestamp,
    grants: HashMap<Ino, (Instant, Grant)>,
}

/// Who writes to a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// A compiler, and whatever it runs.
    Compiler,
    /// A build script.
    Script,
}

impl Passthrough {
    fn writing(&mut self, writer: Writer) -> &mut HashMap<Ino, u32> {
        match writer {
            Writer::Compiler => &mut self.compiling,
            Writer::Script => &mut self.scripts,
        }
    }
}

/// Somebody who writes to some directories, until dropped.
pub struct Writing {
    view: Arc<View>,
    writer: Writer,
    directories: Vec<Ino>,
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut passthrough = self.view.passthrough.lock();
        let writing = passthrough.writing(self.writer);
        for directory in &self.directories {
            if let Some(count) = writing.get_mut(directory) {
                *count -= 1;
                if *count == 0 {
                    writing.remove(directory);
                }
            }
        }
    }
}

/// Whether a process is one of those whose files nobody reads before they are whole.
fn is_tool(pid: u32) -> bool {
    // The program itself: a script goes by its interpreter, and a thread by no name of its own.
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = program.file_name().and_then(|name| name.to_str());
    // `/usr/bin/ar` is a link to `x86_64-linux-gnu-ar`.
    let own = name.and_then(|name| name.rsplit('-').next());
    own.is_some_and(|own| TOOLS.contains(&own))
}

/// What the file itself says.
fn stamp(meta: &Metadata) -> Stamp {
    Stamp {
        size: meta.len(),
        mtime: mtime(meta),
    }
}

/// When a backing was last written.
pub(super) fn mtime(meta: &Metadata) -> Timestamp {
    Timestamp {
        secs: meta.mtime(),
        nanos: u32::try_from(meta.mtime_nsec()).unwrap_or(0),
    }
}

/// When a backing was last written, by the clock that stamps everything else in a view: the disk's
/// is finer, and ahead of it by up to a tick. A time that is further ahead was set by somebody.
pub(super) fn coarse_mtime(meta: &Metadata) -> Timestamp {
    let (written, now) = (mtime(meta), clock::now());
    if is_in_this_tick(written, now) {
        now
    } else {
        written
    }
}

/// Whether a time is one that the coarse clock has not come to yet, and will with its next tick.
fn is_in_this_tick(time: Timestamp, now: Timestamp) -> bool {
    let ahead = i128::from(time.secs - now.secs) * 1_000_000_000 + i128::from(time.nanos)
        - i128::from(now.nanos);
    (0..TICK).contains(&ahead)
}

impl View {
    /// Notes that somebody writes to these directories, for as long as the result lives.
    pub fn writing(self: &Arc<Self>, writer: Writer, directories: Vec<Ino>) -> Writing {
        let mut passthrough = self.passthrough.lock();
        let writing = passthrough.writing(writer);
        for directory in &directories {
            *writing.entry(*directory).or_default() += 1;
        }
        drop(passthrough);
        Writing {
            view: Arc::clone(self),
            writer,
            directories,
        }
    }

    /// Whether a file that process `pid` creates in `directory` is written past the daemon.
    pub fn creates_past(&self, directory: Ino, pid: u32) -> bool {
        self.is_in(directory, Writer::Compiler, DEPTH)
            || (self.is_in(directory, Writer::Script, SCRIPT_DEPTH) && is_tool(pid))
    }

    /// Whether a directory is one to which such a writer writes, or not far below one.
    fn is_in(&self, directory: Ino, writer: Writer, depth: usize) -> bool {
        let mut at = directory;
        for _ in 0..depth {
            {
                let mut passthrough = self.passthrough.lock();
                let writing = passthrough.writing(writer);
                if writing.is_empty() {
                    return false;
                }
                if writing.contains_key(&at) {
                    return true;
                }
            }
            match self.parent(at) {
                Ok(parent) if parent != at => at = parent,
                _ => return false,
            }
        }
        false
    }

    /// Makes a regular file with a backing for the kernel to write to. Returns also that backing,
    /// opened for reading, which is enough to name it to the kernel and leaves it to the creator
    /// to be the only writer.
    pub fn create_backed(
        &self,
        parent: Ino,
        name: &[u8],
        mode: u32,
        caller: Caller,
    ) -> FsResult<(Arc<Node>, Entry, File)> {
        let (id, _) = self.storage.new_scratch().map_err(|e| errno(&e))?;
        let new = NewNode {
            kind: Kind::File,
            mode,
            rdev: 0,
            body: Body::Private {
                id,
                size: 0,
                sparse: true,
                passthrough: true,
            },
        };
        let made = File::open(self.storage.dir.scratch_file(id))
            .map_err(|e| errno(&e))
            .and_then(|file| {
                let (node, entry) = self.create_node(parent, name, new, caller)?;
                Ok((node, entry, file))
            });
        made.inspect_err(|_| self.storage.remove_scratch(id))
    }

    /// Takes back what [`View::create_backed`] planned: every change comes through the daemon.
    pub fn keep_asking(&self, node: &Node) {
        if let Body::Private { passthrough, .. } = &mut node.state.lock().body {
            *passthrough = false;
        }
    }

    /// Keeps a new file among those written past the daemon, unless it is gone already.
    pub fn granted(&self, node: &Arc<Node>, grant: Grant) {
        let mut passthrough = self.passthrough.lock();
        let now = Instant::now();
        passthrough.open.insert(node.ino, (now, Arc::clone(node)));
        passthrough.grants.insert(node.ino, (now, grant));
        drop(passthrough);
        if !self.nodes.read().contains(node.ino) {
            self.revoke(node.ino);
        }
    }

    /// Of a loaded view that stayed mounted: its private files may be open for writing past every
    /// daemon, by grants of the one that died.
    pub(super) fn distrust_private(&self) {
        for node in self.all_nodes() {
            if let Body::Private { passthrough, .. } = &mut node.state.lock().body {
                *passthrough = true;
            } else {
                continue;
            }
            // Whoever was about to open one has long done so.
            let since = Instant::now();
            let entry = (
                since.checked_sub(OPENED).unwrap_or(since),
                Arc::clone(&node),
            );
            self.passthrough.lock().open.insert(node.ino, entry);
        }
    }

    /// The files that may be written past the daemon, and whether each was made so recently that
    /// its maker may not have it open yet.
    pub(super) fn written_past(&self) -> Vec<(Arc<Node>, bool)> {
        let passthrough = self.passthrough.lock();
        let open = passthrough.open.values();
        open.map(|(since, node)| (Arc::clone(node), since.elapsed() < OPENED))
            .collect()
    }

    /// Lets go of grants that nobody can be about to use.
    pub fn expire_grants(&self) {
        let mut passthrough = self.passthrough.lock();
        let is_old = |_: &Ino, (since, _): &mut (Instant, Grant)| since.elapsed() > GRANT_LIFE;
        let expired: Vec<_> = passthrough.grants.extract_if(is_old).collect();
        // Closing them asks the kernel.
        drop(passthrough);
        drop(expired);
    }

    /// Forgets a file that is no longer written past the daemon.
    pub(super) fn not_granted(&self, ino: Ino) {
        self.passthrough.lock().open.remove(&ino);
    }

    /// Forgets a file that is gone: its blocks are the disk's again, nobody can have it open.
    pub(super) fn revoke(&self, ino: Ino) {
        let mut passthrough = self.passthrough.lock();
        passthrough.open.remove(&ino);
        let grant = passthrough.grants.remove(&ino);
        // Closing it asks the kernel.
        drop(passthrough);
        drop(grant);
    }

    /// What the backing of a passthrough file says now.
    pub(super) fn backing_meta(&self, id: ScratchId) -> FsResult<Metadata> {
        fs::metadata(self.storage.dir.scratch_file(id)).map_err(|e| errno(&e))
    }

    /// Remembers in which state a passthrough file was first read: if it changes later, pages of
    /// the old state may be in the page cache.
    pub(super) fn note_read(&self, state: &mut State) {
        if let Body::Private {
            id,
            passthrough: true,
            ..
        } = state.body
            && state.private_mut().first_read.is_none()
        {
            state.private_mut().first_read = self.backing_meta(id).ok().as_ref().map(stamp);
        }
    }

    fn note_backing(&self, written: Timestamp) {
        let mut passthrough = self.passthrough.lock();
        passthrough.latest = passthrough.latest.max(written);
    }

    /// Waits until the clock that stamps everything else has come to the time of the backing written
    /// last: what a hit brings is not older than the dependency that a compiler has just finished.
    pub(super) fn wait_for_the_clock(&self) {
        let latest = self.passthrough.lock().latest;
        while latest > clock::now() && is_in_this_tick(latest, clock::now()) {
            std::thread::sleep(GLANCE);
        }
    }

    /// Opens the backing and waits until nobody writes to it.
    fn unwritten(&self, id: ScratchId, deadline: Instant) -> FsResult<File> {
        // Our own descriptor could write.
        self.storage.close_scratch(id);
        let file = File::open(self.storage.dir.scratch_file(id)).map_err(|e| errno(&e))?;
        if lease::wait_unwritten(&file, deadline) {
            Ok(file)
        } else {
            Err(Errno::EBUSY)
        }
    }

    /// The digest of a file that may still be written past the daemon; EBUSY when it is.
    pub(super) fn passthrough_digest(&self, id: ScratchId, deadline: Instant) -> FsResult<Digest> {
        let file = self.unwritten(id, deadline)?;
        let before = stamp(&file.metadata().map_err(|e| errno(&e))?);
        self.note_backing(before.mtime);
        let (digest, _) = store::digest::hash_reader(&file, |_| ()).map_err(|e| errno(&e))?;
        let after = stamp(&file.metadata().map_err(|e| errno(&e))?);
        if before == after {
            Ok(digest)
        } else {
            Err(Errno::EBUSY)
        }
    }

    /// Ends the passthrough of a file: from now on all its changes come through the daemon. EBUSY
    /// when somebody has it open for writing at the deadline. Any other file is settled already.
    pub fn settle(&self, node: &Arc<Node>, deadline: Instant) -> FsResult<()> {
        let Body::Private {
            id,
            passthrough: true,
            ..
        } = node.state.lock().body
        else {
            self.not_granted(node.ino);
            return Ok(());
        };
        let believed = self
            .unwritten(id, deadline)
            .and_then(|file| self.believe(node, id, &file));
        let stale = match believed {
            // Somebody else has settled it meanwhile, or its last name is gone, and the backing too.
            Err(Errno::ENOENT) if !self.is_passthrough(node, id) => false,
            believed => believed?,
        };
        self.not_granted(node.ino);
        if let Some(invalidate) = self.invalidate.get() {
            if stale {
                invalidate.data(node.ino);
            } else {
                invalidate.attributes(node.ino);
            }
        }
        Ok(())
    }

    /// Whether a node is there and still written past the daemon by way of this backing.
    fn is_passthrough(&self, node: &Node, id: ScratchId) -> bool {
        let state = node.state.lock();
        let is_so = matches!(
            state.body,
            Body::Private { id: current, passthrough: true, .. } if current == id
        );
        is_so && self.nodes.read().contains(node.ino)
    }

    /// Makes inode and record say what the backing says. Returns whether the kernel may hold
    /// pages of an older state.
    fn believe(&self, node: &Arc<Node>, id: ScratchId, file: &File) -> FsResult<bool> {
        let mut state = node.state.lock();
        match &state.body {
            Body::Private {
                id: current,
                passthrough: true,
                ..
            } if *current == id => {}
            _ => return Ok(false),
        }
        let meta = file.metadata().map_err(|e| errno(&e))?;
        let now = stamp(&meta);
        self.note_backing(now.mtime);
        let seen = state.private.take().and_then(|private| private.first_read);
        let stale = seen.is_some_and(|seen| seen != now);
        state.body = if now.size <= INLINE_MAX as u64 {
            let bytes = fs::read(self.storage.dir.scratch_file(id)).map_err(|e| errno(&e))?;
            Body::Inline(bytes)
        } else {
            Body::Private {
                id,
                size: now.size,
                sparse: super::view::is_sparse(&meta),
                passthrough: false,
            }
        };
        state.generation += 1;
        state.attributes.mtime = coarse_mtime(&meta);
        state.attributes.ctime = state.attributes.ctime.max(state.attributes.mtime);
        self.save(node, &mut state)?;
        if matches!(state.body, Body::Inline(_)) {
            self.storage
                .retire_scratch(id, state.changed, state.fsynced);
        }
        Ok(stale)
    }

    /// Settles what was created a while ago and nobody writes to, when no compiler runs.
    pub fn settle_idle(&self) {
        let busy = !self.passthrough.lock().compiling.is_empty();
        if !busy {
            self.settle_all(OPENED);
        }
    }

    /// Settles every file of this age that nobody writes to.
    pub fn settle_all(&self, age: Duration) {
        let old: Vec<Arc<Node>> = {
            let passthrough = self.passthrough.lock();
            let open = passthrough.open.values();
            open.filter(|(since, _)| since.elapsed() >= age)
                .map(|(_, node)| Arc::clone(node))
                .collect()
        };
        for node in old {
            match self.settle(&node, Instant::now()) {
                // Tried again later.
                Ok(()) | Err(Errno::EBUSY) => {}
                Err(error) => tracing::warn!(ino = ?node.ino, %error, "cannot settle"),
            }
        }
    }
}
