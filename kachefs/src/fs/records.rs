//! The records of a view in the index: stored at once where a request needs that, and within a second
//! where they may be behind.

use std::sync::Arc;

use store::{Ino, ViewRecord};

use super::node::{Body, Node, State};
use super::view::View;
use super::{FsResult, index_failed};

/// Inode numbers claimed from the index at a time.
const CLAIM: u64 = 4096;

impl View {
    /// Notes whether the view is mounted. Which views come back is said by their managed targets.
    pub fn set_mounted(&self, mounted: bool) -> FsResult<()> {
        let mut record = self.record.lock();
        record.mounted = mounted;
        self.put_record(&record)
    }

    fn put_record(&self, record: &ViewRecord) -> FsResult<()> {
        let mut batch = self.storage.index.batch();
        batch
            .put_view(self.id, record)
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))
    }

    /// An inode number never used before.
    pub(super) fn allocate_ino(&self) -> FsResult<Ino> {
        let mut next = self.next_ino.lock();
        let mut record = self.record.lock();
        if *next == record.next_ino {
            claim(&mut record, |claimed| self.put_record(claimed))?;
        }
        *next += 1;
        Ok(Ino(*next - 1))
    }

    /// Deletes the records of inodes that were let go.
    fn delete_forgotten(&self) -> FsResult<()> {
        let forgotten = std::mem::take(&mut *self.forgotten.lock());
        if forgotten.is_empty() {
            return Ok(());
        }
        let mut batch = self.storage.index.batch();
        for ino in &forgotten {
            batch.delete_inode(self.id, *ino);
        }
        let deleted = batch.commit().map_err(|e| index_failed(&e));
        if deleted.is_err() {
            self.forgotten.lock().extend(forgotten);
        }
        deleted
    }

    /// Stores the current record of a node whose attributes changed. When that fails the node is
    /// among the dirty ones.
    pub(super) fn save(&self, node: &Arc<Node>, state: &mut State) -> FsResult<()> {
        let saved = self.store_record(node, state);
        match saved {
            Ok(()) => state.dirty = false,
            Err(_) => self.mark_dirty(node, state),
        }
        saved
    }

    pub(super) fn store_record(&self, node: &Node, state: &State) -> FsResult<()> {
        // Without a name it is stored all the same: whoever has it open outlives this daemon.
        if state.attributes.nlink == 0 && !self.nodes.read().contains(node.ino) {
            return Ok(());
        }
        self.stamp(state);
        let record = self.record_of(node, state, &state.attributes)?;
        let mut batch = self.storage.index.batch();
        batch
            .put_inode(self.id, node.ino, &record)
            .map_err(|e| index_failed(&e))?;
        batch.commit().map_err(|e| index_failed(&e))
    }

    /// Tells a later load that nothing was written to a private file since (see `load::load_node`).
    pub(super) fn stamp(&self, state: &State) {
        if let Body::Private { id, .. } = &state.body
            && let Err(error) = self.storage.stamp_scratch(*id, state.attributes.mtime)
        {
            tracing::warn!(?id, %error, "cannot stamp a private file");
        }
    }

    /// Notes that the stored record of a locked node is behind.
    pub(super) fn mark_dirty(&self, node: &Arc<Node>, state: &mut State) {
        if !state.dirty {
            state.dirty = true;
            self.dirty.lock().push(Arc::clone(node));
        }
    }

    /// Stores every record that is behind, and deletes those nobody needs: now and then, and before
    /// an unmount. Tries them all; those that fail stay behind, and the first error is returned.
    pub fn save_dirty(&self) -> FsResult<()> {
        let mut result = self.delete_forgotten();
        let nodes = std::mem::take(&mut *self.dirty.lock());
        for node in nodes {
            let mut state = node.state.lock();
            if std::mem::take(&mut state.dirty) {
                result = result.and(self.save(&node, &mut state));
            }
        }
        result
    }
}

/// Claims more inode numbers. Only what is stored counts: the next daemon begins there.
fn claim(record: &mut ViewRecord, store: impl FnOnce(&ViewRecord) -> FsResult<()>) -> FsResult<()> {
    let mut claimed = record.clone();
    claimed.next_ino += CLAIM;
    store(&claimed)?;
    *record = claimed;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::Errno;

    #[test]
    fn what_is_not_stored_is_not_claimed() {
        let mut record = ViewRecord {
            path: b"/target".to_vec(),
            mounted: true,
            next_ino: 7,
        };
        let full = claim(&mut record, |_| Err(Errno::ENOSPC));
        assert_eq!((full.is_err(), record.next_ino), (true, 7));
        claim(&mut record, |claimed| {
            assert_eq!(claimed.next_ino, 7 + CLAIM);
            Ok(())
        })
        .expect("stored");
        assert_eq!(record.next_ino, 7 + CLAIM);
    }
}
