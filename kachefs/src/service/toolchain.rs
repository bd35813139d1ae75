//! Who compiles and who links: identities by content, not by path or name.
//!
//! A compiler is its executable, its libraries and the standard library of the target. A linker
//! is the driver, the programs it runs and the start files and libc it puts in. All files are
//! looked at on every request (a stat each); bytes are read only when one changed.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use store::{Digest, Hasher};
use wrapper::environment::{self, Environment};
use wrapper::trace::Scope;

use super::files::FileDigests;
use super::programs::{find_program, first_line, is_elf, loaded_libraries, said};

/// What gcc-like drivers put into what they link without being asked (gcc(1), "-print-file-name").
pub(super) const LINKED_IN: &[&str] = &[
    "Scrt1.o",
    "crt1.o",
    "crtbegin.o",
    "crtbeginS.o",
    "crtbeginT.o",
    "crtend.o",
    "crtendS.o",
    "crti.o",
    "crtn.o",
    "gcrt1.o",
    "rcrt1.o",
    "libc.so",
    "libc.so.6",
    "libc.a",
    "libc_nonshared.a",
    "libdl.so.2",
    "libgcc.a",
    "libgcc_eh.a",
    "libgcc_s.so",
    "libgcc_s.so.1",
    "libm.so",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libutil.so.1",
];
/// Programs such drivers run (gcc(1), "-print-prog-name").
const LINK_PROGRAMS: &[&str] = &["collect2", "ld"];

/// What a driver says it runs, links in, and where it searches.
struct Driver {
    files: Vec<PathBuf>,
    /// Programs it leaves to `PATH`, where another may come first tomorrow.
    programs: Vec<PathBuf>,
    search: Vec<PathBuf>,
}

/// Drivers whose answers are kept. Each `PATH` has its own.
const DRIVERS: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// Which driver was asked, and under which circumstances.
type Asked = (PathBuf, Digest, Vec<Option<Vec<u8>>>);

const PATH: &[u8] = b"PATH";

/// Variables that change what a gcc-like driver answers (gcc(1), "ENVIRONMENT").
const ASKED_UNDER: &[&[u8]] = &[
    PATH,
    b"LIBRARY_PATH",
    b"COMPILER_PATH",
    b"GCC_EXEC_PREFIX",
    b"CCC_OVERRIDE_OPTIONS",
    b"CCC_ADD_ARGS",
];

/// A linker as the key sees it.
#[derive(Clone, Debug)]
pub struct Linker {
    /// Digest of everything that is the linker.
    pub digest: Digest,
    /// Whether it is a script, which may look at any environment variable.
    pub is_script: bool,
    /// Where it looks for libraries without being told to.
    pub search: Vec<PathBuf>,
}

/// A compiler as the key sees it.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// Digest of everything that is the compiler.
    pub digest: Digest,
    /// Whether a script or proxy stands before it, which may look at any environment variable.
    pub behind_shim: bool,
    /// What of it the digest holds, so that nobody need look there again.
    pub scope: Scope,
}

/// The programs one action runs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Who compiles.
    pub compiler: Compiler,
    /// Who links, if anybody does.
    pub linker: Option<Linker>,
}

impl Tools {
    /// What the key holds of them.
    pub fn digests(&self) -> (Digest, Option<Digest>) {
        let linker = self.linker.as_ref().map(|linker| linker.digest);
        (self.compiler.digest, linker)
    }
}

/// Where a request comes from, which decides what its program names mean.
pub struct Caller<'a> {
    /// Its environment.
    pub environment: &'a Environment,
    /// Its working directory.
    pub cwd: &'a Path,
    /// Whether a path leads into a view.
    pub in_view: &'a dyn Fn(&Path) -> bool,
}

impl Caller<'_> {
    /// The directories of `LD_LIBRARY_PATH` (ld.so(8); ld(1), "-rpath-link"), but for those in
    /// views: cargo puts the directory it builds into there, where compilers find only each other's
    /// outputs.
    pub fn loader_path(&self) -> impl Iterator<Item = PathBuf> {
        environment::value(self.environment, b"LD_LIBRARY_PATH")
            .filter(|value| !value.is_empty())
            .into_iter()
            .flat_map(|value| value.split(|byte| matches!(byte, b':' | b';')))
            .map(|path| self.cwd.join(OsStr::from_bytes(path)))
            .filter(|path| !(self.in_view)(path))
    }

    /// Libraries that the loader puts into every program (ld.so(8)). One without a path is searched
    /// for: an error.
    fn preloaded(&self) -> io::Result<Vec<PathBuf>> {
        const NAMES: [&[u8]; 2] = [b"LD_PRELOAD", b"LD_AUDIT"];
        let named = NAMES
            .into_iter()
            .filter_map(|name| environment::value(self.environment, name))
            .flat_map(|value| value.split(|byte| matches!(byte, b':' | b' ')))
            .filter(|path| !path.is_empty());
        named
            .map(|path| {
                if path.contains(&b'/') {
                    Ok(self.cwd.join(OsStr::from_bytes(path)))
                } else {
                    Err(io::Error::other("a preloaded library without a path"))
                }
            })
            .collect()
    }
}

/// Finds and digests compilers and linkers.
pub struct Toolchains {
    files: Arc<FileDigests>,
    /// What a driver said, by who was asked and under which circumstances.
    drivers: Mutex<LruCache<Asked, Arc<Driver>>>,
}

impl Toolchains {
    /// Nothing known yet.
    pub fn new(files: Arc<FileDigests>) -> Self {
        Self {
            files,
            drivers: Mutex::new(LruCache::new(DRIVERS)),
        }
    }

    /// The identity of a compiler and of the driver that stands before it, if one does.
    pub fn compiler_behind(
        &self,
        programs: &[PathBuf],
        sysroot: Option<&Path>,
        target: Option<&str>,
        caller: &Caller,
    ) -> io::Result<Compiler> {
        let (first, others) = programs
            .split_first()
            .ok_or_else(|| io::Error::other("no compiler"))?;
        let mut compiler = self.compiler(first, sysroot, target, caller)?;
        for other in others {
            let other = self.compiler(other, sysroot, target, caller)?;
            let mut hasher = Hasher::new("kachefs driver");
            hasher.digest(&compiler.digest).digest(&other.digest);
            compiler.digest = hasher.finish();
            compiler.behind_shim |= other.behind_shim;
        }
        Ok(compiler)
    }

    /// The identity of the compiler cargo calls as `program`, for `target` (`None`: the host).
    pub fn compiler(
        &self,
        program: &Path,
        sysroot: Option<&Path>,
        target: Option<&str>,
        caller: &Caller,
    ) -> io::Result<Compiler> {
        let (environment, cwd) = (caller.environment, caller.cwd);
        let named = find_program(program, environment, cwd)?;
        let path = fs::canonicalize(&named)?;
        let mut hasher = Hasher::new("kachefs compiler");
        hasher.digest(&self.files.file(&path)?);
        // A toolchain made of links can be meant by either path; both are looked at.
        let mut roots = roots_of([&path, &named]);
        let elsewhere = roots.is_empty();
        if elsewhere {
            // Under the name it was called by: rustup's proxies go by it.
            let root = sysroot_behind(&named, environment, cwd)?;
            if !has_driver(&root.join("lib")) {
                self.add_loaded(&mut hasher, [&named, &root.join("bin/rustc")], environment)?;
            }
            roots.push(root);
        }
        // The loader looks there before it looks beside the program (ld.so(8)): cargo run by
        // another toolchain may lend this rustc that toolchain's compiler, and with it the
        // sysroot, which is the directory above.
        // ld looks there too, for what a shared library needs.
        for lent in caller.loader_path() {
            if has_driver(&lent) {
                self.add_directory(&mut hasher, &lent)?;
                roots.extend(lent.parent().map(Path::to_owned));
            } else {
                add_found(&mut hasher, self.files.shared_libraries(&lent))?;
            }
        }
        for library in caller.preloaded()? {
            self.add_file(&mut hasher, &library)?;
        }
        roots.sort();
        roots.dedup();
        for root in &roots {
            self.add_directory(&mut hasher, &root.join("lib"))?;
            self.add_file(&mut hasher, &root.join("bin/rustc"))?;
            // What a proxy of another name leads to.
            if let Some(name) = named.file_name() {
                self.add_file(&mut hasher, &root.join("bin").join(name))?;
            }
        }
        let mut scope = Scope::default();
        for root in roots.iter().map(PathBuf::as_path).chain(sysroot) {
            let digested = self.add_rustlib(&mut hasher, &root.join("lib/rustlib"), target)?;
            add_to_scope(&mut scope, root, &digested);
        }
        Ok(Compiler {
            digest: hasher.finish(),
            behind_shim: elsewhere || !is_elf(&path)?,
            scope,
        })
    }

    /// Where a compiler is that need not be run to tell which one it is.
    pub fn told_by_content(&self, program: &Path, caller: &Caller) -> Option<PathBuf> {
        let named = find_program(program, caller.environment, caller.cwd).ok()?;
        let path = fs::canonicalize(&named).ok()?;
        let is_told = is_elf(&path).ok()? && !roots_of([&path, &named]).is_empty();
        is_told.then_some(named)
    }

    /// What `programs` load, for a compiler that keeps its libraries in a directory of the
    /// system's. An error when none of them loads a compiler.
    fn add_loaded(
        &self,
        hasher: &mut Hasher,
        programs: [&Path; 2],
        environment: &Environment,
    ) -> io::Result<()> {
        let mut found = false;
        for program in programs {
            // A script, or no file at all, loads nothing.
            if !is_elf(program).unwrap_or(false) {
                continue;
            }
            for library in loaded_libraries(program, environment)? {
                found |= is_driver(library.file_name());
                self.add_file(hasher, &library)?;
            }
        }
        if !found {
            return Err(io::Error::other("the compiler's own library is nowhere"));
        }
        Ok(())
    }

    /// The host's part of `lib/rustlib` (its tools, its standard library for proc macros and
    /// build scripts) and the target's.
    fn add_rustlib(
        &self,
        hasher: &mut Hasher,
        rustlib: &Path,
        target: Option<&str>,
    ) -> io::Result<Vec<PathBuf>> {
        // The libraries of a target with a specification of its own go by its name.
        let target = target.map(Path::new).and_then(|target| {
            let is_file = target
                .extension()
                .is_some_and(|extension| extension == "json");
            if is_file {
                target.file_stem()
            } else {
                target.file_name()
            }
        });
        let mut triples: Vec<PathBuf> = match fs::read_dir(rustlib) {
            Ok(entries) => entries
                .filter_map(Result::ok)
                // Nothing lies below a file; a link may lead to a directory.
                .filter(|entry| !entry.file_type().is_ok_and(|kind| kind.is_file()))
                .map(|entry| entry.path())
                // Tools live below the host's triple only.
                .filter(|path| {
                    path.join("bin").is_dir()
                        || target.is_some_and(|t| path.file_name() == Some(t))
                        || (target.is_none() && path.join("lib").is_dir())
                })
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        triples.sort();
        for triple in &triples {
            hasher.field(triple.file_name().unwrap_or_default().as_bytes());
            self.add_file(hasher, &triple.join("target.json"))?;
            for part in [
                "lib",
                "bin",
                "bin/gcc-ld",
                "bin/self-contained",
                "codegen-backends",
                "lib/self-contained",
            ] {
                self.add_directory(hasher, &triple.join(part))?;
            }
            // Describes a target the compiler does not know by heart.
            self.add_file(hasher, &triple.join("target.json"))?;
        }
        Ok(triples)
    }

    fn add_directory(&self, hasher: &mut Hasher, path: &Path) -> io::Result<()> {
        add_found(hasher, self.files.search_directory(path))
    }

    fn add_file(&self, hasher: &mut Hasher, path: &Path) -> io::Result<()> {
        add_found(hasher, self.files.file(path))
    }

    /// The identity of the linker: `linker` as `-C linker` names it (`None`: `cc`), and the
    /// program a `-fuse-ld=` argument selects. A script is never run to find out: its own content
    /// counts, and that of `cc`, which it most likely ends up with.
    pub fn linker(
        &self,
        linker: Option<&Path>,
        fuse_ld: Option<&str>,
        caller: &Caller,
    ) -> io::Result<Linker> {
        let (environment, cwd) = (caller.environment, caller.cwd);
        let named = find_program(linker.unwrap_or(Path::new("cc")), environment, cwd)?;
        let is_script = !is_elf(&named)?;
        let mut hasher = Hasher::new("kachefs linker");
        hasher.digest(&self.files.file(&named)?);
        let driver = if is_script {
            find_program(Path::new("cc"), environment, cwd)
                .ok()
                .filter(|cc| is_elf(cc).unwrap_or(false))
        } else {
            Some(named)
        };
        let search = match driver {
            Some(driver) => self.add_driver(&mut hasher, &driver, environment)?,
            None => Vec::new(),
        };
        if let Some(name) = fuse_ld {
            let program = PathBuf::from(format!("ld.{name}"));
            match find_program(&program, environment, cwd) {
                Ok(path) => self.add_file(&mut hasher, &path)?,
                Err(_) => drop(hasher.number(0)),
            }
        }
        Ok(Linker {
            digest: hasher.finish(),
            is_script,
            search,
        })
    }

    fn add_driver(
        &self,
        hasher: &mut Hasher,
        driver: &Path,
        environment: &Environment,
    ) -> io::Result<Vec<PathBuf>> {
        let digest = self.files.file(driver)?;
        hasher.digest(&digest);
        let says = self.driver(driver, digest, environment)?;
        for path in &says.files {
            hasher.field(path.file_name().unwrap_or_default().as_bytes());
            self.add_file(hasher, path)?;
        }
        for program in &says.programs {
            hasher.field(program.as_os_str().as_bytes());
            match find_program(program, environment, Path::new("/")) {
                Ok(path) => self.add_file(hasher, &path)?,
                Err(_) => drop(hasher.number(0)),
            }
        }
        // `-lz` may find any library there, named by an attribute in a crate nobody asked us
        // about.
        // One that is not there may come, and then comes first.
        let mut seen = HashSet::new();
        for path in &says.search {
            let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            if !seen.contains(&real) {
                self.add_directory(hasher, &real)?;
                seen.insert(real);
            }
        }
        Ok(says.search.clone())
    }

    /// What the driver says of itself; an error for one that is not gcc-like.
    fn driver(
        &self,
        driver: &Path,
        digest: Digest,
        environment: &Environment,
    ) -> io::Result<Arc<Driver>> {
        let under = ASKED_UNDER.iter().map(|name| {
            let value = environment::value(environment, name)?;
            Some(match *name {
                PATH => that_are_there(value),
                _ => value.to_vec(),
            })
        });
        let under = under.collect();
        let key: Asked = (driver.to_owned(), digest, under);
        if let Some(known) = self.drivers.lock().get(&key) {
            return Ok(Arc::clone(known));
        }
        let questions = LINK_PROGRAMS
            .iter()
            .map(|name| format!("-print-prog-name={name}"))
            .chain(
                LINKED_IN
                    .iter()
                    .map(|name| format!("-print-file-name={name}")),
            );
        let (mut files, mut programs) = (Vec::new(), Vec::new());
        for question in questions {
            let mut command = Command::new(driver);
            command.arg(&question);
            let Some(answer) = first_line(command, environment)? else {
                continue;
            };
            let answer = PathBuf::from(answer);
            // A bare name means "not found" for files and "ask PATH" for programs.
            if answer.is_absolute() {
                files.push(answer);
            } else if question.starts_with("-print-prog") {
                programs.push(answer);
            }
        }
        let says = Arc::new(Driver {
            files,
            programs,
            search: search_path(driver, environment)?,
        });
        self.drivers.lock().put(key, Arc::clone(&says));
        Ok(says)
    }
}

/// The directories of a list that are there, or may be: rustup puts one before the others that need not be, and
/// programs are asked thirty questions where the list is another.
fn that_are_there(list: &[u8]) -> Vec<u8> {
    let directories = list.split(|byte| *byte == b':');
    let may_be_there = |directory: &&[u8]| {
        let path = Path::new(OsStr::from_bytes(directory));
        let missing =
            fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        path.is_relative() || !missing
    };
    let there: Vec<&[u8]> = directories.filter(may_be_there).collect();
    there.join(&b':')
}

/// What the digest holds of a toolchain. Of one that the system's packages put below `/usr`, only what
/// lies in directories of its own: the rest there is everybody's.
fn add_to_scope(scope: &mut Scope, root: &Path, triples: &[PathBuf]) {
    let bytes = |path: PathBuf| path.into_os_string().into_encoded_bytes();
    let shared = ["/", "/usr", "/usr/local"].map(Path::new).contains(&root);
    if !shared {
        // As programs in `bin`, and libraries, find their libraries, too (`$ORIGIN/../lib`).
        for libraries in ["lib", "lib/../lib", "bin/../lib", "bin/../lib/../lib"] {
            scope.known.push(bytes(root.join(libraries)));
            scope
                .unknown
                .push(bytes(root.join(libraries).join("rustlib")));
        }
        scope.known.push(bytes(root.join("bin/rustc")));
    }
    scope.known.extend(triples.iter().cloned().map(bytes));
}

/// What is there, or that it is not there.
fn add_found(hasher: &mut Hasher, found: io::Result<Digest>) -> io::Result<()> {
    match found {
        Ok(digest) => hasher.number(1).digest(&digest),
        Err(error) if error.kind() == io::ErrorKind::NotFound => hasher.number(0),
        Err(error) => return Err(error),
    };
    Ok(())
}

/// The toolchains these programs are of, which are mostly one.
fn roots_of([path, named]: [&PathBuf; 2]) -> Vec<PathBuf> {
    [Some(path), Some(named).filter(|named| *named != path)]
        .into_iter()
        .filter_map(|path| path?.parent()?.parent())
        .filter(|root| has_driver(&root.join("lib")))
        .map(Path::to_owned)
        .collect()
}

/// Whether a directory holds what `rustc` itself is little more than a call of.
fn has_driver(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| is_driver(Some(&entry.file_name())))
    })
}

fn is_driver(name: Option<&OsStr>) -> bool {
    name.is_some_and(|name| name.as_bytes().starts_with(b"librustc_driver-"))
}

/// Asks a proxy or script which toolchain it stands for. Asked every time: the answer can depend
/// on files anywhere above the working directory.
fn sysroot_behind(program: &Path, environment: &Environment, cwd: &Path) -> io::Result<PathBuf> {
    let mut command = Command::new(program);
    command.args(["--print", "sysroot"]).current_dir(cwd);
    let answer = first_line(command, environment)?.map(PathBuf::from);
    answer
        .filter(|path| path.is_absolute())
        .ok_or_else(|| io::Error::other(format!("{} does not tell its sysroot", program.display())))
}

/// Directories a gcc-like driver searches for libraries (gcc(1), "-print-search-dirs").
fn search_path(driver: &Path, environment: &Environment) -> io::Result<Vec<PathBuf>> {
    let mut command = Command::new(driver);
    command.arg("-print-search-dirs");
    let said = said(command, environment)?;
    let line = said
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"libraries: ="));
    let paths: Vec<PathBuf> = line
        .unwrap_or_default()
        .split(|byte| *byte == b':')
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(OsStr::from_bytes(path)))
        .collect();
    // It would mean another directory for each compile, and the answer is remembered.
    if paths.iter().any(|path| path.is_relative()) {
        return Err(io::Error::other("a relative directory is searched"));
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_are_not_there_make_no_other_path() {
        let dir = tempfile::tempdir().expect("tempdir");
        let [bin, missing] = ["bin", "missing"].map(|name| dir.path().join(name));
        fs::create_dir(&bin).expect("mkdir");
        let list = |paths: &[&Path]| {
            let paths: Vec<&[u8]> = paths
                .iter()
                .map(|path| path.as_os_str().as_bytes())
                .collect();
            paths.join(&b':')
        };
        let [bin, missing]: [&Path; 2] = [&bin, &missing];
        let there = |paths: &[&Path]| that_are_there(&list(paths));
        assert_eq!(
            there(&[missing, bin, Path::new("/usr/bin")]),
            list(&[bin, Path::new("/usr/bin")])
        );
        let relative = [Path::new("missing"), Path::new(""), bin];
        assert_eq!(there(&relative), list(&relative));
        fs::create_dir(missing).expect("mkdir");
        assert_eq!(there(&[missing, bin]), list(&[missing, bin]));
    }
}
