//! What a compiler goes on from, where it writes aside from the view.
//!
//! rustc keeps the state of a crate in `<crate>-<hash>/s-<time>-<random>-<digest>/` of its incremental directory,
//! beside a lock `s-<time>-<random>.lock`. A compile links hundreds of files from the last session into a new one, and
//! removes the sessions before the last (`rustc_incremental::persist::fs`). So the last session of a crate is put where
//! the compiler writes, and what it has made of it comes into the view when it has ended.
//!
//! Most of it is put there as other names of what the view has: what rustc replaces, and never writes to once it is
//! there ([`is_replaced`]). The rest it may write to, through its link from the last session into the new one: that it
//! gets as copies.
//!
//! What rustc has compiled it takes for another thing when it is told another directory for outputs, so each crate
//! of a view has a directory of its own name ([`Place::name`]).
//!
//! The state is worth time and nothing else: where anything is in the way, there is none, or that of before.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use lru::LruCache;
use parking_lot::Mutex;
use store::{Hasher, Ino, Root, ViewId};
use wrapper::artifacts::PATIENCE;

use crate::fs::adopt::Adopted;
use crate::fs::whole::{Coming, FileId};
use crate::fs::{Caller, Errno, FsResult, Listed, View, errno};
use crate::service::prepare::Prepared;

/// Crates whose directory is remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Files that are those of a view.
type Links = HashMap<FileId, Ino>;

/// An incremental directory of a view, for one crate.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Place {
    view: ViewId,
    /// Where it is in the view, without a leading slash.
    path: Vec<u8>,
    /// The crate, and what tells its variants apart.
    stem: String,
}

impl Place {
    /// Where `-C incremental` names a directory; `None` for one that is not in the compiler's view.
    pub fn of(prepared: &Prepared, named: &Path) -> Option<Self> {
        let path = named.strip_prefix(prepared.roots.path(Root::View)).ok()?;
        Some(Self {
            view: prepared.view.id,
            path: path.as_os_str().as_bytes().to_vec(),
            stem: prepared.invocation.stem(),
        })
    }

    /// The name of the directory that stands for this.
    pub fn name(&self) -> String {
        let mut hasher = Hasher::new("kachefs aside");
        hasher.number(self.view.0.into());
        hasher.field(&self.path);
        hasher.field(self.stem.as_bytes());
        hasher.finish().to_string()
    }
}

/// Which directories are whose. Their names hold a hash that only rustc knows.
pub(super) struct Names(Mutex<LruCache<Place, Vec<u8>>>);

impl Default for Names {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

/// The state that a compiler was given.
pub(super) struct State<'a> {
    names: &'a Names,
    view: &'a View,
    place: Place,
    /// Files that are those of the view.
    links: Links,
    /// The sessions it was given: directory and name.
    put: HashSet<(Vec<u8>, Vec<u8>)>,
}

impl<'a> State<'a> {
    /// Puts there what a compiler of this crate may go on from.
    pub fn put(
        names: &'a Names,
        view: &'a View,
        place: Place,
        crate_name: &str,
        to: &Path,
    ) -> io::Result<Self> {
        fs::create_dir(to)?;
        let mut state = Self {
            names,
            view,
            place,
            links: Links::new(),
            put: HashSet::new(),
        };
        // It may be the first compile of all.
        let Ok(directory) = state.directory() else {
            return Ok(state);
        };
        let known = names.0.lock().get(&state.place).cloned();
        let may_be_its = |name: &[u8]| match &known {
            Some(known) => name == &known[..],
            None => name
                .strip_prefix(crate_name.as_bytes())
                .is_some_and(|rest| rest.starts_with(b"-")),
        };
        let rows = view.list(directory, 0, usize::MAX).unwrap_or_default();
        for row in rows.iter().filter(|row| may_be_its(&row.name)) {
            let to = to.join(OsStr::from_bytes(&row.name));
            match state.put_session(row.ino, &to) {
                Ok(Some((session, links))) => {
                    state.put.insert((row.name.to_vec(), session));
                    state.links.extend(links);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(place = %to.display(), %error, "incremental state stays behind");
                    match fs::remove_dir_all(&to) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
            }
        }
        Ok(state)
    }

    fn directory(&self) -> FsResult<Ino> {
        Ok(self.view.resolve(&self.place.path)?.ino)
    }

    /// The last session of a crate, and its lock: its name, and what is another name of which file.
    fn put_session(&self, from: Ino, to: &Path) -> FsResult<Option<(Vec<u8>, Links)>> {
        let rows = self.view.list(from, 0, usize::MAX)?;
        let sessions = rows
            .iter()
            .filter_map(|row| Some((session(&row.name)?, row)));
        let Some((session, last)) = sessions.max_by_key(|(session, _)| session.begun) else {
            return Ok(None);
        };
        let lock = rows.iter().find(|row| *row.name == *session.lock);
        let lock = lock.ok_or(Errno::ENOENT)?;
        let at = |row: &Listed| to.join(OsStr::from_bytes(&row.name));
        let to = at(last);
        fs::create_dir_all(&to).map_err(|error| errno(&error))?;
        let mut links = Links::new();
        let mut put = |row: &Listed, to: &Path| {
            let node = self.view.node(row.ino)?;
            let id = self.view.take_out(&node, to, is_replaced(&row.name))?;
            links.extend(id.map(|id| (id, row.ino)));
            FsResult::Ok(())
        };
        put(lock, &at(lock))?;
        for row in self.view.list(last.ino, 0, usize::MAX)? {
            put(&row, &to.join(OsStr::from_bytes(&row.name)))?;
        }
        Ok(Some((last.name.to_vec(), links)))
    }

    /// Takes over what the compiler has made of it.
    pub fn take(&self, from: &Path, caller: Caller) -> FsResult<()> {
        let failed = |error: io::Error| errno(&error);
        let directory = self.directory()?;
        let mut result = Ok(());
        for (name, made) in list(from).map_err(failed)? {
            if !made.is_dir() {
                continue;
            }
            let from = from.join(OsStr::from_bytes(&name));
            match self.take_sessions(directory, &name, &from, caller) {
                Ok(true) => drop(self.names.0.lock().put(self.place.clone(), name)),
                Ok(false) => {}
                // Of another crate, perhaps.
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Whether there were any that are new.
    fn take_sessions(
        &self,
        parent: Ino,
        name: &[u8],
        from: &Path,
        caller: Caller,
    ) -> FsResult<bool> {
        let made = list(from).map_err(|error| errno(&error))?;
        let here = match self.view.child(parent, name) {
            Ok(node) => Some(node.ino),
            Err(Errno::ENOENT) => None,
            Err(error) => return Err(error),
        };
        let is_put = |made: &Vec<u8>| {
            let of_it =
                |(directory, session): &(Vec<u8>, Vec<u8>)| directory == name && session == made;
            self.put.iter().any(of_it)
        };
        let new = made
            .iter()
            .map(|(name, _)| name)
            .filter(|name| !is_put(name));
        let new: Vec<_> = new
            .filter_map(|name| Some((name, session(name)?)))
            .collect();
        if new.is_empty() {
            return Ok(false);
        }
        let here = if let Some(here) = here {
            here
        } else {
            self.view
                .adopt_directory(parent, name, &[], Instant::now(), caller)?;
            self.view.child(parent, name)?.ino
        };
        let at = |name: &[u8]| from.join(OsStr::from_bytes(name));
        let deadline = Instant::now() + PATIENCE;
        // First: a session without a lock is taken for one that nobody wants.
        let locks = new.iter().map(|(_, session)| Adopted {
            name: session.lock.clone(),
            path: at(&session.lock),
            edit: None,
        });
        let locks = locks.collect::<Vec<_>>();
        self.view.adopt(here, &locks, deadline, caller)?;
        for (name, _) in &new {
            let files = self.files(&at(name)).map_err(|error| errno(&error))?;
            self.view
                .adopt_directory(here, name, &files, deadline, caller)?;
        }
        self.remove_before(here, &made)?;
        Ok(true)
    }

    /// Removes the sessions before those that the compiler has left. What was begun since, or has not come to its
    /// end, is another's.
    fn remove_before(&self, directory: Ino, left: &[(Vec<u8>, fs::FileType)]) -> FsResult<()> {
        let left = left.iter().filter_map(|(name, _)| session(name));
        let first = left.map(|session| session.begun).min();
        let rows = self.view.list(directory, 0, usize::MAX)?;
        for row in &rows {
            let Some(session) = session(&row.name).filter(|session| Some(session.begun) < first)
            else {
                continue;
            };
            self.view.remove_directory(directory, &row.name)?;
            if rows.iter().any(|row| *row.name == *session.lock) {
                self.view.remove_file(directory, &session.lock)?;
            }
        }
        Ok(())
    }

    fn files(&self, session: &Path) -> io::Result<Vec<Coming<'static>>> {
        let coming = list(session)?.into_iter().map(|(name, _)| {
            let path = session.join(OsStr::from_bytes(&name));
            let id = FileId::from(&fs::symlink_metadata(&path)?);
            Ok(match self.links.get(&id) {
                Some(ino) => Coming::Link { name, ino: *ino },
                None => Coming::Made(Adopted {
                    name,
                    path,
                    edit: None,
                }),
            })
        });
        coming.collect()
    }
}

/// Whether rustc makes a file of this name anew, and never writes to one that is there: objects and metadata are
/// linked into their places, the others removed, or renamed over, before they are written
/// (`rustc_fs_util::link_or_copy`, `rustc_incremental::persist::file_format`). Not so what LTO keeps
/// (`*.pre-lto.bc`, `thin-lto-past-keys.bin`).
fn is_replaced(name: &[u8]) -> bool {
    const REPLACED: [&[u8]; 4] = [
        b"dep-graph.bin",
        b"query-cache.bin",
        b"work-products.bin",
        b"metadata.rmeta",
    ];
    name.ends_with(b".o") || REPLACED.contains(&name)
}

/// A session that came to its end, by its name.
struct Session {
    /// When it began, in units and since a time that only rustc knows.
    begun: u64,
    /// The name of its lock.
    lock: Vec<u8>,
}

fn session(name: &[u8]) -> Option<Session> {
    let mut parts = str::from_utf8(name).ok()?.splitn(4, '-');
    let mut part = || parts.next();
    let ("s", time, random, digest) = (part()?, part()?, part()?, part()?) else {
        return None;
    };
    (digest != "working").then_some(Session {
        begun: u64::from_str_radix(time, 36).ok()?,
        lock: format!("s-{time}-{random}.lock").into_bytes(),
    })
}

fn list(directory: &Path) -> io::Result<Vec<(Vec<u8>, fs::FileType)>> {
    let rows = fs::read_dir(directory)?.map(|entry| {
        let entry = entry?;
        Ok((entry.file_name().as_bytes().to_vec(), entry.file_type()?))
    });
    rows.collect()
}

#[cfg(test)]
mod tests;
