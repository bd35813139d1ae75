//! Small files whose bytes only the index has.
//!
//! Half of the files of a target are small, and their bytes would be most of what the daemon keeps
//! in memory, while hardly anybody asks for them twice: the kernel remembers what it read. So after
//! a load, and some time after a change, a node knows no more than the length, and whoever needs
//! the bytes takes them from the stored record. Never for a node whose record is behind.

use std::sync::atomic::Ordering;

use store::{Attributes, Content, InodeRecord};

use super::node::{Body, Node, State};
use super::{Errno, FsResult, View, index_failed};

/// Up to this length bytes cost no more in memory than a note of where they are.
const KEPT: usize = 24;

/// What stands for the bytes of a small file that are in its stored record.
pub(super) fn stored_body(bytes: Vec<u8>) -> Body {
    if bytes.len() <= KEPT {
        Body::Inline(bytes)
    } else {
        Body::Stored {
            size: bytes.len() as u64,
        }
    }
}

/// More than this is left to the index before it is time.
const MANY: usize = 4 << 20;

impl View {
    /// Notes that bytes of a small file have come into memory.
    pub(super) fn note_small(&self, length: usize) {
        self.small.fetch_add(length, Ordering::Relaxed);
    }

    /// Whether so many have that they should be left to the index soon.
    pub fn has_many_small(&self) -> bool {
        self.small.load(Ordering::Relaxed) > MANY
    }

    /// The bytes a node left to its stored record.
    pub(super) fn stored_bytes(&self, node: &Node) -> FsResult<Vec<u8>> {
        if !self.nodes.read().contains(node.ino) {
            // Let go meanwhile, and its record with it.
            return Err(Errno::ENOENT);
        }
        let record = self.storage.index.inode(self.id, node.ino);
        match record.map_err(|error| index_failed(&error))? {
            Some(InodeRecord {
                content: Content::Inline(bytes),
                ..
            }) => Ok(bytes),
            other => {
                tracing::error!(view = self.id.0, ino = ?node.ino, ?other, "small file has no bytes");
                Err(Errno::EIO)
            }
        }
    }

    /// Takes the bytes of a locked node back into memory, to be changed.
    pub(super) fn fetch(&self, node: &Node, state: &mut State) -> FsResult<()> {
        if matches!(state.body, Body::Stored { .. }) {
            let bytes = self.stored_bytes(node)?;
            self.note_small(bytes.len());
            state.body = Body::Inline(bytes);
        }
        Ok(())
    }

    /// The stored form of a locked node, with `attributes` in place of its own.
    pub(super) fn record_of(
        &self,
        node: &Node,
        state: &State,
        attributes: &Attributes,
    ) -> FsResult<InodeRecord> {
        let content = match state.content() {
            Some(content) => content,
            None => Content::Inline(self.stored_bytes(node)?),
        };
        Ok(InodeRecord {
            kind: node.kind,
            attributes: attributes.clone(),
            content,
            origin: state.origin.as_deref().copied(),
            changed: state.changed,
            fsynced: state.fsynced,
        })
    }

    /// Makes what is left of an emptied view independent of its records, which go when the view is
    /// loaded again.
    pub(super) fn outlive_records(&self) {
        for node in self.all_nodes() {
            let mut state = node.state.lock();
            if let Body::Private { id, .. } = state.body {
                self.storage.hold_scratch(id);
            } else if let Err(error) = self.fetch(&node, &mut state) {
                tracing::warn!(view = self.id.0, ino = ?node.ino, %error, "small file lost");
            }
        }
    }

    /// Leaves the bytes of small files to their stored records: now and then. Not of files without a
    /// name, for their records may go before they do.
    pub fn leave_small(&self) {
        self.small.store(0, Ordering::Relaxed);
        for node in self.all_nodes() {
            let mut state = node.state.lock();
            if state.dirty || state.attributes.nlink == 0 {
                continue;
            }
            if let Body::Inline(bytes) = &mut state.body {
                let bytes = std::mem::take(bytes);
                state.body = stored_body(bytes);
            }
        }
    }
}
