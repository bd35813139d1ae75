//! What is at a path, as somebody who looks at it in a certain way finds it.
//!
//! A file counts by its bytes and permissions, an opened directory by its names, an absence as one.
//! Paths into views are never opened through their mounts.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use store::{Digest, Hasher, Ino, Kind, Look, Observation, Timestamp};
use wrapper::roots::Roots;

use super::super::Service;
use super::super::files::{Limits, changed_at};
use super::super::prepare::{Place, locate};
use super::super::unit_dirs::UnitDirs;
use crate::fs::{Body, Errno, Node, View};

/// The bits of a mode that copies of a file take over.
const PERMISSIONS: u32 = 0o777;

/// How much a build script may declare an input.
const DECLARED: Limits = Limits {
    entries: 20_000,
    bytes: 1 << 30,
};

/// Where an action runs: what its paths mean.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// The service.
    pub service: &'a Service,
    /// The view its outputs go to.
    pub view: &'a Arc<View>,
    /// Literal paths.
    pub roots: &'a Roots,
    /// Its working directory.
    pub cwd: &'a Path,
    /// Its environment.
    pub environment: &'a [(Vec<u8>, Vec<u8>)],
}

impl Site<'_> {
    /// The directory of some unit that its environment names.
    pub(in super::super) fn unit_dirs(&self) -> UnitDirs {
        UnitDirs::of(self.roots, self.environment)
    }

    pub fn locate(&self, path: &Path) -> Place {
        locate(self.service, self.view, self.roots, self.cwd, path)
    }

    /// What somebody who looks at a path in this way finds there; `None` when that cannot be told.
    pub fn look(&self, look: Look, path: &Path) -> Option<Digest> {
        let found = match self.locate(path) {
            Place::Disk(path) => self.look_on_disk(look, &path),
            Place::View(view, path) => look_in_view(&view, look, &path),
        };
        found.map(Found::digest)
    }

    /// What is at the path of a template.
    pub fn look_again(&self, observation: &Observation) -> Option<Digest> {
        let path = self.roots.render(&observation.path);
        self.look(observation.look, Path::new(OsStr::from_bytes(&path)))
    }

    fn look_on_disk(&self, look: Look, path: &Path) -> Option<Found> {
        if look == Look::Tree {
            return self.look_at_tree(path);
        }
        let meta = match look {
            Look::Link => fs::symlink_metadata(path),
            Look::Open | Look::Status | Look::Tree => fs::metadata(path),
        };
        let meta = match meta {
            Ok(meta) => meta,
            Err(error) => return Found::nothing(&error),
        };
        let kind = meta.file_type();
        let found = if kind.is_symlink() {
            let target = fs::read_link(path).ok()?;
            Found::Link(target.into_os_string().into_encoded_bytes())
        } else if kind.is_file() {
            match self.service.files.known_file(path, &meta) {
                Ok(digest) => Found::File(digest, meta.permissions().mode() & PERMISSIONS),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Found::Closed,
                Err(_) => return None,
            }
        } else if kind.is_dir() && look == Look::Open {
            match names_on_disk(path) {
                Ok(names) => Found::names(names),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Found::Closed,
                Err(_) => return None,
            }
        } else if kind.is_dir() {
            Found::Directory
        } else {
            Found::Special
        };
        Some(found)
    }

    fn look_at_tree(&self, path: &Path) -> Option<Found> {
        match fs::metadata(path) {
            Err(error) => Found::nothing(&error),
            Ok(meta) if meta.is_dir() => Some(Found::Names(self.tree(path)?.0)),
            Ok(_) => self.look_on_disk(Look::Open, path),
        }
    }

    fn tree(&self, path: &Path) -> Option<(Digest, Timestamp)> {
        let devices = self.service.mounts.devices();
        let skip = |_: &Path, meta: &Metadata| devices.contains(&meta.dev());
        self.service.files.tree(path, DECLARED, &skip).ok()?
    }

    /// When anything at a path or below it changed last; `None` when that cannot be told. What is in
    /// a view, or nowhere, has not.
    pub fn tree_changed(&self, path: &Path) -> Option<Timestamp> {
        let Place::Disk(path) = self.locate(path) else {
            return Some(Timestamp::default());
        };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(Timestamp::default()),
            Err(_) => None,
            Ok(meta) if meta.is_dir() => Some(self.tree(&path)?.1),
            Ok(meta) => Some(changed_at(&meta)),
        }
    }
}

/// What is at a path.
pub(super) enum Found {
    Nothing,
    Closed,
    File(Digest, u32),
    Directory,
    Names(Digest),
    Link(Vec<u8>),
    Special,
}

impl Found {
    fn nothing(error: &io::Error) -> Option<Self> {
        use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
        match error.kind() {
            NotFound | NotADirectory => Some(Self::Nothing),
            PermissionDenied => Some(Self::Closed),
            _ => None,
        }
    }

    fn names(mut names: Vec<(Vec<u8>, bool)>) -> Self {
        names.sort_unstable();
        let mut hasher = Hasher::new("kachefs names in a directory");
        for (name, is_directory) in &names {
            hasher.field(name).number(u64::from(*is_directory));
        }
        Self::Names(hasher.finish())
    }

    pub(super) fn digest(self) -> Digest {
        let mut hasher = Hasher::new("kachefs observation");
        match self {
            Self::Nothing => hasher.number(0),
            Self::Closed => hasher.number(1),
            Self::File(digest, mode) => hasher.number(2).digest(&digest).number(mode.into()),
            Self::Directory => hasher.number(3),
            Self::Names(digest) => hasher.number(4).digest(&digest),
            Self::Link(target) => hasher.number(5).field(&target),
            Self::Special => hasher.number(6),
        };
        hasher.finish()
    }
}

fn names_on_disk(path: &Path) -> io::Result<Vec<(Vec<u8>, bool)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let is_directory = entry.file_type()?.is_dir();
        names.push((entry.file_name().into_encoded_bytes(), is_directory));
    }
    Ok(names)
}

fn look_in_view(view: &View, look: Look, path: &[u8]) -> Option<Found> {
    let Some(node) = find_in_view(view, path).ok()? else {
        return Some(Found::Nothing);
    };
    let found = match node.kind {
        Kind::File => {
            let digest = view.content_digest(&node).ok()?;
            let mode = u32::from(node.state.lock().attributes.perm) & PERMISSIONS;
            Found::File(digest, mode)
        }
        Kind::Dir if look == Look::Tree => return None,
        Kind::Dir if look == Look::Open => {
            let rows = view.list(node.ino, 0, usize::MAX).ok()?;
            let is_directory = |ino: Ino| view.node(ino).is_ok_and(|node| node.kind == Kind::Dir);
            let names = rows
                .iter()
                .map(|row| (row.name.to_vec(), is_directory(row.ino)));
            Found::names(names.collect())
        }
        Kind::Dir => Found::Directory,
        Kind::Symlink if look == Look::Link => match &node.state.lock().body {
            Body::Link(target) => Found::Link(target.clone()),
            _ => return None,
        },
        // Where it leads is not followed here.
        Kind::Symlink => return None,
        _ => Found::Special,
    };
    Some(found)
}

/// What a path in a view names; an error where a link is on the way, which nobody here follows.
pub(in crate::service) fn find_in_view(
    view: &View,
    path: &[u8],
) -> Result<Option<Arc<Node>>, Errno> {
    let mut node = view.node(Ino::ROOT)?;
    for name in path.split(|byte| *byte == b'/') {
        let next = match name {
            b"" | b"." => continue,
            b".." => view.parent(node.ino)?,
            _ if node.kind == Kind::Symlink => return Err(Errno::ELOOP),
            _ if node.kind != Kind::Dir => return Ok(None),
            name => match view.child(node.ino, name) {
                Ok(child) => child.ino,
                Err(Errno::ENOENT) => return Ok(None),
                Err(error) => return Err(error),
            },
        };
        node = view.node(next)?;
    }
    Ok(Some(node))
}
