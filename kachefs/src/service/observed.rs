//! What a run was seen to look at, as inputs of its action.
//!
//! After a miss, accesses become observations: paths to look at again before a hit. Most lead
//! nowhere new (the toolchain, the view's own outputs) and are left out. A run that changed
//! something outside its own directories, or of which not everything was seen, is not stored.
//! `record` and `script` call it; `look` answers for `lookup` what is at a path now.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use store::{Digest, Hasher, Ino, Kind, Look, Observation, Root, RootSet, Timestamp};
use wrapper::roots::Roots;
use wrapper::trace::{Access, Observed, Scope, Unseen, Uses};

use super::Service;
use super::files::{Limits, changed_at};
use super::prepare::{Place, locate};
use super::swapped::Swapped;
use crate::fs::{Body, Errno, Node, View};

/// How much a build script may declare an input.
const DECLARED: Limits = Limits {
    entries: 20_000,
    bytes: 1 << 30,
};

/// The loader's index of the system's libraries. It changes with every library that is installed;
/// those it leads to count themselves.
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";

/// Libraries of the system that every compiler runs with, whatever it makes.
const RUNTIME_LIBRARIES: &[&str] = &[
    "ld-linux-",
    "libc.so",
    "libdl.so",
    "libgcc_s.so",
    "libm.so",
    "libpthread.so",
    "librt.so",
    "libstdc++.so",
    "libz.so",
];

/// Why what a run did cannot be told from what it was seen to do.
#[derive(Debug, thiserror::Error)]
pub enum Untold {
    /// Something was not seen.
    #[error("not everything it did could be seen: {}", .0.name())]
    Unseen(Unseen),
    /// It changed something that is not its own.
    #[error("it changes {0}")]
    Writes(String),
    /// Something it looked at is not what it was then, or cannot be looked at.
    #[error("{0} changed while it ran")]
    Changed(String),
}

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

/// The inputs a run was seen to have.
#[derive(Debug, Default)]
pub struct Inputs {
    /// What to look at again, sorted.
    pub observations: Vec<Observation>,
    /// Roots whose surroundings it explored: elsewhere it would have looked elsewhere.
    pub bound: RootSet,
}

impl Site<'_> {
    fn locate(&self, path: &Path) -> Place {
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
                Ok(digest) => Found::File(digest),
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
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) => return Found::nothing(&error),
        };
        if !meta.is_dir() {
            return self.look_on_disk(Look::Open, path);
        }
        let devices = self.service.mounts.devices();
        let skip = |_: &Path, meta: &Metadata| devices.contains(&meta.dev());
        let tree = self.service.files.tree(path, DECLARED, &skip).ok()??;
        Some(Found::Names(tree.0))
    }
}

/// What is at a path.
enum Found {
    Nothing,
    Closed,
    File(Digest),
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

    fn digest(self) -> Digest {
        let mut hasher = Hasher::new("kachefs observation");
        match self {
            Self::Nothing => hasher.number(0),
            Self::Closed => hasher.number(1),
            Self::File(digest) => hasher.number(2).digest(&digest),
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
        Kind::File => Found::File(view.content_digest(&node).ok()?),
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
fn find_in_view(view: &View, path: &[u8]) -> Result<Option<Arc<Node>>, Errno> {
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

/// What a compiler need not be watched at besides its scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// A compiler, whose own libraries say nothing about what it makes.
    Compiler,
    /// Any program: what it prints may come from a library of the system.
    Script,
}

/// Turns what a run did since it started into inputs.
pub fn inputs(
    site: Site<'_>,
    observed: &Observed,
    scope: &Scope,
    program: Program,
    started: Timestamp,
    is_known: &dyn Fn(&Path) -> bool,
) -> Result<Inputs, Untold> {
    if let Some(unseen) = observed.unseen.first() {
        return Err(Untold::Unseen(*unseen));
    }
    let in_view = |path: &Path| site.service.mounts.locate(path).is_some();
    let mut run = Run {
        site,
        observed,
        program,
        started,
        swapped: Swapped::since(started, &in_view),
        ways: Ways::new(site.roots, scope, site.environment),
        inputs: Inputs::default(),
    };
    let scratch_space = run.scratch_space();
    for (path, uses) in &observed.paths {
        if run.is_scratch(path, *uses)? || path == LOADER_CACHE {
            continue;
        }
        let path = Path::new(OsStr::from_bytes(path));
        if scratch_space.contains(path) && !uses.accesses.contains(Access::Open) {
            continue;
        }
        if !is_known(path) && !run.is_runtime(path) {
            run.add(path, *uses)?;
        }
    }
    run.bind_explored();
    run.inputs.observations.sort_unstable();
    run.inputs.observations.dedup();
    Ok(run.inputs)
}

/// One run being understood.
struct Run<'a> {
    site: Site<'a>,
    observed: &'a Observed,
    program: Program,
    started: Timestamp,
    swapped: Swapped<'a>,
    ways: Ways,
    inputs: Inputs,
}

impl Run<'_> {
    /// Whether a path is the run's own, made by it and gone with it. An error where the run changed
    /// what is not its own.
    fn is_scratch(&self, path: &[u8], uses: Uses) -> Result<bool, Untold> {
        let writes = Untold::Writes(String::from_utf8_lossy(path).into_owned());
        let here = Path::new(OsStr::from_bytes(path));
        if let Some(made) = here.ancestors().find(|above| self.made(above)) {
            return if self.is_there(made) {
                Err(Untold::Writes(made.display().to_string()))
            } else {
                Ok(true)
            };
        }
        let does = |access| uses.accesses.contains(access);
        if does(Access::Remove) {
            return Err(writes);
        }
        if does(Access::Change) || does(Access::Make) {
            // A pipe or a terminal passes on what is written to it.
            return match self.site.look(Look::Status, here) {
                Some(found) if found == Found::Special.digest() => Ok(true),
                _ => Err(writes),
            };
        }
        Ok(false)
    }

    /// Directories it made something in and took it away again.
    fn scratch_space(&self) -> HashSet<PathBuf> {
        let paths = self.observed.paths.keys();
        paths
            .map(|path| Path::new(OsStr::from_bytes(path)))
            .filter(|path| self.made(path))
            .filter_map(|path| Some(path.parent()?.to_owned()))
            .collect()
    }

    fn made(&self, path: &Path) -> bool {
        let uses = self.observed.paths.get(path.as_os_str().as_bytes());
        uses.is_some_and(|uses| uses.absent && uses.accesses.contains(Access::Make))
    }

    fn is_there(&self, path: &Path) -> bool {
        match self.site.locate(path) {
            Place::Disk(path) => fs::symlink_metadata(path).is_ok(),
            Place::View(view, path) => !matches!(find_in_view(&view, &path), Ok(None)),
        }
    }

    fn is_runtime(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().as_bytes();
        self.program == Program::Compiler
            && ["/lib", "/usr/lib", "/lib64", "/usr/lib64"]
                .iter()
                .any(|directory| path.starts_with(directory))
            && RUNTIME_LIBRARIES
                .iter()
                .any(|library| name.starts_with(library.as_bytes()))
    }

    fn add(&mut self, path: &Path, uses: Uses) -> Result<(), Untold> {
        let changed = || Untold::Changed(path.display().to_string());
        let there = self.is_there(path);
        // What it saw is not what is there now.
        if uses.absent == there {
            return Err(changed());
        }
        let does = |access| uses.accesses.contains(access);
        if !does(Access::Open) && self.ways.leads_to_root(path) {
            self.add_way(path);
            return Ok(());
        }
        if there && self.has_changed(path, does(Access::Open)).unwrap_or(true) {
            return Err(changed());
        }
        let mut looks = Vec::new();
        if does(Access::Open) {
            looks.push(Look::Open);
        } else if does(Access::Status) {
            looks.push(Look::Status);
        }
        if does(Access::Link) && (looks.is_empty() || self.is_link(path)) {
            looks.push(Look::Link);
        }
        self.ways.note(path);
        for look in looks {
            self.site.look(look, path).ok_or_else(changed)?;
            let path = self.site.roots.template(path.as_os_str().as_bytes());
            self.inputs.observations.push(Observation { path, look });
        }
        Ok(())
    }

    /// A directory on the way to a root: that it is one, everywhere. A link leads to another path,
    /// which may be in the outputs where nobody looks for it.
    fn add_way(&mut self, path: &Path) {
        if self.is_link(path) {
            self.inputs.bound = RootSet::all();
        }
    }

    fn is_link(&self, path: &Path) -> bool {
        match self.site.locate(path) {
            Place::Disk(path) => fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink()),
            Place::View(view, path) => match find_in_view(&view, &path) {
                Ok(node) => node.is_some_and(|node| node.kind == Kind::Symlink),
                Err(_) => true,
            },
        }
    }

    /// Whether what is at a path, or the way there, may have been another while it ran; `None` when
    /// nobody knows.
    fn has_changed(&mut self, path: &Path, opened: bool) -> Option<bool> {
        let since = |meta: &Metadata| changed_at(meta) >= self.started;
        let changed = match self.site.locate(path) {
            Place::View(view, path) => {
                let node = find_in_view(&view, &path).ok()??;
                let changed = node.state.lock().attributes.ctime >= self.started;
                changed && (opened || node.kind != Kind::Dir)
            }
            Place::Disk(path) => {
                let link = fs::symlink_metadata(&path).ok()?;
                let changed = match fs::metadata(&path) {
                    Ok(meta) if meta.is_dir() && !opened => false,
                    Ok(meta) => since(&meta),
                    Err(_) => false,
                };
                let replaced = link.is_symlink() && since(&link);
                changed || replaced || self.swapped.on_the_way_to(&path).ok()?
            }
        };
        Some(changed)
    }

    fn bind_explored(&mut self) {
        let explored = self.ways.explored();
        self.inputs.bound.extend(explored);
    }
}

/// The directories above the roots. A run that looks for something there, one level after the
/// other, would look in other directories elsewhere.
struct Ways {
    /// Roots, and directories above and around them.
    roots: Vec<(Option<Root>, PathBuf)>,
    /// Where each name was looked for.
    names: HashMap<Vec<u8>, Vec<PathBuf>>,
    /// Directories that the environment names.
    given: HashSet<PathBuf>,
}

impl Ways {
    fn new(roots: &Roots, scope: &Scope, environment: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let values = environment
            .iter()
            .flat_map(|(_, value)| value.split(|byte| *byte == b':'));
        let given = values
            .map(|value| Path::new(OsStr::from_bytes(value)).components().collect())
            .filter(|path: &PathBuf| path.is_absolute());
        let own = Root::ALL
            .into_iter()
            .map(|root| (Some(root), PathBuf::from(roots.path(root))));
        let known = scope.known.iter().chain(&scope.own);
        let known = known.map(|path| (None, PathBuf::from(OsStr::from_bytes(path))));
        let roots = own.chain(known).filter(|(_, path)| path.is_absolute());
        Self {
            roots: roots.collect(),
            names: HashMap::new(),
            given: given.collect(),
        }
    }

    /// Whether a path is a root or a directory above one.
    fn leads_to_root(&self, path: &Path) -> bool {
        self.roots.iter().any(|(_, root)| root.starts_with(path))
    }

    fn note(&mut self, path: &Path) {
        if self.given.contains(path) {
            return;
        }
        if let (Some(name), Some(parent)) = (path.file_name(), path.parent()) {
            let places = self.names.entry(name.as_bytes().to_vec()).or_default();
            places.push(parent.to_owned());
        }
    }

    /// Roots above which something was looked for.
    fn explored(&self) -> RootSet {
        let mut set = RootSet::default();
        let path_of = |root| {
            let found = self.roots.iter().find(|(is, _)| *is == Some(root));
            found.map_or(Path::new("/"), |(_, path)| path.as_path())
        };
        let cwd = path_of(Root::Cwd);
        // `$CARGO_HOME` is where it is, whoever asks.
        for root in [Root::Cwd, Root::View] {
            let path = path_of(root);
            let explored = self.names.values().any(|places| {
                let has = |wanted: &dyn Fn(&Path) -> bool| places.iter().any(|place| wanted(place));
                let above = |place: &Path| path.starts_with(place) && path != place;
                let further_down = has(&|place| place.starts_with(path));
                // In the root of all, as everywhere, are places of the system; what the environment
                // names is where it is; unless the name was looked for further down as well.
                let near = has(&|place| {
                    above(place)
                        && !place.starts_with(cwd)
                        && place != Path::new("/")
                        && (further_down || !self.given.contains(place))
                });
                let shallow = path.parent() == Some(Path::new("/")) && places.len() > 1;
                // The way up from a target leads through the checkout only where it lies in it.
                let upwards = has(&above) && further_down;
                near || upwards || (shallow && has(&above))
            });
            if explored {
                set.insert(root);
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explored(paths: &[&str]) -> RootSet {
        let roots = Roots::new("/home/ann/ws", "/home/ann/.cargo", "/home/ann/ws/target");
        let environment = [(b"HOME".to_vec(), b"/home/ann".to_vec())];
        let mut ways = Ways::new(&roots, &Scope::default(), &environment);
        for path in paths {
            ways.note(Path::new(path));
        }
        ways.explored()
    }

    #[test]
    fn what_is_looked_for_above_a_root_binds_to_it() {
        let mut both = RootSet::default();
        both.insert(Root::Cwd);
        both.insert(Root::View);
        assert_eq!(explored(&["/home/x.toml"]), both);
        let mut cwd = RootSet::default();
        cwd.insert(Root::Cwd);
        assert_eq!(explored(&["/home/ann/ws/.git", "/home/ann/.git"]), cwd);
        let up_from_the_target = ["/home/ann/ws/target/debug/.git", "/home/ann/ws/.git"];
        let mut view = RootSet::default();
        view.insert(Root::View);
        assert_eq!(explored(&up_from_the_target), view);
    }

    #[test]
    fn what_lies_in_the_checkout_or_the_system_does_not_bind() {
        let none = RootSet::default();
        assert_eq!(explored(&["/home/ann/ws/Cargo.toml"]), none);
        assert_eq!(
            explored(&["/home/ann/.cargo/config.toml", "/etc/x", "/x"]),
            none
        );
        assert_eq!(explored(&["/usr/bin/cc", "/opt/bin/cc"]), none);
        assert_eq!(explored(&["/home/ann/.gitconfig"]), none);
    }

    #[test]
    fn ways_to_roots() {
        let roots = Roots::new("/home/ann/ws", "/c", "/t");
        let scope = Scope {
            known: vec![b"/opt/rust".to_vec()],
            own: Vec::new(),
        };
        let ways = Ways::new(&roots, &scope, &[]);
        for path in ["/home", "/home/ann/ws", "/opt", "/t"] {
            assert!(ways.leads_to_root(Path::new(path)), "{path}");
        }
        for path in ["/home/bob", "/home/ann/ws/a", "/opt/other"] {
            assert!(!ways.leads_to_root(Path::new(path)), "{path}");
        }
    }
}
