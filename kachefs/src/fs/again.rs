//! Requests the kernel sends a second time, because the daemon that had them died.
//!
//! Whether it had carried them out nobody can say but the view itself. While a request that changes
//! names is under way the kernel holds the locks of its directories, so nobody else can have made
//! the change: a name that is there already, with what was asked for, was made by the predecessor,
//! and a name that is gone was removed by it. Requests that change bytes or attributes are simply
//! carried out again. Called by the FUSE adapter.

use store::{Ino, Kind};

use super::names::{NewNode, RenameMode, new_node};
use super::node::{Body, Node, State};
use super::view::{Caller, Entry, View};
use super::{Errno, FsResult};

impl View {
    /// [`View::create_node`] of a request that may have been carried out.
    pub fn create_again(
        &self,
        parent: Ino,
        name: &[u8],
        new: NewNode,
        caller: Caller,
    ) -> FsResult<Entry> {
        let Ok(found) = self.child(parent, name) else {
            return Ok(self.create_node(parent, name, new, caller)?.1);
        };
        let directory = self.node(parent)?.state.lock().attributes.clone();
        let epoch = self.storage.epochs.current();
        let wanted = new_node(Ino(0), new, caller, &directory, epoch);
        if is_same(&wanted, &found) {
            self.lookup(parent, name)
        } else {
            Err(Errno::EEXIST)
        }
    }

    /// [`View::link`] of a request that may have been carried out.
    pub fn link_again(&self, ino: Ino, parent: Ino, name: &[u8]) -> FsResult<Entry> {
        match self.child(parent, name) {
            Ok(found) if found.ino == ino => self.lookup(parent, name),
            _ => self.link(ino, parent, name),
        }
    }

    /// [`View::unlink`] of a request that may have been carried out.
    pub fn unlink_again(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        gone_is_done(self.unlink(parent, name))
    }

    /// [`View::rmdir`] of a request that may have been carried out.
    pub fn rmdir_again(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        gone_is_done(self.rmdir(parent, name))
    }

    /// [`View::rename`] of a request that may have been carried out. An exchange leaves no trace in
    /// the names, so its number is stored with it.
    pub fn rename_again(
        &self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
        request: u64,
    ) -> FsResult<()> {
        if mode == RenameMode::Exchange {
            if self.exchanges.lock().contains(request) {
                return Ok(());
            }
        } else if self.child(from.0, from.1).err() == Some(Errno::ENOENT)
            && self.child(to.0, to.1).is_ok()
        {
            return Ok(());
        }
        self.rename(from, to, mode, request)
    }
}

fn gone_is_done(result: FsResult<()>) -> FsResult<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

/// Whether `found` is what was just made as `wanted`: times apart, nothing has happened to it since.
fn is_same(wanted: &Node, found: &Node) -> bool {
    let traits = |node: &Node, state: &State| {
        let kept = &state.attributes;
        let links = if node.kind == Kind::Dir { 2 } else { 1 };
        (
            node.kind,
            kept.perm,
            kept.uid,
            kept.gid,
            kept.rdev,
            kept.nlink == links,
        )
    };
    let (wanted_state, found_state) = (wanted.state.lock(), found.state.lock());
    traits(wanted, &wanted_state) == traits(found, &found_state)
        && match (&wanted_state.body, &found_state.body) {
            (Body::Inline(wanted), Body::Inline(found))
            | (Body::Link(wanted), Body::Link(found)) => wanted == found,
            // Made for a compiler to write to.
            (Body::Inline(wanted), Body::Private { size: 0, .. }) => wanted.is_empty(),
            (Body::Directory(_), Body::Directory(found)) => found.is_empty(),
            (Body::Special, Body::Special) => true,
            _ => false,
        }
}
