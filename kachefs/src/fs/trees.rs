//! Whole directories: put into place, emptied, walked.
//!
//! What a build script left in its `OUT_DIR` comes back as one subtree: all of it or nothing, in
//! one commit, without a byte read or written. The action service calls this.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use store::{ActionKey, Attributes, Batch, Ino, Kind, Timestamp};

use super::directory::Directory;
use super::names::RenameMode;
use super::node::{Body, Node};
use super::outputs::Bound;
use super::view::{Caller, View};
use super::{Errno, FsResult, index_failed};
use crate::clock;

/// One name of a subtree about to be put into place.
pub struct Grown {
    /// The path below the subtree's root. What holds it comes before.
    pub path: Vec<u8>,
    /// Permission bits.
    pub perm: u16,
    /// Last change of its content; `None` for now.
    pub mtime: Option<Timestamp>,
    /// The action that made it, if it is a file.
    pub origin: Option<Arc<ActionKey>>,
    /// What it is.
    pub body: GrownBody,
}

/// What a name of a subtree is.
pub enum GrownBody {
    /// A directory.
    Directory,
    /// A file or a symbolic link.
    Leaf(Body),
    /// The file that the name at this place in the list has.
    Same(usize),
}

/// A name found in a walk.
pub struct Walked {
    /// The path below the directory the walk began at.
    pub path: Vec<u8>,
    /// What it names.
    pub node: Arc<Node>,
}

impl View {
    /// Everything below a directory, what holds something before what it holds. More than `limit`
    /// names are EFBIG.
    pub fn walk(&self, directory: Ino, limit: usize) -> FsResult<Vec<Walked>> {
        let mut found = Vec::new();
        let mut pending = vec![(directory, Vec::new())];
        while let Some((directory, path)) = pending.pop() {
            for row in self.list(directory, 0, usize::MAX)? {
                if found.len() == limit {
                    return Err(Errno::EFBIG);
                }
                let node = self.node(row.ino)?;
                let path = joined(&path, &row.name);
                if node.kind == Kind::Dir {
                    pending.push((row.ino, path.clone()));
                }
                found.push(Walked { path, node });
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Removes everything below a directory, name by name.
    pub fn empty_directory(&self, directory: Ino) -> FsResult<()> {
        // In reverse a directory comes after what it holds.
        for found in self.walk(directory, usize::MAX)?.into_iter().rev() {
            let (parent, name) = split(&found.path);
            let mut ino = directory;
            for part in parent
                .split(|byte| *byte == b'/')
                .filter(|part| !part.is_empty())
            {
                ino = self.child(ino, part)?.ino;
            }
            if found.node.kind == Kind::Dir {
                self.rmdir(ino, name)?;
            } else {
                self.unlink(ino, name)?;
            }
            self.renamed(ino, [name]);
        }
        Ok(())
    }

    /// Puts a subtree into an empty directory: all of it or nothing. `also` adds what must be stored
    /// in the same commit.
    pub fn grow(
        &self,
        directory: Ino,
        tree: Vec<Grown>,
        caller: Caller,
        also: impl FnOnce(&mut Batch<'_>),
    ) -> FsResult<()> {
        let top: Vec<Vec<u8>> = tree
            .iter()
            .filter(|grown| !grown.path.contains(&b'/'))
            .map(|grown| grown.path.clone())
            .collect();
        self.wait_for_the_clock();
        self.grow_names(directory, tree, caller, also)?;
        self.renamed(directory, top.iter().map(Vec::as_slice));
        Ok(())
    }

    fn grow_names(
        &self,
        directory: Ino,
        tree: Vec<Grown>,
        caller: Caller,
        also: impl FnOnce(&mut Batch<'_>),
    ) -> FsResult<()> {
        let _structure = self.structure.lock();
        let root = self.node(directory)?;
        let mut root_state = root.state.lock();
        if root_state.attributes.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        if !root_state.directory().ok_or(Errno::ENOTDIR)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        let change = self.storage.epochs.change();
        let now = clock::now();
        let mut batch = self.storage.index.batch();
        let planted = self.plant(directory, tree, &mut batch)?;
        let mut made = Vec::with_capacity(planted.nodes.len());
        for new in planted.nodes {
            let (kind, body) = match new.body {
                Body::Directory(names) => (Kind::Dir, Body::Directory(names)),
                Body::Link(target) => (Kind::Symlink, Body::Link(target)),
                body => (Kind::File, body),
            };
            let attributes = Attributes {
                perm: new.perm,
                uid: caller.uid,
                gid: caller.gid,
                nlink: new.nlink,
                rdev: 0,
                atime: now,
                mtime: new.mtime.unwrap_or(now),
                ctime: now,
            };
            let origin = new.origin.filter(|_| kind == Kind::File);
            let node = Node::new(new.ino, kind, attributes, body, origin, change.epoch);
            {
                let state = node.state.lock();
                self.put(&mut batch, &node, &state, &state.attributes)?;
            }
            made.push(node);
        }
        let mut attributes = root_state.attributes.clone();
        attributes.mtime = now;
        attributes.ctime = now;
        attributes.nlink = attributes.nlink.saturating_add(planted.directories);
        self.put(&mut batch, &root, &root_state, &attributes)?;
        also(&mut batch);
        batch.commit().map_err(|error| index_failed(&error))?;

        root_state.attributes = attributes;
        if let Some(names) = root_state.directory_mut() {
            for (name, ino) in &planted.top {
                names.insert(name, *ino);
            }
        }
        let mut nodes = self.nodes.write();
        for node in made {
            nodes.insert(node);
        }
        Ok(())
    }

    /// Gives every name of a subtree its inode, and directories their names.
    fn plant(&self, root: Ino, tree: Vec<Grown>, batch: &mut Batch<'_>) -> FsResult<Planted> {
        let mut planted = Planted {
            nodes: Vec::with_capacity(tree.len()),
            top: Vec::new(),
            directories: 0,
        };
        let mut known: HashMap<Vec<u8>, usize> = HashMap::new();
        // Which inode each name of the list has.
        let mut of_name: Vec<usize> = Vec::with_capacity(tree.len());
        for grown in tree {
            let ino = if let GrownBody::Same(name) = grown.body {
                let at = *of_name.get(name).ok_or(Errno::EINVAL)?;
                of_name.push(at);
                let node = planted.nodes.get_mut(at).ok_or(Errno::EINVAL)?;
                node.nlink += 1;
                node.ino
            } else {
                of_name.push(planted.nodes.len());
                self.allocate_ino()?
            };
            let (parent, name) = split(&grown.path);
            let is_directory = matches!(grown.body, GrownBody::Directory);
            let holder = if parent.is_empty() {
                planted.directories += u32::from(is_directory);
                planted.top.push((name.to_vec(), ino));
                root
            } else {
                let holder = known.get(parent).ok_or(Errno::EINVAL)?;
                let holder = &mut planted.nodes[*holder];
                let Body::Directory(names) = &mut holder.body else {
                    return Err(Errno::ENOTDIR);
                };
                names.insert(name, ino);
                holder.nlink += u32::from(is_directory);
                holder.ino
            };
            batch.put_dentry(self.id, holder, name, ino);
            let (body, nlink) = match grown.body {
                GrownBody::Directory => (Body::Directory(Box::new(Directory::new(holder))), 2),
                GrownBody::Leaf(body) => (body, 1),
                GrownBody::Same(_) => continue,
            };
            planted.nodes.push(NewInode {
                ino,
                perm: grown.perm,
                mtime: grown.mtime,
                origin: grown.origin,
                nlink,
                body,
            });
            if is_directory {
                known.insert(grown.path, planted.nodes.len() - 1);
            }
        }
        Ok(planted)
    }

    /// Puts a file in the place of another, which gets a name of its own; whoever looks finds the one
    /// or the other.
    pub fn stand_in(
        &self,
        directory: Ino,
        name: &[u8],
        stand_in: Bound,
        caller: Caller,
    ) -> FsResult<()> {
        let aside = stand_in.name.clone();
        self.bind(directory, vec![stand_in], None, caller, |_| {})?;
        // No request of the kernel's has this number: none will be asked about again.
        let no_request = 0;
        self.rename(
            (directory, aside.as_slice()),
            (directory, name),
            RenameMode::Exchange,
            no_request,
        )?;
        self.renamed(directory, [name, &aside]);
        Ok(())
    }

    /// Settles every file found in a walk. One that somebody still writes to at the deadline leaves
    /// none of the others unsettled; EBUSY then.
    pub fn settle_walked(&self, found: &[Walked], deadline: Instant) -> FsResult<()> {
        found
            .iter()
            .filter(|found| found.node.kind == Kind::File)
            .map(|found| self.settle(&found.node, deadline))
            .fold(Ok(()), Result::and)
    }
}

/// An inode about to be.
struct NewInode {
    ino: Ino,
    perm: u16,
    mtime: Option<Timestamp>,
    origin: Option<Arc<ActionKey>>,
    nlink: u32,
    body: Body,
}

/// A subtree whose names have inodes.
struct Planted {
    nodes: Vec<NewInode>,
    top: Vec<(Vec<u8>, Ino)>,
    directories: u32,
}

fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() {
        name.to_vec()
    } else {
        [directory, b"/", name].concat()
    }
}

/// The directory of a path and the last name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
