//! What a run was seen to look at, as inputs of its action.
//!
//! After a miss, accesses become observations: paths to look at again before a hit. Most lead
//! nowhere new (the toolchain, the view's own outputs) and are left out. A run that changed
//! something outside its own directories, or of which not everything was seen, is not stored.
//! `record` and `script` call it; `look` answers for `lookup` what is at a path now.

mod look;
mod ways;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use store::{Kind, Look, Observation, RootSet, Timestamp};
use wrapper::trace::{Access, Accesses, Observed, Scope, Unseen, Uses};

pub use self::look::Site;

pub(super) use self::look::find_in_view;

use self::look::Found;
use self::ways::Ways;
use super::files::changed_at;
use super::loaded::LOADER_CACHE;
use super::prepare::Place;
use super::swapped::Swapped;

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

/// How many interpreters of interpreters are followed, as the kernel does (execve(2)).
const MOST_INTERPRETERS: u32 = 4;

/// How much of a script's first line the kernel reads (execve(2)).
const FIRST_LINE: u64 = 256;

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

/// The inputs a run was seen to have.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// What to look at again, sorted.
    pub observations: Vec<Observation>,
    /// Roots whose surroundings it explored: elsewhere it would have looked elsewhere.
    pub bound: RootSet,
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
    let unit_dirs = site.unit_dirs();
    let scratch_space = run.scratch_space();
    for (path, uses) in &observed.paths {
        // The loader's index changes with every library that is installed; those it leads to count
        // themselves.
        if run.is_scratch(path, *uses)? || path == LOADER_CACHE.as_bytes() {
            continue;
        }
        let path = Path::new(OsStr::from_bytes(path));
        if scratch_space.contains(path) && !uses.accesses.contains(Access::Open) {
            continue;
        }
        if !is_known(path) && !run.is_runtime(path) && !unit_dirs.is_vain_search(path, *uses) {
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
    fn is_scratch(&mut self, path: &[u8], uses: Uses) -> Result<bool, Untold> {
        let writes = Untold::Writes(String::from_utf8_lossy(path).into_owned());
        let here = Path::new(OsStr::from_bytes(path));
        if let Some(made) = here.ancestors().find(|above| self.made(above)) {
            if self.is_there(made) {
                return Err(Untold::Writes(made.display().to_string()));
            }
            // Had something been there, it might not have made it.
            let looked = [Access::Open, Access::Status, Access::Link];
            if made == here && looked.iter().any(|look| uses.accesses.contains(*look)) {
                self.push(Look::Link, here)?;
            }
            return Ok(true);
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
        self.add_at(path, uses, 0)
    }

    fn add_at(&mut self, path: &Path, uses: Uses, depth: u32) -> Result<(), Untold> {
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
            self.push(look, path)?;
        }
        if there {
            self.add_links(path)?;
        }
        if does(Access::Open)
            && depth < MOST_INTERPRETERS
            && let Place::Disk(path) = self.site.locate(path)
            && let Some(interpreter) = interpreter(&path)
        {
            self.add_interpreter(&interpreter, depth)?;
        }
        Ok(())
    }

    fn push(&mut self, look: Look, path: &Path) -> Result<(), Untold> {
        let changed = || Untold::Changed(path.display().to_string());
        self.site.look(look, path).ok_or_else(changed)?;
        let path = self.site.roots.template_place(path.as_os_str().as_bytes());
        self.inputs.observations.push(Observation { path, look });
        Ok(())
    }

    /// The links on the way to a directory: what starts in it is seen under the name it really has.
    fn add_links(&mut self, path: &Path) -> Result<(), Untold> {
        let Place::Disk(_) = self.site.locate(path) else {
            return Ok(());
        };
        if !fs::metadata(path).is_ok_and(|meta| meta.is_dir()) {
            return Ok(());
        }
        for part in path.ancestors() {
            if !self.is_link(part) {
                continue;
            }
            if self.ways.leads_to_root(part) {
                self.inputs.bound = RootSet::all();
            } else {
                self.push(Look::Link, part)?;
            }
        }
        Ok(())
    }

    /// What the kernel opens to run a script, unseen.
    fn add_interpreter(&mut self, path: &Path, depth: u32) -> Result<(), Untold> {
        let mut accesses = Accesses::default();
        accesses.insert(Access::Open);
        let absent = !self.is_there(path);
        let uses = Uses { accesses, absent };
        self.add_at(path, uses, depth + 1)
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

/// The program a script names in its first line.
fn interpreter(path: &Path) -> Option<PathBuf> {
    let meta = fs::metadata(path).ok()?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return None;
    }
    let mut start = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(FIRST_LINE).read_to_end(&mut start));
    read.ok()?;
    let line = start
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let name = line
        .trim_ascii()
        .split(|byte| matches!(byte, b' ' | b'\t'))
        .next()?;
    let name = Path::new(OsStr::from_bytes(name));
    name.is_absolute().then(|| name.to_owned())
}
