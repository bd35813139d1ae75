//! What is recorded about actions: keys, results, and which inputs an earlier run read.
//!
//! Plain data. How a key is computed and what a root is replaced by is the business of the
//! `wrapper` crate; this file only fixes what is written to the index.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{Record, whole};
use crate::digest::{Digest, Hasher};

/// Digest of everything that may influence an action's outputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ActionKey(pub Digest);

impl fmt::Debug for ActionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActionKey({:?})", self.0)
    }
}

/// Digest of what is known of an action before any source is read: arguments, compiler, place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InvocationDigest(pub Digest);

impl fmt::Debug for InvocationDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InvocationDigest({:?})", self.0)
    }
}

/// Digest of the value an environment variable had, or of its absence.
pub type EnvHash = Digest;

/// A directory whose path differs between machines and checkouts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum Root {
    /// The directory rustc runs in: the workspace, or the package for one outside it.
    Cwd = 0,
    /// `$CARGO_HOME`.
    CargoHome = 1,
    /// The mountpoint of the view the outputs go to.
    View = 2,
    /// The user's home directory.
    Home = 3,
    /// `$TMPDIR`.
    Temp = 4,
}

impl Root {
    /// Every root.
    pub const ALL: [Self; 5] = [
        Self::Cwd,
        Self::CargoHome,
        Self::View,
        Self::Home,
        Self::Temp,
    ];

    /// Those that every action has. The others are where they are, whoever asks.
    pub const OF_CHECKOUT: [Self; 3] = [Self::Cwd, Self::CargoHome, Self::View];
}

/// A set of roots: those whose literal path an action's outputs hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, Serialize, Deserialize)]
pub struct RootSet(u8);

impl RootSet {
    /// All roots: the result serves only the very same paths.
    pub fn all() -> Self {
        let mut all = Self::default();
        for root in Root::ALL {
            all.insert(root);
        }
        all
    }

    /// Adds `root`.
    pub fn insert(&mut self, root: Root) {
        self.0 |= 1 << root as u8;
    }

    /// Adds every root of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether `root` is in the set.
    pub fn contains(self, root: Root) -> bool {
        self.0 & (1 << root as u8) != 0
    }

    /// Whether no root is in the set: the result serves any checkout.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// One file an action left in its out-dir.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// File name inside the out-dir; never a path.
    pub name: String,
    /// Permission bits as the compiler left them.
    pub mode: u32,
    /// The bytes.
    pub content: OutputContent,
}

/// The bytes of an output.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum OutputContent {
    /// Served as they are.
    Blob {
        /// Name of the blob.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// A small text (dep-info) with root placeholders, rendered for the checkout that gets it.
    Template(Vec<u8>),
}

/// What a later action must know of the action that made one of its externs.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// File stems (`serde-0123abcd`) of the crate itself and of every crate it was compiled
    /// against, sorted, without duplicates.
    pub closure: Vec<String>,
    /// Whether a proc macro runs when a crate using this one is compiled, or ran for any crate
    /// in the closure.
    pub proc_macro: bool,
}

/// The outcome of a successful action.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ActionResult {
    /// The crate compiled, for people.
    pub crate_name: String,
    /// Files left in the out-dir.
    pub outputs: Vec<Output>,
    /// Standard output with root placeholders.
    pub stdout: Vec<u8>,
    /// Standard error with root placeholders.
    pub stderr: Vec<u8>,
    /// For actions that take the outputs as externs.
    pub origin: Origin,
    /// Milliseconds the compiler took.
    pub compile_ms: u64,
}

impl ActionResult {
    /// The blobs it names, with their sizes in bytes.
    pub fn blobs(&self) -> impl Iterator<Item = (Digest, u64)> {
        let outputs = self.outputs.iter();
        outputs.filter_map(|output| match output.content {
            OutputContent::Blob { digest, size } => Some((digest, size)),
            OutputContent::Template(_) => None,
        })
    }

    /// Bytes a hit refers to.
    pub fn referenced_bytes(&self) -> u64 {
        self.outputs
            .iter()
            .map(|output| match &output.content {
                OutputContent::Blob { size, .. } => *size,
                OutputContent::Template(text) => text.len() as u64,
            })
            .sum()
    }
}

/// The outcome of a build script's successful run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScriptResult {
    /// The package, for people.
    pub package: String,
    /// What it left in its `OUT_DIR`, a directory before what it holds.
    pub tree: Vec<TreeEntry>,
    /// Standard output with root placeholders.
    pub stdout: Vec<u8>,
    /// Standard error with root placeholders.
    pub stderr: Vec<u8>,
    /// Milliseconds the run took.
    pub run_ms: u64,
}

impl ScriptResult {
    /// The blobs it names, with their sizes in bytes.
    pub fn blobs(&self) -> impl Iterator<Item = (Digest, u64)> {
        self.tree.iter().filter_map(|entry| match entry.content {
            TreeContent::Blob { digest, size } => Some((digest, size)),
            TreeContent::Directory | TreeContent::Link(_) => None,
        })
    }

    /// Bytes a hit refers to.
    pub fn referenced_bytes(&self) -> u64 {
        self.blobs().map(|(_, size)| size).sum()
    }
}

/// One name in a subtree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TreeEntry {
    /// The path below the subtree's root.
    pub path: Vec<u8>,
    /// Permission bits.
    pub mode: u16,
    /// What it names.
    pub content: TreeContent,
}

/// What a name in a subtree names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum TreeContent {
    /// A directory.
    Directory,
    /// A file.
    Blob {
        /// Name of the blob.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// A symbolic link to this target, a template.
    Link(Vec<u8>),
}

/// What the action cache holds under a key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ActionEntry {
    /// A compiler's result that serves whoever computes this key.
    Result(ActionResult),
    /// The outputs hold the literal path of these roots: look again under the key that also
    /// holds the roots' paths.
    PathBound(RootSet),
    /// A build script's result that serves whoever computes this key.
    Script(ScriptResult),
}

impl Record for ActionEntry {
    const NAME: &'static str = "action entry";
    const VERSION: u8 = 2;

    /// The first layout had no scripts, which come last.
    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        (version == 1).then(|| whole(body))
    }
}

/// How a run looked at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Look {
    /// It opened it: a file's bytes or a directory's names.
    Open,
    /// It asked what it is, following links.
    Status,
    /// It asked what it is, not following a last link, or where that leads.
    Link,
    /// It declared everything below it an input.
    Tree,
}

/// One look at one path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Observation {
    /// The path, a template.
    pub path: Vec<u8>,
    /// How it was looked at.
    pub look: Look,
}

/// What an earlier run of the same invocation read. Lets an action key be computed without
/// running the compiler.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InputRecord {
    /// Source and included files, as path templates, in the order of the dep-info.
    pub sources: Vec<Vec<u8>>,
    /// Environment variables the compiler says it read.
    pub env: Vec<String>,
    /// What it was seen to look at besides, sorted; `None` where it could not be watched.
    pub observed: Option<Vec<Observation>>,
    /// Milliseconds since the epoch when the record was made; the oldest go first.
    pub created_ms: u64,
    /// Which crates it loaded; `None` where that was not seen, or it loaded none.
    pub loads: Option<Loads>,
}

/// Which of the crates that a compiler may load it did load: what the next compile of the same crate reads,
/// most likely. A hint and no input: a result is as good whatever is said here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Loads {
    /// Stands for the names of all crates behind it; of others than these nothing is said.
    closure: [u8; 8],
    /// Stand for the names of the files it opened.
    files: BTreeSet<[u8; 4]>,
}

impl Loads {
    /// Of a crate with these crates behind it, whose compiler opened files of these names.
    pub fn new<'a>(
        closure: impl IntoIterator<Item = &'a str>,
        files: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        Self {
            closure: closure_stand_in(closure),
            files: files.into_iter().map(stand_in).collect(),
        }
    }

    /// Whether it opened none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether it says something of a crate with these crates behind it.
    pub fn is_of<'a>(&self, closure: impl IntoIterator<Item = &'a str>) -> bool {
        self.closure == closure_stand_in(closure)
    }

    /// Whether a file of this name was opened.
    pub fn has(&self, file: &str) -> bool {
        self.files.contains(&stand_in(file))
    }
}

/// A few bytes for a name: whoever takes one for another fetches a file too many, or when it is read.
fn stand_in(file: &str) -> [u8; 4] {
    let digest = Digest::of(file.as_bytes());
    digest.as_bytes().first_chunk().copied().unwrap_or_default()
}

fn closure_stand_in<'a>(closure: impl IntoIterator<Item = &'a str>) -> [u8; 8] {
    let mut hasher = Hasher::new("kachefs crates behind a crate");
    for stem in closure {
        hasher.field(stem.as_bytes());
    }
    let digest = hasher.finish();
    digest.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// An input record as it was before it said what was loaded: what it lists, which still is its name.
#[derive(Serialize, Deserialize)]
pub(crate) struct InputRecord2 {
    sources: Vec<Vec<u8>>,
    env: Vec<String>,
    observed: Option<Vec<Observation>>,
    created_ms: u64,
}

impl InputRecord2 {
    /// What a record lists, whenever it was made.
    pub(crate) fn listing(record: &InputRecord) -> Self {
        Self {
            sources: record.sources.clone(),
            env: record.env.clone(),
            observed: record.observed.clone(),
            created_ms: 0,
        }
    }
}

impl Record for InputRecord2 {
    const NAME: &'static str = "input record, as it was";
    const VERSION: u8 = 2;
}

impl From<InputRecord2> for InputRecord {
    fn from(older: InputRecord2) -> Self {
        Self {
            sources: older.sources,
            env: older.env,
            observed: older.observed,
            created_ms: older.created_ms,
            loads: None,
        }
    }
}

impl Record for InputRecord {
    const NAME: &'static str = "input record";
    const VERSION: u8 = 3;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        #[derive(Deserialize)]
        struct First {
            sources: Vec<Vec<u8>>,
            env: Vec<String>,
            created_ms: u64,
        }
        match version {
            1 => Some(whole(body).map(|first: First| Self {
                sources: first.sources,
                env: first.env,
                observed: None,
                created_ms: first.created_ms,
                loads: None,
            })),
            2 => Some(whole::<InputRecord2>(body).map(Self::from)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CodecError, decode, encode};

    fn result() -> ActionEntry {
        ActionEntry::Result(ActionResult {
            crate_name: "a".into(),
            outputs: vec![Output {
                name: "liba.rlib".into(),
                mode: 0o644,
                content: OutputContent::Blob {
                    digest: Digest::of(b"x"),
                    size: 1,
                },
            }],
            stdout: Vec::new(),
            stderr: b"w".to_vec(),
            origin: Origin {
                closure: vec!["a-1".into()],
                proc_macro: true,
            },
            compile_ms: 300,
        })
    }

    #[test]
    fn action_entry_layout_is_fixed() {
        let bytes = encode(&result()).expect("encodes");
        let mut golden = vec![2, 0, 1, b'a', 1, 9];
        golden.extend_from_slice(b"liba.rlib");
        golden.extend_from_slice(&[0xa4, 0x03, 0]);
        golden.extend_from_slice(Digest::of(b"x").as_bytes());
        golden.extend_from_slice(&[1, 0, 1, b'w', 1, 3, b'a', b'-', b'1', 1, 0xac, 2]);
        assert_eq!(
            bytes, golden,
            "a changed layout needs a new ActionEntry::VERSION"
        );
        assert_eq!(decode::<ActionEntry>(&bytes).expect("decodes"), result());
        golden[0] = 1;
        assert_eq!(
            decode::<ActionEntry>(&golden).expect("decodes an older one"),
            result()
        );
    }

    #[test]
    fn script_entry_layout_is_fixed() {
        let entry = ActionEntry::Script(ScriptResult {
            package: "p".into(),
            tree: vec![
                TreeEntry {
                    path: b"d".to_vec(),
                    mode: 0o755,
                    content: TreeContent::Directory,
                },
                TreeEntry {
                    path: b"d/l".to_vec(),
                    mode: 0o777,
                    content: TreeContent::Link(b"x".to_vec()),
                },
            ],
            stdout: b"o".to_vec(),
            stderr: Vec::new(),
            run_ms: 3,
        });
        let bytes = encode(&entry).expect("encodes");
        let mut golden = vec![2, 2, 1, b'p', 2, 1, b'd', 0xed, 0x03, 0, 3];
        golden.extend_from_slice(b"d/l");
        golden.extend_from_slice(&[0xff, 0x03, 2, 1, b'x', 1, b'o', 0, 3]);
        assert_eq!(
            bytes, golden,
            "a changed layout needs a new ActionEntry::VERSION"
        );
        assert_eq!(decode::<ActionEntry>(&bytes).expect("decodes"), entry);
    }

    #[test]
    fn readers_refuse_what_they_do_not_know() {
        let mut bytes = encode(&result()).expect("encodes");
        bytes[0] = 77;
        assert!(matches!(
            decode::<ActionEntry>(&bytes),
            Err(CodecError::Version { found: 77, .. })
        ));
        assert!(decode::<ActionEntry>(&[]).is_err());
        bytes[0] = ActionEntry::VERSION;
        bytes.push(0);
        assert!(
            decode::<ActionEntry>(&bytes).is_err(),
            "trailing bytes are damage"
        );
    }

    #[test]
    fn what_was_loaded_is_known_by_name() {
        let loads = Loads::new(["b-2", "c-3"], ["libc-3.rmeta", "libb-2.rlib"]);
        assert!(loads.is_of(["b-2", "c-3"]));
        assert!(!loads.is_of(["b-2"]) && !loads.is_of(["b-2c-3"]));
        assert!(loads.has("libb-2.rlib") && loads.has("libc-3.rmeta"));
        assert!(!loads.has("libb-2.rmeta"));
    }

    #[test]
    fn input_record_layout_is_fixed() {
        let record = InputRecord {
            sources: vec![b"\0C\0/src/lib.rs".to_vec()],
            env: vec!["A".into()],
            observed: Some(vec![Observation {
                path: b"/etc/x".to_vec(),
                look: Look::Status,
            }]),
            created_ms: 5,
            loads: Some(Loads::new(["b-2", "c-3"], ["libc-3.rmeta", "libb-2.rlib"])),
        };
        let bytes = encode(&record).expect("encodes");
        let mut golden = vec![3, 1, 14];
        golden.extend_from_slice(b"\0C\0/src/lib.rs");
        golden.extend_from_slice(&[1, 1, b'A', 1, 1, 6]);
        golden.extend_from_slice(b"/etc/x");
        golden.extend_from_slice(&[1, 5]);
        let older = [&[2], &golden[1..]].concat();
        golden.push(1);
        golden.extend_from_slice(&closure_stand_in(["b-2", "c-3"]));
        let mut files = ["libb-2.rlib", "libc-3.rmeta"].map(stand_in);
        files.sort_unstable();
        golden.push(2);
        golden.extend_from_slice(files.as_flattened());
        assert_eq!(
            bytes, golden,
            "a changed layout needs a new InputRecord::VERSION"
        );
        assert_eq!(decode::<InputRecord>(&bytes).expect("decodes"), record);
        let older = decode::<InputRecord>(&older).expect("decodes an older one");
        let without = InputRecord {
            loads: None,
            ..record
        };
        assert_eq!(older, without);
    }

    #[test]
    fn older_input_records_are_read() {
        let mut older = vec![1, 1, 14];
        older.extend_from_slice(b"\0C\0/src/lib.rs");
        older.extend_from_slice(&[1, 1, b'A', 5]);
        let record = decode::<InputRecord>(&older).expect("decodes");
        assert_eq!((record.observed, record.created_ms), (None, 5));
    }
}
