//! What was wrong with a store when it was opened, and what follows from it.
//!
//! Says in the log what `store::recover` found, decides whether a mount of an earlier daemon may go
//! on, and what becomes of private files that no inode names. It never removes one that a damaged
//! record may have named. Used by [`crate::storage::Storage`] and the daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use store::{History, Index, Quarantine, StoreDir, Thing, ViewId};

use crate::fs::recovery::LastEnd;

/// Findings told one by one; the rest is counted.
const TOLD: usize = 100;

/// What was wrong.
pub struct Damage {
    history: History,
    torn: Option<String>,
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
        if !matches!(
            recovered.history,
            History::New | History::Whole | History::RolledBack
        ) {
            tracing::error!(history = ?recovered.history, "the index was damaged");
        }
        let damage = Self {
            history: recovered.history,
            torn: recovered.torn,
            mended: recovered.mended,
            forgot_inodes: recovered.forgot_inodes,
            forgetful: AtomicBool::new(false),
            quarantine: recovered.quarantine,
        };
        Ok((recovered.index, damage))
    }

    /// Says where the index's log ends, unless it does so in order.
    pub fn tell_of_the_log(&self, last_end: &LastEnd) {
        match (&self.torn, last_end) {
            (None, _) => {}
            // It has to.
            (Some(torn), LastEnd::Cut(_)) => tracing::info!("the power cut ended the log: {torn}"),
            // So it is when the daemon dies while it writes. Whether more than that is missing the
            // keeper knows.
            (Some(torn), LastEnd::SameBoot(_)) => {
                tracing::warn!("damaged: the end of the log: {torn}");
            }
            (Some(torn), LastEnd::New | LastEnd::Ended(_)) => {
                tracing::error!("damaged: the end of the log: {torn}");
            }
        }
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

    /// Whether a view may have given out inode numbers that its record does not know of.
    pub fn forgot_numbers(&self, view: ViewId) -> bool {
        self.forgetful.load(Ordering::Relaxed) || self.mended.contains(&view)
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

    /// Whether a private file that no inode names may have lost the record that did. Otherwise it was
    /// unlinked while open. After a power cut an index that went back is what it should be.
    pub fn forgot_inodes(&self, cut: bool) -> bool {
        self.forgot_inodes || (self.history == History::RolledBack && !cut)
    }

    /// Moves a private file that nobody names to the quarantine.
    pub fn set_aside(&self, file: &Path) -> Result<()> {
        self.quarantine.take(Thing::Scratch, file)?;
        Ok(())
    }
}
