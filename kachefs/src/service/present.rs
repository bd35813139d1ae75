//! Before a compiler runs, the crates are on this machine that the last compile of the same crate loaded, if that was
//! watched; else whatever it may load. They are fetched together or, where they are lost, made again (`lineage`), and
//! one that does not come is missing (which rustc says, and the next build mends), for who has a file mapped that does
//! not come is killed. All else it reads is fetched when it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use store::{ActionKey, Digest, Ino, Loads};
use wrapper::args::{Search, SearchKind};

use super::Service;
use super::externs::behind;
use super::lookup::records;
use super::prepare::{Place, Prepared};
use super::pulse::Pulse;
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
    /// Fetches what this compile loads, while the wrapper hears that we are alive.
    pub(super) fn bring_externs(&self, stream: &UnixStream, prepared: &Prepared) -> io::Result<()> {
        if self.storage.lazy.connection().is_none() {
            return Ok(());
        }
        Pulse::during(stream, || self.fetch_externs(prepared))
    }

    fn fetch_externs(&self, prepared: &Prepared) {
        let all = || self.externs_elsewhere(prepared, None);
        let mut wanted = all();
        if wanted.is_empty() {
            return;
        }
        // Of a remote that does not answer nothing comes when it is mapped, either: what is far goes before.
        if !self.storage.is_away()
            && let Some(loads) = self.loaded_before(prepared)
        {
            wanted = self.externs_elsewhere(prepared, Some(&loads));
            if wanted.is_empty() {
                return;
            }
        }
        let blobs: Vec<_> = wanted.iter().map(|wanted| wanted.blob).collect();
        tracing::debug!(
            crate_name = prepared.invocation.crate_name,
            blobs = blobs.len(),
            "fetching what it loads"
        );
        let fetched = self.storage.ask_twice(|| self.storage.fault_all(&blobs));
        if fetched.is_ok() || self.lineage.bring(self, &wanted) {
            return;
        }
        if self.storage.is_away() {
            wanted = all();
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

    /// What this compile loads that is not on this machine: what the last one did, if that is known, else all it may.
    pub(super) fn externs_elsewhere(
        &self,
        prepared: &Prepared,
        loads: Option<&Loads>,
    ) -> Vec<Wanted> {
        let crates = Libraries::searched(self, prepared, &[SearchKind::Dependency], |_, name| {
            [".rlib", ".rmeta", ".so"]
                .iter()
                .any(|end| name.ends_with(end))
        });
        let mut files = if let Some(loads) = loads {
            crates.take(|name| loads.has(name))
        } else {
            let names = self.names_of_crates(prepared, &crates);
            crates.take(|name| names.contains(name))
        };
        if prepared.invocation.emit.link {
            files.extend(self.archives(prepared));
        }
        let wanted = files.into_iter().filter_map(|(view, ino)| {
            let node = view.node(ino).ok()?;
            let state = node.state.lock();
            let Body::Blob { digest, size } = state.body else {
                return None;
            };
            Some(Wanted {
                view,
                ino,
                blob: (digest, size),
                action: state.origin.as_deref().copied(),
            })
        });
        let is_here = |wanted: &Wanted| self.storage.cas.has(&wanted.blob.0, wanted.blob.1);
        wanted.filter(|wanted| !is_here(wanted)).collect()
    }

    /// The archives that rustc puts into the crate, or the linker takes: those that arguments name, and those beside
    /// what the package's own script has made, which the source may name (`#[link]`).
    fn archives(&self, prepared: &Prepared) -> Vec<(Arc<View>, Ino)> {
        let named = prepared.invocation.native_libs.iter();
        let named: BTreeSet<_> = named.map(|value| archive(value)).collect();
        let mut environment = prepared.environment.iter();
        let out_dir = environment.find_map(|(name, value)| (name == b"OUT_DIR").then_some(value));
        let is_own = |search: &Search| {
            out_dir.is_some_and(|out_dir| search.path.starts_with(OsStr::from_bytes(out_dir)))
        };
        let kinds = [SearchKind::Native, SearchKind::All];
        let found = Libraries::searched(self, prepared, &kinds, |search, name| {
            let is_archive = Path::new(name).extension().is_some_and(|end| end == "a");
            named.contains(name) || (is_archive && is_own(search))
        });
        found.0.into_values().flatten().collect()
    }

    /// What the last compile of the same crate loaded, wherever that was, if the same crates were behind it.
    fn loaded_before(&self, prepared: &Prepared) -> Option<Loads> {
        let records = records(self, &prepared.digest);
        let mut loads = records.into_iter().filter_map(|record| record.loads);
        loads.find(|loads| loads.is_of(prepared.dependencies.stems()))
    }

    /// The names of the files which rustc maps to load the crates of a compile (`rustc_metadata`, `locator` and
    /// `creader`). What arguments name is taken from there. What is behind it is looked for: a `.rmeta` comes
    /// first, then the code, where that is wanted or there is nothing else. Of a proc macro, and a crate whose
    /// name has no hash, everything is looked at that begins like it.
    fn names_of_crates(&self, prepared: &Prepared, crates: &Libraries) -> BTreeSet<String> {
        let externs = &prepared.dependencies.externs;
        let mut names: BTreeSet<_> = externs.iter().map(|(_, file, _)| file.clone()).collect();
        let is_linked = prepared.invocation.is_linked();
        let behind = behind(self, prepared);
        for (stem, _) in &prepared.dependencies.closure {
            let [metadata, code, shared] =
                ["rmeta", "rlib", "so"].map(|extension| format!("lib{stem}.{extension}"));
            let has_metadata = crates.has(&metadata);
            let is_shared = crates.has(&shared);
            names.extend(is_linked.then(|| code.clone()));
            if behind.as_ref().is_some_and(|behind| !behind.contains(stem)) {
                continue;
            }
            let name = crate_name(stem);
            if is_shared || name == stem {
                names.extend(crates.beginning_with(&format!("lib{name}")));
            }
            names.insert(if has_metadata { metadata } else { code });
        }
        names
    }
}

/// Files in directories of views that a compile searches, by name.
struct Libraries(BTreeMap<String, Vec<(Arc<View>, Ino)>>);

impl Libraries {
    /// Those wanted of the directories that are searched for something of these kinds.
    fn searched(
        service: &Service,
        prepared: &Prepared,
        kinds: &[SearchKind],
        is_wanted: impl Fn(&Search, &str) -> bool,
    ) -> Self {
        let mut found = BTreeMap::<_, Vec<_>>::new();
        let searches = prepared.invocation.searches.iter();
        for search in searches.filter(|search| kinds.contains(&search.kind)) {
            let Place::View(view, path) = prepared.locate(service, &search.path) else {
                continue;
            };
            let rows = view
                .resolve(&path)
                .and_then(|node| view.list(node.ino, 0, usize::MAX));
            for row in rows.into_iter().flatten() {
                if let Ok(name) = str::from_utf8(&row.name)
                    && is_wanted(search, name)
                {
                    let places = found.entry(name.to_owned()).or_default();
                    places.push((Arc::clone(&view), row.ino));
                }
            }
        }
        Self(found)
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The files whose names are wanted.
    fn take(self, is_wanted: impl Fn(&str) -> bool) -> Vec<(Arc<View>, Ino)> {
        let wanted = self.0.into_iter().filter(|(name, _)| is_wanted(name));
        wanted.flat_map(|(_, places)| places).collect()
    }

    fn beginning_with(&self, prefix: &str) -> impl Iterator<Item = String> {
        let names = self.0.range(prefix.to_owned()..).map(|(name, _)| name);
        names
            .take_while(move |name| name.starts_with(prefix))
            .cloned()
    }
}

/// `serde` of `serde-0123456789abcdef`; the same where there is no such hash.
fn crate_name(stem: &str) -> &str {
    let is_hash =
        |hash: &str| hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    match stem.rsplit_once('-') {
        Some((name, hash)) if is_hash(hash) => name,
        _ => stem,
    }
}

/// The file that holds a static library: of `[KIND[:MODIFIERS]=]NAME[:RENAME]` (rustc book, "-l").
fn archive(value: &str) -> String {
    let (kind, name) = value.split_once('=').unwrap_or(("", value));
    let name = name.split_once(':').map_or(name, |(name, _)| name);
    if kind.contains("+verbatim") {
        name.to_owned()
    } else {
        format!("lib{name}.a")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        assert_eq!(crate_name("serde-0123456789abcdef"), "serde");
        assert_eq!(crate_name("serde_derive-1"), "serde_derive-1");
        assert_eq!(crate_name("plain"), "plain");
        assert_eq!(archive("git2"), "libgit2.a");
        assert_eq!(archive("static=git2:other"), "libgit2.a");
        assert_eq!(archive("static:+verbatim,-bundle=git2.lib"), "git2.lib");
    }
}
