//! One inode in memory: attributes, content pointer, and who has it open.
//!
//! There is one for every name of every mounted view, so it holds what all of them need and nothing
//! else: what few need is boxed, what many share is shared, and the bytes of a small file that
//! nobody has changed for a while are left to the index.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use store::{ActionKey, Attributes, Content, Digest, Epoch, Ino, Kind, ScratchId, Timestamp};

use super::directory::Directory;
use super::durability::Held;

/// Where the bytes or names of an inode are.
#[derive(Debug)]
pub enum Body {
    /// Names.
    Directory(Box<Directory>),
    /// The target of a symbolic link.
    Link(Vec<u8>),
    /// A small file.
    Inline(Vec<u8>),
    /// A small file whose bytes only its stored record holds.
    Stored {
        /// Its length.
        size: u64,
    },
    /// An immutable blob. Never written: a write copies up first.
    Blob {
        /// Its name.
        digest: Digest,
        /// Its length.
        size: u64,
    },
    /// A private backing file.
    Private {
        /// Which.
        id: ScratchId,
        /// Its length, followed through every write.
        size: u64,
        /// Whether it may have holes, so that only the disk knows how many blocks it takes.
        sparse: bool,
        /// Whether the kernel may write to the file without asking: then length and times are
        /// the file's own (see `fs::passthrough`).
        passthrough: bool,
    },
    /// FIFOs, sockets, devices.
    Special,
}

/// Tells one state of a backing file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// Last change of the bytes.
    pub mtime: Timestamp,
}

/// Everything that changes about an inode.
#[derive(Debug)]
pub struct State {
    /// What `stat` shows.
    pub attributes: Attributes,
    /// Bytes or names.
    pub body: Body,
    /// The action whose output the content is, shared by all its outputs.
    pub origin: Option<Arc<ActionKey>>,
    /// Users inside the daemon that need the content whatever becomes of the names.
    pub pins: u32,
    /// Grows with every change of the bytes.
    pub generation: u64,
    /// What only private files have.
    pub private: Option<Box<PrivateState>>,
    /// Whether the stored record is behind and the view knows.
    pub dirty: bool,
    /// Whether somebody has ever synced the file.
    pub fsynced: bool,
    /// The epoch the bytes last changed in.
    pub changed: Epoch,
}

/// What is known of a private file until its bytes change.
#[derive(Debug, Default)]
pub struct PrivateState {
    /// Digest of the bytes at some generation.
    pub digest: Option<(u64, Digest)>,
    /// What a passthrough file was when its bytes were first read through the daemon.
    pub first_read: Option<Stamp>,
    /// The backing whose name is known to be on the disk.
    pub named: Option<Held>,
}

/// One inode.
#[derive(Debug)]
pub struct Node {
    /// Its number.
    pub ino: Ino,
    /// Its kind, which never changes.
    pub kind: Kind,
    /// All the rest.
    pub state: Mutex<State>,
    /// References the kernel holds to the node id. An open file holds one. [`UNKNOWN`] and more:
    /// an earlier daemon gave out some, how many went with it.
    pub lookups: AtomicU64,
}

/// Added to the references of a node taken over from an earlier daemon.
pub const UNKNOWN: u64 = 1 << 62;

impl Node {
    /// A node nobody refers to, whose bytes last changed in `changed`.
    pub fn new(
        ino: Ino,
        kind: Kind,
        attributes: Attributes,
        body: Body,
        origin: Option<Arc<ActionKey>>,
        changed: Epoch,
    ) -> Arc<Self> {
        let state = State {
            attributes,
            body,
            origin,
            pins: 0,
            generation: 0,
            private: None,
            dirty: false,
            changed,
            fsynced: false,
        };
        Arc::new(Self {
            ino,
            kind,
            state: Mutex::new(state),
            lookups: AtomicU64::new(0),
        })
    }
}

/// Nodes by their numbers. Each knows its own, so nothing is kept beside it.
#[derive(Debug, Default)]
pub struct Nodes(HashSet<Numbered>);

#[derive(Debug)]
struct Numbered(Arc<Node>);

impl Hash for Numbered {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.0.ino.hash(hasher);
    }
}

impl PartialEq for Numbered {
    fn eq(&self, other: &Self) -> bool {
        self.0.ino == other.0.ino
    }
}

impl Eq for Numbered {}

impl Borrow<Ino> for Numbered {
    fn borrow(&self) -> &Ino {
        &self.0.ino
    }
}

impl FromIterator<Arc<Node>> for Nodes {
    fn from_iter<I: IntoIterator<Item = Arc<Node>>>(nodes: I) -> Self {
        Self(nodes.into_iter().map(Numbered).collect())
    }
}

impl Nodes {
    /// The node of a number.
    pub fn get(&self, ino: Ino) -> Option<&Arc<Node>> {
        self.0.get(&ino).map(|numbered| &numbered.0)
    }

    /// Whether there is a node of that number.
    pub fn contains(&self, ino: Ino) -> bool {
        self.0.contains(&ino)
    }

    /// Adds a node, whose number no other has.
    pub fn insert(&mut self, node: Arc<Node>) {
        self.0.insert(Numbered(node));
    }

    /// Takes a node out; whether it was there.
    pub fn remove(&mut self, ino: Ino) -> bool {
        self.0.remove(&ino)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.0.iter().map(|numbered| &numbered.0)
    }
}

impl State {
    /// Length in bytes as `stat` shows it.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::Directory(_) => 4096,
            Body::Link(target) => target.len() as u64,
            Body::Inline(bytes) => bytes.len() as u64,
            Body::Stored { size } | Body::Blob { size, .. } | Body::Private { size, .. } => *size,
            Body::Special => 0,
        }
    }

    /// Where the bytes are, as it is stored. `None` when the stored record alone has them.
    pub fn content(&self) -> Option<Content> {
        Some(match &self.body {
            Body::Stored { .. } => return None,
            Body::Directory(_) | Body::Special => Content::None,
            Body::Link(target) => Content::Link(target.clone()),
            Body::Inline(bytes) => Content::Inline(bytes.clone()),
            Body::Blob { digest, size } => Content::Blob {
                digest: *digest,
                size: *size,
            },
            Body::Private { id, .. } => Content::Private(*id),
        })
    }

    /// The digest of a private file, if it is known.
    pub fn digest(&self) -> Option<Digest> {
        let (generation, digest) = self.private.as_ref()?.digest?;
        (generation == self.generation).then_some(digest)
    }

    /// The backing whose name is known to be on the disk.
    pub fn named(&self) -> Option<Held> {
        self.private.as_ref()?.named
    }

    /// What is known of a private file.
    pub fn private_mut(&mut self) -> &mut PrivateState {
        self.private.get_or_insert_default()
    }

    /// Notes that the bytes change now.
    pub fn touch_content(&mut self, now: Timestamp) {
        self.generation += 1;
        self.forget_digest();
        self.origin = None;
        self.attributes.mtime = now;
        self.attributes.ctime = now;
    }

    /// The bytes are about to be others.
    pub fn forget_digest(&mut self) {
        if let Some(private) = &mut self.private {
            private.digest = None;
        }
    }

    /// The names, when this is a directory.
    pub fn directory(&self) -> Option<&Directory> {
        match &self.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// The names, when this is a directory.
    pub fn directory_mut(&mut self) -> Option<&mut Directory> {
        match &mut self.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_small() {
        // With the two counters beside it and the allocator's word: 208 bytes.
        assert!(size_of::<Node>() <= 176, "{}", size_of::<Node>());
    }
}
