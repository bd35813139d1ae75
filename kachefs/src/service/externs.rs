//! The externs of an action, and the crates behind them that no argument names.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use store::{Digest, Origin};
use wrapper::args::{self, SearchKind};
use wrapper::roots::Roots;

use super::Service;
use super::files::is_system;
use super::prepare::{Place, Prepared, Refusal, locate};
use crate::fs::{Errno, Node, View};

/// The externs of an action and the closure behind them.
pub(super) struct Externs {
    /// `options:name`, file name, content; in order.
    pub(super) direct: Vec<(String, String, Digest)>,
    /// Stems of all crates behind them.
    pub(super) closure: BTreeSet<String>,
    /// Whether a proc macro is among those.
    pub(super) proc_macro: bool,
}

impl Externs {
    /// Looks at every extern; one of unknown origin widens the closure to all crates beside it.
    pub(super) fn collect(
        service: &Service,
        invocation: &args::Invocation,
        view: &Arc<View>,
        roots: &Roots,
        cwd: &Path,
    ) -> Result<Self, Refusal> {
        let mut externs = Self {
            direct: Vec::new(),
            closure: BTreeSet::new(),
            proc_macro: false,
        };
        let mut unknown = false;
        for extern_ in &invocation.externs {
            let Some(path) = &extern_.path else { continue };
            let place = locate(service, view, roots, cwd, path);
            let (digest, origin) = match &place {
                Place::View(view, rest) => extern_in_view(service, view, rest)?,
                Place::Disk(path) => {
                    let digest = service.files.file(path);
                    (digest.map_err(|_| Refusal::Named("extern-missing"))?, None)
                }
            };
            match origin {
                Some(origin) => {
                    externs.closure.extend(origin.closure.iter().cloned());
                    externs.proc_macro |= origin.proc_macro;
                }
                None => unknown = true,
            }
            let file = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let name = format!("{}:{}", extern_.options, extern_.name);
            externs.direct.push((name, file, digest));
        }
        // `extern crate` finds crates there that no argument names, proc macros among them.
        externs.proc_macro |= invocation.searches.iter().any(|search| {
            let place = locate(service, view, roots, cwd, &search.path);
            holds_unnamed(search.kind, &place)
        });
        if unknown {
            externs.proc_macro = true;
            for search in &invocation.searches {
                if search.kind == SearchKind::Dependency {
                    let place = locate(service, view, roots, cwd, &search.path);
                    externs.closure.extend(crates_in(&place));
                }
            }
        }
        Ok(externs)
    }
}

fn extern_in_view(
    service: &Service,
    view: &View,
    path: &[u8],
) -> Result<(Digest, Option<Arc<Origin>>), Refusal> {
    let missing = |error| match error {
        Errno::EBUSY => Refusal::Named("extern-being-written"),
        _ => Refusal::Named("extern-missing"),
    };
    let node = view.resolve(path).map_err(missing)?;
    let digest = view.content_digest(&node).map_err(missing)?;
    Ok((digest, origin_in_view(service, view, path, &node)))
}

fn origin_in_view(service: &Service, view: &View, path: &[u8], node: &Node) -> Option<Arc<Origin>> {
    let action = node.state.lock().origin.clone();
    let recorded = action.and_then(|action| service.units.of_action(&action));
    recorded.or_else(|| {
        let stem = crate_stem(path)?;
        service.units.of_output(&(view.id, stem))
    })
}

/// A library that rustc may load and run.
pub(super) struct Library {
    /// Where it is.
    pub view: Arc<View>,
    /// Its file.
    pub node: Arc<Node>,
}

/// The libraries of proc macros behind a compile, and others that are called like them. `None` where it may load
/// some that nobody names, or that are in no view.
pub(super) fn libraries(service: &Service, prepared: &Prepared) -> Option<Vec<Library>> {
    let mut libraries = Vec::new();
    let mut add = |view: Arc<View>, node: Option<Arc<Node>>| {
        libraries.extend(node.map(|node| Library { view, node }));
    };
    let externs = prepared.invocation.externs.iter();
    for path in externs.filter_map(|extern_| extern_.path.as_ref()) {
        if path.extension() == Some(OsStr::new("so")) {
            let Place::View(view, rest) = prepared.locate(service, path) else {
                return None;
            };
            let node = view.resolve(&rest).ok()?;
            add(view, Some(node));
        }
    }
    for search in &prepared.invocation.searches {
        let place = prepared.locate(service, &search.path);
        match (search.kind, place) {
            (SearchKind::Dependency, Place::View(view, path)) => {
                // One that is not there may come.
                let directory = view.resolve(&path).ok()?;
                for (stem, _) in &prepared.dependencies.closure {
                    let name = format!("lib{stem}.so");
                    let node = view.child(directory.ino, name.as_bytes());
                    add(Arc::clone(&view), node.ok());
                }
            }
            (SearchKind::Dependency, Place::Disk(_)) => return None,
            (kind, place) if holds_unnamed(kind, &place) => return None,
            _ => {}
        }
    }
    Some(libraries)
}

/// The stems of the crates in the closure that others in it depend on: rustc looks for these by name. `None` where
/// nobody knows.
pub(super) fn behind(service: &Service, prepared: &Prepared) -> Option<HashSet<String>> {
    let mut behind = HashSet::new();
    let externs = prepared.invocation.externs.iter();
    for path in externs.filter_map(|extern_| extern_.path.as_ref()) {
        let Place::View(view, rest) = prepared.locate(service, path) else {
            return None;
        };
        let node = view.resolve(&rest).ok()?;
        let origin = origin_in_view(service, &view, &rest, &node)?;
        let own = crate_stem(path.file_name()?.as_bytes())?;
        let others = origin.closure.iter();
        behind.extend(others.filter(|stem| stem.as_bytes() != own).cloned());
    }
    Some(behind)
}

/// `debug/deps/libserde-1f.rmeta` without `lib` and extension.
fn crate_stem(path: &[u8]) -> Option<Vec<u8>> {
    let at = path
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |at| at + 1);
    let (directory, file) = path.split_at(at);
    let file = file.strip_prefix(b"lib")?;
    let dot = file.iter().rposition(|byte| *byte == b'.')?;
    Some([directory, &file[..dot]].concat())
}

/// Whether `extern crate` may find crates in a directory that no argument names.
fn holds_unnamed(kind: SearchKind, place: &Place) -> bool {
    let is_system = matches!(place, Place::Disk(path) if is_system(path));
    matches!(kind, SearchKind::All | SearchKind::Crate)
        && !is_system
        && !crates_in(place).is_empty()
}

/// Stems of all crates in a dependency directory.
fn crates_in(place: &Place) -> Vec<String> {
    let names: Vec<Vec<u8>> = match place {
        Place::View(view, path) => view
            .resolve(path)
            .and_then(|node| view.list(node.ino, 0, usize::MAX))
            .map(|rows| rows.iter().map(|row| row.name.to_vec()).collect())
            .unwrap_or_default(),
        Place::Disk(path) => std::fs::read_dir(path).map_or_else(
            |_| Vec::new(),
            |entries| {
                entries
                    .flatten()
                    .map(|e| e.file_name().into_encoded_bytes())
                    .collect()
            },
        ),
    };
    names
        .iter()
        .filter(|name| {
            EXTENSIONS
                .iter()
                .any(|extension| name.ends_with(extension.as_bytes()))
        })
        .filter_map(|name| String::from_utf8(crate_stem(name)?).ok())
        .collect()
}

const EXTENSIONS: [&str; 3] = [".rlib", ".rmeta", ".so"];

/// What this action reads of each crate in the closure, found by name in its dependency
/// directories as rustc does: code where something is linked, else metadata.
pub(super) fn closure_digests(
    service: &Service,
    prepared: &Prepared,
    closure: &BTreeSet<String>,
) -> Result<Vec<(String, Digest)>, Refusal> {
    let extensions = if prepared.invocation.is_linked() {
        [".rlib", ".so", ".rmeta"]
    } else {
        [".rmeta", ".rlib", ".so"]
    };
    let places: Vec<Place> = prepared
        .invocation
        .searches
        .iter()
        .filter(|search| search.kind == SearchKind::Dependency)
        .map(|search| prepared.locate(service, &search.path))
        .collect();
    let mut digests = Vec::with_capacity(closure.len());
    for stem in closure {
        let found = extensions.iter().find_map(|extension| {
            let name = format!("lib{stem}{extension}");
            places
                .iter()
                .find_map(|place| digest_in(service, place, &name))
        });
        let digest = match found {
            Some(digest) => digest.map_err(|_| Refusal::Named("extern-being-written"))?,
            // As true of this action as of every other with the same names around it.
            None => Digest::of(b"absent"),
        };
        digests.push((stem.clone(), digest));
    }
    Ok(digests)
}

fn digest_in(service: &Service, directory: &Place, name: &str) -> Option<Result<Digest, Errno>> {
    match directory {
        Place::View(view, path) => {
            let directory = view.resolve(path).ok()?;
            let node = view.child(directory.ino, name.as_bytes()).ok()?;
            Some(view.content_digest(&node))
        }
        Place::Disk(path) => service.files.file(&path.join(name)).ok().map(Ok),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_of_paths() {
        let stem =
            |path: &str| crate_stem(path.as_bytes()).map(|s| String::from_utf8(s).expect("utf8"));
        assert_eq!(
            stem("debug/deps/libserde-1f.rmeta").as_deref(),
            Some("debug/deps/serde-1f")
        );
        assert_eq!(stem("liba.b-1.rlib").as_deref(), Some("a.b-1"));
        assert_eq!(stem("debug/deps/main-1f"), None);
    }
}
