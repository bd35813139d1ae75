//! What machines tell each other through a remote: results, where the blobs they name are, and which
//! of them are still to be sent.
//!
//! A [`Fact`] is everything another machine needs to hit: what to look at, and what was made. It holds
//! path templates, digests and texts; what must not leave the machine is decided before a fact is made.

use serde::{Deserialize, Serialize};

use crate::action::{ActionEntry, ActionKey, InputRecord, InputRecord2, InvocationDigest};
use crate::codec::{CodecError, Record, encode, whole};
use crate::digest::{Digest, Hasher};

/// Which remote a fact is about: its location, as a digest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RemoteId([u8; 8]);

impl RemoteId {
    /// The remote at `location`.
    pub fn of(location: &str) -> Self {
        let digest = Digest::of(location.as_bytes());
        let start = digest.as_bytes().first_chunk().copied();
        Self(start.unwrap_or_default())
    }

    /// What keys about it start with.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Where in a remote a blob is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Place {
    /// It is an object of its own.
    Own,
    /// It is part of a pack.
    Pack {
        /// The name of the pack.
        pack: Digest,
        /// Where it starts there, in bytes.
        offset: u64,
        /// How many bytes it is there.
        length: u64,
    },
}

/// A blob that a remote holds; or a result, under the digest of its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Its length in bytes, as a blob; 0 for a result.
    pub size: u64,
    /// Where it is.
    pub place: Place,
    /// When it was written, as far as that was seen here, in milliseconds since the epoch; else 0, or
    /// [`Kept::DOUBTED`] where it was not there once and is said to be there again.
    pub seen_ms: u64,
    /// When that was, or when it was last learned that the remote holds it; 0 where that is not known, and
    /// [`Kept::LOST`] where it was held and is not any more.
    pub known_ms: u64,
}

impl Kept {
    /// Instead of a time: it is not there any more.
    pub(crate) const LOST: u64 = u64::MAX;

    /// The same: it was not there once.
    pub const DOUBTED: u64 = u64::MAX;
}

/// Version 1: as it was before rows aged.
#[derive(Deserialize)]
struct Kept1 {
    size: u64,
    place: Place,
    seen_ms: u64,
}

impl Record for Kept {
    const NAME: &'static str = "blob in a remote";
    const VERSION: u8 = 2;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        let convert = |old: Kept1| Self {
            size: old.size,
            place: old.place,
            seen_ms: old.seen_ms,
            known_ms: old.seen_ms,
        };
        (version == 1).then(|| whole(body).map(convert))
    }
}

/// A result that others are to learn.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Upload {
    /// Where it is to be uploaded.
    pub remote: RemoteId,
    /// The invocation it is a result of.
    pub invocation: InvocationDigest,
    /// What the run read.
    pub record: InputRecord,
    /// The key, and the key it is bound under where it is bound to paths.
    pub keys: Vec<ActionKey>,
    /// Bytes that must not leave this machine. What holds any of them is not sent.
    pub secrets: Vec<Vec<u8>>,
    /// What the last key held then ([`ActionEntry::digest`]): what takes its place may hold other bytes that
    /// must not leave, and has a note of its own. `None` where an older kachefs noted it.
    pub result: Option<Digest>,
}

/// The first layout. In the second came `result`, behind all else: what follows a struct in a tuple follows its
/// fields (postcard).
#[derive(Deserialize)]
struct Upload1 {
    remote: RemoteId,
    invocation: InvocationDigest,
    record: InputRecord2,
    keys: Vec<ActionKey>,
    secrets: Vec<Vec<u8>>,
}

impl Upload1 {
    fn with(self, result: Option<Digest>) -> Upload {
        Upload {
            remote: self.remote,
            invocation: self.invocation,
            record: self.record.into(),
            keys: self.keys,
            secrets: self.secrets,
            result,
        }
    }
}

impl Record for Upload {
    const NAME: &'static str = "upload";
    const VERSION: u8 = 3;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        match version {
            1 => Some(whole(body).map(|older: Upload1| older.with(None))),
            2 => Some(whole(body).map(|(older, result): (Upload1, _)| older.with(result))),
            _ => None,
        }
    }
}

/// A result as others learn it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fact {
    /// The invocation it is a result of.
    pub invocation: InvocationDigest,
    /// What the run read.
    pub record: InputRecord,
    /// What the action cache holds under which key: one result, and before it where to find it.
    pub entries: Vec<(ActionKey, ActionEntry)>,
    /// The blobs that are no objects of their own.
    pub packed: Vec<(Digest, Place)>,
}

/// As it was when records did not say what was loaded.
#[derive(Deserialize)]
struct Fact1 {
    invocation: InvocationDigest,
    record: InputRecord2,
    entries: Vec<(ActionKey, ActionEntry)>,
    packed: Vec<(Digest, Place)>,
}

impl From<Fact1> for Fact {
    fn from(older: Fact1) -> Self {
        Self {
            invocation: older.invocation,
            record: older.record.into(),
            entries: older.entries,
            packed: older.packed,
        }
    }
}

impl Record for Fact {
    const NAME: &'static str = "shared result";
    const VERSION: u8 = 2;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        (version == 1).then(|| whole::<Fact1>(body).map(Self::from))
    }
}

/// The results of one build.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct BuildManifest {
    /// Its results.
    pub facts: Vec<Fact>,
    /// Blobs that builds like it have fetched, in the order they read them, the newest build's first.
    pub reads: Vec<Digest>,
}

impl Record for BuildManifest {
    const NAME: &'static str = "build manifest";
    const VERSION: u8 = 3;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        let with = |facts: Vec<Fact1>, reads| Self {
            facts: facts.into_iter().map(Fact::from).collect(),
            reads,
        };
        match version {
            1 => Some(whole(body).map(|facts| with(facts, Vec::new()))),
            2 => Some(whole(body).map(|(facts, reads)| with(facts, reads))),
            _ => None,
        }
    }
}

impl ActionEntry {
    /// What tells it from others.
    pub fn digest(&self) -> Result<Digest, CodecError> {
        encode(self).map(|bytes| Digest::of(&bytes))
    }

    /// What says that a remote holds it under this key: another that takes its place is not said to be there.
    pub fn kept_as(&self, key: &ActionKey) -> Result<Digest, CodecError> {
        let mut hasher = Hasher::new("kachefs result in a remote");
        Ok(hasher.digest(&key.0).digest(&self.digest()?).finish())
    }

    /// The blobs it names, with their sizes in bytes.
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        match self {
            Self::Result(result) => result.blobs().collect(),
            Self::Script(result) => result.blobs().collect(),
            Self::PathBound(_) => Vec::new(),
        }
    }

    /// Whether binding it puts nothing but into the directory it is bound in.
    pub fn stays_inside(&self) -> bool {
        match self {
            Self::PathBound(_) => true,
            Self::Result(result) => result
                .outputs
                .iter()
                .all(|output| is_name(output.name.as_bytes())),
            Self::Script(result) => result
                .tree
                .iter()
                .all(|entry| entry.path.split(|byte| *byte == b'/').all(is_name)),
        }
    }
}

/// Whether bytes are the name of something in a directory, and no way out of it.
pub(crate) fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::{ActionResult, Origin, Output, RootSet, ScriptResult, TreeEntry};
    use crate::codec::decode;
    use crate::{OutputContent, TreeContent};

    fn fact() -> Fact {
        Fact {
            invocation: InvocationDigest(Digest::of(b"i")),
            record: InputRecord {
                sources: vec![b"s".to_vec()],
                env: Vec::new(),
                observed: None,
                created_ms: 1,
                loads: None,
            },
            entries: vec![(
                ActionKey(Digest::of(b"k")),
                ActionEntry::PathBound(RootSet::all()),
            )],
            packed: vec![(
                Digest::of(b"b"),
                Place::Pack {
                    pack: Digest::of(b"p"),
                    offset: 2,
                    length: 3,
                },
            )],
        }
    }

    #[test]
    fn the_layout_of_facts_is_fixed() {
        let bytes = encode(&fact()).expect("encodes");
        let golden = [&[2], &body_of_fact(&[0])[..]].concat();
        assert_eq!(bytes, golden, "a changed layout needs a new Fact::VERSION");
        assert_eq!(decode::<Fact>(&bytes).expect("decodes"), fact());
        let older = [&[1], &body_of_fact(&[])[..]].concat();
        assert_eq!(
            decode::<Fact>(&older).expect("decodes an older one"),
            fact()
        );
    }

    /// The layout of [`fact`], with what its record says of what was loaded.
    fn body_of_fact(loads: &[u8]) -> Vec<u8> {
        let mut body = Digest::of(b"i").as_bytes().to_vec();
        body.extend_from_slice(&[1, 1, b's', 0, 0, 1]);
        body.extend_from_slice(loads);
        body.push(1);
        body.extend_from_slice(Digest::of(b"k").as_bytes());
        body.extend_from_slice(&[1, 31, 1]);
        body.extend_from_slice(Digest::of(b"b").as_bytes());
        body.push(1);
        body.extend_from_slice(Digest::of(b"p").as_bytes());
        body.extend_from_slice(&[2, 3]);
        body
    }

    #[test]
    fn the_layout_of_manifests_is_fixed() {
        let read = Digest::of(b"r");
        let manifest = BuildManifest {
            facts: vec![fact()],
            reads: vec![read],
        };
        let (fact, older) = (body_of_fact(&[0]), body_of_fact(&[]));
        let golden = [&[3, 1], &fact[..], &[1], &read.as_bytes()[..]].concat();
        let bytes = encode(&manifest).expect("encodes");
        assert_eq!(bytes, golden, "a changed layout needs a new version");
        assert_eq!(decode::<BuildManifest>(&bytes).expect("decodes"), manifest);
        let second = [&[2, 1], &older[..], &[1], &read.as_bytes()[..]].concat();
        let second = decode::<BuildManifest>(&second).expect("decodes an older one");
        assert_eq!(second, manifest);
        let first = [&[1, 1], &older[..]].concat();
        let first = decode::<BuildManifest>(&first).expect("decodes an older one");
        assert_eq!((first.facts, first.reads), (manifest.facts, Vec::new()));
    }

    #[test]
    fn the_layout_of_what_is_kept_is_fixed() {
        let kept = Kept {
            size: 300,
            place: Place::Own,
            seen_ms: 5,
            known_ms: 7,
        };
        let bytes = encode(&kept).expect("encodes");
        let golden = [2, 0xac, 2, 0, 5, 7];
        assert_eq!(bytes, golden, "a changed layout needs a new Kept::VERSION");
        assert_eq!(decode::<Kept>(&bytes).expect("decodes"), kept);
        let older = Kept {
            known_ms: 5,
            ..kept
        };
        let golden = [1, 0xac, 2, 0, 5];
        assert_eq!(decode::<Kept>(&golden).expect("decodes"), older);
    }

    #[test]
    fn the_layout_of_what_waits_is_fixed() {
        let Fact {
            invocation, record, ..
        } = fact();
        let upload = Upload {
            remote: RemoteId::of("s3://one"),
            invocation,
            record,
            keys: vec![ActionKey(Digest::of(b"k"))],
            secrets: vec![b"x".to_vec()],
            result: Some(Digest::of(b"r")),
        };
        let body = |loads: &[u8]| {
            let mut body = RemoteId::of("s3://one").0.to_vec();
            body.extend_from_slice(Digest::of(b"i").as_bytes());
            body.extend_from_slice(&[1, 1, b's', 0, 0, 1]);
            body.extend_from_slice(loads);
            body.push(1);
            body.extend_from_slice(Digest::of(b"k").as_bytes());
            body.extend_from_slice(&[1, 1, b'x']);
            body
        };
        let result = Digest::of(b"r");
        let golden = [&[3], &body(&[0])[..], &[1], result.as_bytes()].concat();
        let bytes = encode(&upload).expect("encodes");
        assert_eq!(
            bytes, golden,
            "a changed layout needs a new Upload::VERSION"
        );
        assert_eq!(decode::<Upload>(&golden).expect("decodes"), upload);
        let second = [&[2], &body(&[])[..], &[1], result.as_bytes()].concat();
        let second = decode::<Upload>(&second).expect("decodes an older one");
        assert_eq!(second, upload);
        let first = decode::<Upload>(&[&[1], &body(&[])[..]].concat()).expect("decodes");
        let without = Upload {
            result: None,
            ..upload
        };
        assert_eq!(first, without);
    }

    #[test]
    fn names_that_lead_elsewhere_are_seen() {
        let result = |name: &str| {
            ActionEntry::Result(ActionResult {
                crate_name: "c".into(),
                outputs: vec![Output {
                    name: name.into(),
                    mode: 0o644,
                    content: OutputContent::Template(Vec::new()),
                }],
                stdout: Vec::new(),
                stderr: Vec::new(),
                origin: Origin::default(),
                compile_ms: 0,
            })
        };
        let script = |path: &str| {
            ActionEntry::Script(ScriptResult {
                package: "p".into(),
                tree: vec![TreeEntry {
                    path: path.into(),
                    mode: 0o644,
                    content: TreeContent::Directory,
                }],
                stdout: Vec::new(),
                stderr: Vec::new(),
                run_ms: 0,
            })
        };
        assert!(result("liba.rlib").stays_inside());
        assert!(script("a/b").stays_inside());
        for name in ["", ".", "..", "a/b", "/a", "a\0"] {
            assert!(!result(name).stays_inside(), "{name:?}");
        }
        for path in ["", "..", "a/../b", "/a", "a//b", "a/", "./a", "a\0"] {
            assert!(!script(path).stays_inside(), "{path:?}");
        }
    }
}
