//! Views from the index: made, loaded for a fresh mount, or taken over with a mount that has outlived
//! its daemon.
//!
//! What a death left half done is completed here: times and lengths of files written since their
//! record, sealed files that are not blobs yet, inodes without names.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use store::{
    ActionKey, Attributes, Content, DentryRecord, Ino, InodeRecord, Kind, ScratchId, Timestamp,
    ViewId, ViewRecord,
};

use super::directory::Directory;
use super::node::{Body, Node, Nodes, UNKNOWN};
use super::passthrough;
use super::small::stored_body;
use super::view::{Caller, View, is_sparse};
use super::{Errno, FsResult, check, index_failed};
use crate::clock;
use crate::storage::Storage;

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
