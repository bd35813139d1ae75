//! Files whose content tells what it should be, written, overwritten, replaced and synced in a known
//! order, and what may be left of them when the power goes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harness::Must;
use harness::chance::Chance;

/// Files of each kind.
const EACH: usize = 6;
/// What is appended at a time.
const CHUNK: usize = 5000;
/// The index itself holds what is at most 8 KiB.
const SMALL: usize = 6000;
const LARGE: usize = 200_000;
/// Between two changes, at most.
const PAUSE: Duration = Duration::from_millis(80);

/// How a file changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Emptied and written again.
    Rewritten,
    /// Overwritten where it is.
    InPlace,
    /// Replaced by a new file that nobody syncs.
    Replaced,
    /// Replaced by a new file, synced before; now and then synced itself.
    Synced,
    /// Added to.
    Appended,
    /// Removed, and made again.
    Removed,
}

const KINDS: [Kind; 6] = [
    Kind::Rewritten,
    Kind::InPlace,
    Kind::Replaced,
    Kind::Synced,
    Kind::Appended,
    Kind::Removed,
];

/// What was done to a file.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    /// Versions begun; the last of them is one less.
    begun: usize,
    /// The last version a returned `fsync` has made durable.
    synced: Option<usize>,
}

/// What was done to all files, by name.
#[derive(Clone, Debug)]
pub struct Moment(BTreeMap<String, Done>);

impl Moment {
    /// How many files there were.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// The files, and what was done to them so far.
pub struct Files {
    dir: PathBuf,
    done: Mutex<BTreeMap<String, Done>>,
}

impl Files {
    /// None yet, to be in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        let done = Mutex::default();
        Self { dir, done }
    }

    /// What was done by now.
    pub fn moment(&self) -> Moment {
        Moment(self.done.lock().must("the journal").clone())
    }

    /// Changes files until told to stop.
    pub fn change(&self, stop: &AtomicBool) {
        fs::create_dir_all(&self.dir).must("mkdir");
        let mut chance = Chance::new();
        while !stop.load(Ordering::Relaxed) {
            let kind = KINDS[chance.below(KINDS.len())];
            let name = format!("{kind:?}-{}", chance.below(EACH));
            let version = self.begin(&name);
            let synced = self.make(kind, &name, version, &mut chance);
            if synced && let Some(done) = self.done.lock().must("the journal").get_mut(&name) {
                done.synced = Some(version);
            }
            thread::sleep(chance.pause(PAUSE));
        }
    }

    fn begin(&self, name: &str) -> usize {
        let mut done = self.done.lock().must("the journal");
        let done = done.entry(name.to_owned()).or_default();
        done.begun += 1;
        done.begun - 1
    }

    /// Makes a version of a file; whether it is durable now.
    fn make(&self, kind: Kind, name: &str, version: usize, chance: &mut Chance) -> bool {
        let path = self.dir.join(name);
        let longest = if chance.below(3) == 0 { SMALL } else { LARGE };
        let length = 100 + chance.below(longest);
        match kind {
            Kind::Rewritten => {
                fs::write(&path, content(name, version, length)).must("write");
                false
            }
            Kind::InPlace => {
                let mut options = OpenOptions::new();
                let file = options.write(true).create(true).truncate(false).open(&path);
                let length = 20_000 + 8 * name.len();
                let text = content(name, version, length);
                file.must("open").write_all_at(&text, 0).must("pwrite");
                false
            }
            Kind::Replaced | Kind::Synced => {
                let beside = self.dir.join(format!("{name}.new"));
                let mut file = File::create(&beside).must("create");
                file.write_all(&content(name, version, length))
                    .must("write");
                if kind == Kind::Synced {
                    file.sync_all().must("fsync");
                }
                fs::rename(&beside, &path).must("rename");
                let again = kind == Kind::Synced && chance.below(2) == 0;
                if again {
                    file.sync_all().must("fsync");
                }
                again
            }
            Kind::Appended => {
                let mut options = OpenOptions::new();
                let file = options.append(true).create(true).open(&path);
                let chunk = filler(name, version, CHUNK);
                file.must("open").write_all(&chunk).must("append");
                false
            }
            Kind::Removed => {
                if version > 0 {
                    fs::remove_file(&path).must("unlink");
                }
                fs::write(&path, content(name, version, length)).must("write");
                false
            }
        }
    }

    /// The test fails unless each file in `dir` is whole or absent, and what was synced before the
    /// first moment is there. Nothing begun after the second can be. Returns how many are there.
    #[track_caller]
    pub fn check(dir: &Path, before: &Moment, after: &Moment) -> usize {
        let mut there = 0;
        for (name, done) in &after.0 {
            let synced = before.0.get(name).and_then(|done| done.synced);
            let Ok(text) = fs::read(dir.join(name)) else {
                assert!(synced.is_none(), "{name} was synced: {done:?}");
                continue;
            };
            there += 1;
            let version = if name.starts_with("Appended") {
                appended(name, &text)
            } else {
                version_of(name, &text)
            };
            // At some moment it was empty, when nobody had synced it.
            assert!(
                version.is_some() || text.is_empty() && synced.is_none(),
                "{name} is torn: {} bytes, {:?}…, {done:?}",
                text.len(),
                String::from_utf8_lossy(&text[..text.len().min(60)])
            );
            let Some(version) = version else { continue };
            assert!(version < done.begun, "{name}: {version}, {done:?}");
            assert!(synced <= Some(version), "{name}: {version}, {synced:?}");
        }
        there
    }
}

/// The content of one version of a file.
fn content(name: &str, version: usize, length: usize) -> Vec<u8> {
    let mut text = format!("{name} {version} {length}\n").into_bytes();
    text.extend(filler(name, version, length));
    text
}

/// The version a file holds, if it holds exactly that.
fn version_of(name: &str, text: &[u8]) -> Option<usize> {
    let end = text.iter().position(|byte| *byte == b'\n')?;
    let head = str::from_utf8(&text[..end]).ok()?;
    let [own, version, length] = head.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let (version, length) = (version.parse().ok()?, length.parse().ok()?);
    (own == name && text == content(name, version, length)).then_some(version)
}

/// The last chunk of a file that is added to, if it holds exactly all chunks up to that.
fn appended(name: &str, text: &[u8]) -> Option<usize> {
    let whole = text.len().is_multiple_of(CHUNK);
    let mut chunks = text.chunks(CHUNK).enumerate();
    let right = chunks.all(|(version, chunk)| chunk == filler(name, version, CHUNK));
    (whole && right).then(|| (text.len() / CHUNK).checked_sub(1))?
}

/// Bytes that differ from version to version everywhere.
fn filler(name: &str, version: usize, length: usize) -> Vec<u8> {
    let seed = name.bytes().fold(version as u64 + 1, |seed, byte| {
        seed.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte)
    });
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(length);
    bytes
}
