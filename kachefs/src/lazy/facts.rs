//! The objects that hold facts: what is in them, and what of it is believed.
//!
//! Everything here comes from somewhere else: lengths are bounded before anything is unpacked, and a
//! fact is used only when who made it is trusted and when binding it stays where it belongs.

use std::io;

use bytes::Bytes;
use remote::signed::{self, Opened, Purpose, SecretKey, Trust, Untrusted};
use remote::{ObjectName, Remote, RemoteError, TreeName};
use store::codec::{decode, encode};
use store::{BuildManifest, Digest, Fact, InvocationDigest, Tree};

/// Results of one invocation that are kept: the branches a team switches between.
pub const RESULTS: usize = 8;

/// Compression of facts: they are sent once and read by everybody.
const LEVEL: i32 = 9;

/// No object with facts unpacks to more.
pub(super) const LARGEST_UNPACKED: usize = 256 << 20;

/// Nor do the results of an invocation, which are unpacked before anybody knows who signed them.
const LARGEST_RESULTS: usize = 32 << 20;

/// A result of more bytes is not sent.
pub(super) const LARGEST_RESULT: usize = 16 << 20;

/// No object with facts is larger.
pub const LARGEST: u64 = 64 << 20;

/// The results of an invocation, as they are in a remote: each in an envelope of whoever made it.
#[derive(Default)]
pub struct Results(Vec<Vec<u8>>);

impl Results {
    /// What an object holds; nothing where it does not hold results.
    pub fn read(object: &[u8]) -> Self {
        Self::parse(object).unwrap_or_default()
    }

    /// The same; `None` where it does not hold results.
    pub fn parse(object: &[u8]) -> Option<Self> {
        let unpacked = unpack(object, LARGEST_RESULTS)?;
        // Looked at first: a count in a few bytes that nobody has signed would be room for gigabytes.
        let (count, _) = postcard::take_from_bytes::<usize>(&unpacked).ok()?;
        if count > RESULTS {
            return None;
        }
        let (sealed, rest) = postcard::take_from_bytes::<Vec<Vec<u8>>>(&unpacked).ok()?;
        rest.is_empty().then_some(Self(sealed))
    }

    /// All of them, whoever made them and whatever they name; `None` where one cannot be read.
    pub fn open_all(&self, invocation: &InvocationDigest) -> Option<Vec<Fact>> {
        let subject = invocation.0.as_bytes();
        let open = |sealed: &Vec<u8>| {
            let opened = signed::open(Purpose::Action, subject, sealed, &Trust::Everybody).ok()?;
            decode(&opened.fact).ok()
        };
        self.0.iter().map(open).collect()
    }

    /// Those that may be used.
    pub fn open(&self, invocation: &InvocationDigest, trust: &Trust) -> Vec<Fact> {
        let open = |sealed: &Vec<u8>| open_fact(invocation, sealed, trust);
        self.0.iter().filter_map(open).collect()
    }

    /// Keeps those that `wanted` says of, of what may be used.
    pub fn retain(
        &mut self,
        invocation: &InvocationDigest,
        trust: &Trust,
        wanted: impl Fn(&Fact) -> bool,
    ) {
        let is_wanted = |sealed: &Vec<u8>| {
            let fact = open_fact(invocation, sealed, trust);
            fact.is_some_and(|fact| wanted(&fact))
        };
        self.0.retain(is_wanted);
    }

    /// Adds one, in front; one that it is newer than goes, and what others cannot use.
    pub fn add(&mut self, fact: &Fact, key: Option<&SecretKey>, trust: &Trust) -> io::Result<()> {
        let is_other = |sealed: &Vec<u8>| {
            let known = open_fact(&fact.invocation, sealed, trust);
            known.is_some_and(|known| !is_same(&known, fact))
        };
        self.0.retain(is_other);
        let sealed = seal_fact(fact, key)?;
        self.0.insert(0, sealed);
        self.0.truncate(RESULTS);
        Ok(())
    }

    /// Whether one that says the same is there: also of where its blobs are.
    pub fn hold(&self, fact: &Fact, trust: &Trust) -> bool {
        let opened = self.open(&fact.invocation, trust);
        let says_the_same =
            |known: &Fact| known.entries == fact.entries && known.packed == fact.packed;
        opened.iter().any(says_the_same)
    }

    /// The object, without the oldest where it would be more than anybody reads.
    pub fn write(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let bytes = postcard::to_allocvec(&self.0).map_err(io::Error::other)?;
            if bytes.len() <= LARGEST_RESULTS {
                return pack(&bytes);
            }
            self.0.pop();
        }
    }
}

/// Whether two facts are of the same keys.
fn is_same(one: &Fact, other: &Fact) -> bool {
    let keys = |fact: &Fact| fact.entries.iter().map(|(key, _)| *key).collect::<Vec<_>>();
    keys(one) == keys(other)
}

fn seal_fact(fact: &Fact, key: Option<&SecretKey>) -> io::Result<Vec<u8>> {
    let bytes = encode(fact).map_err(io::Error::other)?;
    let subject = fact.invocation.0;
    Ok(signed::seal(
        Purpose::Action,
        subject.as_bytes(),
        bytes,
        key,
    ))
}

fn open_fact(invocation: &InvocationDigest, sealed: &[u8], trust: &Trust) -> Option<Fact> {
    let Opened { fact, .. } =
        signed::open(Purpose::Action, invocation.0.as_bytes(), sealed, trust).ok()?;
    let fact: Fact = decode(&fact).ok()?;
    (fact.invocation == *invocation && is_harmless(&fact)).then_some(fact)
}

/// Whether using a fact does nothing but what a result does.
fn is_harmless(fact: &Fact) -> bool {
    fact.entries.iter().all(|(_, entry)| entry.stays_inside())
}

/// The object that holds the results of a build.
pub fn write_build(
    fingerprint: &Digest,
    manifest: &BuildManifest,
    key: Option<&SecretKey>,
) -> io::Result<Vec<u8>> {
    let packed = pack(&encode(manifest).map_err(io::Error::other)?)?;
    let subject = fingerprint.as_bytes();
    Ok(signed::seal(Purpose::Build, subject, packed, key))
}

/// The results of a build that may be used; `None` where the object does not hold any that may.
pub fn read_build(fingerprint: &Digest, object: &[u8], trust: &Trust) -> Option<BuildManifest> {
    let opened = signed::open(Purpose::Build, fingerprint.as_bytes(), object, trust).ok()?;
    let mut manifest: BuildManifest = decode(&unpack(&opened.fact, LARGEST_UNPACKED)?).ok()?;
    manifest.facts.retain(is_harmless);
    Some(manifest)
}

/// The object that holds a tree.
pub fn write_tree(name: &TreeName, tree: &Tree, key: Option<&SecretKey>) -> io::Result<Vec<u8>> {
    let packed = pack(&encode(tree).map_err(io::Error::other)?)?;
    let subject = name.as_str().as_bytes();
    Ok(signed::seal(Purpose::Tree, subject, packed, key))
}

/// The tree that an object holds, if it may be used and is one.
pub fn read_tree(name: &TreeName, object: &[u8], trust: &Trust) -> Result<Tree, Untrusted> {
    let opened = signed::open(Purpose::Tree, name.as_str().as_bytes(), object, trust)?;
    let bytes = unpack(&opened.fact, LARGEST_UNPACKED).ok_or(Untrusted::Damaged)?;
    let tree: Tree = decode(&bytes).map_err(|_| Untrusted::Damaged)?;
    if tree.is_sound() {
        Ok(tree)
    } else {
        Err(Untrusted::Damaged)
    }
}

/// An object with facts that is to be written again. What cannot be read may have been damaged on the way: it is
/// asked for once more, and taken for what is there only if it comes as it came.
pub(super) async fn get_to_replace(
    remote: &dyn Remote,
    name: &ObjectName,
    is_readable: impl Fn(&[u8]) -> bool,
) -> Result<Option<Bytes>, RemoteError> {
    let first = remote.get(name, None, LARGEST).await?;
    if first.as_ref().is_none_or(|object| is_readable(object)) {
        return Ok(first);
    }
    let second = remote.get(name, None, LARGEST).await?;
    if second.as_ref().is_some_and(|object| is_readable(object)) || second == first {
        return Ok(second);
    }
    Err(RemoteError::Unreachable {
        place: name.to_string(),
        reason: "it arrives damaged, and each time otherwise".to_owned(),
    })
}

/// As objects hold it: with a checksum (RFC 8878, 3.1.1), as what nobody signs has no digest that anybody
/// knows.
pub(super) fn pack(bytes: &[u8]) -> io::Result<Vec<u8>> {
    if bytes.len() > LARGEST_UNPACKED {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    compressor.include_checksum(true)?;
    compressor.compress(bytes)
}

/// What was packed, if it is no more than anybody would pack, and arrived as it was.
pub(super) fn unpack(packed: &[u8], most: usize) -> Option<Vec<u8>> {
    // What it says of its own length decides what is set aside for it, up to the limit.
    let said = zstd::zstd_safe::get_frame_content_size(packed).ok()??;
    let length = usize::try_from(said)
        .ok()
        .filter(|length| *length <= most)?;
    zstd::bulk::decompress(packed, length).ok()
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use store::{ActionEntry, ActionKey, InputRecord, RootSet};

    use super::super::testing;
    use super::*;

    fn fact(n: u8) -> Fact {
        Fact {
            invocation: InvocationDigest(Digest::of(b"i")),
            record: InputRecord {
                sources: vec![vec![n]],
                env: Vec::new(),
                observed: None,
                created_ms: u64::from(n),
                loads: None,
            },
            entries: vec![(
                ActionKey(Digest::of(&[n])),
                ActionEntry::PathBound(RootSet::all()),
            )],
            packed: Vec::new(),
        }
    }

    fn keys() -> (SecretKey, Trust) {
        let key = SecretKey::generate().expect("a key");
        let trust = Trust::Only(vec![key.public()]);
        (key, trust)
    }

    #[test]
    fn the_newest_results_are_kept_and_each_once() {
        let (key, trust) = keys();
        let mut results = Results::default();
        for n in [1, 2, 1, 3] {
            results.add(&fact(n), Some(&key), &trust).expect("adds");
        }
        let object = results.write().expect("writes");
        let read = Results::read(&object).open(&fact(1).invocation, &trust);
        assert_eq!(read, [3, 1, 2].map(fact));
        assert!(results.hold(&fact(2), &trust) && !results.hold(&fact(9), &trust));
        for n in 10..30 {
            results.add(&fact(n), Some(&key), &trust).expect("adds");
        }
        let read = Results::read(&results.write().expect("writes"));
        assert_eq!(read.open(&fact(1).invocation, &trust).len(), RESULTS);
    }

    #[test]
    fn what_is_written_can_be_read() {
        let (key, trust) = keys();
        let mut results = Results::default();
        for n in 1..=3 {
            let mut fact = fact(n);
            fact.record.sources = vec![vec![n; LARGEST_RESULT - 1024]];
            results.add(&fact, Some(&key), &trust).expect("adds");
        }
        let object = results.write().expect("writes");
        let read = Results::read(&object).open(&fact(1).invocation, &trust);
        let keys: Vec<_> = read.iter().map(|fact| fact.entries[0].0).collect();
        assert_eq!(keys, [3, 2].map(|n| fact(n).entries[0].0));
    }

    #[test]
    fn a_count_is_no_reason_to_set_anything_aside() {
        let mut bytes = postcard::to_allocvec(&(LARGEST_RESULTS - 8)).expect("encodes");
        bytes.resize(LARGEST_RESULTS, 0);
        let object = pack(&bytes).expect("packs");
        assert!(object.len() < 10_000);
        let before = most_memory();
        assert!(Results::parse(&object).is_none());
        let took = most_memory() - before;
        assert!(took < 400 << 10, "{took} KiB");
    }

    /// The most this process has had in memory so far, in KiB (proc(5), `VmHWM`).
    fn most_memory() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("reads");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let words = line.and_then(|line| line.split_whitespace().next());
        words
            .and_then(|number| number.parse().ok())
            .expect("a number")
    }

    #[test]
    fn strangers_are_not_believed_and_not_kept() {
        let (key, trust) = keys();
        let (stranger, _) = keys();
        let everybody = Trust::Everybody;
        let mut results = Results::default();
        results
            .add(&fact(1), Some(&stranger), &everybody)
            .expect("adds");
        results.add(&fact(2), None, &everybody).expect("adds");
        assert!(results.open(&fact(1).invocation, &trust).is_empty());
        assert_eq!(results.open(&fact(1).invocation, &everybody).len(), 2);
        results.add(&fact(3), Some(&key), &trust).expect("adds");
        let all = results.open(&fact(1).invocation, &everybody);
        assert_eq!(all, [fact(3)]);
    }

    #[test]
    fn results_of_one_invocation_are_not_those_of_another() {
        let (key, trust) = keys();
        let mut results = Results::default();
        results.add(&fact(1), Some(&key), &trust).expect("adds");
        let other = InvocationDigest(Digest::of(b"other"));
        for trust in [trust, Trust::Everybody] {
            assert!(results.open(&other, &trust).is_empty());
        }
    }

    #[test]
    fn builds_are_read_as_they_were_written() {
        let (key, trust) = keys();
        let fingerprint = Digest::of(b"f");
        let manifest = BuildManifest {
            facts: vec![fact(1), fact(2)],
            reads: vec![Digest::of(b"read")],
        };
        let object = write_build(&fingerprint, &manifest, Some(&key)).expect("writes");
        assert_eq!(read_build(&fingerprint, &object, &trust), Some(manifest));
        assert_eq!(read_build(&Digest::of(b"g"), &object, &trust), None);
        for end in 0..object.len() {
            assert_eq!(read_build(&fingerprint, &object[..end], &trust), None);
        }
    }

    #[test]
    fn what_may_have_been_damaged_on_the_way_is_not_replaced() {
        let get = |answers: &[&'static [u8]]| {
            let remote = testing::Answers(Mutex::new(answers.iter().copied().collect()));
            let name = ObjectName::build(&Digest::of(b"f"));
            let is_readable = |object: &[u8]| object == b"good";
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            let runtime = runtime.expect("a runtime");
            runtime.block_on(get_to_replace(&remote, &name, is_readable))
        };
        let comes = |bytes: &'static [u8]| Some(Bytes::from_static(bytes));
        assert_eq!(get(&[]).expect("answers"), None);
        assert_eq!(get(&[b"good"]).expect("answers"), comes(b"good"));
        assert_eq!(get(&[b"bad", b"bad"]).expect("answers"), comes(b"bad"));
        assert_eq!(get(&[b"bad", b"good"]).expect("answers"), comes(b"good"));
        for answers in [&[&b"bad"[..], b"worse"][..], &[b"bad"]] {
            let error = get(answers).expect_err("next time, perhaps");
            assert!(error.is_passing(), "{error}");
        }
    }

    /// Where nobody signs nothing else would tell.
    #[test]
    fn no_bit_flips_unnoticed() {
        let bytes: Vec<u8> = (0..300u32).flat_map(|n| (n * n).to_le_bytes()).collect();
        let packed = pack(&bytes).expect("packs");
        assert!(packed.len() < bytes.len());
        let fingerprint = Digest::of(b"f");
        let manifest = BuildManifest {
            facts: vec![fact(1)],
            reads: vec![Digest::of(b"read")],
        };
        let build = write_build(&fingerprint, &manifest, None).expect("writes");
        let flips = |bytes: &[u8]| -> Vec<Vec<u8>> {
            let flip = |bit: usize| {
                let mut flipped = bytes.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                flipped
            };
            (0..bytes.len() * 8).map(flip).collect()
        };
        for (bit, flipped) in flips(&packed).iter().enumerate() {
            let found = unpack(flipped, LARGEST_UNPACKED);
            assert!(found.is_none_or(|found| found == bytes), "bit {bit}");
        }
        for (bit, flipped) in flips(&build).iter().enumerate() {
            let found = read_build(&fingerprint, flipped, &Trust::Everybody);
            assert!(found.is_none_or(|found| found == manifest), "bit {bit}");
        }
    }

    #[test]
    fn nothing_unpacks_to_more_than_the_limit() {
        pack(&vec![0; LARGEST_UNPACKED + 1]).expect_err("refused");
        let bomb = pack(&vec![0; LARGEST_RESULTS + 1]).expect("packs");
        assert!(bomb.len() < 1 << 20);
        assert_eq!(unpack(&bomb, LARGEST_RESULTS), None);
        assert!(Results::read(&bomb).0.is_empty());
        assert_eq!(unpack(b"", LARGEST_RESULTS), None);
        assert_eq!(unpack(b"no zstd at all", LARGEST_RESULTS), None);
    }
}
