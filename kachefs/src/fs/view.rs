//! A view: its nodes by number, loading, lookup, listing, and the life of nodes.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use store::{
    ActionKey, Attributes, Content, DentryRecord, Exchanges, Ino, InodeRecord, Kind, ScratchId,
    Timestamp, ViewId, ViewRecord,
};

use super::directory::Directory;
use super::node::{Body, Node, Nodes, State, UNKNOWN};
use super::passthrough::{self, Passthrough};
use super::small::stored_body;
use super::{Errno, FsResult, check, index_failed};
use crate::clock;
use crate::storage::Storage;

/// Inode numbers claimed from the index at a time.
const CLAIM: u64 = 4096;

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
    record: Mutex<ViewRecord>,
    next_ino: Mutex<u64>,
    /// Bytes of small files that came into memory since they were last left to the index.
    pub(super) small: AtomicUsize,
    /// Inodes whose stored records are behind.
    dirty: Mutex<Vec<Arc<Node>>>,
    pub(super) passthrough: Mutex<Passthrough>,
    /// Inodes nobody refers to any more, whose records are still to be deleted.
    forgotten: Mutex<Vec<Ino>>,
    /// The exchanges carried out last.
    pub(super) exchanges: Mutex<Exchanges>,
    /// Files whose bytes may be lost (see `fs::check`).
    pub(super) suspects: Mutex<Vec<Ino>>,
}

impl View {
    /// Makes a new view whose root directory belongs to `owner`.
    pub fn create(
        storage: Arc<Storage>,
        id: ViewId,
        path: Vec<u8>,
        owner: Caller,
    ) -> FsResult<Self> {
        let now = clock::now();
        let attributes = Attributes {
            perm: 0o755,
            uid: owner.uid,
            gid: owner.gid,
            nlink: 2,
            rdev: 0,
            atime: now,
            mtime: now,
            ctime: now,
        };
        let body = Body::Directory(Box::new(Directory::new(Ino::ROOT)));
        let epoch = storage.epochs.current();
        let first = InodeRecord {
            kind: Kind::Dir,
            attributes: attributes.clone(),
            content: Content::None,
            origin: None,
            changed: epoch,
            fsynced: false,
        };
        let root = Node::new(Ino::ROOT, Kind::Dir, attributes, body, None, epoch);
        let record = ViewRecord {
            path,
            mounted: false,
            next_ino: Ino::ROOT.0 + 1,
        };
        let mut batch = storage.index.batch();
        batch
            .put_view(id, &record)
            .and_then(|()| batch.put_inode(id, Ino::ROOT, &first))
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))?;
        Ok(Self::with_nodes(
            storage,
            id,
            record,
            [root].into_iter().collect(),
        ))
    }

    /// Loads a view as it was, to be mounted afresh. What has no name, because it was unlinked
    /// while open under an earlier daemon, goes.
    pub fn load(storage: Arc<Storage>, id: ViewId, record: ViewRecord) -> FsResult<Self> {
        let Stored {
            nodes,
            orphans,
            names,
            lost,
            ..
        } = Stored::read(&storage, id)?;
        let mut batch = storage.index.batch();
        for (ino, stored) in orphans {
            batch.delete_inode(id, ino);
            if let Content::Private(scratch) = stored.content {
                storage.drop_scratch(scratch, stored.changed, stored.fsynced);
            }
        }
        // Numbers of requests mean something only on the connection they came from.
        batch.delete_exchanges(id);
        batch.commit().map_err(|e| index_failed(&e))?;
        let view = Self::with_names(storage, id, record, nodes, names)?;
        view.suspect(lost);
        view.drop_suspects();
        Ok(view)
    }

    /// Loads a view whose mount has outlived its daemon. The kernel may refer to every inode, also
    /// to those without a name, and how often nobody knows.
    pub fn take_over(storage: Arc<Storage>, id: ViewId, record: ViewRecord) -> FsResult<Self> {
        let Stored {
            mut nodes,
            orphans,
            names,
            mut origins,
            lost,
        } = Stored::read(&storage, id)?;
        let exchanges = storage.index.exchanges(id).map_err(|e| index_failed(&e))?;
        let mut forgotten = Vec::new();
        for (ino, stored) in orphans {
            if let Content::Private(scratch) = &stored.content
                && !storage.dir.scratch_file(*scratch).exists()
            {
                // Reaped, but its record not yet deleted.
                forgotten.push(ino);
                continue;
            }
            let node = load_node(&storage, ino, stored, &mut origins);
            node.state.lock().attributes.nlink = 0;
            nodes.insert(node);
        }
        for node in nodes.iter() {
            node.lookups.store(UNKNOWN, Ordering::Relaxed);
        }
        let view = Self::with_names(storage, id, record, nodes, names)?;
        *view.exchanges.lock() = exchanges;
        *view.forgotten.lock() = forgotten;
        view.distrust_private();
        view.suspect(lost);
        Ok(view)
    }

    /// Gives loaded nodes their names.
    fn with_names(
        storage: Arc<Storage>,
        id: ViewId,
        record: ViewRecord,
        nodes: Nodes,
        names: Vec<DentryRecord>,
    ) -> FsResult<Self> {
        for dentry in names {
            let Some(child) = nodes.get(dentry.ino).cloned() else {
                tracing::warn!(view = id.0, ?dentry, "name of an inode that is not there");
                continue;
            };
            if let Some(directory) = child.state.lock().directory_mut() {
                directory.parent = Some(dentry.parent);
            }
            let parent = nodes.get(dentry.parent);
            let named = parent.is_some_and(|parent| {
                let mut state = parent.state.lock();
                let directory = state.directory_mut();
                directory.is_some_and(|names| {
                    names.insert(&dentry.name, dentry.ino);
                    true
                })
            });
            if !named {
                tracing::warn!(view = id.0, ?dentry, "name in no directory");
            }
        }
        for node in nodes.iter() {
            if let Some(names) = node.state.lock().directory_mut() {
                names.pack();
            }
        }
        if !nodes.contains(Ino::ROOT) {
            tracing::error!(view = id.0, "view has no root directory");
            return Err(Errno::EIO);
        }
        Ok(Self::with_nodes(storage, id, record, nodes))
    }

    fn with_nodes(storage: Arc<Storage>, id: ViewId, record: ViewRecord, nodes: Nodes) -> Self {
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

    /// Notes whether the view is mounted. Which views come back is said by their managed targets.
    pub fn set_mounted(&self, mounted: bool) -> FsResult<()> {
        let mut record = self.record.lock();
        record.mounted = mounted;
        self.put_record(&record)
    }

    fn put_record(&self, record: &ViewRecord) -> FsResult<()> {
        let mut batch = self.storage.index.batch();
        batch
            .put_view(self.id, record)
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))
    }

    /// An inode number never used before.
    pub(super) fn allocate_ino(&self) -> FsResult<Ino> {
        let mut next = self.next_ino.lock();
        let mut record = self.record.lock();
        if *next == record.next_ino {
            record.next_ino += CLAIM;
            self.put_record(&record)?;
        }
        *next += 1;
        Ok(Ino(*next - 1))
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
        self.not_granted(node.ino);
        // Not a commit of its own: every unlink would cost two. Until the next save the record is
        // that of an inode without a name, which no load shows.
        self.forgotten.lock().push(node.ino);
        if let Body::Private { id, .. } = state.body {
            self.storage
                .retire_scratch(id, state.changed, state.fsynced);
        }
    }

    /// Deletes the records of inodes that were let go.
    fn delete_forgotten(&self) -> FsResult<()> {
        let forgotten = std::mem::take(&mut *self.forgotten.lock());
        if forgotten.is_empty() {
            return Ok(());
        }
        let mut batch = self.storage.index.batch();
        for ino in &forgotten {
            batch.delete_inode(self.id, *ino);
        }
        let deleted = batch.commit().map_err(|e| index_failed(&e));
        if deleted.is_err() {
            self.forgotten.lock().extend(forgotten);
        }
        deleted
    }

    /// Stores the current record of a node whose attributes changed. When that fails the node is
    /// among the dirty ones.
    pub(super) fn save(&self, node: &Arc<Node>, state: &mut State) -> FsResult<()> {
        let saved = self.store_record(node, state);
        match saved {
            Ok(()) => state.dirty = false,
            Err(_) => self.mark_dirty(node, state),
        }
        saved
    }

    pub(super) fn store_record(&self, node: &Node, state: &State) -> FsResult<()> {
        // Without a name it is stored all the same: whoever has it open outlives this daemon.
        if state.attributes.nlink == 0 && !self.nodes.read().contains(node.ino) {
            return Ok(());
        }
        if let Body::Private { id, .. } = &state.body {
            // Tells a later load that nothing was written since (see `load_node`).
            if let Err(error) = self.storage.stamp_scratch(*id, state.attributes.mtime) {
                tracing::warn!(?id, %error, "cannot stamp a private file");
            }
        }
        let record = self.record_of(node, state, &state.attributes)?;
        let mut batch = self.storage.index.batch();
        batch
            .put_inode(self.id, node.ino, &record)
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))
    }

    /// Notes that the stored record of a locked node is behind.
    pub(super) fn mark_dirty(&self, node: &Arc<Node>, state: &mut State) {
        if !state.dirty {
            state.dirty = true;
            self.dirty.lock().push(Arc::clone(node));
        }
    }

    /// Stores every record that is behind, and deletes those nobody needs: now and then, and before
    /// an unmount. Tries them all; those that fail stay behind, and the first error is returned.
    pub fn save_dirty(&self) -> FsResult<()> {
        let mut result = self.delete_forgotten();
        let nodes = std::mem::take(&mut *self.dirty.lock());
        for node in nodes {
            let mut state = node.state.lock();
            if std::mem::take(&mut state.dirty) {
                result = result.and(self.save(&node, &mut state));
            }
        }
        result
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

/// A view as the index has it.
struct Stored {
    /// Inodes that have a name, and the root.
    nodes: Nodes,
    /// Inodes that have none.
    orphans: Vec<(Ino, InodeRecord)>,
    names: Vec<DentryRecord>,
    origins: Origins,
    /// Those of the first whose bytes are not in the store any more.
    lost: Vec<Ino>,
}

impl Stored {
    fn read(storage: &Storage, id: ViewId) -> FsResult<Self> {
        let names = storage.index.dentries(id).map_err(|e| index_failed(&e))?;
        let named: HashSet<Ino> = names.iter().map(|name| name.ino).collect();
        let (mut nodes, mut orphans) = (Nodes::default(), Vec::new());
        let (mut origins, mut lost) = (Origins::default(), Vec::new());
        let read = storage.index.each_inode(id, |ino, stored| {
            if ino == Ino::ROOT || named.contains(&ino) {
                if !check::is_backed(storage, &stored) {
                    lost.push(ino);
                }
                nodes.insert(load_node(storage, ino, stored, &mut origins));
            } else {
                orphans.push((ino, stored));
            }
        });
        read.map_err(|e| index_failed(&e))?;
        Ok(Self {
            nodes,
            orphans,
            names,
            origins,
            lost,
        })
    }
}

/// The actions behind the outputs of a view: each is in memory once.
#[derive(Default)]
struct Origins(HashSet<Arc<ActionKey>>);

impl Origins {
    fn share(&mut self, action: ActionKey) -> Arc<ActionKey> {
        if let Some(known) = self.0.get(&action) {
            return Arc::clone(known);
        }
        let action = Arc::new(action);
        self.0.insert(Arc::clone(&action));
        action
    }
}

fn load_node(storage: &Storage, ino: Ino, stored: InodeRecord, origins: &mut Origins) -> Arc<Node> {
    let mut attributes = stored.attributes;
    let mut origin = stored.origin.map(|action| origins.share(action));
    let body = match (stored.kind, stored.content) {
        (Kind::Dir, _) => Body::Directory(Box::new(Directory::new(Ino::ROOT))),
        (_, Content::Link(target)) => Body::Link(target),
        (_, Content::Inline(bytes)) => stored_body(bytes),
        (_, Content::Blob { digest, size }) => Body::Blob { digest, size },
        (_, Content::Private(id)) => {
            let found = backing(storage, id);
            // The file carries the record's time since that was stored; another time means that
            // it was written later, by a daemon that died before the close.
            if found
                .written
                .is_some_and(|written| written != attributes.mtime)
            {
                attributes.mtime = found.written.unwrap_or(attributes.mtime);
                attributes.ctime = attributes.ctime.max(attributes.mtime);
                origin = None;
            }
            found.body
        }
        (Kind::File, Content::None) => Body::Inline(Vec::new()),
        (_, Content::None) => Body::Special,
    };
    let node = Node::new(ino, stored.kind, attributes, body, origin, stored.changed);
    node.state.lock().fsynced = stored.fsynced;
    node
}

struct Backing {
    body: Body,
    /// When it was last written; `None` when it is not there.
    written: Option<Timestamp>,
}

fn backing(storage: &Storage, id: ScratchId) -> Backing {
    let path = storage.dir.scratch_file(id);
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(error) => {
            tracing::error!(?id, %error, "private file has no backing");
            return Backing {
                body: Body::Private {
                    id,
                    size: 0,
                    sparse: false,
                    passthrough: false,
                },
                written: None,
            };
        }
    };
    let written = Some(passthrough::mtime(&meta));
    let private = Body::Private {
        id,
        size: meta.len(),
        sparse: is_sparse(&meta),
        passthrough: false,
    };
    if meta.mode() & 0o222 != 0 {
        return Backing {
            body: private,
            written,
        };
    }
    // Sealed: it may be a blob already, by a daemon that died before it said so. It must never be
    // written again.
    let sealed = fs::File::open(&path)
        .map_err(store::CasError::from_io(&path))
        .and_then(|file| {
            let (digest, size) = store::digest::hash_reader(&file, |_| ())
                .map_err(store::CasError::from_io(&path))?;
            storage.cas.adopt(&path, &file, digest, size)
        });
    match sealed {
        Ok(blob) => Backing {
            body: Body::Blob {
                digest: blob.digest,
                size: blob.size,
            },
            written,
        },
        Err(error) => {
            tracing::error!(?id, %error, "cannot take a sealed file into the store");
            Backing {
                body: private,
                written,
            }
        }
    }
}
