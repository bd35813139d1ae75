//! From a request to everything about a C compile but what it reads.
//!
//! A refusal is a named reason and a plain run. Arguments are keyed as they are, paths of this checkout
//! included: a compiler may make anything of a path, its length for one.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use store::{Ino, InvocationDigest, ViewId};
use wrapper::cc::args::{self, Compile};
use wrapper::cc::environment;
use wrapper::cc::key::CcInvocation;
use wrapper::protocol::CcRequest;
use wrapper::roots::Roots;
use wrapper::trace::Scope;

use super::super::Service;
use super::super::machine::processor;
use super::super::observed::Site;
use super::super::prepare::{Refusal, cargo_home, in_view, text};
use super::super::programs::{find_program, is_elf};
use super::super::script::prepare::{view_root, workspace_root};
use super::super::unit_dirs::UnitDirs;
use super::dates;
use crate::fs::{Caller, View};
use crate::lazy::secrets::{self, Secrets};

/// How the programs are called that take the arguments `args` knows.
const DRIVERS: [&str; 5] = ["gcc", "g++", "clang", "clang++", "c++"];

/// A compile before it is known what it reads.
pub(super) struct Prepared {
    /// The parsed arguments.
    pub(super) compile: Compile,
    /// The view the object goes to.
    pub(super) view: Arc<View>,
    /// The directory in it.
    pub(super) directory: Ino,
    /// What the outputs are called there: the object, and the list of what it includes.
    pub(super) names: Vec<Vec<u8>>,
    /// Literal paths.
    pub(super) roots: Roots,
    /// Where input records are found.
    pub(super) digest: InvocationDigest,
    /// What is keyed of its environment.
    pub(super) environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub(super) cwd: PathBuf,
    /// Who asks.
    pub(super) caller: Caller,
    /// Their file mode creation mask.
    pub(super) umask: u32,
    /// What must not leave this machine.
    pub(super) secrets: Secrets,
    /// What it need not be watched at: its outputs.
    pub(super) scope: Scope,
}

impl Prepared {
    /// Where it runs.
    pub(super) fn site<'a>(&'a self, service: &'a Service) -> Site<'a> {
        Site {
            service,
            view: &self.view,
            roots: &self.roots,
            cwd: &self.cwd,
            environment: &self.environment,
        }
    }

    /// The outputs as the compiler would name them.
    pub(super) fn written(&self) -> Vec<Vec<u8>> {
        let outputs = [Some(&self.compile.object), self.compile.depfile.as_ref()];
        let whole = |path: &String| self.cwd.join(path).into_os_string().into_encoded_bytes();
        outputs.into_iter().flatten().map(whole).collect()
    }
}

/// Everything about a compile but what it reads.
pub(super) fn prepare(
    service: &Service,
    request: &CcRequest,
    caller: Caller,
) -> Result<Prepared, Refusal> {
    let argv: Vec<String> = request
        .argv
        .iter()
        .map(|arg| text(arg).map(str::to_owned))
        .collect::<Result<_, _>>()?;
    let (program, arguments) = argv.split_first().ok_or(Refusal::Named("cc-query"))?;
    let compile = args::parse(arguments).map_err(|reason| Refusal::Named(reason.name()))?;
    if compile
        .keyed
        .iter()
        .any(|arg| dates::in_text(arg.as_bytes()))
    {
        return Err(Refusal::Named("cc-date"));
    }
    if environment::changes_the_run(&request.environment) {
        return Err(Refusal::Named("cc-environment"));
    }
    let cwd = PathBuf::from(text(&request.cwd)?);
    let names = names(request, &compile, &cwd)?;
    let view = service
        .mounts
        .view(ViewId(request.token.0))
        .ok_or(Refusal::Named("view-not-mounted"))?;
    let directory = Ino(request.token.1);
    let view_path = view_root(&request.directory, directory, &view)?;
    let home = cargo_home(&request.environment)?;
    let workspace = workspace_root(Path::new(view_path), &cwd, Path::new(&home));
    let roots = Roots::new(text(workspace.as_os_str().as_bytes())?, &home, view_path)
        .with_environment(&request.environment);

    let (named, driver) = driver(service, &roots, Path::new(program), request, &cwd)?;
    let unit_dirs = UnitDirs::of(&roots, &request.environment);
    let keyed = |(name, value): (&[u8], &[u8])| {
        let value = if environment::is_searched(name) {
            roots.template_place(&unit_dirs.keyed(name, value))
        } else {
            value.to_vec()
        };
        (name.to_vec(), value)
    };
    let mut read = environment::keyed(&request.environment);
    read.extend(other_name_of(service, &roots, request, &cwd));
    let facts = CcInvocation {
        processor: processor()?,
        compiler: service
            .files
            .file(&driver)
            .map_err(|_| Refusal::Named("cc-unknown-compiler"))?,
        program: driver.as_os_str().as_bytes().to_vec(),
        name: program.as_bytes().to_vec(),
        found: named.as_os_str().as_bytes().to_vec(),
        arguments: compile.keyed.iter().map(|arg| arg.clone().into()).collect(),
        object: names.first().cloned().unwrap_or_default(),
        cwd: roots.template(&request.cwd),
        environment: read.iter().copied().map(keyed).collect(),
    };
    let as_is = |(name, value): (&[u8], &[u8])| (name.to_vec(), value.to_vec());
    let mut prepared = Prepared {
        digest: facts.digest(),
        environment: read.iter().copied().map(as_is).collect(),
        umask: request.umask,
        secrets: secrets::of_script(&request.environment),
        scope: Scope::default(),
        compile,
        view,
        directory,
        names,
        roots,
        cwd,
        caller,
    };
    prepared.scope.own = prepared.written();
    Ok(prepared)
}

/// What the outputs are called in the directory that was asked. Each must lie there.
fn names(request: &CcRequest, compile: &Compile, cwd: &Path) -> Result<Vec<Vec<u8>>, Refusal> {
    let asked = Path::new(OsStr::from_bytes(&request.directory));
    let name = |path: &str| {
        let whole = cwd.join(path);
        // `a/..` and `a/.` end in no name.
        let name = whole.file_name().filter(|_| !path.ends_with(['/', '.']))?;
        (whole.parent() == Some(asked)).then(|| name.as_bytes().to_vec())
    };
    let object = name(&compile.object).ok_or(Refusal::Named("cc-output-outside-view"))?;
    let depfile = match &compile.depfile {
        Some(depfile) => Some(name(depfile).ok_or(Refusal::Named("cc-depfile-elsewhere"))?),
        None => None,
    };
    if depfile.as_ref() == Some(&object) {
        return Err(Refusal::Named("cc-depfile-flags"));
    }
    Ok([object].into_iter().chain(depfile).collect())
}

/// `PWD` where it is another name of the working directory: compilers then prefer it.
fn other_name_of<'a>(
    service: &Service,
    roots: &Roots,
    request: &'a CcRequest,
    cwd: &Path,
) -> Option<(&'a [u8], &'a [u8])> {
    const PWD: &[u8] = b"PWD";
    let value = wrapper::environment::value(&request.environment, PWD)?;
    let said = Path::new(OsStr::from_bytes(value));
    if value == request.cwd || !said.is_absolute() {
        return None;
    }
    let identity = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    // Nothing is asked of a view through its mount.
    let hidden = in_view(service, roots, said) || in_view(service, roots, cwd);
    (hidden || identity(said) == identity(cwd)).then_some((PWD, value))
}

/// The program of a gcc or a clang, as it is found and as it is; not a script, and none that stands before
/// compilers.
fn driver(
    service: &Service,
    roots: &Roots,
    program: &Path,
    request: &CcRequest,
    cwd: &Path,
) -> Result<(PathBuf, PathBuf), Refusal> {
    let unknown = || Refusal::Named("cc-unknown-compiler");
    let named = find_program(program, &request.environment, cwd).map_err(|_| unknown())?;
    if in_view(service, roots, &named) {
        return Err(unknown());
    }
    let real = fs::canonicalize(&named).map_err(|_| unknown())?;
    let is_known = real
        .file_name()
        .and_then(OsStr::to_str)
        .is_some_and(is_driver);
    if is_known && is_elf(&real).unwrap_or(false) {
        Ok((named, real))
    } else {
        Err(unknown())
    }
}

/// `gcc`, `x86_64-linux-gnu-gcc-12`, `clang-14`.
fn is_driver(name: &str) -> bool {
    let is_version = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    let name = match name.rsplit_once('-') {
        Some((name, version)) if is_version(version) => name,
        _ => name,
    };
    let last = name.rsplit_once('-').map_or(name, |(_, last)| last);
    DRIVERS.contains(&last)
}

#[cfg(test)]
mod tests {
    use super::is_driver;

    #[test]
    fn drivers_by_their_names() {
        for name in [
            "gcc",
            "x86_64-linux-gnu-gcc-12",
            "clang-14",
            "g++-12.2",
            "clang++",
        ] {
            assert!(is_driver(name), "{name}");
        }
        for name in [
            "ccache",
            "tcc",
            "nvcc",
            "icc",
            "clang-tidy",
            "gcc-ar",
            "distcc",
            "cc",
        ] {
            assert!(!is_driver(name), "{name}");
        }
    }
}
