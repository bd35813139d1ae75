//! Trees: snapshots of views, as they are published.
//!
//! A tree names blobs and holds everything else itself, small files included: whoever has it can show
//! all of it, and needs a blob only when somebody reads it. It comes from elsewhere, so it is checked
//! ([`Tree::is_sound`]) before a view is made of it.

use serde::{Deserialize, Serialize};

use crate::action::{ActionEntry, ActionKey};
use crate::codec::Record;
use crate::digest::Digest;
use crate::shared::{Place, is_name};
use crate::view::Timestamp;

/// A snapshot of a view.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Tree {
    /// What the names name.
    pub inodes: Vec<TreeInode>,
    /// Paths below the root, a directory before what it holds, and which inode they name.
    pub names: Vec<(Vec<u8>, u32)>,
    /// The actions that made files of it, as far as they are known.
    pub actions: Vec<(ActionKey, ActionEntry)>,
    /// The blobs that are no objects of their own in the remote.
    pub packed: Vec<(Digest, Place)>,
    /// Milliseconds since the epoch when it was made.
    pub created_ms: u64,
}

/// One inode of a tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TreeInode {
    /// Permission bits.
    pub perm: u16,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// What it is.
    pub body: TreeBody,
    /// The action that made it.
    pub origin: Option<ActionKey>,
}

/// What an inode of a tree is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum TreeBody {
    /// A directory.
    Directory,
    /// A symbolic link.
    Link(Vec<u8>),
    /// A small file.
    Inline(Vec<u8>),
    /// A file.
    Blob {
        /// Name of the blob.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
}

impl Record for Tree {
    const NAME: &'static str = "tree";
    const VERSION: u8 = 1;
}

impl Tree {
    /// The blobs it names, with their sizes in bytes.
    pub fn blobs(&self) -> impl Iterator<Item = (Digest, u64)> {
        self.inodes.iter().filter_map(|inode| match inode.body {
            TreeBody::Blob { digest, size } => Some((digest, size)),
            _ => None,
        })
    }

    /// Whether it is a tree: each name is one of a directory that came before, leads nowhere else, and
    /// stands for an inode that is there; a directory has one name.
    pub fn is_sound(&self) -> bool {
        let mut directories = std::collections::HashSet::new();
        let mut named = vec![0_u32; self.inodes.len()];
        for (path, inode) in &self.names {
            let at = usize::try_from(*inode).unwrap_or(usize::MAX);
            let (Some(inode), Some(names)) = (self.inodes.get(at), named.get_mut(at)) else {
                return false;
            };
            *names += 1;
            let (holder, name) = match path.iter().rposition(|byte| *byte == b'/') {
                Some(at) => (Some(&path[..at]), &path[at + 1..]),
                None => (None, &path[..]),
            };
            if !is_name(name) || holder.is_some_and(|holder| !directories.contains(holder)) {
                return false;
            }
            if inode.body == TreeBody::Directory {
                if *names > 1 {
                    return false;
                }
                directories.insert(path.as_slice());
            }
        }
        let mut paths: Vec<_> = self.names.iter().map(|(path, _)| path).collect();
        paths.sort_unstable();
        let distinct = paths.windows(2).all(|pair| pair[0] != pair[1]);
        let stays = self.actions.iter().all(|(_, entry)| entry.stays_inside());
        distinct && stays && named.iter().all(|names| *names > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    fn tree(names: &[(&str, u32)]) -> Tree {
        let inode = |body| TreeInode {
            perm: 0o644,
            mtime: Timestamp::default(),
            body,
            origin: None,
        };
        Tree {
            inodes: vec![
                inode(TreeBody::Directory),
                inode(TreeBody::Inline(b"x".to_vec())),
            ],
            names: names
                .iter()
                .map(|(path, inode)| (path.as_bytes().to_vec(), *inode))
                .collect(),
            ..Tree::default()
        }
    }

    #[test]
    fn a_tree_is_one() {
        assert!(tree(&[("d", 0), ("d/f", 1), ("g", 1)]).is_sound());
        assert!(Tree::default().is_sound());
    }

    #[test]
    fn what_is_none_is_seen() {
        for names in [
            &[("d", 0), ("f", 2)][..],
            &[("d", 0)],
            &[("d/f", 1), ("d", 0)],
            &[("d", 0), ("e", 0), ("f", 1)],
            &[("d", 0), ("d/../f", 1)],
            &[("d", 0), ("..", 1)],
            &[("d", 0), ("/f", 1)],
            &[("d", 0), ("f", 1), ("f/g", 1)],
            &[("d", 0), ("f", 1), ("f", 1)],
            &[("d", 0), ("d//f", 1)],
            &[("d", 0), ("", 1)],
        ] {
            assert!(!tree(names).is_sound(), "{names:?}");
        }
    }

    #[test]
    fn the_layout_of_trees_is_fixed() {
        let mut known = tree(&[("d", 0), ("d/f", 1)]);
        known.created_ms = 5;
        known.inodes[1].body = TreeBody::Blob {
            digest: Digest::of(b"x"),
            size: 1,
        };
        let bytes = encode(&known).expect("encodes");
        let mut golden = vec![1, 2, 0xa4, 3, 0, 0, 0, 0, 0xa4, 3, 0, 0, 3];
        golden.extend_from_slice(Digest::of(b"x").as_bytes());
        golden.extend_from_slice(&[1, 0, 2, 1, b'd', 0, 3, b'd', b'/', b'f', 1, 0, 0, 5]);
        assert_eq!(bytes, golden, "a changed layout needs a new Tree::VERSION");
        assert_eq!(decode::<Tree>(&bytes).expect("decodes"), known);
    }
}
