//! From a request to everything its key needs, short of the sources.
//!
//! A refusal here is a named reason and a plain compile. Whatever cannot be known for sure is
//! refused or widened (an extern of unknown origin makes the whole dependency directory an
//! input), never guessed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use store::{Digest, Hasher, Ino, InvocationDigest, Kind, Origin, Root, RootSet};
use wrapper::args::{self, SearchKind, Uncacheable};
use wrapper::environment;
use wrapper::key::{self, Dependencies};
use wrapper::protocol::CompileRequest;
use wrapper::roots::Roots;

use super::Service;
use super::files::Limits;
use super::units::UnderWay;
use crate::fs::{Body, Caller, Errno, Node, View};

/// How much of a package is keyed as a whole; a larger one is refused.
const PACKAGE: Limits = Limits {
    entries: 20_000,
    bytes: 1 << 30,
};

/// Why an action is not cached.
#[derive(Debug)]
pub enum Refusal {
    /// The argument model says so.
    Arguments(Uncacheable),
    /// A named reason of the daemon's.
    Named(&'static str),
}

impl Refusal {
    /// The name it is counted under; `None` for what is not a compile at all.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Arguments(reason) => {
                let name = reason.name();
                (name != "not-a-compile").then_some(name)
            }
            Self::Named(name) => Some(name),
        }
    }
}

/// A cacheable action before its sources are known.
pub struct Prepared {
    /// The parsed arguments.
    pub invocation: args::Invocation,
    /// The view the outputs go to.
    pub view: Arc<View>,
    /// The out-dir in it.
    pub out_dir: Ino,
    /// Literal paths.
    pub roots: Roots,
    /// Where input records are found.
    pub digest: InvocationDigest,
    /// All that is keyed besides sources.
    pub dependencies: Dependencies,
    /// What the outputs' users will need to know.
    pub origin: Origin,
    /// Environment as the compiler sees it.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Variables taken away from the compiler.
    pub scrubbed: Vec<Vec<u8>>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Who asks.
    pub caller: Caller,
    /// Their file mode creation mask.
    pub umask: u32,
    /// The outputs' name while they are being made.
    pub under_way: UnderWay,
    /// Roots that reach the outputs in a form a search for their paths would miss.
    pub hidden_roots: RootSet,
    /// Whether the package's compile may run proc macros or an unknown compiler.
    opaque: bool,
}

/// Where a path leads.
pub enum Place {
    /// Into a mounted view: never opened through its mount.
    View(Arc<View>, Vec<u8>),
    /// Onto the disk.
    Disk(PathBuf),
}

impl Prepared {
    /// Where a path given to this compiler leads.
    pub fn locate(&self, service: &Service, path: &Path) -> Place {
        locate(service, &self.view, &self.roots, &self.cwd, path)
    }
}

fn locate(service: &Service, view: &Arc<View>, roots: &Roots, cwd: &Path, path: &Path) -> Place {
    let path = cwd.join(path);
    // By its text, only to see whether it leads into a view: what `..` means behind a symbolic
    // link only the disk knows, so a path on the disk is opened as it was written.
    let normal = normalise(&path);
    if let Ok(rest) = normal.strip_prefix(roots.path(Root::View)) {
        return Place::View(Arc::clone(view), rest.as_os_str().as_bytes().to_vec());
    }
    match service.mounts.locate(&normal) {
        Some((view, rest)) => Place::View(view, rest.into_os_string().into_encoded_bytes()),
        None => Place::Disk(path),
    }
}

/// Takes `.` and `..` out of a path by its text alone.
fn normalise(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(normal.pop()),
            other => normal.push(other),
        }
    }
    normal
}

fn text(bytes: &[u8]) -> Result<&str, Refusal> {
    std::str::from_utf8(bytes).map_err(|_| Refusal::Named("invalid-utf8"))
}

/// Everything about an action but its sources.
pub fn prepare(
    service: &Service,
    request: &CompileRequest,
    caller: Caller,
) -> Result<Prepared, Refusal> {
    let argv: Vec<String> = request
        .argv
        .iter()
        .map(|arg| text(arg).map(str::to_owned))
        .collect::<Result<_, _>>()?;
    let (compiler, arguments) = argv.split_first().ok_or(Refusal::Named("not-a-compile"))?;
    if arguments
        .first()
        .is_some_and(|first| first.ends_with("rustc") && !first.starts_with('-'))
    {
        return Err(Refusal::Named("workspace-wrapper"));
    }
    let cwd = PathBuf::from(text(&request.cwd)?);
    let invocation = args::parse(arguments, &cwd).map_err(Refusal::Arguments)?;
    if chooses_linker_script(&invocation.link_args) {
        return Err(Refusal::Named("linker-script"));
    }
    let view = service
        .mounts
        .view(store::ViewId(request.token.0))
        .ok_or(Refusal::Named("view-not-mounted"))?;
    let out_dir = Ino(request.token.1);
    let roots = find_roots(request, &invocation, &view, out_dir, &cwd)?;

    let io = |_: io::Error| Refusal::Named("unknown-compiler");
    let compiler = service
        .toolchains
        .compiler(
            Path::new(compiler),
            invocation.sysroot.as_deref(),
            invocation.target.as_deref(),
            &request.environment,
            &cwd,
            &|path| {
                path.starts_with(roots.path(Root::View)) || service.mounts.locate(path).is_some()
            },
        )
        .map_err(io)?;
    let linker = invocation
        .runs_linker()
        .then(|| {
            service.toolchains.linker(
                invocation.linker.as_deref(),
                invocation.fuse_ld(),
                &request.environment,
                &cwd,
            )
        })
        .transpose()
        .map_err(|_| Refusal::Named("unknown-linker"))?;
    let facts = key::Invocation {
        compiler: compiler.digest,
        linker: linker.as_ref().map(|linker| linker.digest),
        cpu: invocation.native_cpu.then(cpu).transpose().map_err(io)?,
        arguments: invocation
            .keyed
            .iter()
            .map(|arg| roots.template(arg.as_bytes()))
            .collect(),
        source: roots.template(invocation.source.as_os_str().as_bytes()),
        remaps_cwd: !roots.in_cargo_home(),
    };

    let externs = Externs::collect(service, &invocation, &view, &roots, &cwd)?;
    let opaque = externs.proc_macro
        || compiler.behind_shim
        || linker.as_ref().is_some_and(|linker| linker.is_script);
    let scrubbed = if opaque {
        environment::scrubbed(&request.environment)
    } else {
        Vec::new()
    };
    let environment: Vec<_> = request
        .environment
        .iter()
        .filter(|(name, _)| !scrubbed.contains(name))
        .cloned()
        .collect();
    let stem = invocation.stem();
    let is_proc_macro = invocation.is_proc_macro();
    // rustc does not load what a proc macro was made of.
    let mut closure = if is_proc_macro {
        Vec::new()
    } else {
        externs.closure.iter().cloned().collect()
    };
    closure.push(stem.clone());
    closure.sort_unstable();
    closure.dedup();
    let relative = view
        .path_of(out_dir)
        .map_err(|_| Refusal::Named("out-dir-gone"))?;
    let under_way = (
        view.id,
        [relative.as_slice(), b"/", stem.as_bytes()].concat(),
    );
    let hidden_roots = shortened_roots(&invocation.user_remaps, &roots);
    let mut prepared = Prepared {
        digest: facts.digest(),
        dependencies: Dependencies {
            externs: externs.direct,
            closure: Vec::new(),
            named: Vec::new(),
            environment: Vec::new(),
            package: None,
        },
        origin: Origin {
            closure,
            proc_macro: is_proc_macro || externs.proc_macro,
        },
        invocation,
        view,
        out_dir,
        roots,
        environment,
        scrubbed,
        cwd,
        caller,
        umask: request.umask,
        under_way,
        hidden_roots,
        opaque,
    };
    prepared.dependencies.closure = closure_digests(service, &prepared, &externs.closure)?;
    prepared.dependencies.named = named_digests(service, &prepared)?;
    prepared.dependencies.environment = environment::keyed(&prepared.environment, opaque)
        .into_iter()
        .map(|(name, value)| (name.to_vec(), prepared.roots.template(value)))
        .collect();
    if opaque {
        prepared.dependencies.package = package_digest(service, &prepared)?;
    }
    Ok(prepared)
}

/// Roots that the user's own `--remap-path-prefix` shortens: the outputs then hold the rest of the
/// path behind another beginning.
fn shortened_roots(remaps: &[String], roots: &Roots) -> RootSet {
    let mut set = RootSet::default();
    for from in remaps
        .iter()
        .filter_map(|remap| Some(remap.rsplit_once('=')?.0))
    {
        for root in Root::ALL {
            let path = roots.path(root);
            if path.starts_with(from) && path != from {
                set.insert(root);
            }
        }
    }
    set
}

/// Whether an argument selects a linker script by name, searched for who knows where.
fn chooses_linker_script(link_args: &[String]) -> bool {
    link_args.iter().flat_map(|arg| arg.split(',')).any(|part| {
        part.starts_with("-T") || part.starts_with("--script") || part.starts_with("-script")
    })
}

/// The same dependencies, looked at again: equal when nothing changed while a compiler ran.
pub fn dependencies_again(service: &Service, before: &Prepared) -> Result<Dependencies, Refusal> {
    let (view, roots, cwd) = (&before.view, &before.roots, &before.cwd);
    let externs = Externs::collect(service, &before.invocation, view, roots, cwd)?;
    let package = if before.opaque {
        package_digest(service, before)?
    } else {
        None
    };
    Ok(Dependencies {
        externs: externs.direct,
        closure: closure_digests(service, before, &externs.closure)?,
        named: named_digests(service, before)?,
        environment: before.dependencies.environment.clone(),
        package,
    })
}

/// The literal root paths. The view's is taken from the out-dir as cargo spells it, because that
/// spelling is what reaches the compiler.
fn find_roots(
    request: &CompileRequest,
    invocation: &args::Invocation,
    view: &View,
    out_dir: Ino,
    cwd: &Path,
) -> Result<Roots, Refusal> {
    let relative = view
        .path_of(out_dir)
        .map_err(|_| Refusal::Named("out-dir-gone"))?;
    let literal = text(invocation.out_dir.as_os_str().as_bytes())?;
    let view_path = literal
        .as_bytes()
        .strip_suffix(relative.as_slice())
        .filter(|root| relative.is_empty() || root.ends_with(b"/"))
        .ok_or(Refusal::Named("out-dir-mismatch"))?;
    let variable = |name: &[u8]| environment::value(&request.environment, name);
    let cargo_home = match (variable(b"CARGO_HOME"), variable(b"HOME")) {
        (Some(home), _) => text(home)?.to_owned(),
        (None, Some(home)) => format!("{}/.cargo", text(home)?),
        (None, None) => String::new(),
    };
    let cwd = text(cwd.as_os_str().as_bytes())?;
    Ok(Roots::new(cwd, &cargo_home, text(view_path)?))
}

fn cpu() -> io::Result<Digest> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let mut hasher = Hasher::new("kachefs processor");
    for line in info.lines() {
        if ["model name", "flags", "Features", "CPU part"]
            .iter()
            .any(|key| line.starts_with(key))
        {
            hasher.field(line.as_bytes());
        }
        if line.is_empty() {
            break;
        }
    }
    Ok(hasher.finish())
}

/// The externs of an action and the closure behind them.
struct Externs {
    direct: Vec<(String, String, Digest)>,
    closure: BTreeSet<String>,
    proc_macro: bool,
}

impl Externs {
    fn collect(
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
    let action = node.state.lock().origin;
    let recorded = action.and_then(|action| service.units.of_action(&action));
    let origin = recorded.or_else(|| {
        let stem = crate_stem(path)?;
        service.units.of_output(&(view.id, stem))
    });
    Ok((digest, origin))
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
fn closure_digests(
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

/// Files and directories named by flags.
fn named_digests(
    service: &Service,
    prepared: &Prepared,
) -> Result<Vec<(Vec<u8>, Digest)>, Refusal> {
    let invocation = &prepared.invocation;
    let mut named = Vec::new();
    let mut add = |path: &Path, required: bool| {
        let template = prepared.roots.template(path.as_os_str().as_bytes());
        match content_at(service, &prepared.locate(service, path)) {
            Ok(Some(digest)) => named.push((template, digest)),
            Ok(None) if !required => named.push((template, Digest::of(b"absent"))),
            _ => return Err(Refusal::Named("named-input-unreadable")),
        }
        Ok(())
    };
    for search in &invocation.searches {
        if search.kind != SearchKind::Dependency {
            add(&search.path, false)?;
        }
    }
    for path in &invocation.input_files {
        add(path, true)?;
    }
    for path in args::link_arg_paths(&invocation.link_args, &prepared.cwd) {
        refuse_linker_script(&path)?;
        add(&path, false)?;
    }
    Ok(named)
}

/// A linker script can name further files (ld(1), "INCLUDE", "INPUT", "GROUP") that nobody would
/// look at.
fn refuse_linker_script(path: &Path) -> Result<(), Refusal> {
    use std::io::Read;
    const LONGEST: u64 = 1 << 20;
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut text));
    let binary = text.starts_with(b"\x7fELF") || text.starts_with(b"!<arch>");
    let names_files = |word: &str| text.windows(word.len()).any(|part| part == word.as_bytes());
    if read.is_ok() && !binary && ["INCLUDE", "INPUT", "GROUP"].into_iter().any(names_files) {
        return Err(Refusal::Named("linker-script"));
    }
    Ok(())
}

/// Content of a file, or of the files in a directory; `None` when nothing is there.
fn content_at(service: &Service, place: &Place) -> Result<Option<Digest>, Refusal> {
    let unreadable = |_: io::Error| Refusal::Named("named-input-unreadable");
    match place {
        Place::Disk(path) => match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => service
                .files
                .search_directory(path)
                .map(Some)
                .map_err(unreadable),
            Ok(meta) if meta.is_file() => service
                .files
                .known_file(path, &meta)
                .map(Some)
                .map_err(unreadable),
            Ok(_) => Ok(None),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.kind() == io::ErrorKind::NotADirectory =>
            {
                Ok(None)
            }
            Err(error) => Err(unreadable(error)),
        },
        Place::View(view, path) => {
            let unreadable = |_: Errno| Refusal::Named("named-input-unreadable");
            match view.resolve(path) {
                Ok(node) if node.kind == Kind::Dir => {
                    view_directory(view, &node).map(Some).map_err(unreadable)
                }
                Ok(node) if node.kind == Kind::File => {
                    view.content_digest(&node).map(Some).map_err(unreadable)
                }
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
                Err(error) => Err(unreadable(error)),
            }
        }
    }
}

/// Names and contents of the files in a directory of a view.
fn view_directory(view: &View, directory: &Node) -> Result<Digest, Errno> {
    let mut rows = view.list(directory.ino, 0, usize::MAX)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = Hasher::new("kachefs search directory");
    for row in rows {
        let node = view.node(row.ino)?;
        if node.kind == Kind::File {
            hasher.field(&row.name).digest(&view.content_digest(&node)?);
        } else if let Body::Link(target) = &node.state.lock().body {
            hasher.field(&row.name).field(target);
        }
    }
    Ok(hasher.finish())
}

/// What a proc macro may read without anybody reporting it: the package directory, except views
/// and version control, and what the package's build script left. Registry and git packages never
/// change under their path (cargo itself relies on it).
fn package_digest(service: &Service, prepared: &Prepared) -> Result<Option<Digest>, Refusal> {
    let variable = |name: &[u8]| {
        environment::value(&prepared.environment, name).map(|v| Path::new(OsStr::from_bytes(v)))
    };
    let directory = variable(b"CARGO_MANIFEST_DIR").ok_or(Refusal::Named("no-manifest-dir"))?;
    let cargo_home = Path::new(prepared.roots.path(Root::CargoHome));
    let immutable = ["registry", "git/checkouts"]
        .iter()
        .any(|part| directory.starts_with(cargo_home.join(part)));
    let package = if immutable {
        None
    } else {
        Some(directory_digest(service, directory)?)
    };
    let generated = match variable(b"OUT_DIR").map(|path| prepared.locate(service, path)) {
        None => None,
        Some(Place::Disk(path)) => Some(directory_digest(service, &path)?),
        Some(Place::View(view, path)) => {
            let digest = view.resolve(&path).and_then(|node| view_tree(&view, &node));
            Some(digest.map_err(|_| Refusal::Named("out-dir-unreadable"))?)
        }
    };
    if package.is_none() && generated.is_none() {
        return Ok(None);
    }
    let mut hasher = Hasher::new("kachefs package");
    for digest in [package, generated] {
        match digest {
            Some(digest) => hasher.number(1).digest(&digest),
            None => hasher.number(0),
        };
    }
    Ok(Some(hasher.finish()))
}

fn directory_digest(service: &Service, directory: &Path) -> Result<Digest, Refusal> {
    let devices = service.mounts.devices();
    let skip = |path: &Path, meta: &Metadata| {
        path.file_name() == Some(OsStr::new(".git")) || devices.contains(&meta.dev())
    };
    service
        .files
        .tree(directory, PACKAGE, &skip)
        .map_err(|_| Refusal::Named("package-unreadable"))?
        .ok_or(Refusal::Named("package-too-large"))
}

/// Names and contents of everything below a directory of a view.
fn view_tree(view: &View, directory: &Node) -> Result<Digest, Errno> {
    let mut hasher = Hasher::new("kachefs directory tree");
    let mut rows = view.list(directory.ino, 0, usize::MAX)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    for row in rows {
        let node = view.node(row.ino)?;
        hasher.field(&row.name);
        match node.kind {
            Kind::Dir => hasher.field(b"directory").digest(&view_tree(view, &node)?),
            Kind::File => hasher.field(b"file").digest(&view.content_digest(&node)?),
            Kind::Symlink => hasher.field(b"link").field(&view.readlink(row.ino)?),
            _ => hasher.field(b"special"),
        };
    }
    Ok(hasher.finish())
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

    #[test]
    fn paths_are_normalised_by_text() {
        assert_eq!(normalise(Path::new("/a/./b/../c")), Path::new("/a/c"));
        assert_eq!(normalise(Path::new("/../a")), Path::new("/a"));
    }
}
