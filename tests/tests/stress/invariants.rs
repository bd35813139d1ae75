//! What must hold: now and then while everything goes on, and, more of it, when all hands rest.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Counters, Must, Sandbox, mounts, processes, tree};
use nix::mount::{MsFlags, mount, umount};
use nix::unistd::Pid;
use serde_json::Value;

use crate::World;

/// What a daemon may use: a fixed part, and this much for each name.
const MEMORY: u64 = 100_000_000;
const MEMORY_PER_NAME: u64 = 300;
/// Descriptors a daemon may have: open backings (512), index files (256), the rest for mounts and
/// conversations. A process may have 1024 unless somebody raised that.
const DESCRIPTORS: usize = 1000;
/// Threads a view has, and those of everything else: the index, conversations with compilers.
const THREADS_PER_VIEW: usize = 4;
const OTHER_THREADS: usize = 150;
/// How long what is forgotten may take to be let go.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the process of a daemon uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    threads: usize,
    descriptors: usize,
}

impl Usage {
    /// Of a daemon; `None` when it is gone.
    fn of(pid: Pid) -> Option<Self> {
        let count = |what: &str| Some(fs::read_dir(format!("/proc/{pid}/{what}")).ok()?.count());
        Some(Self {
            threads: count("task")?,
            descriptors: count("fd")?,
        })
    }

    /// Of a daemon that does nothing.
    #[track_caller]
    pub fn at_rest(sandbox: &Sandbox) -> Self {
        sandbox.counters();
        Self::of(sandbox.daemon_pid()).must("the daemon's process")
    }
}

fn number(stats: &Value, pointer: &str) -> u64 {
    let value = stats.pointer(pointer).and_then(Value::as_u64);
    value.must(format!("no {pointer} in {stats:#}"))
}

fn views(stats: &Value) -> &Vec<Value> {
    stats["views"].as_array().must("views")
}

/// Checks a daemon that is busy.
#[track_caller]
pub fn live(world: &World, stats: &Value) {
    let (used, names) = assert_memory(stats);
    world.used(used, names);
    let mounted = views(stats).len();
    let pid = i32::try_from(number(stats, "/daemon/pid")).must("a pid");
    // Killed since it answered: the next is asked soon.
    if let Some(usage) = Usage::of(Pid::from_raw(pid)) {
        assert!(
            usage.descriptors <= DESCRIPTORS
                && usage.threads <= mounted * THREADS_PER_VIEW + OTHER_THREADS,
            "{usage:?} with {mounted} views"
        );
    }
    assert!(number(stats, "/bytes/stored") <= number(stats, "/bytes/ingested"));
    assert_no_error_logged(&world.sandbox);
}

#[track_caller]
fn assert_memory(stats: &Value) -> (u64, u64) {
    let names: u64 = views(stats).iter().map(|view| number(view, "/names")).sum();
    let used = number(stats, "/daemon/rss_bytes");
    let allowed = MEMORY + MEMORY_PER_NAME * names;
    assert!(
        used <= allowed,
        "{used} bytes of memory for {names} names in {} views, allowed are {allowed}",
        views(stats).len()
    );
    (used, names)
}

#[track_caller]
fn assert_no_error_logged(sandbox: &Sandbox) {
    let log = fs::read_to_string(sandbox.store().join("daemon.log")).must("daemon.log");
    let wrong = |line: &&str| line.contains("ERROR") || line.contains("panicked");
    let errors: Vec<_> = log.lines().filter(wrong).collect();
    assert!(
        errors.is_empty(),
        "{} errors in daemon.log:\n{}",
        errors.len(),
        errors[..errors.len().min(20)].join("\n")
    );
}

/// Every unit cargo did not find fresh was counted, as one thing or another.
#[track_caller]
pub fn counted(world: &World, seen: &Counters) {
    let units = world.times("units compiled or hit");
    let counted = seen.hits + seen.misses + seen.uncacheable;
    assert!(units > 0 && seen.hits > 0 && seen.misses > 0, "{seen:?}");
    // Builds that were killed or failed counted more. Daemons that were killed counted less: they
    // had a compile under way.
    assert!(
        counted >= units || world.times("daemons killed") > 0,
        "{counted} counted, {units} reported: {seen:?}"
    );
    let failed = world.times("builds that failed as they should");
    assert!(
        seen.failed >= failed || world.times("daemons killed") > 0,
        "{failed} builds failed: {seen:?}"
    );
}

/// Checks everything once all hands rest. Nothing is mounted afterwards, and nothing is in the
/// views.
#[track_caller]
pub fn at_rest(world: &World, targets: &[PathBuf], before: &Usage, kills: usize) {
    let sandbox = &world.sandbox;
    sandbox.counters();
    assert_nothing_waits(sandbox);
    assert_blobs_are_true(sandbox);
    assert_memory(&sandbox.stats());
    // A daemon that took over may keep what the kernel refers to until the next fresh mount.
    if kills == 0 {
        assert_counted_as_seen(sandbox, targets, "as it was used");
    }
    for target in targets {
        sandbox.unmount(target);
    }
    assert_no_orphan(sandbox, &targets[0]);
    for target in targets {
        sandbox.mount(target);
    }
    assert_counted_as_seen(sandbox, targets, "mounted afresh");
    assert_usage_returns(sandbox, targets, before);
    for target in targets {
        sandbox.mount(target);
        sandbox.empty_view(target);
        sandbox.unmount(target);
    }
    let (left, _) = scratch(sandbox);
    assert!(left.is_empty(), "files of nobody: {left:?}");
    assert_no_error_logged(sandbox);
}

/// Where the kernel tells of FUSE connections: mounted for the test where it is not.
struct Connections(PathBuf, bool);

impl Connections {
    #[track_caller]
    fn show(sandbox: &Sandbox) -> Self {
        let usual = PathBuf::from("/sys/fs/fuse/connections");
        if fs::read_dir(&usual).is_ok_and(|mut names| names.next().is_some()) {
            return Self(usual, false);
        }
        let own = sandbox.make_dir("connections");
        let (none, flags) = (None::<&str>, MsFlags::empty());
        mount(Some("fusectl"), &own, Some("fusectl"), flags, none).must("mount fusectl");
        Self(own, true)
    }

    /// Requests of a connection that have no answer yet.
    #[track_caller]
    fn waiting(&self, minor: u32) -> u64 {
        let path = self.0.join(format!("{minor}/waiting"));
        let text = fs::read_to_string(&path).must(path.display());
        text.trim().parse().must("a number of requests")
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        if self.1 {
            // The sandbox says so if this fails.
            let _ = umount(&self.0);
        }
    }
}

/// No request is without its answer.
#[track_caller]
fn assert_nothing_waits(sandbox: &Sandbox) {
    let views: Vec<_> = mounts::below(sandbox.root());
    assert!(!views.is_empty(), "something is mounted");
    let connections = Connections::show(sandbox);
    for view in views {
        let none = || connections.waiting(view.minor) == 0;
        assert!(
            processes::wait_for(PATIENCE, none),
            "{}: {} requests wait",
            view.point.display(),
            connections.waiting(view.minor)
        );
    }
}

/// Every blob holds what its name promises, is sealed, and is counted.
#[track_caller]
fn assert_blobs_are_true(sandbox: &Sandbox) {
    let mut bytes = 0;
    let blobs = tree::files(&sandbox.store().join("blobs"));
    for blob in &blobs {
        let content = fs::read(blob).must(blob.display());
        let name = blake3::hash(&content).to_hex();
        assert!(
            blob.ends_with(name.as_str()),
            "{} is damaged",
            blob.display()
        );
        let mode = blob.metadata().must(blob.display()).mode();
        assert_eq!(mode & 0o222, 0, "{} is not sealed", blob.display());
        bytes += content.len() as u64;
    }
    let stats = sandbox.stats();
    let counted = (
        number(&stats, "/blobs/count"),
        number(&stats, "/blobs/local_bytes"),
    );
    assert_eq!(counted, (blobs.len() as u64, bytes), "blobs and bytes");
}

/// Inodes and bytes of a view as somebody sees them who looks.
fn seen(target: &Path) -> (u64, u64) {
    let mut inodes = HashMap::new();
    for path in tree::walk(target) {
        let meta = fs::symlink_metadata(&path).must(path.display());
        inodes.insert(meta.ino(), if meta.is_file() { meta.len() } else { 0 });
    }
    // The root has no name.
    (inodes.len() as u64 + 1, inodes.values().sum())
}

/// The daemon knows of as many inodes and bytes as there are: it has forgotten what is gone.
#[track_caller]
fn assert_counted_as_seen(sandbox: &Sandbox, targets: &[PathBuf], when: &str) {
    for target in targets {
        let seen = seen(target);
        let mut counted = (0, 0);
        let equal = || {
            let stats = sandbox.stats();
            let view = views(&stats)
                .iter()
                .find(|view| view["path"] == *target.to_string_lossy());
            let view = view.must(target.display());
            counted = (number(view, "/names"), number(view, "/logical_bytes"));
            counted == seen
        };
        assert!(
            processes::wait_for(PATIENCE, equal),
            "{when}: {}: {counted:?} inodes and bytes counted, {seen:?} seen",
            target.display()
        );
    }
}

/// The backing files, and those that wait for the next sync point to be removed.
fn scratch(sandbox: &Sandbox) -> (BTreeSet<PathBuf>, BTreeSet<PathBuf>) {
    tree::files(&sandbox.store().join("scratch"))
        .into_iter()
        .partition(|path| path.extension().is_none())
}

/// Every backing file belongs to an inode: a daemon that starts retires those that do not, and one
/// that ends leaves none that wait.
#[track_caller]
fn assert_no_orphan(sandbox: &Sandbox, target: &Path) {
    let (before, _) = scratch(sandbox);
    let _ = sandbox.kachefs("daemon stop").ok();
    let (_, waiting) = scratch(sandbox);
    assert!(waiting.is_empty(), "still there: {waiting:?}");
    sandbox.mount(target);
    let (after, _) = scratch(sandbox);
    let orphans: Vec<_> = before.difference(&after).collect();
    assert!(orphans.is_empty(), "backing files of no inode: {orphans:?}");
}

/// With all views but one unmounted a daemon has the threads it had before, and descriptors only
/// for backings it may read again.
#[track_caller]
fn assert_usage_returns(sandbox: &Sandbox, targets: &[PathBuf], before: &Usage) {
    for target in &targets[1..] {
        sandbox.unmount(target);
    }
    let mut now = Usage::default();
    let returns = || {
        now = Usage::at_rest(sandbox);
        now.threads <= before.threads && now.descriptors <= DESCRIPTORS
    };
    assert!(
        processes::wait_for(PATIENCE, returns),
        "{now:?} at rest, before that {before:?}"
    );
}
