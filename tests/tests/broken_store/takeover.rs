//! A daemon that finds its index damaged while the kernel still holds the mounts of the one before: no
//! number may mean another file than it did. What was open fails or shows its own bytes, and the mount
//! is there again.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use harness::chance::Chance;
use harness::{Must, processes, tree};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};

use super::damage::{self, HARMS, Harm, harm, index_files};
use super::{LIMIT, Scene};

/// Kills the daemon, and has `damage` done before the keeper starts the next.
#[track_caller]
fn between_two_daemons(scene: &Scene, damage: impl FnOnce()) {
    let (keeper, _) = scene.sandbox.keeper();
    let daemon = scene.sandbox.daemon_pid();
    kill(keeper, Signal::SIGSTOP).must("SIGSTOP");
    kill(daemon, Signal::SIGKILL).must("SIGKILL");
    // A zombie, for its keeper is stopped, without threads: then its locks are gone too.
    let ended = || {
        let threads = fs::read_dir(format!("/proc/{daemon}/task"));
        let state = fs::read_to_string(format!("/proc/{daemon}/stat")).unwrap_or_default();
        let state = state.rsplit(") ").next().unwrap_or_default();
        threads.map_or(0, Iterator::count) <= 1 && !state.starts_with(['R', 'S', 'D', 'T'])
    };
    let is_over = processes::wait_for(Duration::from_secs(20), ended);
    damage();
    kill(keeper, Signal::SIGCONT).must("SIGCONT");
    assert!(is_over, "the daemon survives SIGKILL");
}

/// Open files, each with bytes that only it has.
struct Opened(Vec<(File, Vec<u8>)>);

impl Opened {
    #[track_caller]
    fn new(scene: &Scene, round: usize) -> Self {
        let target = scene.damaged.target();
        let files = (0..20).map(|number| {
            let path = target.join(format!("open-{number}"));
            // Large and small, so that some are private files and some are in the record.
            let bytes = format!("{round} {number} ").into_bytes();
            let bytes = bytes.repeat(if number % 2 == 0 { 4_000 } else { 5 });
            // A new inode each round.
            let _ = fs::remove_file(&path);
            fs::write(&path, &bytes).must("write");
            (File::open(path).must("open"), bytes)
        });
        Self(files.collect())
    }

    /// Every one fails, or shows what it showed.
    #[track_caller]
    fn check(&self, what: &str) -> usize {
        let mut alive = 0;
        for (number, (file, bytes)) in self.0.iter().enumerate() {
            // Fails where the mount has ended.
            let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            let mut found = vec![0; bytes.len()];
            if file.read_exact_at(&mut found, 0).is_ok() {
                assert!(
                    found == *bytes,
                    "{what}: open-{number} shows another file's bytes"
                );
                alive += 1;
            }
        }
        alive
    }
}

/// Damages the index between two daemons. Returns how many open files went on.
#[track_caller]
fn goes_on(scene: &Scene, round: usize, what: &str, damage: impl FnOnce()) -> usize {
    let opened = Opened::new(scene, round);
    between_two_daemons(scene, damage);
    scene.sandbox.current_daemon();
    // New files take new numbers, also in a view that is mounted afresh.
    scene.start();
    let target = scene.damaged.target();
    for number in 0..100 {
        fs::write(target.join(format!("new-{number}")), vec![b'!'; 20_000]).must("write");
    }
    let alive = opened.check(what);
    scene.builds();
    alive
}

#[track_caller]
pub fn index_damaged() {
    let mut chance = Chance::new();
    let scene = Scene::new(Duration::from_mins(12));
    let store = scene.sandbox.store();
    let whole = goes_on(&scene, 0, "undamaged", || ());
    assert_eq!(whole, 20, "without damage everything goes on");
    let mut round = 0;
    for kind in ["log", "sst", "MANIFEST", "CURRENT"] {
        for how in HARMS {
            round += 1;
            let what = format!("{how:?} {kind}");
            let alive = goes_on(&scene, round, &what, || {
                for file in index_files(&store, kind) {
                    harm(&file, how, &mut chance);
                }
            });
            println!("{what}: {alive} of 20 open files went on");
            if kind == "log" && matches!(how, Harm::Empty | Harm::Remove) {
                assert_eq!(
                    alive, 0,
                    "{what}: what it acknowledged is lost, the mount ended"
                );
            }
        }
    }
}

/// The beginning of a record, as of a daemon that died while it wrote (RocksDB's log format:
/// checksum, length, type, bytes).
const BEGUN: &[u8] = b"\x01\x02\x03\x04\x64\x00\x01and no more";

#[track_caller]
pub fn write_under_way() {
    let scene = Scene::new(LIMIT);
    let store = scene.sandbox.store();
    let before = scene.log().len();
    let alive = goes_on(&scene, 1, "a write under way", || {
        let newest = index_files(&store, "log").pop().must("a log");
        let mut log = File::options().append(true).open(newest).must("open");
        log.write_all(BEGUN).must("write");
    });
    assert_eq!(alive, 20, "nothing that was acknowledged is missing");
    let named = scene.named(before);
    assert!(!named.is_empty(), "it is named");
    let log = scene.log()[before..].to_owned();
    assert!(!log.contains("ERROR"), "and no error:\n{log}");
}

#[track_caller]
pub fn index_removed() {
    let scene = Scene::new(LIMIT);
    let store = scene.sandbox.store();
    let alive = goes_on(&scene, 1, "removed", || {
        fs::remove_dir_all(store.join("index")).must("remove");
    });
    assert_eq!(alive, 0, "the mount of the lost view ended");
    // What was private is not gone without a trace.
    let kept = tree::files(&store.join("quarantine"));
    let private = kept
        .iter()
        .filter(|path| path.to_string_lossy().contains("/scratch/"));
    assert!(private.count() >= 10, "{kept:?}");
}

#[track_caller]
pub fn records_spoiled() {
    let mut chance = Chance::new();
    let scene = Scene::new(LIMIT);
    let store = scene.sandbox.store();
    for (round, family) in ["inodes", "dentries", "views"].into_iter().enumerate() {
        goes_on(&scene, round, family, || {
            super::spoil(&scene, family, &mut chance);
        });
    }
    assert!(!damage::blobs(&store).is_empty(), "blobs stay");
}
