//! Which of the paths a compile looked at lead to one file, or to files that may be taken for one.
//!
//! A compiler that is given a directory twice looks into it once, and what is marked `#pragma once` it
//! includes once. It tells by the number of the inode, gcc also by content and time. The numbers
//! themselves say nothing, so what counts is which of them are equal.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use store::{Digest, Look, Observation, Root, Timestamp};
use wrapper::cc::key::{Alike, Likeness};

use super::super::observed::Site;
use super::super::observed::find_in_view;
use super::super::prepare::Place;

/// No run has so many observations.
const FIRST_SURROUNDING: u64 = 1 << 32;

/// A file or directory, wherever it is.
#[derive(PartialEq, Eq, Hash)]
enum Identity {
    Disk(u64, u64),
    View(u32, u64),
}

/// How each path is like one before it; `None` when that cannot be told.
pub(super) fn of(site: Site<'_>, seen: &[(Observation, Digest)]) -> Option<Vec<Alike>> {
    let mut same = surroundings(site)?;
    let mut twins: HashMap<(Digest, Timestamp), u64> = HashMap::new();
    let mut alike = Vec::with_capacity(seen.len());
    for (at, (observation, digest)) in (0_u64..).zip(seen) {
        let path = site.roots.render(&observation.path);
        let mut likeness = Alike {
            first: at,
            kind: Likeness::None,
        };
        // What a link leads to is looked at under names of its own.
        if observation.look != Look::Link
            && let Some((identity, changed)) = identity(site, Path::new(OsStr::from_bytes(&path)))?
        {
            let first = *same.entry(identity).or_insert(at);
            let twin = *twins.entry((*digest, changed)).or_insert(at);
            if first != at {
                likeness = Alike {
                    first,
                    kind: Likeness::Same,
                };
            } else if twin != at && observation.look == Look::Open {
                likeness = Alike {
                    first: twin,
                    kind: Likeness::Twin,
                };
            }
        }
        alike.push(likeness);
    }
    Some(alike)
}

/// The working directory, the roots and what is above them: no observations say what they are.
fn surroundings(site: Site<'_>) -> Option<HashMap<Identity, u64>> {
    let roots = Root::OF_CHECKOUT
        .into_iter()
        .map(|root| Path::new(site.roots.path(root)));
    let starts = [site.cwd].into_iter().chain(roots);
    let places = starts
        .filter(|path| path.is_absolute())
        .flat_map(Path::ancestors);
    let mut same = HashMap::new();
    for (at, path) in (FIRST_SURROUNDING..).zip(places) {
        if let Some((identity, _)) = identity(site, path)? {
            same.entry(identity).or_insert(at);
        }
    }
    Some(same)
}

/// What is at a path, and when it was written; `Some(None)` for nothing.
#[expect(clippy::option_option, reason = "unknown is not the same as absent")]
fn identity(site: Site<'_>, path: &Path) -> Option<Option<(Identity, Timestamp)>> {
    match site.locate(path) {
        Place::Disk(path) => match fs::metadata(path) {
            Ok(meta) => {
                let written = Timestamp {
                    secs: meta.mtime(),
                    nanos: u32::try_from(meta.mtime_nsec()).unwrap_or(0),
                };
                Some(Some((Identity::Disk(meta.dev(), meta.ino()), written)))
            }
            Err(error) => {
                use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
                let absent = [NotFound, NotADirectory, PermissionDenied].contains(&error.kind());
                absent.then_some(None)
            }
        },
        Place::View(view, path) => match find_in_view(&view, &path).ok()? {
            Some(node) => {
                let written = node.state.lock().attributes.mtime;
                Some(Some((Identity::View(view.id.0, node.ino.0), written)))
            }
            None => Some(None),
        },
    }
}
