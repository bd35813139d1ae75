//! Operations that change names: create, link, unlink, rename.
//!
//! Each computes the new records, commits them in one batch, and only then changes memory: a
//! failed commit leaves the view as it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;
use store::{Attributes, Batch, Epoch, Ino, Kind, Timestamp};
use wrapper::protocol::TOKEN_NAME;

use super::directory::Directory;
use super::node::{Body, Node, State};
use super::view::{Caller, Entry, View};
use super::{Errno, FsResult, NAME_MAX, index_failed};
use crate::clock;

/// `S_ISGID`: new entries of the directory get its group (inode(7)).
const SETGID: u16 = 0o2000;
/// `S_ISVTX` and all other bits a mode can hold.
const PERMISSIONS: u32 = 0o7777;

/// How `rename` treats an existing target (renameat2(2)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RenameMode {
    /// Replaces it.
    Replace,
    /// Fails with EEXIST.
    NoReplace,
    /// Swaps the two.
    Exchange,
}

/// A node about to be made.
pub struct NewNode {
    /// Its kind.
    pub kind: Kind,
    /// Mode bits, the umask applied.
    pub mode: u32,
    /// Device number of a device file.
    pub rdev: u32,
    /// Its first content.
    pub body: Body,
}

impl NewNode {
    /// An empty regular file.
    pub fn file(mode: u32) -> Self {
        Self {
            kind: Kind::File,
            mode,
            rdev: 0,
            body: Body::Inline(Vec::new()),
        }
    }

    /// An empty directory in `parent`.
    pub fn directory(parent: Ino, mode: u32) -> Self {
        Self {
            kind: Kind::Dir,
            mode,
            rdev: 0,
            body: Body::Directory(Box::new(Directory::new(parent))),
        }
    }

    /// A symbolic link.
    pub fn symlink(target: &[u8]) -> Self {
        Self {
            kind: Kind::Symlink,
            mode: 0o777,
            rdev: 0,
            body: Body::Link(target.to_vec()),
        }
    }
}

fn check_name(name: &[u8]) -> FsResult<()> {
    if name.len() > NAME_MAX {
        Err(Errno::ENAMETOOLONG)
    } else if name == TOKEN_NAME.as_bytes() {
        // Taken in every directory; see `wrapper::protocol::Token`.
        Err(Errno::EEXIST)
    } else {
        Ok(())
    }
}

/// A directory that may take new names.
pub(super) fn live_directory(state: &State) -> FsResult<&Directory> {
    let directory = state.directory().ok_or(Errno::ENOTDIR)?;
    if state.attributes.nlink == 0 {
        Err(Errno::ENOENT)
    } else {
        Ok(directory)
    }
}

/// The attributes of a directory after its names changed.
pub(super) fn renamed_in(state: &State, now: Timestamp, subdirectories: i32) -> Attributes {
    let mut attributes = state.attributes.clone();
    attributes.mtime = now;
    attributes.ctime = now;
    attributes.nlink = attributes.nlink.saturating_add_signed(subdirectories);
    attributes
}

/// The attributes of an inode after losing a name. A directory has only one to lose.
fn unnamed(node: &Node, state: &State, now: Timestamp) -> Attributes {
    let mut attributes = state.attributes.clone();
    attributes.ctime = now;
    attributes.nlink = if node.kind == Kind::Dir {
        0
    } else {
        attributes.nlink.saturating_sub(1)
    };
    attributes
}

impl View {
    /// Puts the record of an inode as it will be. One that loses its last name keeps the record it
    /// has: the kernel may still refer to it, and a load knows it by the missing name.
    pub(super) fn put(
        &self,
        batch: &mut Batch<'_>,
        node: &Node,
        state: &State,
        attributes: &Attributes,
    ) -> FsResult<()> {
        if attributes.nlink == 0 {
            return Ok(());
        }
        let record = self.record_of(node, state, attributes)?;
        batch
            .put_inode(self.id, node.ino, &record)
            .map_err(|e| index_failed(&e))
    }

    /// Makes an inode under a new name; the kernel holds a reference to it from then on.
    pub fn create_node(
        &self,
        parent: Ino,
        name: &[u8],
        new: NewNode,
        caller: Caller,
    ) -> FsResult<(Arc<Node>, Entry)> {
        check_name(name)?;
        let _structure = self.structure.lock();
        let parent = self.node(parent)?;
        let mut parent_state = parent.state.lock();
        if live_directory(&parent_state)?.get(name).is_some() {
            return Err(Errno::EEXIST);
        }
        let ino = self.allocate_ino()?;
        let change = self.storage.epochs.change();
        let node = new_node(ino, new, caller, &parent_state.attributes, change.epoch);
        let is_dir = node.kind == Kind::Dir;
        let now = node.state.lock().attributes.mtime;
        let parent_attributes = renamed_in(&parent_state, now, i32::from(is_dir));
        let mut batch = self.storage.index.batch();
        {
            let state = node.state.lock();
            self.put(&mut batch, &node, &state, &state.attributes)?;
        }
        batch.put_dentry(self.id, parent.ino, name, ino);
        self.put(&mut batch, &parent, &parent_state, &parent_attributes)?;
        batch.commit().map_err(|e| index_failed(&e))?;

        parent_state.attributes = parent_attributes;
        if let Some(directory) = parent_state.directory_mut() {
            directory.insert(name, ino);
        }
        node.lookups.fetch_add(1, Ordering::Relaxed);
        self.nodes.write().insert(Arc::clone(&node));
        let made = self.entry(&node, &node.state.lock());
        Ok((node, made))
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        parent: Ino,
        name: &[u8],
        target: &[u8],
        caller: Caller,
    ) -> FsResult<Entry> {
        let new = NewNode::symlink(target);
        Ok(self.create_node(parent, name, new, caller)?.1)
    }

    /// Makes a directory.
    pub fn mkdir(&self, parent: Ino, name: &[u8], mode: u32, caller: Caller) -> FsResult<Entry> {
        let new = NewNode::directory(parent, mode);
        Ok(self.create_node(parent, name, new, caller)?.1)
    }

    /// Gives an inode one more name.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> FsResult<Entry> {
        check_name(name)?;
        let _structure = self.structure.lock();
        let node = self.node(ino)?;
        if node.kind == Kind::Dir {
            return Err(Errno::EPERM);
        }
        let parent = self.node(parent)?;
        let mut parent_state = parent.state.lock();
        if live_directory(&parent_state)?.get(name).is_some() {
            return Err(Errno::EEXIST);
        }
        let mut state = node.state.lock();
        if state.attributes.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        let now = clock::now();
        let parent_attributes = renamed_in(&parent_state, now, 0);
        let mut attributes = state.attributes.clone();
        attributes.nlink = attributes.nlink.checked_add(1).ok_or(Errno::EMLINK)?;
        attributes.ctime = now;
        let mut batch = self.storage.index.batch();
        self.put(&mut batch, &node, &state, &attributes)?;
        self.put(&mut batch, &parent, &parent_state, &parent_attributes)?;
        batch.put_dentry(self.id, parent.ino, name, ino);
        batch.commit().map_err(|e| index_failed(&e))?;

        parent_state.attributes = parent_attributes;
        if let Some(directory) = parent_state.directory_mut() {
            directory.insert(name, ino);
        }
        state.attributes = attributes;
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Ok(self.entry(&node, &state))
    }

    /// Removes a name of something that is not a directory.
    pub fn unlink(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        self.remove(parent, name, false)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        self.remove(parent, name, true)
    }

    fn remove(&self, parent: Ino, name: &[u8], directory: bool) -> FsResult<()> {
        let structure = self.structure.lock();
        let parent = self.node(parent)?;
        let mut parent_state = parent.state.lock();
        let ino = live_directory(&parent_state)?
            .get(name)
            .ok_or(Errno::ENOENT)?;
        let node = self.node(ino)?;
        let mut state = node.state.lock();
        match state.directory() {
            Some(_) if !directory => return Err(Errno::EISDIR),
            None if directory => return Err(Errno::ENOTDIR),
            Some(names) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
        let now = clock::now();
        let parent_attributes = renamed_in(&parent_state, now, -i32::from(directory));
        let attributes = unnamed(&node, &state, now);
        let mut batch = self.storage.index.batch();
        batch.delete_dentry(self.id, parent.ino, name);
        self.put(&mut batch, &node, &state, &attributes)?;
        self.put(&mut batch, &parent, &parent_state, &parent_attributes)?;
        batch.commit().map_err(|e| index_failed(&e))?;

        parent_state.attributes = parent_attributes;
        if let Some(names) = parent_state.directory_mut() {
            names.remove(name);
        }
        state.attributes = attributes;
        drop((state, parent_state, structure));
        self.reap(&node);
        Ok(())
    }

    /// Renames, with what `mode` says of an existing target. An exchange is remembered under the
    /// number of the request that wants it (see [`View::rename_again`]).
    pub fn rename(
        &self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
        request: u64,
    ) -> FsResult<()> {
        check_name(to.1)?;
        let _structure = self.structure.lock();
        let source = self.child(from.0, from.1)?;
        let target = match self.child(to.0, to.1) {
            Ok(node) => Some(node),
            Err(Errno::ENOENT) => None,
            Err(error) => return Err(error),
        };
        match (mode, &target) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EEXIST),
            (RenameMode::Exchange, None) => return Err(Errno::ENOENT),
            // Two names of one inode: rename(2) does nothing.
            (_, Some(target)) if target.ino == source.ino => return Ok(()),
            _ => {}
        }
        let move_ = Move {
            from,
            to,
            from_directory: self.node(from.0)?,
            to_directory: self.node(to.0)?,
            source: &source,
            target: target.as_ref(),
        };
        if mode == RenameMode::Exchange {
            self.exchange(&move_, request)
        } else {
            self.replace(&move_)?;
            if let Some(target) = &target {
                self.reap(target);
            }
            Ok(())
        }
    }

    fn replace(&self, move_: &Move<'_>) -> FsResult<()> {
        let now = clock::now();
        let source_is_dir = move_.source.kind == Kind::Dir;
        let mut target_state = move_.target.map(|node| (node, node.state.lock()));
        if let Some((target, state)) = &target_state {
            match state.directory() {
                Some(_) if !source_is_dir => return Err(Errno::EISDIR),
                Some(names) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
                None if source_is_dir => return Err(Errno::ENOTDIR),
                _ => {}
            }
            debug_assert!(target.ino != move_.source.ino);
        }
        let target_is_dir = source_is_dir && target_state.is_some();
        let mut parents = Parents::lock(move_)?;
        // Directories leaving one parent and entering the other, net of the one replaced.
        let (leaving, entering) = (
            i32::from(source_is_dir),
            i32::from(source_is_dir) - i32::from(target_is_dir),
        );
        let changes = parents.changes(now, -leaving, entering);

        let mut source_state = move_.source.state.lock();
        let mut source_attributes = source_state.attributes.clone();
        source_attributes.ctime = now;
        let mut batch = self.storage.index.batch();
        batch.delete_dentry(self.id, move_.from.0, move_.from.1);
        batch.put_dentry(self.id, move_.to.0, move_.to.1, move_.source.ino);
        self.put(&mut batch, move_.source, &source_state, &source_attributes)?;
        parents.put(self, &mut batch, &changes)?;
        let target_attributes = match &target_state {
            Some((node, state)) => {
                let attributes = unnamed(node, state, now);
                self.put(&mut batch, node, state, &attributes)?;
                Some(attributes)
            }
            None => None,
        };
        batch.commit().map_err(|e| index_failed(&e))?;

        parents.apply(changes);
        if let Some(names) = parents.source_names().directory_mut() {
            names.remove(move_.from.1);
        }
        if let Some(names) = parents.target_names().directory_mut() {
            names.insert(move_.to.1, move_.source.ino);
        }
        source_state.attributes = source_attributes;
        if let Some(directory) = source_state.directory_mut() {
            directory.parent = Some(move_.to.0);
        }
        if let (Some((_, state)), Some(attributes)) = (&mut target_state, target_attributes) {
            state.attributes = attributes;
        }
        Ok(())
    }

    fn exchange(&self, move_: &Move<'_>, request: u64) -> FsResult<()> {
        let target = move_.target.ok_or(Errno::ENOENT)?;
        let now = clock::now();
        let mut parents = Parents::lock(move_)?;
        let difference =
            i32::from(target.kind == Kind::Dir) - i32::from(move_.source.kind == Kind::Dir);
        let changes = parents.changes(now, difference, -difference);
        let mut states = [move_.source, target].map(|node| node.state.lock());
        let mut batch = self.storage.index.batch();
        batch.put_dentry(self.id, move_.from.0, move_.from.1, target.ino);
        batch.put_dentry(self.id, move_.to.0, move_.to.1, move_.source.ino);
        for (node, state) in [move_.source, target].iter().zip(&states) {
            let mut attributes = state.attributes.clone();
            attributes.ctime = now;
            self.put(&mut batch, node, state, &attributes)?;
        }
        parents.put(self, &mut batch, &changes)?;
        let mut exchanges = self.exchanges.lock();
        let noted = exchanges.with(request);
        batch
            .put_exchanges(self.id, &noted)
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))?;

        *exchanges = noted;
        parents.apply(changes);
        if let Some(names) = parents.source_names().directory_mut() {
            names.insert(move_.from.1, target.ino);
        }
        if let Some(names) = parents.target_names().directory_mut() {
            names.insert(move_.to.1, move_.source.ino);
        }
        for (state, parent) in states.iter_mut().zip([move_.to.0, move_.from.0]) {
            state.attributes.ctime = now;
            if let Some(directory) = state.directory_mut() {
                directory.parent = Some(parent);
            }
        }
        Ok(())
    }
}

struct Move<'a> {
    from: (Ino, &'a [u8]),
    to: (Ino, &'a [u8]),
    from_directory: Arc<Node>,
    to_directory: Arc<Node>,
    source: &'a Arc<Node>,
    target: Option<&'a Arc<Node>>,
}

/// The two directories of a rename, locked; or the one, when both names are in it.
struct Parents<'a> {
    from: (&'a Node, MutexGuard<'a, State>),
    to: Option<(&'a Node, MutexGuard<'a, State>)>,
}

/// Their attributes after the rename.
struct ParentChanges {
    from: Attributes,
    to: Option<Attributes>,
}

impl<'a> Parents<'a> {
    fn lock(move_: &'a Move<'a>) -> FsResult<Self> {
        let from = &*move_.from_directory;
        let to = &*move_.to_directory;
        let mut parents = Self {
            from: (from, from.state.lock()),
            to: (from.ino != to.ino).then(|| (to, to.state.lock())),
        };
        live_directory(parents.target_names())?;
        Ok(parents)
    }

    fn source_names(&mut self) -> &mut State {
        &mut self.from.1
    }

    fn target_names(&mut self) -> &mut State {
        match &mut self.to {
            Some((_, state)) => state,
            None => &mut self.from.1,
        }
    }

    /// New attributes when `from` gains `from_dirs` subdirectories and `to` gains `to_dirs`.
    fn changes(&self, now: Timestamp, from_dirs: i32, to_dirs: i32) -> ParentChanges {
        match &self.to {
            None => ParentChanges {
                from: renamed_in(&self.from.1, now, from_dirs + to_dirs),
                to: None,
            },
            Some((_, to)) => ParentChanges {
                from: renamed_in(&self.from.1, now, from_dirs),
                to: Some(renamed_in(to, now, to_dirs)),
            },
        }
    }

    fn put(&self, view: &View, batch: &mut Batch<'_>, changes: &ParentChanges) -> FsResult<()> {
        view.put(batch, self.from.0, &self.from.1, &changes.from)?;
        match (&self.to, &changes.to) {
            (Some((node, state)), Some(attributes)) => view.put(batch, node, state, attributes),
            _ => Ok(()),
        }
    }

    fn apply(&mut self, changes: ParentChanges) {
        self.from.1.attributes = changes.from;
        if let (Some((_, state)), Some(attributes)) = (&mut self.to, changes.to) {
            state.attributes = attributes;
        }
    }
}

pub(super) fn new_node(
    ino: Ino,
    new: NewNode,
    caller: Caller,
    parent: &Attributes,
    epoch: Epoch,
) -> Arc<Node> {
    let now = clock::now();
    let mut perm = u16::try_from(new.mode & PERMISSIONS).unwrap_or(0);
    let mut gid = caller.gid;
    if parent.perm & SETGID != 0 {
        gid = parent.gid;
        if new.kind == Kind::Dir {
            perm |= SETGID;
        }
    }
    let attributes = Attributes {
        perm,
        uid: caller.uid,
        gid,
        nlink: if new.kind == Kind::Dir { 2 } else { 1 },
        rdev: new.rdev,
        atime: now,
        mtime: now,
        ctime: now,
    };
    Node::new(ino, new.kind, attributes, new.body, None, epoch)
}
