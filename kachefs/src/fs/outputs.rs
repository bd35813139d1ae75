//! What the action service asks of a view: digests of files, ingest of outputs, bind of a hit.
//!
//! Bind is the product's promise: outputs appear as pointers to blobs, all in one commit, without
//! a byte read or written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use store::scan::RootNeedles;
use store::{ActionKey, Attributes, Batch, Digest, Ino, Kind, RootSet};

use super::durability::Held;
use super::node::{Body, Node, State};
use super::view::{Caller, View};
use super::{Errno, FsResult, errno, index_failed};
use crate::clock;

/// How long a file that is an input may go on being written past the daemon.
const PATIENCE: Duration = Duration::from_secs(5);

/// An output on its way into a directory.
pub struct Bound {
    /// File name.
    pub name: Vec<u8>,
    /// Permission bits.
    pub perm: u16,
    /// `Blob`, `Inline` or `Private`.
    pub body: Body,
}

/// What ingest found out about a file.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Name of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Roots whose literal path is in the bytes.
    pub roots: RootSet,
    /// Whether the store had not held the blob before.
    pub new: bool,
    /// The state of the file this is true of.
    pub generation: u64,
}

impl View {
    /// The digest of a regular file's content, computed once per change.
    pub fn content_digest(&self, node: &Node) -> FsResult<Digest> {
        if node.kind != Kind::File {
            return Err(Errno::EINVAL);
        }
        loop {
            let (generation, file) = {
                let state = node.state.lock();
                match &state.body {
                    Body::Blob { digest, .. } => return Ok(*digest),
                    Body::Inline(bytes) => return Ok(Digest::of(bytes)),
                    Body::Stored { .. } => return Ok(Digest::of(&self.stored_bytes(node)?)),
                    _ => {}
                }
                if let Some(digest) = state.digest() {
                    return Ok(digest);
                }
                let (id, passthrough) = match &state.body {
                    Body::Private {
                        id, passthrough, ..
                    } => (id, *passthrough),
                    _ => return Err(Errno::EINVAL),
                };
                if passthrough {
                    let id = *id;
                    drop(state);
                    return self.passthrough_digest(id, Instant::now() + PATIENCE);
                }
                // A handle of its own: the shared one has no use for a moving offset.
                let file = self.storage.open_scratch(*id).map_err(|e| errno(&e))?;
                (state.generation, file)
            };
            let (digest, _) = store::digest::hash_reader(file, |_| ()).map_err(|e| errno(&e))?;
            let mut state = node.state.lock();
            if state.generation == generation {
                state.private_mut().digest = Some((generation, digest));
                return Ok(digest);
            }
        }
    }

    /// Moves a finished private file into the CAS and makes the inode point at the blob; any
    /// other content is stored as a blob beside. Searches the bytes for roots on the way. A file
    /// written to meanwhile is EBUSY.
    pub fn ingest(&self, node: &Arc<Node>, needles: &RootNeedles) -> FsResult<Taken> {
        let failed = |error: store::CasError| {
            tracing::warn!(%error, "ingest");
            error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
        };
        // Counts as one: a blob is new since the last sync point.
        let change = self.storage.epochs.change();
        let mut scanner = needles.scanner();
        let (generation, id) = {
            let mut state = node.state.lock();
            self.fetch(node, &mut state)?;
            match &state.body {
                Body::Private {
                    passthrough: true, ..
                } => return Err(Errno::EBUSY),
                Body::Private { id, .. } => (state.generation, *id),
                Body::Inline(bytes) => {
                    scanner.feed(bytes);
                    let stored = self.storage.cas.ingest_bytes(bytes).map_err(failed)?;
                    return Ok(Taken::of(stored, scanner.finish(), state.generation));
                }
                Body::Blob { digest, size } => {
                    let (digest, size, generation) = (*digest, *size, state.generation);
                    drop(state);
                    // Nothing is changed from here on, and it may take its time.
                    drop(change);
                    self.fault(node.ino)?;
                    let blob = self.storage.cas.open(&digest).map_err(failed)?;
                    let read = store::digest::hash_reader(blob, |chunk| scanner.feed(chunk));
                    if read.map_err(|e| errno(&e))? != (digest, size) {
                        self.doubt_blob(node, &digest);
                        return Err(Errno::EIO);
                    }
                    let stored = store::Ingested {
                        digest,
                        size,
                        new: false,
                    };
                    return Ok(Taken::of(stored, scanner.finish(), generation));
                }
                _ => return Err(Errno::EINVAL),
            }
        };
        let file = self.storage.open_scratch(id).map_err(|e| errno(&e))?;
        let (digest, size) = store::digest::hash_reader(&file, |chunk| scanner.feed(chunk))
            .map_err(|e| errno(&e))?;

        let mut state = node.state.lock();
        if state.generation != generation {
            return Err(Errno::EBUSY);
        }
        // A writable descriptor must not outlive the private file.
        self.storage.close_scratch(id);
        let path = self.storage.dir.scratch_file(id);
        let stored = self
            .storage
            .cas
            .adopt(&path, &file, digest, size)
            .map_err(failed)?;
        state.body = Body::Blob { digest, size };
        state.private = None;
        // When this fails, the private file is sealed and must not be written again: the inode stays
        // a blob, and the stored record is put right by the next save or when the view is loaded.
        if state.fsynced {
            self.sync_name(Held::Blob(digest))?;
        }
        self.save(node, &mut state)?;
        self.storage
            .retire_scratch(id, state.changed, state.fsynced);
        Ok(Taken::of(stored, scanner.finish(), generation))
    }

    /// Commits `batch` together with the fact that these inodes are what `action` made, those that
    /// still hold what they held when they were ingested.
    pub fn commit_origin(
        &self,
        mut batch: Batch<'_>,
        outputs: &[(Arc<Node>, u64)],
        action: ActionKey,
    ) -> FsResult<()> {
        let _structure = self.structure.lock();
        // Locked until the commit is done, or a link made meanwhile would be overwritten.
        let action = Arc::new(action);
        let mut locked: BTreeMap<Ino, (&Node, MutexGuard<'_, State>)> = BTreeMap::new();
        for (node, generation) in outputs {
            if locked.contains_key(&node.ino) {
                continue;
            }
            let mut state = node.state.lock();
            if state.generation == *generation {
                state.origin = Some(Arc::clone(&action));
                self.put(&mut batch, node, &state, &state.attributes)?;
                locked.insert(node.ino, (node, state));
            }
        }
        batch.commit().map_err(|e| index_failed(&e))
    }

    /// Puts all outputs of a hit into a directory: all of them or none. Existing names are
    /// replaced as rename would. `origin` is the action whose outputs they are; `also` adds what must be
    /// stored in the same commit.
    pub fn bind(
        &self,
        directory: Ino,
        outputs: Vec<Bound>,
        origin: Option<ActionKey>,
        caller: Caller,
        also: impl FnOnce(&mut Batch<'_>),
    ) -> FsResult<()> {
        let names: Vec<Vec<u8>> = outputs.iter().map(|output| output.name.clone()).collect();
        self.wait_for_the_clock();
        let replaced = self.bind_names(directory, outputs, origin, caller, also)?;
        self.renamed(directory, names.iter().map(Vec::as_slice));
        if let Some(invalidate) = self.invalidate.get() {
            for node in &replaced {
                invalidate.attributes(node.ino);
            }
        }
        for node in replaced {
            self.reap(&node);
        }
        Ok(())
    }

    fn bind_names(
        &self,
        directory: Ino,
        outputs: Vec<Bound>,
        origin: Option<ActionKey>,
        caller: Caller,
        also: impl FnOnce(&mut Batch<'_>),
    ) -> FsResult<Vec<Arc<Node>>> {
        let _structure = self.structure.lock();
        let parent = self.node(directory)?;
        let mut parent_state = parent.state.lock();
        if parent_state.attributes.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        let names = parent_state.directory().ok_or(Errno::ENOTDIR)?;
        // Two replaced names may be links of one inode: each takes one away.
        let mut replaced: BTreeMap<Ino, (Arc<Node>, u32)> = BTreeMap::new();
        for output in &outputs {
            if let Some(ino) = names.get(&output.name) {
                let node = self.node(ino)?;
                if node.kind == Kind::Dir {
                    return Err(Errno::EISDIR);
                }
                replaced.entry(ino).or_insert((node, 0)).1 += 1;
            }
        }
        let change = self.storage.epochs.change();
        let now = clock::now();
        let mut parent_attributes = parent_state.attributes.clone();
        parent_attributes.mtime = now;
        parent_attributes.ctime = now;
        let mut batch = self.storage.index.batch();
        let origin = origin.map(Arc::new);
        let mut made = Vec::with_capacity(outputs.len());
        for output in outputs {
            let attributes = Attributes {
                perm: output.perm,
                uid: caller.uid,
                gid: caller.gid,
                nlink: 1,
                rdev: 0,
                atime: now,
                mtime: now,
                ctime: now,
            };
            let ino = self.allocate_ino()?;
            let body = output.body;
            let node = Node::new(
                ino,
                Kind::File,
                attributes,
                body,
                origin.clone(),
                change.epoch,
            );
            {
                let state = node.state.lock();
                self.stamp(&state);
                self.put(&mut batch, &node, &state, &state.attributes)?;
            }
            batch.put_dentry(self.id, directory, &output.name, ino);
            made.push((output.name, node));
        }
        let mut states = Vec::with_capacity(replaced.len());
        for (node, names) in replaced.values() {
            let state = node.state.lock();
            let mut attributes = state.attributes.clone();
            attributes.nlink = attributes.nlink.saturating_sub(*names);
            attributes.ctime = now;
            self.put(&mut batch, node, &state, &attributes)?;
            states.push((state, attributes));
        }
        self.put(&mut batch, &parent, &parent_state, &parent_attributes)?;
        also(&mut batch);
        batch.commit().map_err(|e| index_failed(&e))?;

        parent_state.attributes = parent_attributes;
        for (mut state, attributes) in states {
            state.attributes = attributes;
        }
        let mut nodes = self.nodes.write();
        for (name, node) in made {
            if let Some(directory) = parent_state.directory_mut() {
                directory.insert(&name, node.ino);
            }
            nodes.insert(node);
        }
        Ok(replaced.into_values().map(|(node, _)| node).collect())
    }
}

impl Taken {
    fn of(stored: store::Ingested, roots: RootSet, generation: u64) -> Self {
        Self {
            digest: stored.digest,
            size: stored.size,
            roots,
            new: stored.new,
            generation,
        }
    }
}
