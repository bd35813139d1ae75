//! Who compiles and who links: identities by content, not by path or name.
//!
//! A compiler is its executable, its libraries and the standard library of the target. A linker
//! is the driver, the programs it runs and the start files and libc it puts in. All files are
//! looked at on every request (a stat each); bytes are read only when one changed.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use store::{Digest, Hasher};
use wrapper::environment;

use super::files::FileDigests;

/// What gcc-like drivers put into what they link without being asked (gcc(1), "-print-file-name").
const LINKED_IN: &[&str] = &[
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
    search: Vec<PathBuf>,
}

/// Which driver was asked, and under which circumstances.
type Asked = (PathBuf, Digest, Vec<Option<Vec<u8>>>);

/// Variables that change what a gcc-like driver answers (gcc(1), "ENVIRONMENT").
const ASKED_UNDER: &[&[u8]] = &[
    b"PATH",
    b"LIBRARY_PATH",
    b"COMPILER_PATH",
    b"GCC_EXEC_PREFIX",
    b"CCC_OVERRIDE_OPTIONS",
    b"CCC_ADD_ARGS",
];

/// How long a driver may take to answer a question about itself.
const PROBE: Duration = Duration::from_secs(10);

/// A linker as the key sees it.
#[derive(Clone, Debug)]
pub struct Linker {
    /// Digest of everything that is the linker.
    pub digest: Digest,
    /// Whether it is a script, which may look at any environment variable.
    pub is_script: bool,
}

/// The environment of a request.
pub type Environment = [(Vec<u8>, Vec<u8>)];

/// A compiler as the key sees it.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// Digest of everything that is the compiler.
    pub digest: Digest,
    /// Whether a script or proxy stands before it, which may look at any environment variable.
    pub behind_shim: bool,
}

/// Finds and digests compilers and linkers.
pub struct Toolchains {
    files: Arc<FileDigests>,
    /// What a driver said it links in, by driver path and digest.
    drivers: Mutex<HashMap<Asked, Arc<Driver>>>,
}

impl Toolchains {
    /// Nothing known yet.
    pub fn new(files: Arc<FileDigests>) -> Self {
        Self {
            files,
            drivers: Mutex::default(),
        }
    }

    /// The identity of the compiler cargo calls as `program`, for `target` (`None`: the host).
    pub fn compiler(
        &self,
        program: &Path,
        sysroot: Option<&Path>,
        target: Option<&str>,
        environment: &Environment,
        cwd: &Path,
        in_view: &dyn Fn(&Path) -> bool,
    ) -> io::Result<Compiler> {
        let named = find_program(program, environment, cwd)?;
        let path = fs::canonicalize(&named)?;
        let mut hasher = Hasher::new("kachefs compiler");
        hasher.digest(&self.files.file(&path)?);
        // A toolchain made of links can be meant by either path; both are looked at.
        let mut roots: Vec<PathBuf> = [&path, &named]
            .into_iter()
            .filter_map(|path| path.parent()?.parent())
            .filter(|root| has_driver(root))
            .map(Path::to_owned)
            .collect();
        let behind_shim = roots.is_empty();
        if behind_shim {
            // Under the name it was called by: rustup's proxies go by it.
            roots.push(sysroot_behind(&named, environment, cwd)?);
        }
        // The loader looks there before it looks beside the program (ld.so(8)): cargo run by
        // another toolchain may lend this rustc that toolchain's compiler.
        let search = environment::value(environment, b"LD_LIBRARY_PATH").unwrap_or_default();
        roots.extend(
            search
                .split(|byte| *byte == b':')
                .map(|path| cwd.join(OsStr::from_bytes(path)))
                .filter(|path| !in_view(path))
                .filter_map(|path| path.parent().map(Path::to_owned))
                .filter(|root| has_driver(root)),
        );
        roots.sort();
        roots.dedup();
        for root in &roots {
            self.add_directory(&mut hasher, &root.join("lib"))?;
            self.add_file(&mut hasher, &root.join("bin/rustc"))?;
        }
        for root in roots.iter().map(PathBuf::as_path).chain(sysroot) {
            self.add_rustlib(&mut hasher, &root.join("lib/rustlib"), target)?;
        }
        Ok(Compiler {
            digest: hasher.finish(),
            behind_shim,
        })
    }

    /// The host's part of `lib/rustlib` (its tools, its standard library for proc macros and
    /// build scripts) and the target's.
    fn add_rustlib(
        &self,
        hasher: &mut Hasher,
        rustlib: &Path,
        target: Option<&str>,
    ) -> io::Result<()> {
        let mut triples: Vec<PathBuf> = match fs::read_dir(rustlib) {
            Ok(entries) => entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                // Tools live below the host's triple only.
                .filter(|path| {
                    path.join("bin").is_dir()
                        || target.is_some_and(|t| path.file_name() == Some(OsStr::new(t)))
                        || (target.is_none() && path.join("lib").is_dir())
                })
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        triples.sort();
        for triple in triples {
            hasher.field(triple.file_name().unwrap_or_default().as_bytes());
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
        }
        Ok(())
    }

    fn add_directory(&self, hasher: &mut Hasher, path: &Path) -> io::Result<()> {
        match self.files.search_directory(path) {
            Ok(digest) => hasher.number(1).digest(&digest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => hasher.number(0),
            Err(error) => return Err(error),
        };
        Ok(())
    }

    fn add_file(&self, hasher: &mut Hasher, path: &Path) -> io::Result<()> {
        match self.files.file(path) {
            Ok(digest) => hasher.number(1).digest(&digest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => hasher.number(0),
            Err(error) => return Err(error),
        };
        Ok(())
    }

    /// The identity of the linker: `linker` as `-C linker` names it (`None`: `cc`), and the
    /// program a `-fuse-ld=` argument selects. A script is never run to find out: its own content
    /// counts, and that of `cc`, which it most likely ends up with.
    pub fn linker(
        &self,
        linker: Option<&Path>,
        fuse_ld: Option<&str>,
        environment: &Environment,
        cwd: &Path,
    ) -> io::Result<Linker> {
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
        if let Some(driver) = driver {
            self.add_driver(&mut hasher, &driver, environment)?;
        }
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
        })
    }

    fn add_driver(
        &self,
        hasher: &mut Hasher,
        driver: &Path,
        environment: &Environment,
    ) -> io::Result<()> {
        let digest = self.files.file(driver)?;
        hasher.digest(&digest);
        let says = self.driver(driver, digest, environment)?;
        for path in &says.files {
            hasher.field(path.file_name().unwrap_or_default().as_bytes());
            self.add_file(hasher, path)?;
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
        Ok(())
    }

    /// What the driver says of itself; an error for one that is not gcc-like.
    fn driver(
        &self,
        driver: &Path,
        digest: Digest,
        environment: &Environment,
    ) -> io::Result<Arc<Driver>> {
        let under = ASKED_UNDER
            .iter()
            .map(|name| environment::value(environment, name).map(<[u8]>::to_vec))
            .collect();
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
        let mut files = Vec::new();
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
            } else if let Ok(path) = find_program(&answer, environment, Path::new("/"))
                && question.starts_with("-print-prog")
            {
                files.push(path);
            }
        }
        let says = Arc::new(Driver {
            files,
            search: search_path(driver, environment)?,
        });
        self.drivers.lock().insert(key, Arc::clone(&says));
        Ok(says)
    }
}

/// Whether a directory is a toolchain: `bin/rustc` loads `lib/librustc_driver-*.so`.
fn has_driver(root: &Path) -> bool {
    fs::read_dir(root.join("lib")).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            entry
                .file_name()
                .as_bytes()
                .starts_with(b"librustc_driver-")
        })
    })
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

fn first_line(command: Command, environment: &Environment) -> io::Result<Option<OsString>> {
    let said = said(command, environment)?;
    let line = said.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok((!line.is_empty()).then(|| OsString::from_vec(line.to_vec())))
}

/// What a program prints. One that does not finish saying it in time is ended, and half an answer
/// is none.
fn said(mut command: Command, environment: &Environment) -> io::Result<Vec<u8>> {
    let mut child = command
        .env_clear()
        .envs(
            environment
                .iter()
                .map(|(n, v)| (OsStr::from_bytes(n), OsStr::from_bytes(v))),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let text = child
        .stdout
        .take()
        .map_or(Ok(Vec::new()), |stdout| read_in_time(stdout, PROBE));
    if text.is_err() {
        // Already ended is what we want.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let text = text?;
    if !status.success() {
        return Err(io::Error::other(format!(
            "{status} when asked about itself"
        )));
    }
    Ok(text)
}

fn read_in_time(mut from: ChildStdout, patience: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + patience;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).map_err(io::Error::other)?;
        let mut waiting = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match from.read(&mut buffer)? {
            0 => return Ok(text),
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
}

fn is_elf(path: &Path) -> io::Result<bool> {
    let mut magic = [0; 4];
    match fs::File::open(path)?.read_exact(&mut magic) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| magic == *b"\x7fELF"),
    }
}

/// The file a program name means in a request's environment: an absolute path.
fn find_program(program: &Path, environment: &Environment, cwd: &Path) -> io::Result<PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return Ok(cwd.join(program));
    }
    let search = environment::value(environment, b"PATH").unwrap_or_default();
    search
        .split(|byte| *byte == b':')
        .map(|directory| cwd.join(OsStr::from_bytes(directory)).join(program))
        .find(|path| is_executable(path))
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn is_executable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
        && fs::metadata(path).is_ok_and(|meta| meta.is_file())
}
