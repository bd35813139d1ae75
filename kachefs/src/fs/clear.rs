//! The end of everything a view holds: what `cargo clean` means for it.
//!
//! Called by the daemon when it detaches a view that was emptied, and when it brings back one
//! whose directory was removed meanwhile; never for a request of the kernel.

use std::sync::atomic::Ordering;

use store::{Ino, Kind};

use super::node::Body;
use super::{FsResult, View};

impl Drop for View {
    /// What was unlinked while open goes with the mount. The kernel's last references end with it,
    /// and often it does not come to say so. For other views the next load does the same.
    fn drop(&mut self) {
        if !self.retired.load(Ordering::Relaxed) {
            return;
        }
        for node in self.all_nodes() {
            let state = node.state.lock();
            if let Body::Private { id, .. } = state.body {
                self.storage
                    .retire_scratch(id, state.changed, state.fsynced);
            }
        }
    }
}

impl View {
    /// Whether the root holds no name.
    pub fn is_empty(&self) -> bool {
        self.list(Ino::ROOT, 0, 1).is_ok_and(|rows| rows.is_empty())
    }

    /// Makes the root a removed directory, in memory: whoever still has it open can make nothing
    /// in it any more. The stored record stays as it is, for this view to be loaded again while
    /// unlinked files of the old mount are still in use; the two then have nothing in common.
    pub fn retire(&self) -> bool {
        let _structure = self.structure.lock();
        let Ok(root) = self.node(Ino::ROOT) else {
            return false;
        };
        let mut state = root.state.lock();
        if state.directory().is_none_or(|names| !names.is_empty()) {
            return false;
        }
        state.attributes.nlink = 0;
        drop(state);
        self.outlive_records();
        self.retired.store(true, Ordering::Relaxed);
        true
    }

    /// Removes every name. Only while the view is not mounted: no kernel is told.
    pub fn clear(&self) -> FsResult<()> {
        let mut pending = vec![Ino::ROOT];
        let mut directories = Vec::new();
        while let Some(directory) = pending.pop() {
            for row in self.list(directory, 0, usize::MAX)? {
                if self.node(row.ino)?.kind == Kind::Dir {
                    pending.push(row.ino);
                    directories.push((directory, row.name));
                } else {
                    self.unlink(directory, &row.name)?;
                }
            }
        }
        // A directory comes before what it holds in the list.
        for (parent, name) in directories.into_iter().rev() {
            self.rmdir(parent, &name)?;
        }
        Ok(())
    }
}
