//! A view: its nodes by number, lookup, listing, attributes, and the life of nodes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use store::{Attributes, Exchanges, Ino, Kind, ViewId, ViewRecord};

use super::check::Withdrawal;
use super::node::{Body, Node, Nodes, State, UNKNOWN};
use super::passthrough::{self, Passthrough};
use super::{Errno, FsResult};
use crate::storage::Storage;

/// Tells the kernel that what it remembers of a name is no longer true.
pub trait Invalidate: Send + Sync {
    /// Forget what `name` in `parent` is. Called with no lock held: the kernel takes the
    /// directory's lock, which a request waiting for one of ours may hold.
    fn entry(&self, parent: Ino, name: &[u8]);

    /// Forget the attributes of an inode. Called with no lock held.
    fn attributes(&self, ino: Ino);

    /// Write back what was changed through mappings of an inode, and forget its attributes and
    /// bytes. Called with no lock held, and never by a thread that serves requests: the kernel waits
    /// for its writes.
    fn data(&self, ino: Ino);
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// An inode as `stat` shows it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its number.
    pub ino: Ino,
    /// Its kind.
    pub kind: Kind,
    /// Its attributes.
    pub attributes: Attributes,
    /// Its length in bytes.
    pub size: u64,
    /// What it takes on the disk, in units of 512 bytes.
    pub blocks: u64,
}

/// One row of a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Where to go on after this row.
    pub cookie: u64,
    /// The name.
    pub name: Box<[u8]>,
    /// The inode it names.
    pub ino: Ino,
}

/// One mutable tree of names over the store.
pub struct View {
    /// Its number.
    pub id: ViewId,
    /// The store.
    pub storage: Arc<Storage>,
    pub(super) structure: Mutex<()>,
    pub(super) nodes: RwLock<Nodes>,
    pub(super) invalidate: OnceLock<Box<dyn Invalidate>>,
    pub(super) record: Mutex<ViewRecord>,
    pub(super) next_ino: Mutex<u64>,
    /// Bytes of small files that came into memory since they were last left to the index.
    pub(super) small: AtomicUsize,
    /// Inodes whose stored records are behind.
    pub(super) dirty: Mutex<Vec<Arc<Node>>>,
    pub(super) passthrough: Mutex<Passthrough>,
    /// Inodes nobody refers to any more, whose records are still to be deleted.
    pub(super) forgotten: Mutex<Vec<Ino>>,
    /// The exchanges carried out last.
    pub(super) exchanges: Mutex<Exchanges>,
    /// Files whose bytes may be lost (see `fs::check`).
    pub(super) suspects: Mutex<Vec<Ino>>,
    /// The last time that names of all that is lost were taken away; held while any are.
    pub(super) withdrawn: Mutex<Option<Withdrawal>>,
    /// Whether it goes on only for what was open when it was emptied (see `fs::clear`).
    pub(super) retired: AtomicBool,
}

/// What the path of a view that is only read ends with in its record, so that it is none.
pub const READ_ONLY: &[u8] = b"\0read-only";

impl View {
    /// Whether nobody writes to it.
    pub fn is_read_only(&self) -> bool {
        self.record.lock().path.ends_with(READ_ONLY)
    }

    pub(super) fn with_nodes(
        storage: Arc<Storage>,
        id: ViewId,
        record: ViewRecord,
        nodes: Nodes,
    ) -> Self {
        Self {
            id,
            storage,
            structure: Mutex::new(()),
            nodes: RwLock::new(nodes),
            invalidate: OnceLock::new(),
            next_ino: Mutex::new(record.next_ino),
            record: Mutex::new(record),
            small: AtomicUsize::new(0),
            dirty: Mutex::default(),
            passthrough: Mutex::default(),
            forgotten: Mutex::default(),
            exchanges: Mutex::default(),
            suspects: Mutex::default(),
            withdrawn: Mutex::default(),
            retired: AtomicBool::new(false),
        }
    }

    /// Where the view is mounted.
    pub fn mountpoint(&self) -> PathBuf {
        use std::os::unix::ffi::OsStringExt;
        PathBuf::from(std::ffi::OsString::from_vec(
            self.record.lock().path.clone(),
        ))
    }

    /// Sets who tells the kernel; once, before the first request.
    pub fn set_invalidate(&self, invalidate: Box<dyn Invalidate>) {
        if self.invalidate.set(invalidate).is_err() {
            tracing::error!(view = self.id.0, "view is mounted twice");
        }
    }

    /// Has the kernel write back what was changed through mappings of an inode. For threads that
    /// serve no requests (see [`Invalidate::data`]).
    pub fn write_back(&self, ino: Ino) {
        if let Some(kernel) = self.invalidate.get() {
            kernel.data(ino);
        }
    }

    /// Tells the kernel that names of a directory are others than it was told, or were not there.
    pub(super) fn renamed<'a>(&self, directory: Ino, names: impl IntoIterator<Item = &'a [u8]>) {
        if let Some(kernel) = self.invalidate.get() {
            for name in names {
                kernel.entry(directory, name);
            }
            // Of a name that nobody has asked for the kernel knows nothing, but it may have a list of all
            // names, which holds for as long as the directory's times do (fs/fuse/readdir.c).
            kernel.attributes(directory);
        }
    }

    /// The node of a number the kernel or a directory gave us.
    pub fn node(&self, ino: Ino) -> FsResult<Arc<Node>> {
        self.nodes.read().get(ino).cloned().ok_or(Errno::ENOENT)
    }

    /// The node `name` names in `parent`, without counting a kernel reference.
    pub fn child(&self, parent: Ino, name: &[u8]) -> FsResult<Arc<Node>> {
        let parent = self.node(parent)?;
        let state = parent.state.lock();
        let directory = state.directory().ok_or(Errno::ENOTDIR)?;
        let ino = directory.get(name).ok_or(Errno::ENOENT)?;
        self.node(ino)
    }

    /// Looks a name up for the kernel, which from then on holds a reference.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> FsResult<Entry> {
        if name.len() > super::NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        let child = {
            let parent = self.node(parent)?;
            let state = parent.state.lock();
            let directory = state.directory().ok_or(Errno::ENOTDIR)?;
            let child = self.node(directory.get(name).ok_or(Errno::ENOENT)?)?;
            // Counted while the name exists: an inode without names gains no references.
            child.lookups.fetch_add(1, Ordering::Relaxed);
            child
        };
        Ok(self.entry(&child, &child.state.lock()))
    }

    /// The attributes of an inode.
    pub fn getattr(&self, ino: Ino) -> FsResult<Entry> {
        let node = self.node(ino)?;
        let state = node.state.lock();
        Ok(self.entry(&node, &state))
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> FsResult<Vec<u8>> {
        match &self.node(ino)?.state.lock().body {
            Body::Link(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Up to `limit` names of a directory after `cookie`, without `.` and `..`.
    pub fn list(&self, ino: Ino, cookie: u64, limit: usize) -> FsResult<Vec<Listed>> {
        let node = self.node(ino)?;
        let state = node.state.lock();
        let directory = state.directory().ok_or(Errno::ENOTDIR)?;
        Ok(directory
            .after(cookie)
            .take(limit)
            .map(|(cookie, name, ino)| Listed {
                cookie,
                name: name.into(),
                ino,
            })
            .collect())
    }

    /// The directory that holds a directory.
    pub fn parent(&self, ino: Ino) -> FsResult<Ino> {
        let node = self.node(ino)?;
        let state = node.state.lock();
        Ok(state
            .directory()
            .ok_or(Errno::ENOTDIR)?
            .parent
            .unwrap_or(Ino::ROOT))
    }

    /// The path of a directory below the root, without a leading slash.
    pub fn path_of(&self, directory: Ino) -> FsResult<Vec<u8>> {
        let _structure = self.structure.lock();
        let mut names = Vec::new();
        let mut ino = directory;
        while ino != Ino::ROOT {
            let parent = self.parent(ino)?;
            let name = {
                let node = self.node(parent)?;
                let state = node.state.lock();
                let names = state.directory().ok_or(Errno::ENOTDIR)?;
                let name = names.after(0).find(|(_, _, child)| *child == ino);
                name.map(|(_, name, _)| name.to_vec())
                    .ok_or(Errno::ENOENT)?
            };
            names.push(name);
            ino = parent;
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// The node at a path below the root: components are taken as they are, `.` and `..`
    /// included; a symbolic link on the way is not followed and gives ENOENT.
    pub fn resolve(&self, path: &[u8]) -> FsResult<Arc<Node>> {
        let mut ino = Ino::ROOT;
        for name in path.split(|byte| *byte == b'/') {
            ino = match name {
                b"" | b"." => ino,
                b".." => self.parent(ino)?,
                name => self.child(ino, name)?.ino,
            };
        }
        self.node(ino)
    }

    /// The kernel drops `count` references to an inode.
    pub fn forget(&self, ino: Ino, count: u64) {
        let Ok(node) = self.node(ino) else { return };
        let named = node.state.lock().attributes.nlink > 0;
        let less = |known: u64| match known.checked_sub(UNKNOWN) {
            // The kernel gives all references back at once, one alone only when it had no use for
            // an answer. So this many are all of ours and those of the earlier daemon. While there
            // are names it may be asking for more at this moment: then it still counts as unknown.
            Some(since) if count >= since => Some(if named { UNKNOWN } else { 0 }),
            Some(_) => Some(known - count),
            None => Some(known.saturating_sub(count)),
        };
        let before = node
            .lookups
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .unwrap_or_default();
        if before < count {
            tracing::error!(?ino, before, count, "more forgets than lookups");
        }
        self.reap(&node);
    }

    /// Lets go of an inode that has no name, no pin and no kernel reference.
    pub(super) fn reap(&self, node: &Arc<Node>) {
        let state = node.state.lock();
        if state.attributes.nlink > 0 || state.pins > 0 || node.lookups.load(Ordering::Relaxed) > 0
        {
            return;
        }
        if !self.nodes.write().remove(node.ino) {
            return;
        }
        // Not a commit of its own: every unlink would cost two. Until the next save the record is
        // that of an inode without a name, which no load shows.
        self.forgotten.lock().push(node.ino);
        if let Body::Private { id, .. } = state.body {
            self.storage
                .retire_scratch(id, state.changed, state.fsynced);
        }
        drop(state);
        self.revoke(node.ino);
    }

    /// Every inode there is.
    pub fn inodes(&self) -> Vec<(Ino, Kind)> {
        let nodes = self.nodes.read();
        nodes.iter().map(|node| (node.ino, node.kind)).collect()
    }

    /// Every node. Collected: the map's lock is never held while a node's is taken.
    pub(super) fn all_nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.read().iter().cloned().collect()
    }

    /// Number of inodes and the sum of the file sizes in bytes.
    pub fn usage(&self) -> (u64, u64) {
        let nodes = self.all_nodes();
        let bytes = nodes
            .iter()
            .filter(|node| node.kind == Kind::File)
            .map(|node| node.state.lock().size())
            .sum();
        (nodes.len() as u64, bytes)
    }
}

/// What a file of this length takes on the disk when it is not sparse.
fn full_blocks(size: u64) -> u64 {
    size.div_ceil(512)
}

/// Whether a file takes fewer blocks than its length needs.
pub(super) fn is_sparse(meta: &fs::Metadata) -> bool {
    meta.blocks() < full_blocks(meta.len())
}

impl View {
    /// What `stat` shows of a locked node.
    pub(super) fn entry(&self, node: &Node, state: &State) -> Entry {
        if let Body::Private {
            id,
            passthrough: true,
            ..
        } = &state.body
            && let Ok(meta) = self.backing_meta(*id)
        {
            return passthrough_entry(node, state, &meta);
        }
        let size = state.size();
        let blocks = match &state.body {
            // Only a private file can be sparse.
            Body::Private {
                id, sparse: true, ..
            } => fs::metadata(self.storage.dir.scratch_file(*id))
                .map_or_else(|_| full_blocks(size), |meta| meta.blocks()),
            _ => full_blocks(size),
        };
        entry_of(node, state, size, blocks)
    }
}

/// The length and times of a file the kernel writes to are those of the backing.
fn passthrough_entry(node: &Node, state: &State, meta: &fs::Metadata) -> Entry {
    let mut entry = entry_of(node, state, meta.len(), meta.blocks());
    entry.attributes.mtime = passthrough::coarse_mtime(meta);
    entry.attributes.ctime = entry.attributes.ctime.max(entry.attributes.mtime);
    entry
}

fn entry_of(node: &Node, state: &State, size: u64, blocks: u64) -> Entry {
    Entry {
        ino: node.ino,
        kind: node.kind,
        attributes: state.attributes.clone(),
        size,
        blocks,
    }
}
