//! Of a large blob that is elsewhere, what somebody reads is fetched; the rest when that is worth it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::proxy::Fault;
use harness::{Chance, Must, Proxy, Sandbox, Seaweed, tree};

const MIB: usize = 1 << 20;

/// What is fetched at least: a window, as `kachefs::lazy::partial` has it.
const WINDOW: u64 = 1 << 20;

/// A published tree with one large file, and a machine that shows it.
struct Published {
    shared: tempfile::TempDir,
    bytes: Vec<u8>,
    shard: Sandbox,
    file: PathBuf,
}

/// Bytes of which some compress and some do not.
fn bytes(chance: &mut Chance, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        bytes.extend(chance.bytes(50_000));
        bytes.extend(vec![7; 150_000]);
    }
    bytes.truncate(size);
    bytes
}

/// Makes a view with a file, and publishes it as `tree`.
fn publish(builder: &Sandbox, bytes: &[u8]) {
    let target = builder.make_dir("project/target");
    builder.mount(&target);
    fs::write(target.join("large"), bytes).must("writes");
    builder.kachefs("publish --name tree").arg(&target).ok();
}

impl Published {
    fn new(size: usize) -> Self {
        let shared = tempfile::tempdir().must("a directory");
        let set = format!("remote set {} --wait 2", shared.path().display());
        let bytes = bytes(&mut Chance::new(), size);
        let builder = Sandbox::new();
        builder.kachefs(&set).ok();
        publish(&builder, &bytes);
        let shard = Sandbox::new();
        shard.kachefs(&set).ok();
        let file = show(&shard);
        Self {
            shared,
            bytes,
            shard,
            file,
        }
    }

    #[track_caller]
    fn assert_reads(&self, offset: usize, length: usize) {
        let mut into = vec![0; length];
        let file = File::open(&self.file).must("opens");
        file.read_exact_at(&mut into, offset as u64).must("reads");
        assert!(into == self.bytes[offset..offset + length], "{offset}");
    }

    fn blob(&self) -> PathBuf {
        let blobs = tree::files(&self.shared.path().join("v1/blobs"));
        let largest = blobs
            .into_iter()
            .max_by_key(|blob| fs::metadata(blob).must("meta").len());
        largest.must("the blob")
    }
}

/// Mounts the tree, and says where the large file is.
fn show(shard: &Sandbox) -> PathBuf {
    let directory = shard.make_dir("farm");
    shard.kachefs("mount --read-only tree").arg(&directory).ok();
    directory.join("large")
}

fn number(machine: &Sandbox, name: &str) -> u64 {
    machine.stats()["remote"][name].as_u64().must(name)
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "never {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn only_what_is_read_is_fetched() {
    let tree = Published::new(40 * MIB);
    assert_eq!(number(&tree.shard, "faults"), 0);
    tree.assert_reads(0, 8);
    let first = number(&tree.shard, "bytes_faulted");
    assert!(first > 0 && first <= 2 * WINDOW, "{first}");
    // In the middle of it, across windows, at the end.
    for (offset, length) in [(20 * MIB + 77, 100), (30 * MIB - 3, 9), (40 * MIB - 1, 1)] {
        tree.assert_reads(offset, length);
    }
    let jumps = number(&tree.shard, "bytes_faulted");
    // What the kernel reads besides is less than a window.
    assert!(jumps <= 8 * WINDOW, "{jumps}");
    assert_eq!(number(&tree.shard, "faults"), 1, "one blob");
}

#[test]
fn who_reads_on_has_it_whole_and_then_needs_nobody() {
    let tree = Published::new(40 * MIB);
    assert!(fs::read(&tree.file).must("reads") == tree.bytes);
    let size = tree.bytes.len() as u64;
    assert_eq!(number(&tree.shard, "bytes_faulted"), size, "each byte once");
    let requests = number(&tree.shard, "requests");
    assert!(requests < 30, "{requests} for 40 windows");
    // A blob like any other: it is there without the remote, and after the daemon.
    until("whole", || {
        tree::files(&tree.shard.store().join("blobs"))
            .iter()
            .any(|blob| fs::metadata(blob).must("meta").len() == size)
    });
    fs::remove_file(tree.blob()).must("removes");
    tree.shard.kill_daemon();
    tree.shard.stats();
    fs::write("/proc/sys/vm/drop_caches", "1").must("drops the caches");
    assert!(fs::read(&tree.file).must("reads") == tree.bytes);
    assert_eq!(number(&tree.shard, "bytes_faulted"), size);
}

#[test]
fn half_of_it_is_reason_enough_to_fetch_all() {
    let tree = Published::new(16 * MIB);
    let size = tree.bytes.len() as u64;
    // Backwards: nobody reads on.
    for window in (0..16).rev().step_by(2) {
        tree.assert_reads(window * MIB + 5, 3);
    }
    until("all of it", || number(&tree.shard, "bytes_faulted") == size);
}

#[test]
fn many_read_it_at_once() {
    let tree = Published::new(32 * MIB);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut chance = Chance::new();
                for _ in 0..40 {
                    let length = chance.below(200_000);
                    let offset = chance.below(tree.bytes.len() - length);
                    tree.assert_reads(offset, length);
                }
            });
        }
    });
    let fetched = number(&tree.shard, "bytes_faulted");
    assert!(
        fetched <= tree.bytes.len() as u64,
        "nothing twice: {fetched}"
    );
    assert_eq!(number(&tree.shard, "faults"), 1);
}

#[test]
fn no_damaged_byte_is_read() {
    let tree = Published::new(40 * MIB);
    tree.assert_reads(0, 8);
    let blob = tree.blob();
    let mut object = fs::read(&blob).must("reads");
    let at = object.len() - 1000;
    object[at] ^= 4;
    fs::write(&blob, object).must("writes");
    // Elsewhere nothing is wrong.
    tree.assert_reads(20 * MIB, 100);
    let error = fs::read(&tree.file).err().must("is not read");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let log = fs::read_to_string(tree.shard.store().join("daemon.log")).must("the log");
    assert!(log.contains("is damaged"), "{log}");
}

#[test]
fn the_next_daemon_goes_on() {
    let tree = Published::new(40 * MIB);
    tree.assert_reads(0, 8);
    tree.assert_reads(20 * MIB, 8);
    let parts = || tree::files(&tree.shard.store().join("scratch")).len();
    assert_eq!(parts(), 1);
    tree.shard.kill_daemon();
    tree.assert_reads(30 * MIB, 8);
    tree.assert_reads(10 * MIB, 8);
    assert_eq!(parts(), 1, "what the last one had is gone with it");
}

/// A large file in a bucket, and a machine that shows it and gets answers as slow as `fault` says at the
/// time.
struct Late {
    // Dropped in this order: nobody has a file open in a mount that goes, and the server runs in the shard.
    file: File,
    _seaweed: Seaweed,
    _proxy: Proxy,
    _builder: Sandbox,
    _shard: Sandbox,
    is_slow: Arc<AtomicBool>,
    bytes: Vec<u8>,
}

impl Late {
    fn new(bytes: Vec<u8>, fault: Fault) -> Self {
        let shard = Sandbox::with_limit(Duration::from_mins(3));
        let seaweed = Seaweed::start(&shard);
        seaweed.make_bucket("cache");
        let is_slow = Arc::new(AtomicBool::new(false));
        let chosen = Arc::clone(&is_slow);
        let proxy = Proxy::start(&seaweed.endpoint(), move |_| {
            if chosen.load(Ordering::Relaxed) {
                fault
            } else {
                Fault::None
            }
        });
        let set = |machine: &Sandbox, endpoint: &str| {
            let set = format!("remote set s3://cache --endpoint {endpoint} --anonymous --wait 1");
            machine.kachefs(&set).ok();
        };
        let builder = Sandbox::new();
        set(&builder, &seaweed.endpoint());
        publish(&builder, &bytes);
        set(&shard, &proxy.endpoint());
        let file = File::open(show(&shard)).must("opens");
        Self {
            file,
            _seaweed: seaweed,
            _proxy: proxy,
            _builder: builder,
            _shard: shard,
            is_slow,
            bytes,
        }
    }

    fn read(&self, offset: usize) -> std::io::Result<()> {
        let mut into = [0; 100];
        self.file.read_exact_at(&mut into, offset as u64)?;
        assert!(into == self.bytes[offset..offset + 100], "{offset}");
        Ok(())
    }
}

#[test]
fn who_reads_does_not_wait_for_the_rest() {
    let bytes = Chance::new().bytes(64 * MIB);
    let late = Late::new(bytes, Fault::Slow(600_000));
    let mut windows = (0..64).rev().step_by(2).map(|window| window * MIB + 5);
    for offset in windows.by_ref().take(31) {
        late.read(offset).must("is there");
    }
    late.is_slow.store(true, Ordering::Relaxed);
    // Half of it: the rest is on its way now, and takes a minute.
    late.read(windows.next().must("one more")).must("is there");
    let began = Instant::now();
    late.read(62 * MIB + 5).must("comes before the rest");
    assert!(began.elapsed() < Duration::from_secs(8), "{began:?}");
}

#[test]
fn a_remote_that_hangs_holds_up_what_is_not_here() {
    let late = Late::new(bytes(&mut Chance::new(), 40 * MIB), Fault::Hung);
    late.read(20 * MIB).must("is there");
    late.is_slow.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let error = late.read(30 * MIB).err().must("does not come");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(began.elapsed() < Duration::from_secs(15), "{began:?}");
    // Of the same window, but no page that the kernel has.
    late.read(20 * MIB + MIB / 2).must("is here");
    late.is_slow.store(false, Ordering::Relaxed);
    until("again", || late.read(30 * MIB).is_ok());
}
