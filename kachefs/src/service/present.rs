//! Before a compiler runs, the crates it will load are on this machine: they are fetched together or, where
//! they are lost, made again (`lineage`), and one that does not come is missing (which rustc says, and the
//! next build mends) before anybody has it mapped. Whatever else it reads is fetched when it is read.

use std::collections::BTreeSet;
use std::sync::Arc;

use store::{ActionKey, Digest, Ino};
use wrapper::args::SearchKind;
use wrapper::key::Dependencies;

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
        // Who waited for one of them in vain asks once more, if it is not the remote that does not answer.
        let comes = || self.storage.fault_all(&blobs).is_ok();
        if comes() || (!self.storage.is_away() && comes()) || self.lineage.bring(self, &wanted) {
            return;
        }
        let mut views = Vec::new();
        for Wanted {
            view, ino, blob, ..
        } in wanted
        {
            let (digest, size) = blob;
            if !self.storage.cas.has(&digest, size) {
                view.suspect([ino]);
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
        let find = |name: &str| {
            places.iter().find_map(|(view, directory)| {
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
            })
        };
        let is_here = |wanted: &Wanted| self.storage.cas.has(&wanted.blob.0, wanted.blob.1);
        let names = self.names_of_externs(prepared, |name| find(name)?.action);
        let wanted = names.iter().filter_map(|name| find(name));
        wanted.filter(|wanted| !is_here(wanted)).collect()
    }

    /// The names of the files in which rustc finds the crates a compile loads. What arguments name is taken from
    /// there; what is behind it is looked for, and what is known of it taken from a `.rmeta` where there is one
    /// (`rustc_metadata::locator`), also where its code is linked. Proc macros are run.
    fn names_of_externs(
        &self,
        prepared: &Prepared,
        made_by: impl Fn(&str) -> Option<ActionKey>,
    ) -> BTreeSet<String> {
        let Dependencies {
            externs, closure, ..
        } = &prepared.dependencies;
        let is_linked = prepared.invocation.is_linked();
        let mut names: BTreeSet<_> = externs.iter().map(|(_, file, _)| file.clone()).collect();
        let mut behind = BTreeSet::new();
        for (stem, _) in closure {
            let [code, macros] = ["rlib", "so"].map(|extension| format!("lib{stem}.{extension}"));
            let made = is_linked.then(|| made_by(&code).or_else(|| made_by(&macros)));
            let origin = made.flatten().and_then(|made| self.units.of_action(&made));
            match origin {
                Some(origin) => {
                    let others = origin.closure.iter().filter(|other| *other != stem);
                    behind.extend(others.cloned());
                }
                None => behind.extend(closure.iter().map(|(stem, _)| stem.clone())),
            }
            names.extend(is_linked.then_some(code));
            names.insert(macros);
        }
        names.extend(behind.iter().map(|stem| format!("lib{stem}.rmeta")));
        names
    }
}
