//! The end of everything a view holds: what `cargo clean` means for it.
//!
//! Called by the daemon when it detaches a view that was emptied, and when it brings back one
//! whose directory was removed meanwhile; never for a request of the kernel.

use store::{Ino, Kind};

use super::{FsResult, View};

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
