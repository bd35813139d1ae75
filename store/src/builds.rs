//! What is remembered about builds: which actions a cargo process asked for, how each ended, and what
//! its key was made of.
//!
//! Plain data, for `kachefs explain`, `verify` and `stats --last-build`: nothing here decides whether
//! anything hits. Values of variables and contents of files are kept as short hashes; only requests
//! hold them in full, so that what hit in the last build, and what is still shown, can be made again.

use serde::{Deserialize, Serialize};

use crate::action::{ActionKey, Look, Root, RootSet};
use crate::codec::Record;
use crate::digest::Digest;

/// Number of a build in its view; later ones are greater.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct BuildId(pub u64);

/// One cargo process that built something.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BuildRecord {
    /// Its process id.
    pub pid: u32,
    /// When it started, in the kernel's ticks since boot; `None` when it was gone already.
    pub started: Option<u64>,
    /// Milliseconds since the epoch when it first asked.
    pub asked_ms: u64,
}

impl Record for BuildRecord {
    const NAME: &'static str = "build";
    const VERSION: u8 = 1;
}

/// Which crate an action compiles, or whose build script it runs.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Unit {
    /// `CARGO_PKG_NAME`; empty where cargo did not say.
    pub package: String,
    /// The name of the crate.
    pub crate_name: String,
    /// What is made of it: the crate types, `test`, `build script`, or `build script run`.
    pub kind: String,
}

impl Unit {
    /// The name under which compiles of the same unit are found.
    pub fn digest(&self) -> Digest {
        crate::Hasher::new("kachefs unit")
            .field(self.package.as_bytes())
            .field(self.crate_name.as_bytes())
            .field(self.kind.as_bytes())
            .finish()
    }
}

/// One action of a build.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LoggedAction {
    /// What it makes.
    pub unit: Unit,
    /// `CARGO_PKG_VERSION`.
    pub version: String,
    /// Milliseconds since the epoch when it was asked for.
    pub asked_ms: u64,
    /// Microseconds until the daemon's answer, without waiting for others.
    pub answer_us: u64,
    /// How it ended.
    pub end: LoggedEnd,
}

impl Record for LoggedAction {
    const NAME: &'static str = "action of a build";
    const VERSION: u8 = 1;
}

/// How an action ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum LoggedEnd {
    /// Served.
    Hit {
        /// The result's key.
        key: ActionKey,
        /// Milliseconds it took when it ran.
        spared_ms: u64,
    },
    /// Ran, and succeeded.
    Miss {
        /// Milliseconds it took.
        ran_ms: u64,
        /// What its key is made of.
        parts: Parts,
        /// Why it is not stored; `None` when it is.
        not_stored: Option<String>,
    },
    /// Ran, and failed.
    Failed {
        /// Milliseconds it took.
        ran_ms: u64,
    },
    /// Not cached.
    Uncacheable {
        /// The name it is counted under.
        reason: String,
        /// The same in words, where the name does not say all.
        detail: Option<String>,
    },
}

/// What an action key is made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// The key before it is bound to paths; `None` when the sources are not known.
    pub key: Option<ActionKey>,
    /// The package's version.
    pub version: String,
    /// Milliseconds since the epoch when this was noted.
    pub noted_ms: u64,
    /// Roots whose paths the outputs hold.
    pub bound: RootSet,
    /// The paths of the roots, in the order of [`Root::OF_CHECKOUT`].
    pub roots: [String; Root::OF_CHECKOUT.len()],
    /// Every part, in no order that means anything.
    pub list: Vec<Part>,
    /// How many more there were than are kept.
    pub left_out: u64,
}

impl Record for Parts {
    const NAME: &'static str = "parts of a key";
    const VERSION: u8 = 1;
}

/// One part of a key.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    pub kind: PartKind,
    /// Which one of its kind: a name, or a path template.
    pub name: Vec<u8>,
    /// What it was.
    pub value: PartValue,
}

/// What a part of a key is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum PartKind {
    /// The compiler and its libraries.
    Compiler,
    /// The linker and what it links in by itself.
    Linker,
    /// The processor.
    Processor,
    /// An argument.
    Argument,
    /// The arguments' order.
    ArgumentOrder,
    /// The crate's root file.
    CrateRoot,
    /// Whether the package lies below `$CARGO_HOME`.
    Place,
    /// A crate given with `--extern`.
    Extern,
    /// A crate behind those.
    Closure,
    /// A file or directory a flag names.
    Named,
    /// A variable that is keyed without being reported.
    Variable,
    /// A source file.
    Source,
    /// A variable the compiler reports it read.
    Reported,
    /// A path looked at.
    Observed(Look),
    /// The package's directory.
    Package,
    /// A build script's program.
    Script,
    /// The working directory of a build script.
    Directory,
    /// The file mode mask of a build script.
    Umask,
}

/// What a part of a key was.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum PartValue {
    /// The first bytes of a digest.
    Hash([u8; PartValue::HASH]),
    /// A short text.
    Text(Vec<u8>),
    /// Nothing: a variable that is not set.
    Absent,
}

impl PartValue {
    /// Bytes kept of a digest: enough to tell apart what one person ever compiles.
    pub const HASH: usize = 8;

    /// The short form of a digest.
    pub fn of(digest: &Digest) -> Self {
        let mut hash = [0; Self::HASH];
        hash.copy_from_slice(&digest.as_bytes()[..Self::HASH]);
        Self::Hash(hash)
    }

    /// The short form of a text's digest.
    pub fn hashed(text: &[u8]) -> Self {
        Self::of(&Digest::of(text))
    }
}

/// A compile that hit, as it was asked for. Holds the environment in full.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptRequest {
    /// What it makes.
    pub unit: Unit,
    /// `CARGO_PKG_VERSION`.
    pub version: String,
    /// The result it got.
    pub key: ActionKey,
    /// View and inode of the out-dir.
    pub out_dir: (u32, u64),
    /// The compiler and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// The file mode mask.
    pub umask: u32,
}

impl Record for KeptRequest {
    const NAME: &'static str = "request of a build";
    const VERSION: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    fn unit() -> Unit {
        Unit {
            package: "p".into(),
            crate_name: "c".into(),
            kind: "lib".into(),
        }
    }

    fn key() -> ActionKey {
        ActionKey(Digest::of(b"k"))
    }

    #[test]
    fn build_layout_is_fixed() {
        let record = BuildRecord {
            pid: 7,
            started: Some(300),
            asked_ms: 5,
        };
        let bytes = encode(&record).expect("encodes");
        assert_eq!(bytes, [1, 7, 1, 0xac, 2, 5], "a new layout needs a version");
        assert_eq!(decode::<BuildRecord>(&bytes).expect("decodes"), record);
    }

    #[test]
    fn action_layout_is_fixed() {
        let parts = Parts {
            key: Some(key()),
            version: "1".into(),
            noted_ms: 4,
            bound: RootSet::default(),
            roots: ["/a".into(), String::new(), "/b".into()],
            list: vec![Part {
                kind: PartKind::Observed(Look::Link),
                name: b"x".to_vec(),
                value: PartValue::Text(b"t".to_vec()),
            }],
            left_out: 0,
        };
        let action = LoggedAction {
            unit: unit(),
            version: "1".into(),
            asked_ms: 2,
            answer_us: 3,
            end: LoggedEnd::Miss {
                ran_ms: 9,
                parts,
                not_stored: None,
            },
        };
        let mut golden = vec![
            1, 1, b'p', 1, b'c', 3, b'l', b'i', b'b', 1, b'1', 2, 3, 1, 9, 1,
        ];
        golden.extend_from_slice(Digest::of(b"k").as_bytes());
        golden.extend_from_slice(&[1, b'1', 4, 0, 2, b'/', b'a', 0, 2, b'/', b'b']);
        golden.extend_from_slice(&[1, 13, 2, 1, b'x', 1, 1, b't', 0, 0]);
        let bytes = encode(&action).expect("encodes");
        assert_eq!(bytes, golden, "a new layout needs a version");
        assert_eq!(decode::<LoggedAction>(&bytes).expect("decodes"), action);
    }

    #[test]
    fn request_layout_is_fixed() {
        let request = KeptRequest {
            unit: unit(),
            version: "1".into(),
            key: key(),
            out_dir: (1, 2),
            argv: vec![b"r".to_vec()],
            environment: vec![(b"A".to_vec(), b"b".to_vec())],
            cwd: b"/".to_vec(),
            umask: 18,
        };
        let mut golden = vec![1, 1, b'p', 1, b'c', 3, b'l', b'i', b'b', 1, b'1'];
        golden.extend_from_slice(Digest::of(b"k").as_bytes());
        golden.extend_from_slice(&[1, 2, 1, 1, b'r', 1, 1, b'A', 1, b'b', 1, b'/', 18]);
        let bytes = encode(&request).expect("encodes");
        assert_eq!(bytes, golden, "a new layout needs a version");
        assert_eq!(decode::<KeptRequest>(&bytes).expect("decodes"), request);
    }
}
