//! From a request to everything its key needs, short of the sources.
//!
//! A refusal here is a named reason and a plain compile. Whatever cannot be known for sure is
//! refused or widened (an extern of unknown origin makes the whole dependency directory an
//! input), never guessed. `externs`, `named` and `package` digest what each of them is about.

use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use store::{Digest, Ino, InvocationDigest, Origin, Root, RootSet, Timestamp};
use wrapper::args::{self, SearchKind, Uncacheable};
use wrapper::drivers;
use wrapper::environment::{self, Environment};
use wrapper::key::{self, Dependencies};
use wrapper::mode::Mode;
use wrapper::protocol::CompileRequest;
use wrapper::roots::Roots;
use wrapper::trace::Scope;

use super::Service;
use super::externs::{Externs, closure_digests};
use super::machine::processor;
use super::mode;
use super::named::{
    chooses_linker_script, named_digests, refuse_library_scripts, searches_elsewhere,
};
use super::observed::Site;
use super::package::package_digest;
use super::sidecars;
use super::toolchain::{self, Compiler, Linker, Tools};
use super::unit_dirs::is_out_dir;
use super::units::UnderWay;
use crate::fs::{Caller, View};
use crate::lazy::secrets::Secrets;

/// What `cargo fix` gives compilers whose suggestions it applies to the sources.
const FIXING: &[u8] = b"__CARGO_FIX_PLZ";

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

    /// The reason in words, where its name does not say all.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::Arguments(reason) => Some(reason.to_string()),
            Self::Named(_) => None,
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
    /// What is known of the compile before anything it reads is looked at.
    pub facts: key::Invocation,
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
    /// The process that started the compiler: cargo.
    pub parent: u32,
    /// What must not leave this machine, where something may; `None` where that is not known.
    pub secrets: Option<Secrets>,
    /// Their file mode creation mask.
    pub umask: u32,
    /// The outputs' name while they are being made.
    pub under_way: UnderWay,
    /// Roots that reach the outputs in a form a search for their paths would miss.
    pub hidden_roots: RootSet,
    /// What the compiler need not be watched at.
    pub scope: Scope,
    /// Whether the package's compile may run proc macros or an unknown compiler.
    pub opaque: bool,
    /// Whether what runs is not known for what it is: a compiler behind a shim, a linker that is a script, clippy.
    pub runs_unknown: bool,
    /// Whether it is clippy that runs.
    pub is_clippy: bool,
    /// How far the result travels.
    pub mode: Mode,
    /// The compiler as cargo called it, behind its driver if it has one.
    programs: Vec<PathBuf>,
    /// Digests of compiler and linker.
    tools: (Digest, Option<Digest>),
    /// Where the linker looks for libraries: as it names the directories, and as they are.
    linker_search: HashSet<PathBuf>,
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

    /// Whether a path is that of clippy's driver or of what it stands for: the key holds them.
    pub fn is_driver(&self, path: &Path) -> bool {
        self.is_clippy && self.programs.iter().any(|program| program == path)
    }

    /// Paths to remap, and to what.
    pub fn remaps(&self) -> Vec<(&str, &'static str)> {
        match self.mode {
            Mode::Portable => self.roots.remaps(),
            Mode::Exact => Vec::new(),
        }
    }

    /// What is run, which may be a driver that is called with the compiler, and the digest of both.
    pub fn compiler(&self) -> Option<(&Path, Digest)> {
        Some((self.programs.first()?, self.tools.0))
    }

    /// Where the action runs.
    pub fn site<'a>(&'a self, service: &'a Service) -> Site<'a> {
        Site {
            service,
            view: &self.view,
            roots: &self.roots,
            cwd: &self.cwd,
            environment: &self.environment,
        }
    }

    /// Whether a path is in a directory whose libraries the linker's digest holds, or is one.
    pub fn linker_knows(&self, path: &Path) -> bool {
        let is_searched = |path: &Path| {
            self.linker_search.contains(path)
                || fs::canonicalize(path).is_ok_and(|real| self.linker_search.contains(&real))
        };
        !self.linker_search.is_empty()
            && !path.starts_with(self.roots.path(Root::View))
            && (is_searched(path) || path.parent().is_some_and(is_searched))
    }

    /// The package directory, where something unwatched may read any of it; with the time anything
    /// of it changed last.
    pub fn package(&self, service: &Service) -> Result<(Option<Digest>, Timestamp), Refusal> {
        if self.opaque {
            package_digest(service, self)
        } else {
            Ok((None, Timestamp::default()))
        }
    }
}

pub(super) fn locate(
    service: &Service,
    view: &Arc<View>,
    roots: &Roots,
    cwd: &Path,
    path: &Path,
) -> Place {
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

pub(super) fn text(bytes: &[u8]) -> Result<&str, Refusal> {
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
    let (programs, arguments) = argv
        .split_at_checked(drivers::programs(&argv))
        .ok_or(Refusal::Named("not-a-compile"))?;
    let programs: Vec<PathBuf> = programs.iter().map(PathBuf::from).collect();
    let is_clippy = programs.len() > 1 && drivers::is_clippy(&programs[0]);
    if programs.len() > 1 && !is_clippy {
        return Err(Refusal::Named("workspace-wrapper"));
    }
    if environment::value(&request.environment, FIXING).is_some() {
        return Err(Refusal::Named("cargo-fix"));
    }
    let cwd = PathBuf::from(text(&request.cwd)?);
    let invocation = args::parse(arguments, &cwd).map_err(Refusal::Arguments)?;
    if chooses_linker_script(&invocation.link_args) {
        return Err(Refusal::Named("linker-script"));
    }
    if searches_elsewhere(&invocation.link_args) {
        return Err(Refusal::Named("linker-search"));
    }
    let searched = environment::value(&request.environment, b"RUST_TARGET_PATH");
    if invocation.target.is_some() && searched.is_some_and(|path| !path.is_empty()) {
        // A specification may lie there that no argument names.
        return Err(Refusal::Named("target-path"));
    }
    if invocation.runs_linker() {
        if invocation.linker.is_none() && invocation.linker_flavor.is_some() {
            // It decides which program that is, by rules of rustc's own.
            return Err(Refusal::Named("linker-flavor"));
        }
        if environment::makes_linkers_write(&request.environment) {
            return Err(Refusal::Named("linker-output"));
        }
    }
    let view = service
        .mounts
        .view(store::ViewId(request.token.0))
        .ok_or(Refusal::Named("view-not-mounted"))?;
    let out_dir = Ino(request.token.1);
    let roots = find_roots(request, &invocation, &view, out_dir, &cwd)?;

    let around = mode::around(roots.path(Root::View));
    let configured = [around, &cwd, service.storage.dir.root()];
    let mode = mode::mode(&request.environment, &configured)?;

    let tools = find_tools(
        service,
        &programs,
        &invocation,
        &view,
        &roots,
        &request.environment,
        &cwd,
    )?;
    let (compiler_digest, linker_digest) = tools.digests();
    let facts = key::Invocation {
        compiler: compiler_digest,
        linker: linker_digest,
        cpu: invocation.native_cpu.then(processor).transpose()?,
        arguments: invocation
            .keyed
            .iter()
            .map(|arg| roots.template(arg.as_bytes()))
            .collect(),
        source: roots.template(invocation.source.as_os_str().as_bytes()),
        remaps_cwd: !roots.in_cargo_home(),
        mode,
    };

    let externs = Externs::collect(service, &invocation, &view, &roots, &cwd)?;
    let runs_unknown = is_clippy
        || tools.compiler.behind_shim
        || tools.linker.as_ref().is_some_and(|linker| linker.is_script);
    let opaque = externs.proc_macro || runs_unknown;
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
    let mut hidden_roots = shortened_roots(&invocation.user_remaps, &roots);
    // A cfg leaves no trace of its value: what was compiled for it is what it decided.
    for cfg in invocation
        .keyed
        .iter()
        .filter(|arg| arg.starts_with("--cfg"))
    {
        hidden_roots.extend(roots.held_in(cfg.as_bytes()));
    }
    let mut prepared = Prepared {
        digest: facts.digest(),
        facts,
        dependencies: Dependencies {
            externs: externs.direct,
            closure: Vec::new(),
            named: Vec::new(),
            searched: Vec::new(),
            environment: Vec::new(),
        },
        scope: scope_of(&invocation, &tools, &roots, &view, &request.environment),
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
        parent: request.parent,
        secrets: service.secrets_of(request.parent),
        umask: request.umask,
        under_way,
        hidden_roots,
        opaque,
        runs_unknown,
        programs,
        is_clippy,
        mode,
        tools: (compiler_digest, linker_digest),
        linker_search: tools.linker.iter().flat_map(search_directories).collect(),
    };
    if !sidecars::are_found(&prepared) {
        return Err(Refusal::Arguments(Uncacheable::SplitDebuginfo));
    }
    prepared.dependencies.closure = closure_digests(service, &prepared, &externs.closure)?;
    let named = named_digests(service, &prepared)?;
    prepared.dependencies.named = named.read;
    prepared.dependencies.searched = named.searched;
    let unit_dirs = prepared.site(service).unit_dirs();
    prepared.dependencies.environment = environment::keyed(&prepared.environment, opaque)
        .into_iter()
        .map(|(name, value)| (name, unit_dirs.keyed(name, value)))
        .map(|(name, value)| (name.to_vec(), prepared.roots.template_place(&value)))
        .collect();
    Ok(prepared)
}

fn search_directories(linker: &Linker) -> impl Iterator<Item = PathBuf> {
    let named = linker.search.iter().map(|path| path.components().collect());
    let real = linker
        .search
        .iter()
        .filter_map(|path| fs::canonicalize(path).ok());
    named.chain(real)
}

/// The toolchain, packages that never change under their path, and the crates beside the
/// dependencies are known. The compiler's own are the directories it is told to write to.
///
/// Where a build script has left its files may be such a directory by its arguments; it is none.
fn scope_of(
    invocation: &args::Invocation,
    tools: &Tools,
    roots: &Roots,
    view: &View,
    environment: &Environment,
) -> Scope {
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let mut scope = scope_around(&tools.compiler, roots);
    let searches = invocation.searches.iter();
    let generated = environment::value(environment, b"OUT_DIR");
    let is_generated = |path: &Path| {
        let inside = path.strip_prefix(roots.path(Root::View));
        generated == Some(path.as_os_str().as_bytes())
            || inside.is_ok_and(|inside| is_out_dir(view, inside))
    };
    let beside = searches
        .filter(|search| search.kind == SearchKind::Dependency && !is_generated(&search.path));
    scope.known.extend(beside.map(|search| bytes(&search.path)));
    let own = [Some(&invocation.out_dir), invocation.incremental.as_ref()];
    scope.own = own.into_iter().flatten().map(|path| bytes(path)).collect();
    scope
}

/// What nobody who runs with this compiler need be watched at.
pub(super) fn scope_around(compiler: &Compiler, roots: &Roots) -> Scope {
    let packages = immutable_packages(roots);
    let packages = packages
        .into_iter()
        .map(|path| path.into_os_string().into_encoded_bytes());
    let mut scope = compiler.scope.clone();
    scope.known.extend(packages);
    scope
}

/// Where cargo keeps what it never changes once it is there (it relies on that itself).
pub(super) fn immutable_packages(roots: &Roots) -> Vec<PathBuf> {
    let cargo_home = Path::new(roots.path(Root::CargoHome));
    if !cargo_home.is_absolute() {
        return Vec::new();
    }
    ["registry/src", "git/checkouts"]
        .iter()
        .map(|part| cargo_home.join(part))
        .collect()
}

/// Whether a path leads into a view.
pub(super) fn in_view(service: &Service, roots: &Roots, path: &Path) -> bool {
    path.starts_with(roots.path(Root::View)) || service.mounts.locate(path).is_some()
}

/// The compiler, and the linker if one will run.
fn find_tools(
    service: &Service,
    programs: &[PathBuf],
    invocation: &args::Invocation,
    view: &Arc<View>,
    roots: &Roots,
    environment: &Environment,
    cwd: &Path,
) -> Result<Tools, Refusal> {
    let caller = toolchain::Caller {
        environment,
        cwd,
        in_view: &|path| in_view(service, roots, path),
    };
    let toolchains = &service.toolchains;
    let (sysroot, target) = (invocation.sysroot.as_deref(), invocation.target.as_deref());
    let compiler = toolchains
        .compiler_behind(programs, sysroot, target, &caller)
        .map_err(|_| Refusal::Named("unknown-compiler"))?;
    let linker = invocation
        .runs_linker()
        .then(|| toolchains.linker(invocation.linker.as_deref(), invocation.fuse_ld(), &caller))
        .transpose()
        .map_err(|_| Refusal::Named("unknown-linker"))?;
    for directory in linker.iter().flat_map(|linker| &linker.search) {
        // What those it knows by name lead to is keyed with it.
        let place = locate(service, view, roots, cwd, directory);
        refuse_library_scripts(&place, toolchain::LINKED_IN)?;
    }
    Ok(Tools { compiler, linker })
}

/// Whether compiler and linker are still what the key says.
pub fn same_tools(service: &Service, before: &Prepared) -> bool {
    find_tools(
        service,
        &before.programs,
        &before.invocation,
        &before.view,
        &before.roots,
        &before.environment,
        &before.cwd,
    )
    .is_ok_and(|tools| tools.digests() == before.tools)
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

/// The same dependencies, looked at again: equal when nothing changed while a compiler ran.
pub fn dependencies_again(service: &Service, before: &Prepared) -> Result<Dependencies, Refusal> {
    let (view, roots, cwd) = (&before.view, &before.roots, &before.cwd);
    let externs = Externs::collect(service, &before.invocation, view, roots, cwd)?;
    let named = named_digests(service, before)?;
    Ok(Dependencies {
        externs: externs.direct,
        closure: closure_digests(service, before, &externs.closure)?,
        named: named.read,
        searched: named.searched,
        environment: before.dependencies.environment.clone(),
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
    let cargo_home = cargo_home(&request.environment)?;
    let cwd = text(cwd.as_os_str().as_bytes())?;
    let roots = Roots::new(cwd, &cargo_home, text(view_path)?);
    Ok(roots.with_environment(&request.environment))
}

/// `$CARGO_HOME` as cargo finds it; empty when there is none.
pub(super) fn cargo_home(environment: &Environment) -> Result<String, Refusal> {
    let variable = |name: &[u8]| environment::value(environment, name);
    Ok(match (variable(b"CARGO_HOME"), variable(b"HOME")) {
        (Some(home), _) => text(home)?.to_owned(),
        (None, Some(home)) => format!("{}/.cargo", text(home)?),
        (None, None) => String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_by_text() {
        assert_eq!(normalise(Path::new("/a/./b/../c")), Path::new("/a/c"));
        assert_eq!(normalise(Path::new("/../a")), Path::new("/a"));
    }
}
