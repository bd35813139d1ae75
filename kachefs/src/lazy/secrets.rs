//! What never leaves the machine: the values of the user's environment, and the path of their home.
//!
//! A compiler can put anything it reads into what it makes. Before a result is uploaded its texts and
//! bytes are searched for these; one that holds any of them stays here. What cargo itself sets is not
//! secret: it says what is compiled.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use aho_corasick::AhoCorasick;
use lru::LruCache;
use parking_lot::Mutex;
use wrapper::environment::{self, Environment};

/// Shorter values are found in anything.
const SHORTEST: usize = 8;

/// Variables whose values are words that everybody uses, or directories in which one works: a path in the
/// user's home is found by the home.
const COMMON: &[&[u8]] = &[
    b"COLORTERM",
    b"DEBIAN_FRONTEND",
    b"LANG",
    b"LANGUAGE",
    b"LD_LIBRARY_PATH",
    b"LOGNAME",
    b"OLDPWD",
    b"PWD",
    b"SHELL",
    b"TEMP",
    b"TERM",
    b"TERM_PROGRAM",
    b"TMP",
    b"TMPDIR",
    b"USER",
];

/// What such variables begin with. Those of cargo, rustc and rustup say what is built, and by whom.
const COMMON_PREFIXES: &[&[u8]] = &[b"CARGO", b"LC_", b"RUSTC", b"RUSTUP_", b"KACHEFS_"];

/// What the names of variables hold whose values are secret, whoever reads them.
const SECRET_WORDS: &[&[u8]] = &[
    b"CREDENTIAL",
    b"KEY",
    b"PASSWORD",
    b"PROXY",
    b"SECRET",
    b"TOKEN",
];

/// What cargo tells build scripts, and the programs these run, beside its own `CARGO_*` (the cargo book,
/// "Environment variables Cargo sets for build scripts").
const TOLD_TO_SCRIPTS: &[&[u8]] = &[
    b"DEBUG",
    b"HOST",
    b"NUM_JOBS",
    b"OPT_LEVEL",
    b"OUT_DIR",
    b"PROFILE",
    b"RUSTDOC",
    b"RUST_RECURSION_COUNT",
    b"SSL_CERT_DIR",
    b"SSL_CERT_FILE",
    b"TARGET",
];

/// Processes whose environments are remembered.
const PROCESSES: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// Bytes that no upload may hold.
pub type Secrets = Arc<Vec<Vec<u8>>>;

/// Remembers the environments of cargo processes.
pub struct SecretsOf(Mutex<LruCache<(u32, u64), Secrets>>);

impl Default for SecretsOf {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(PROCESSES)))
    }
}

impl SecretsOf {
    /// The secrets of a process: what is in the environment it was started with (proc(5), `environ`).
    /// `None` where that cannot be read; nobody knows then what is secret.
    pub fn process(&self, pid: u32, started: Option<u64>) -> Option<Secrets> {
        let key = (pid, started?);
        if let Some(known) = self.0.lock().get(&key) {
            return Some(Arc::clone(known));
        }
        let text = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let variables: Vec<_> = text
            .split(|byte| *byte == 0)
            .filter_map(|line| {
                let at = line.iter().position(|byte| *byte == b'=')?;
                Some((line[..at].to_vec(), line[at + 1..].to_vec()))
            })
            .collect();
        let secrets = Arc::new(of(&variables, |_| false));
        self.0.lock().put(key, Arc::clone(&secrets));
        Some(secrets)
    }
}

/// The secrets in the environment of a program that a build script runs.
pub fn of_script(environment: &Environment) -> Secrets {
    let is_told = |name: &[u8]| TOLD_TO_SCRIPTS.contains(&name) || name.starts_with(b"DEP_");
    Arc::new(of(environment, is_told))
}

fn of(environment: &Environment, is_told: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let is_secret = |name: &[u8]| {
        let mut words = SECRET_WORDS.iter();
        words.any(|word| name.windows(word.len()).any(|part| part == *word))
    };
    let home = environment::value(environment, b"HOME").map(OsStr::from_bytes);
    // As it is spelled, and as it is.
    let real = home.and_then(|home| fs::canonicalize(home).ok());
    let homes = home.map(Path::new).into_iter().chain(real.as_deref());
    let homes: Vec<_> = homes
        .filter(|home| home.is_absolute() && home.parent().is_some())
        .collect();
    let path = environment::value(environment, b"PATH").unwrap_or_default();
    // Where a JDK or an SDK is installed is no secret, and in much that is linked.
    let is_of_programs = |value: &[u8]| {
        let value = Path::new(OsStr::from_bytes(value));
        let mut programs = path.split(|byte| *byte == b':');
        let is_of_user = |home: &&Path| home.starts_with(value) || value.starts_with(home);
        value.is_absolute()
            && !homes.iter().any(is_of_user)
            && programs.any(|programs| {
                let programs = Path::new(OsStr::from_bytes(programs));
                programs == value || programs.parent() == Some(value)
            })
    };
    let is_common = |name: &[u8], value: &[u8]| {
        if is_secret(name) {
            return false;
        }
        COMMON.contains(&name)
            || is_of_programs(value)
            || COMMON_PREFIXES
                .iter()
                .any(|prefix| name.starts_with(prefix))
            || is_told(name)
    };
    let mut secrets: Vec<Vec<u8>> = environment
        .iter()
        .filter(|(name, value)| value.len() >= SHORTEST && !is_common(name, value))
        .map(|(_, value)| value.clone())
        .collect();
    for home in homes {
        let mut home = home.as_os_str().as_bytes().to_vec();
        // Not the beginning of another name.
        home.push(b'/');
        secrets.push(home);
    }
    secrets.sort();
    secrets.dedup();
    secrets
}

/// A search for secrets.
pub struct Search(AhoCorasick);

impl Search {
    /// For these; an error when they are too many to be searched for.
    pub fn new(secrets: &[Vec<u8>]) -> io::Result<Self> {
        AhoCorasick::new(secrets)
            .map(Self)
            .map_err(io::Error::other)
    }

    /// Whether bytes hold one.
    pub fn finds(&self, bytes: &[u8]) -> bool {
        self.0.is_match(bytes)
    }

    /// Whether a file holds one.
    pub fn finds_in(&self, file: &File) -> io::Result<bool> {
        let found = self.0.stream_find_iter(file).next();
        found.transpose().map(|found| found.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_the_user_and_their_home_are_secret() {
        let environment: Vec<_> = [
            ("HOME", "/home/ann"),
            ("MY_TOKEN", "hunter2-hunter2"),
            ("AWS_SECRET_ACCESS_KEY", "abcdefgh12345678"),
            ("CARGO_PKG_NAME", "long-package-name"),
            ("CARGO_REGISTRY_TOKEN", "registry-token"),
            ("RUSTUP_TOOLCHAIN", "nightly-2026-01-01"),
            ("TERM", "xterm-256color"),
            ("SHLVL", "1"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .to_vec();
        let secrets = of(&environment, |_| false);
        let expected: [&[u8]; 5] = [
            b"/home/ann",
            b"/home/ann/",
            b"abcdefgh12345678",
            b"hunter2-hunter2",
            b"registry-token",
        ];
        assert_eq!(secrets, expected);
        let search = Search::new(&secrets).expect("a search");
        assert!(search.finds(b"x hunter2-hunter2 y") && search.finds(b"/home/ann/x"));
        assert!(!search.finds(b"long-package-name xterm-256color"));
    }

    #[test]
    fn where_programs_are_is_not() {
        let environment: Vec<_> = [
            ("HOME", "/home/ann"),
            ("MINE", "/home/ann"),
            (
                "PATH",
                "/usr/bin:/opt/jdk-21/bin:/opt/sdk:/opt/acme/x/bin:/home/ann/tools/bin",
            ),
            ("TOOLS", "/home/ann/tools"),
            ("JAVA_HOME", "/opt/jdk-21"),
            ("SDK", "/opt/sdk/"),
            ("KEY_DIR", "/opt/jdk-21"),
            ("PROJECT", "/opt/project"),
            ("PART", "/opt/jdk-2"),
            ("ABOVE", "/opt/acme"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .to_vec();
        let path: &[u8] = b"/usr/bin:/opt/jdk-21/bin:/opt/sdk:/opt/acme/x/bin:/home/ann/tools/bin";
        let homes: [&[u8]; 3] = [b"/home/ann", b"/home/ann/", b"/home/ann/tools"];
        let others: [&[u8]; 4] = [b"/opt/acme", b"/opt/jdk-2", b"/opt/jdk-21", b"/opt/project"];
        let expected = [&homes[..], &others, &[path]].concat();
        assert_eq!(of(&environment, |_| false), expected);
    }

    #[test]
    fn what_cargo_tells_scripts_is_not() {
        let environment = [
            (b"TARGET".to_vec(), b"x86_64-unknown-linux-gnu".to_vec()),
            (b"DEP_Z_INCLUDE".to_vec(), b"/usr/include/z".to_vec()),
            (b"SECRET".to_vec(), b"12345678".to_vec()),
        ];
        assert_eq!(*of_script(&environment), [b"12345678".to_vec()]);
    }

    #[test]
    fn the_environment_of_a_process_is_read() {
        let own = std::process::id();
        let secrets = SecretsOf::default();
        let found = secrets.process(own, Some(1)).expect("readable");
        if let Ok(home) = std::env::var("HOME") {
            let home = format!("{home}/").into_bytes();
            assert!(home == b"//" || found.contains(&home));
        }
        assert!(secrets.process(own, None).is_none());
        assert!(secrets.process(0, Some(1)).is_none());
    }
}
