//! Files whose bytes are not in the store any more: a blob or a private file that is missing, or a
//! blob that is damaged.
//!
//! Such a file loses its names, so that the next cargo build makes it again; until then a read gives
//! EIO. When a view is mounted afresh that happens before anybody can look; in a mounted view, after
//! the first read that failed, by a thread that serves no requests. Bytes are not read to find out:
//! a blob is judged by its length and by whether it was written since it was sealed.

use std::collections::HashSet;

use store::{Content, Digest, Ino, InodeRecord, Kind};

use super::node::{Body, Node};
use super::view::View;
use super::{Errno, FsResult};
use crate::storage::Storage;

/// Whether the bytes of a stored inode are there.
pub(super) fn is_backed(storage: &Storage, record: &InodeRecord) -> bool {
    match &record.content {
        Content::Blob { digest, size } => storage.cas.has(digest, *size),
        Content::Private(id) => storage.dir.scratch_file(*id).exists(),
        _ => true,
    }
}

impl View {
    /// Notes files whose bytes are not there.
    pub(super) fn suspect(&self, inodes: impl IntoIterator<Item = Ino>) {
        self.suspects.lock().extend(inodes);
    }

    /// A blob could not be read, or ended early. Whether it is there all the same: then somebody has
    /// just stored it again.
    pub(super) fn doubt_blob(&self, node: &Node, digest: &Digest, size: u64) -> bool {
        self.storage.close_blob(digest);
        if self.storage.cas.has(digest, size) {
            return true;
        }
        tracing::error!(ino = ?node.ino, %digest, "blob is missing or damaged");
        self.suspect([node.ino]);
        false
    }

    /// Takes the names of suspected files away. In a mounted view, for threads that serve no
    /// requests: the kernel is told, and takes the locks of directories for it.
    pub fn drop_suspects(&self) {
        let suspects: HashSet<Ino> = std::mem::take(&mut *self.suspects.lock())
            .into_iter()
            .filter(|ino| self.is_lost(*ino))
            .collect();
        if suspects.is_empty() {
            return;
        }
        for (parent, name, ino) in self.names_of(&suspects) {
            let shown = String::from_utf8_lossy(&name).into_owned();
            match self.unlink_lost(parent, &name, ino) {
                Ok(true) => {
                    tracing::error!(
                        view = self.id.0,
                        name = shown,
                        ?ino,
                        "its bytes are lost: removed"
                    );
                    if let Some(kernel) = self.invalidate.get() {
                        kernel.entry(parent, &name);
                    }
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(view = self.id.0, name = shown, %error, "cannot remove what is lost");
                    self.suspect([ino]);
                }
            }
        }
    }

    /// Whether a suspected file still is what it was suspected of.
    fn is_lost(&self, ino: Ino) -> bool {
        let Ok(node) = self.node(ino) else {
            return false;
        };
        let state = node.state.lock();
        match &state.body {
            Body::Blob { digest, size } => {
                let (digest, size) = (*digest, *size);
                drop(state);
                !self.storage.cas.has(&digest, size)
            }
            Body::Private { id, .. } => !self.storage.dir.scratch_file(*id).exists(),
            _ => false,
        }
    }

    fn names_of(&self, inodes: &HashSet<Ino>) -> Vec<(Ino, Vec<u8>, Ino)> {
        let mut names = Vec::new();
        for (directory, kind) in self.inodes() {
            if kind != Kind::Dir {
                continue;
            }
            let rows = self.list(directory, 0, usize::MAX).unwrap_or_default();
            let wanted = rows.into_iter().filter(|row| inodes.contains(&row.ino));
            names.extend(wanted.map(|row| (directory, row.name.to_vec(), row.ino)));
        }
        names
    }

    /// Removes a name unless it stands for something else by now.
    fn unlink_lost(&self, parent: Ino, name: &[u8], ino: Ino) -> FsResult<bool> {
        match self.child(parent, name) {
            Ok(found) if found.ino == ino => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.unlink(parent, name) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
