//! What compilers are loaded with.
//!
//! The dynamic linker looks for each library of a compiler in several directories, and in each for
//! parts made for some processors: two hundred questions before `main`, of which a watched compiler hands over
//! each. Where it is known what they lead to, they need not be asked (`wrapper::trace::Program`), only what is
//! to be found in the environment's directories, which the shim looks up by itself. `Service::run` asks.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use lru::LruCache;
use parking_lot::Mutex;
use store::Digest;
use wrapper::environment;

use super::listings::Identity;
use super::programs::all_loaded;
use super::toolchain::Caller;
use super::unit_dirs::FOR_PROCESSORS;

/// The loader's index of the system's libraries.
pub(super) const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// Answers remembered: one for each compiler and environment.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// Where the loader looks first (ld.so(8)).
const SEARCHED: &[u8] = b"LD_LIBRARY_PATH";

/// What else changes what the loader finds (ld.so(8)); where any of it is set, it is left to itself.
const ELSEWISE: [&[u8]; 6] = [
    b"LD_PRELOAD",
    b"LD_AUDIT",
    b"LD_ASSUME_KERNEL",
    b"LD_HWCAP_MASK",
    b"LD_ORIGIN_PATH",
    b"GLIBC_TUNABLES",
];

/// What the answer depends on.
#[derive(PartialEq, Eq, Hash)]
struct Asked {
    /// The compiler's real path, from which its own directories are named, and its digest.
    compiler: (PathBuf, Digest),
    /// Where its libraries are looked for first, and what those directories are. What may come into one of a
    /// view, the shim sees.
    searched: (Vec<u8>, Vec<Option<Identity>>),
    /// The system's index of libraries.
    cache: Identity,
}

/// What is remembered.
pub struct Loaded(Mutex<LruCache<Asked, Vec<Vec<u8>>>>);

impl Default for Loaded {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

impl Loaded {
    /// The libraries that the loader finds for a compiler, whose digest holds its own libraries, in their
    /// order. None where it should look itself.
    pub fn libraries(&self, compiler: &Path, digest: Digest, caller: &Caller) -> Vec<Vec<u8>> {
        let Some(asked) = Asked::by(compiler, digest, caller) else {
            return Vec::new();
        };
        let known = self.0.lock().get(&asked).cloned();
        // The loader complains about what it is given and cannot find.
        if let Some(known) = known.filter(|known| known.iter().all(|path| is_file(path))) {
            return known;
        }
        let found = found_by_loader(compiler, caller).unwrap_or_else(|error| {
            tracing::debug!(%error, "what the compiler is loaded with");
            // Nor is it asked again.
            Vec::new()
        });
        self.0.lock().put(asked, found.clone());
        found
    }
}

impl Asked {
    /// `None` where nothing should be remembered.
    fn by(compiler: &Path, digest: Digest, caller: &Caller) -> Option<Self> {
        let value = |name: &[u8]| environment::value(caller.environment, name).unwrap_or_default();
        let searched = value(SEARCHED);
        if ELSEWISE.iter().any(|name| !value(name).is_empty()) || !is_plain_list(searched) {
            return None;
        }
        let identity = |path: &Path| fs::metadata(path).ok().as_ref().map(Identity::from);
        let directories = searched.split(|byte| *byte == b':');
        let directories = directories.map(|path| Path::new(OsStr::from_bytes(path)));
        let directories = directories
            .filter(|path| !(caller.in_view)(path))
            .map(identity);
        Some(Self {
            compiler: (fs::canonicalize(compiler).ok()?, digest),
            searched: (searched.to_vec(), directories.collect()),
            cache: identity(Path::new(LOADER_CACHE))?,
        })
    }
}

/// Asks the loader. No libraries where the shim would find, at each compile, that others are meant.
fn found_by_loader(compiler: &Path, caller: &Caller) -> io::Result<Vec<Vec<u8>>> {
    let Some(mut found) = all_loaded(compiler, caller.environment, caller.cwd)? else {
        return Ok(Vec::new());
    };
    found.retain(|path| !is_loader(path));
    // A daemon must not look into its own mounts.
    let are_plain = found
        .iter()
        .all(|path| is_plain(path.as_os_str().as_bytes()) && !(caller.in_view)(path));
    let beside = compiler.ancestors().nth(2).map(|root| root.join("lib"));
    let mut searched = caller.loader_path().chain(beside);
    if !are_plain || searched.any(|directory| has_for_processors(&directory)) {
        return Ok(Vec::new());
    }
    let found = found.into_iter();
    Ok(found.map(|path| path.into_os_string().into_vec()).collect())
}

/// Whether a directory has any part for some processors.
fn has_for_processors(directory: &Path) -> bool {
    let mut names = FOR_PROCESSORS.iter();
    names.any(|name| directory.join(name).exists())
}

/// Whether a list of directories means what it says, whoever reads it and wherever.
fn is_plain_list(list: &[u8]) -> bool {
    let is_plain = |directory: &[u8]| directory.starts_with(b"/") && !directory.contains(&b'$');
    list.is_empty() || (!list.contains(&b';') && list.split(|byte| *byte == b':').all(is_plain))
}

/// Whether a path may stand in `LD_PRELOAD`, where colons and blanks divide and `$` begins a name.
fn is_plain(path: &[u8]) -> bool {
    let divides = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b':' | b';' | b'$');
    path.starts_with(b"/") && !path.iter().any(divides)
}

fn is_file(path: &[u8]) -> bool {
    fs::metadata(OsStr::from_bytes(path)).is_ok_and(|meta| meta.is_file())
}

fn is_loader(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_bytes().starts_with(b"ld-linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "/bin/sh";

    fn asked(loaded: &Loaded, program: &Path, variables: &[(&str, &str)]) -> Vec<Vec<u8>> {
        let environment: Vec<_> = variables
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        let caller = Caller {
            environment: &environment,
            cwd: Path::new("/"),
            in_view: &|path| path.starts_with("/view"),
        };
        loaded.libraries(program, Digest::of(b""), &caller)
    }

    fn found(variables: &[(&str, &str)]) -> Vec<Vec<u8>> {
        let loaded = Loaded::default();
        let once = asked(&loaded, Path::new(PROGRAM), variables);
        assert_eq!(asked(&loaded, Path::new(PROGRAM), variables), once);
        once
    }

    #[test]
    fn libraries_are_told_where_the_loader_would_find_them_again() {
        let libraries = found(&[("LD_LIBRARY_PATH", "/nowhere:/view/deps")]);
        let is_libc = |path: &Vec<u8>| path.ends_with(b"/libc.so.6");
        assert!(libraries.iter().any(is_libc), "{libraries:?}");
        let is_loader = |path: &Vec<u8>| is_loader(Path::new(OsStr::from_bytes(path)));
        assert!(!libraries.iter().any(is_loader));
        assert_eq!(found(&[]), libraries);
        for variable in [
            ("LD_LIBRARY_PATH", "here"),
            ("LD_LIBRARY_PATH", "/nowhere:"),
            ("LD_LIBRARY_PATH", "/nowhere;/nor/here"),
            ("LD_LIBRARY_PATH", "$ORIGIN/lib"),
            ("LD_PRELOAD", "/nowhere/lib.so"),
            ("GLIBC_TUNABLES", "glibc.cpu.hwcap_mask=0"),
        ] {
            assert!(found(&[variable]).is_empty(), "{variable:?}");
        }
    }

    #[test]
    fn what_comes_into_a_directory_is_noticed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let libraries = found(&[]);
        let is_libc = |path: &&Vec<u8>| path.ends_with(b"/libc.so.6");
        let libc = libraries.iter().find(is_libc).expect("every program has");
        let variables = [("LD_LIBRARY_PATH", dir.path().to_str().expect("UTF-8"))];
        let loaded = Loaded::default();
        let asked = || asked(&loaded, Path::new(PROGRAM), &variables);
        assert_eq!(asked(), libraries);
        let own = dir.path().join("libc.so.6");
        fs::copy(OsStr::from_bytes(libc), &own).expect("copies");
        assert!(asked().contains(&own.into_os_string().into_vec()));
        fs::create_dir(dir.path().join("glibc-hwcaps")).expect("mkdir");
        assert!(asked().is_empty());
    }

    #[test]
    fn a_compiler_by_another_path_is_another() {
        let dir = tempfile::tempdir().expect("tempdir");
        let link = dir.path().join("link");
        let loaded = Loaded::default();
        for (program, is_given) in [(PROGRAM, true), ("/bin/no-such-program", false)] {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(program, &link).expect("links");
            assert_eq!(
                !asked(&loaded, &link, &[]).is_empty(),
                is_given,
                "{program}"
            );
        }
    }

    #[test]
    fn only_plain_paths_are_told() {
        assert!(is_plain(b"/usr/lib/libz.so.1"));
        for path in [
            "libz.so.1",
            "/my lib/libz.so",
            "/a:b/libz.so",
            "/$LIB/libz.so",
        ] {
            assert!(!is_plain(path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn what_is_gone_is_looked_for_again() {
        let loaded = Loaded::default();
        let known = asked(&loaded, Path::new(PROGRAM), &[]);
        for (_, remembered) in loaded.0.lock().iter_mut() {
            remembered.push(b"/nowhere/lib.so".to_vec());
        }
        assert_eq!(asked(&loaded, Path::new(PROGRAM), &[]), known);
    }
}
