//! What keeps a power cut from showing a mixture: marks on what changes, and `fsync`.
//!
//! Bytes of private files reach the disk when the disk likes, their records in the order of the log.
//! So the first change of a private file that a sync point has vouched for is announced: its record,
//! and with it everything that came before, is on the disk before the bytes change. Files that no
//! sync point has seen need none of this; recovery drops them whole.

use std::fs::File;
use std::sync::Arc;

use store::{Digest, Epoch, Ino, Kind, ScratchId};
use wrapper::lease;

use super::node::{Body, Node, State};
use super::view::View;
use super::{Errno, FsResult, errno, index_failed};
use crate::epochs::Change;

/// What holds the bytes of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// A blob.
    Blob(Digest),
    /// A private file.
    Private(ScratchId),
    /// The index alone.
    Index,
}

impl Held {
    pub(super) fn by(state: &State) -> Self {
        match &state.body {
            Body::Blob { digest, .. } => Self::Blob(*digest),
            Body::Private { id, .. } => Self::Private(*id),
            _ => Self::Index,
        }
    }
}

impl View {
    /// Begins a change of the bytes of a locked inode; to be held until they are changed.
    pub(super) fn change(&self, node: &Arc<Node>, state: &mut State) -> FsResult<Change<'_>> {
        let change = self.storage.epochs.change();
        let before = std::mem::replace(&mut state.changed, change.epoch);
        // Who uses fsync looks after the order of things alone, as on any disk. A file without a
        // name is gone after a power cut in any case.
        let announced = state.fsynced || state.attributes.nlink == 0;
        if before < change.epoch && !announced && matches!(state.body, Body::Private { .. }) {
            let announced = self
                .save(node, state)
                .and_then(|()| self.storage.index.sync().map_err(|e| index_failed(&e)));
            if let Err(error) = announced {
                state.changed = before;
                return Err(error);
            }
        }
        Ok(change)
    }

    /// Marks what is being written past the daemon as changed in the epoch that has just begun:
    /// nobody will say so later. To be stored before a sync point vouches for the last epoch.
    pub fn mark_written(&self, epoch: Epoch) {
        for (node, settling_in) in self.written_past() {
            let (id, changed) = match &*node.state.lock() {
                State {
                    body:
                        Body::Private {
                            id,
                            passthrough: true,
                            ..
                        },
                    changed,
                    ..
                } => (*id, *changed),
                _ => continue,
            };
            // A file made a moment ago may be opened only now by who made it.
            let expected = settling_in && changed.next() >= epoch;
            if changed < epoch && (expected || self.is_written_past(id)) {
                let change = self.storage.epochs.change();
                let mut state = node.state.lock();
                state.changed = state.changed.max(change.epoch);
                self.mark_dirty(&node, &mut state);
            }
        }
    }

    fn is_written_past(&self, id: ScratchId) -> bool {
        // Our own descriptor could write.
        self.storage.close_scratch(id);
        let file = File::open(self.storage.dir.scratch_file(id));
        file.is_ok_and(|file| lease::is_written(&file))
    }

    /// Makes a file's bytes, record and names survive a power cut, from now on whatever happens to
    /// it: who syncs one version of a file relies on finding one.
    pub fn fsync(&self, ino: Ino) -> FsResult<()> {
        let node = self.node(ino)?;
        loop {
            let (file, held, named) = {
                let mut state = node.state.lock();
                self.save(&node, &mut state)?;
                let held = Held::by(&state);
                (self.backing(&state)?, held, state.named() == Some(held))
            };
            if let Some(file) = file {
                file.sync_all().map_err(|e| sync_failed(&e))?;
            }
            if !named {
                self.sync_name(held)?;
            }
            let mut state = node.state.lock();
            if Held::by(&state) != held {
                // Moved meanwhile, by a write or into the CAS.
                continue;
            }
            state.private_mut().named = Some(held);
            if node.kind == Kind::File && !state.fsynced {
                state.fsynced = true;
                if let Err(error) = self.store_record(&node, &state) {
                    state.fsynced = false;
                    return Err(error);
                }
            }
            break;
        }
        // All names up to now come with it: the log is synced in order.
        self.storage.index.sync().map_err(|e| index_failed(&e))
    }

    /// Makes the name of a backing survive a power cut. Most file systems do so when a new file is
    /// synced; not all have to.
    pub(super) fn sync_name(&self, held: Held) -> FsResult<()> {
        let synced = match held {
            Held::Blob(digest) => self.storage.sync_blob(&digest),
            Held::Private(_) => {
                File::open(self.storage.dir.scratch()).and_then(|scratch| scratch.sync_all())
            }
            Held::Index => Ok(()),
        };
        synced.map_err(|e| sync_failed(&e))
    }

    /// Of a file that was synced before: its bytes are about to be those of another backing, which
    /// the index may name before the disk has it.
    pub(super) fn sync_moved(&self, state: &State, id: ScratchId, file: &File) -> FsResult<()> {
        if !state.fsynced {
            return Ok(());
        }
        file.sync_all().map_err(|e| sync_failed(&e))?;
        self.sync_name(Held::Private(id))
    }
}

fn sync_failed(error: &std::io::Error) -> Errno {
    tracing::error!(%error, "fsync");
    errno(error)
}
