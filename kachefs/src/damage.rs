//! What was wrong with a store when it was opened, and what follows from it.
//!
//! Says in the log what `store::recover` found, decides whether a mount of an earlier daemon may go
//! on, and what becomes of private files that no inode names. It never removes one that a damaged
//! record may have named. Used by [`crate::storage::Storage`] and the daemon.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use store::{Content, History, Index, Quarantine, StoreDir, Thing, ViewId};

use crate::storage::Storage;

/// Findings told one by one; the rest is counted.
const TOLD: usize = 100;

/// What was wrong.
pub struct Damage {
    history: History,
    mended: BTreeSet<ViewId>,
    forgot_inodes: bool,
    /// Whether an earlier daemon has acknowledged what the index does not hold.
    forgetful: AtomicBool,
    quarantine: Quarantine,
}

impl Damage {
    /// Opens the index of a store, and says what was wrong with it.
    pub fn look(dir: &StoreDir, quarantine: &Quarantine) -> Result<(Index, Self)> {
        if let Err(error) = quarantine.clean() {
            tracing::warn!(%error, "cannot clean the quarantine");
        }
        let recovered = store::recover::open(dir, quarantine)?;
        let mut findings = recovered.findings;
        match dir.managed().mend(quarantine) {
            Ok(damaged) => findings.extend(damaged),
            Err(error) => tracing::warn!(%error, "cannot look for damaged managed targets"),
        }
        for finding in findings.iter().take(TOLD) {
            tracing::error!("damaged: {finding}");
        }
        if findings.len() > TOLD {
            tracing::error!("damaged: {} more", findings.len() - TOLD);
        }
        if !matches!(recovered.history, History::New | History::Whole) {
            tracing::error!(history = ?recovered.history, "the index was damaged");
        }
        let damage = Self {
            history: recovered.history,
            mended: recovered.mended,
            forgot_inodes: recovered.forgot_inodes,
            forgetful: AtomicBool::new(false),
            quarantine: recovered.quarantine,
        };
        Ok((recovered.index, damage))
    }

    /// Notes that an earlier daemon has acknowledged what the index does not hold.
    pub fn forgets(&self) {
        tracing::error!("the index has lost what was acknowledged");
        self.forgetful.store(true, Ordering::Relaxed);
    }

    /// Whether the numbers and names the kernel knows of a view mean what they meant.
    pub fn spares(&self, view: ViewId) -> bool {
        matches!(self.history, History::Whole | History::RolledBack)
            && !self.forgetful.load(Ordering::Relaxed)
            && !self.mended.contains(&view)
    }

    /// The least number a new view may have. Views that are lost leave no trace of theirs, and who
    /// still knows them must not find another view.
    pub fn first_view(&self) -> u32 {
        let kept = matches!(
            self.history,
            History::New | History::Whole | History::RolledBack
        );
        if !kept || !self.mended.is_empty() {
            u32::try_from(crate::clock::now().secs).unwrap_or(1)
        } else {
            1
        }
    }

    /// Where scratch ids go on: also above those of files an index that went back does not know.
    pub fn next_scratch(&self, dir: &StoreDir, index: &Index) -> Result<u64> {
        let mut next = index.next_scratch()?;
        for entry in fs::read_dir(dir.scratch())? {
            let name = entry?.file_name();
            let id = name
                .to_str()
                .and_then(|name| u64::from_str_radix(name, 16).ok());
            next = next.max(id.map_or(0, |id| id.saturating_add(1)));
        }
        Ok(next)
    }

    /// Removes private files that no inode of any view points at: what was unlinked but still open
    /// when an earlier daemon died. Where inodes may be missing they are moved to the quarantine.
    pub fn clear_scratch(&self, storage: &Storage) -> Result<()> {
        let mut named = HashSet::new();
        for (view, _) in storage.index.views()? {
            for (_, record) in storage.index.inodes(view)? {
                if let Content::Private(id) = record.content {
                    named.insert(storage.dir.scratch_file(id));
                }
            }
        }
        let mut moved = 0_u64;
        for entry in fs::read_dir(storage.dir.scratch())? {
            let path = entry?.path();
            if named.contains(&path) {
                continue;
            }
            if !self.forgot_inodes || is_empty(&path)? {
                fs::remove_file(&path)?;
            } else {
                self.quarantine.take(Thing::Scratch, &path)?;
                moved += 1;
            }
        }
        if moved > 0 {
            tracing::error!(
                moved,
                "private files nobody names any more are in the quarantine"
            );
        }
        Ok(())
    }
}

fn is_empty(path: &std::path::Path) -> io::Result<bool> {
    Ok(fs::symlink_metadata(path)?.len() == 0)
}
