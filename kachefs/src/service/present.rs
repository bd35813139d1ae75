//! Before a compiler runs, the crates it will load are on this machine: they are fetched together or, where
//! they are lost, made again (`lineage`), and one that does not come is missing (which rustc says, and the
//! next build mends) before anybody has it mapped. Whatever else it reads is fetched when it is read.

use std::sync::Arc;

use store::{ActionKey, Digest, Ino};
use wrapper::args::SearchKind;

use super::Service;
use super::prepare::{Place, Prepared};
use crate::fs::{Body, View};

/// A file that is not here.
pub(super) struct Wanted {
    pub view: Arc<View>,
    pub ino: Ino,
    pub blob: (Digest, u64),
    /// The action that made it.
    pub action: Option<ActionKey>,
}

impl Service {
    /// Fetches what this compile loads.
    pub(super) fn bring_externs(&self, prepared: &Prepared) {
        if self.storage.lazy.connection().is_none() {
            return;
        }
        let wanted = self.externs_elsewhere(prepared);
        if wanted.is_empty() {
            return;
        }
        let blobs: Vec<_> = wanted.iter().map(|wanted| wanted.blob).collect();
        tracing::debug!(
            crate_name = prepared.invocation.crate_name,
            blobs = blobs.len(),
            "fetching what it loads"
        );
        if self.storage.fault_all(&blobs).is_ok() || self.lineage.bring(self, &wanted) {
            return;
        }
        let mut views = Vec::new();
        for Wanted {
            view, ino, blob, ..
        } in wanted
        {
            let (digest, size) = blob;
            if !self.storage.cas.has(&digest, size) {
                view.doubt(ino);
            }
            if views.iter().all(|known: &Arc<View>| known.id != view.id) {
                views.push(view);
            }
        }
        for view in views {
            view.withdraw_lost();
        }
    }

    /// What this compile loads that is not on this machine.
    pub(super) fn externs_elsewhere(&self, prepared: &Prepared) -> Vec<Wanted> {
        // Of a crate that is linked, its code; of another, what is known of it. Proc macros are run.
        let extensions = if prepared.invocation.is_linked() {
            ["rlib", "so"]
        } else {
            ["rmeta", "so"]
        };
        let searches = prepared.invocation.searches.iter();
        let places = searches
            .filter(|search| search.kind == SearchKind::Dependency)
            .filter_map(|search| match prepared.locate(self, &search.path) {
                Place::View(view, path) => {
                    let directory = view.resolve(&path).ok()?;
                    Some((view, directory.ino))
                }
                Place::Disk(_) => None,
            });
        let places: Vec<_> = places.collect();
        let mut wanted = Vec::new();
        for (stem, _) in &prepared.dependencies.closure {
            for name in extensions.map(|extension| format!("lib{stem}.{extension}")) {
                let found = places.iter().find_map(|(view, directory)| {
                    let node = view.child(*directory, name.as_bytes()).ok()?;
                    let state = node.state.lock();
                    let Body::Blob { digest, size } = state.body else {
                        return None;
                    };
                    Some(Wanted {
                        view: Arc::clone(view),
                        ino: node.ino,
                        blob: (digest, size),
                        action: state.origin.as_deref().copied(),
                    })
                });
                let is_here = |wanted: &Wanted| self.storage.cas.has(&wanted.blob.0, wanted.blob.1);
                wanted.extend(found.filter(|wanted| !is_here(wanted)));
            }
        }
        wanted
    }
}
