//! Directories that belong to one unit each, as cargo's layout with `build/<package>/<hash>/out` has
//! them: what they mean where cargo names them besides the unit's own arguments.
//!
//! Cargo puts one of them into `LD_LIBRARY_PATH`: whichever it came to first, another one in each
//! build, even the `OUT_DIR` of a build script. Which one is no input, nor is what the loader looks for
//! there in vain. All else in an `OUT_DIR` is, though the compiler is told to search there for crates.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use store::Root;
use wrapper::environment;
use wrapper::roots::Roots;
use wrapper::trace::{Access, Uses};

use crate::fs::View;

/// The variable cargo puts the directories of libraries into.
const LIBRARY_PATH: &[u8] = b"LD_LIBRARY_PATH";

/// What stands in keys for the directory of some unit.
const SOME_UNIT: &[u8] = b"unit";

/// Where the loader looks for libraries made for its processor (ld.so(8), "Hardware capabilities").
pub(super) const FOR_PROCESSORS: &[&str] = &[
    "glibc-hwcaps",
    "tls",
    "haswell",
    "avx512_1",
    "xeon_phi",
    std::env::consts::ARCH,
];

/// Directories cargo makes and names, whatever is built.
pub(super) struct UnitDirs {
    /// The directory of whichever unit.
    unit: Option<PathBuf>,
    /// The profile's in the target, which cargo makes sooner or later.
    profile: Option<PathBuf>,
}

impl UnitDirs {
    /// The one that this environment names: for programs behind the profile's directory, for compilers
    /// at the beginning and without that.
    pub(super) fn of(roots: &Roots, environment: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let value = environment::value(environment, LIBRARY_PATH).unwrap_or_default();
        let view = Path::new(roots.path(Root::View));
        let named: Vec<&Path> = entries(value).map(path).collect();
        let is_some_unit = |at: &usize| {
            let unit = named[*at];
            let Some(profile) = unit.ancestors().nth(4) else {
                return false;
            };
            // The profile's directory in the target, which may be another one.
            let is_profiles = |entry: &&&Path| entry.file_name() == profile.file_name();
            let in_place = match named[..*at].last() {
                Some(last) => is_profiles(&last),
                None => !named.iter().any(|entry| is_profiles(&entry)),
            };
            let once = named.iter().filter(|entry| **entry == unit).count() == 1;
            let inside = unit.strip_prefix(profile);
            in_place && once && profile.starts_with(view) && inside.is_ok_and(is_units)
        };
        let unit = (0..named.len()).find(is_some_unit);
        let is_deps = |at: &usize| {
            let (before, deps) = (named[at - 1], named[*at]);
            deps.starts_with(view)
                && deps.ends_with("deps")
                && deps.parent().and_then(Path::file_name) == before.file_name()
        };
        let profile = unit.or_else(|| (1..named.len()).find(is_deps));
        let before = profile.and_then(|at| at.checked_sub(1));
        Self {
            unit: unit.map(|at| named[at].to_owned()),
            profile: before.map(|at| named[at].to_owned()),
        }
    }

    /// The value of a variable as it counts.
    pub(super) fn keyed(&self, name: &[u8], value: &[u8]) -> Vec<u8> {
        let Some(unit) = self.unit.as_ref().filter(|_| name == LIBRARY_PATH) else {
            return value.to_vec();
        };
        let counting = |entry| {
            if path(entry) == unit {
                SOME_UNIT
            } else {
                entry
            }
        };
        let entries: Vec<&[u8]> = entries(value).map(counting).collect();
        entries.join(&b':')
    }

    /// Whether a path is that of the profile's directory, wherever it lies.
    pub(super) fn is_profiles(&self, path: &Path) -> bool {
        self.profile.as_deref() == Some(path)
    }

    /// Whether what was done at a path is the loader's search for libraries that are not there.
    pub(super) fn is_vain_search(&self, path: &Path, uses: Uses) -> bool {
        let opened = uses.accesses.contains(Access::Open);
        if self.is_profiles(path) {
            return !opened;
        }
        let Some(unit) = &self.unit else {
            return false;
        };
        let Ok(inside) = path.strip_prefix(unit) else {
            return false;
        };
        if inside.as_os_str().is_empty() {
            return !opened;
        }
        uses.absent && is_library(inside)
    }
}

/// Whether the loader may look for this in a directory of libraries.
fn is_library(inside: &Path) -> bool {
    let mut names = inside.iter().map(OsStr::as_bytes);
    let first = names.next().unwrap_or_default();
    let alone = names.next().is_none();
    let is_shared = first.windows(3).any(|part| part == b".so");
    let for_processor = FOR_PROCESSORS.iter().any(|name| name.as_bytes() == first);
    for_processor || (alone && first.starts_with(b"lib") && is_shared)
}

fn path(entry: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(entry))
}

fn entries(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b':')
}

/// Whether a path below a profile's directory is `build/<package>/<hash>/out`.
fn is_units(inside: &Path) -> bool {
    let names: Vec<&[u8]> = inside.iter().map(OsStr::as_bytes).collect();
    let is_hash = |name: &[u8]| name.len() == 16 && name.iter().all(u8::is_ascii_hexdigit);
    matches!(names.as_slice(), [b"build", _, hash, b"out"] if is_hash(hash))
}

/// Whether a directory of a view is where a build script has left its files, in that layout.
pub(super) fn is_out_dir(view: &View, inside: &Path) -> bool {
    let run = inside.parent().map(|unit| unit.join("run"));
    run.is_some_and(|run| view.resolve(run.as_os_str().as_bytes()).is_ok())
}

#[cfg(test)]
mod tests {
    use wrapper::trace::Accesses;

    use super::*;

    const VALUE: &[u8] = b"/t/debug:/t/debug/build/a/0123456789abcdef/out:/lib";

    fn of(value: &[u8]) -> UnitDirs {
        let roots = Roots::new("/ws", "/home", "/t");
        UnitDirs::of(&roots, &[(LIBRARY_PATH.to_vec(), value.to_vec())])
    }

    #[test]
    fn one_counts_as_any_other() {
        let counts = |value: &[u8], as_if: &[u8]| {
            assert_eq!(of(value).keyed(LIBRARY_PATH, value), as_if);
            assert_eq!(of(value).keyed(b"OTHER", value), value);
        };
        counts(VALUE, b"/t/debug:unit:/lib");
        counts(b"/t/debug/build/a/0123456789abcdef/out:/lib", b"unit:/lib");
        let apart = b"/ws/target/debug:/t/debug/build/a/0123456789abcdef/out";
        counts(apart, b"/ws/target/debug:unit");
        for value in [
            // The place of native libraries.
            &b"/t/debug/build/a/0123456789abcdef/out:/t/debug"[..],
            b"/u/debug:/u/debug/build/a/0123456789abcdef/out",
            b"/t/debug:/t/debug/build/a-0123456789abcdef/out",
            b"/t/debug/build/a/0123456789abcdef/out:/t/debug:/t/debug/build/a/0123456789abcdef/out",
        ] {
            counts(value, value);
        }
    }

    #[test]
    fn only_what_the_loader_misses_says_nothing() {
        let unit = Path::new("/t/debug/build/a/0123456789abcdef/out");
        let is_vain = |name: &str, absent| {
            let accesses = Accesses::default();
            of(VALUE).is_vain_search(&unit.join(name), Uses { accesses, absent })
        };
        assert!(is_vain("libc.so.6", true));
        assert!(is_vain("glibc-hwcaps/x86-64-v2", true));
        assert!(is_vain("tls/x86_64/libc.so.6", true));
        assert!(is_vain("", false));
        assert!(!is_vain("libc.so.6", false));
        assert!(!is_vain("words", true));
        assert!(!is_vain("made/libc.so.6", true));
    }
}
