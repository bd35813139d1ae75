//! Snapshots: a view as a tree, and a view made of one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::scan::RootNeedles;
use store::{ActionKey, Digest, Ino, Kind, Tree, TreeBody, TreeInode};

use super::node::{Body, Node};
use super::trees::{Grown, GrownBody};
use super::view::{Caller, View};
use super::{Errno, FsResult, INLINE_MAX};
use crate::clock;

/// How long a file may go on being written while the snapshot waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

impl View {
    /// Everything in the view as it is now. EBUSY while a file is being written.
    ///
    /// Names are taken in one walk, bytes behind it: what changes meanwhile is in it as it was before
    /// or after. Private files become blobs on the way. What is neither file, directory nor link stays
    /// out.
    pub fn snapshot(&self) -> FsResult<Tree> {
        let found = self.walk(Ino::ROOT, usize::MAX)?;
        self.settle_walked(&found, Instant::now() + PATIENCE)?;
        let mut tree = Tree {
            created_ms: clock::now_ms(),
            ..Tree::default()
        };
        let mut known: HashMap<Ino, u32> = HashMap::new();
        for found in found {
            let index = if let Some(index) = known.get(&found.node.ino) {
                *index
            } else {
                let Some(inode) = self.inode_of(&found.node)? else {
                    continue;
                };
                let index = u32::try_from(tree.inodes.len()).map_err(|_| Errno::EFBIG)?;
                tree.inodes.push(inode);
                known.insert(found.node.ino, index);
                index
            };
            tree.names.push((found.path, index));
        }
        Ok(tree)
    }

    /// The blobs of its files, with their sizes in bytes, as far as they are blobs.
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        let blob = |node: Arc<Node>| match node.state.lock().body {
            Body::Blob { digest, size } => Some((digest, size)),
            _ => None,
        };
        self.all_nodes().into_iter().filter_map(blob).collect()
    }

    /// The actions whose outputs it shows.
    pub fn origins(&self) -> HashSet<ActionKey> {
        let origin = |node: Arc<Node>| node.state.lock().origin.as_deref().copied();
        self.all_nodes().into_iter().filter_map(origin).collect()
    }

    fn inode_of(&self, node: &Arc<Node>) -> FsResult<Option<TreeInode>> {
        let body = match node.kind {
            Kind::Dir => TreeBody::Directory,
            Kind::Symlink => match &node.state.lock().body {
                Body::Link(target) => TreeBody::Link(target.clone()),
                _ => return Err(Errno::EIO),
            },
            Kind::File => self.bytes_of(node)?,
            _ => return Ok(None),
        };
        let state = node.state.lock();
        Ok(Some(TreeInode {
            perm: state.attributes.perm,
            mtime: state.attributes.mtime,
            body,
            origin: state.origin.as_deref().copied(),
        }))
    }

    fn bytes_of(&self, node: &Arc<Node>) -> FsResult<TreeBody> {
        {
            let mut state = node.state.lock();
            self.fetch(node, &mut state)?;
            match &state.body {
                Body::Inline(bytes) => return Ok(TreeBody::Inline(bytes.clone())),
                Body::Blob { digest, size } => {
                    return Ok(TreeBody::Blob {
                        digest: *digest,
                        size: *size,
                    });
                }
                _ => {}
            }
        }
        let taken = self.ingest(node, &RootNeedles::new(&[]))?;
        Ok(TreeBody::Blob {
            digest: taken.digest,
            size: taken.size,
        })
    }

    /// Makes an empty view what a sound tree says.
    pub fn fill(&self, tree: Tree, caller: Caller) -> FsResult<()> {
        let mut first: HashMap<u32, usize> = HashMap::new();
        let mut grown = Vec::with_capacity(tree.names.len());
        let mut origins: HashMap<ActionKey, Arc<ActionKey>> = HashMap::new();
        for (path, index) in tree.names {
            let at = usize::try_from(index).map_err(|_| Errno::EINVAL)?;
            let inode = tree.inodes.get(at).ok_or(Errno::EINVAL)?;
            let body = match (&inode.body, first.get(&index)) {
                (_, Some(first)) => GrownBody::Same(*first),
                (TreeBody::Directory, _) => GrownBody::Directory,
                (TreeBody::Link(target), _) => GrownBody::Leaf(Body::Link(target.clone())),
                (TreeBody::Inline(bytes), _) if bytes.len() <= INLINE_MAX => {
                    GrownBody::Leaf(Body::Inline(bytes.clone()))
                }
                (TreeBody::Inline(_), _) => return Err(Errno::EINVAL),
                (TreeBody::Blob { digest, size }, _) => GrownBody::Leaf(Body::Blob {
                    digest: *digest,
                    size: *size,
                }),
            };
            first.entry(index).or_insert(grown.len());
            let origin = inode.origin.map(|origin| {
                let shared = origins.entry(origin).or_insert_with(|| Arc::new(origin));
                Arc::clone(shared)
            });
            grown.push(Grown {
                path,
                perm: inode.perm & 0o7777,
                mtime: Some(inode.mtime),
                origin,
                body,
            });
        }
        self.grow(Ino::ROOT, grown, caller, |_| {})
    }
}
