//! Files written past the daemon, without a mount: what the kernel would write is written to the
//! backing directly.

use std::fs::{self, File};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kachefs::fs::outputs::Bound;
use kachefs::fs::passthrough::Writer;
use kachefs::fs::{Body, Caller, Errno, Invalidate, Node, View};
use kachefs::storage::Storage;
use store::{ActionKey, Digest, Ino, ScratchId, StoreDir, ViewId};
use wrapper::lease::Unharmed;

const CALLER: Caller = Caller { uid: 1, gid: 2 };

/// Remembers which inodes' bytes the kernel was told to forget.
#[derive(Default)]
struct Forgotten(Arc<Mutex<Vec<Ino>>>);

impl Invalidate for Forgotten {
    fn entry(&self, _parent: Ino, _name: &[u8]) {}
    fn attributes(&self, _ino: Ino) {}
    fn data(&self, ino: Ino) {
        self.0.lock().expect("not poisoned").push(ino);
    }
}

struct Fixture {
    _dir: tempfile::TempDir,
    _unharmed: Unharmed,
    view: Arc<View>,
    forgotten: Arc<Mutex<Vec<Ino>>>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage =
            Arc::new(Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens"));
        let view = View::create(storage, ViewId(1), b"/nowhere".to_vec(), CALLER).expect("creates");
        let forgotten = Forgotten::default();
        let list = Arc::clone(&forgotten.0);
        view.set_invalidate(Box::new(forgotten));
        Self {
            _dir: dir,
            _unharmed: Unharmed::start(),
            view: Arc::new(view),
            forgotten: list,
        }
    }

    /// A file as a compiler creates it, and the writable backing the kernel would open.
    fn create(&self, name: &[u8]) -> (Arc<Node>, File) {
        let made = self.view.create_backed(Ino::ROOT, name, 0o644, CALLER);
        let (node, _, _) = made.expect("creates");
        self.view.granted(&node, Box::new(()));
        let path = self.view.storage.dir.scratch_file(backing(&node));
        let file = File::options().read(true).write(true).open(path);
        (node, file.expect("opens"))
    }

    fn read(&self, node: &Node) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let read = self.view.read(node.ino, 0, &mut bytes).expect("reads");
        bytes.truncate(read);
        bytes
    }
}

fn backing(node: &Node) -> ScratchId {
    match node.state.lock().body {
        Body::Private { id, .. } => id,
        ref other => panic!("has no backing: {other:?}"),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(20)
}

#[test]
fn what_the_kernel_wrote_is_what_everybody_sees() {
    let fixture = Fixture::new();
    let bytes = vec![7; 100_000];
    let (node, mut file) = fixture.create(b"f");
    file.write_all(&bytes).expect("writes");
    let entry = fixture.view.getattr(node.ino).expect("stat");
    assert_eq!(entry.size, 100_000, "before it is settled");
    drop(file);
    fixture.view.settle(&node, soon()).expect("settles");
    let entry = fixture.view.getattr(node.ino).expect("stat");
    assert_eq!(entry.size, 100_000);
    assert_eq!(fixture.read(&node), bytes);
    let digest = fixture.view.content_digest(&node).expect("hashes");
    assert_eq!(digest, Digest::of(&bytes));
}

#[test]
fn what_a_hit_brings_is_not_older_than_what_a_compiler_has_just_made() {
    let fixture = Fixture::new();
    for round in 0..200 {
        let name = format!("dependency-{round}");
        let (node, mut file) = fixture.create(name.as_bytes());
        // A file system with fine times uses them for what was looked at since.
        fixture.view.getattr(node.ino).expect("stat");
        file.write_all(&vec![1; 20_000]).expect("writes");
        drop(file);
        fixture.view.content_digest(&node).expect("hashes");
        let hit = Bound {
            name: b"hit".to_vec(),
            perm: 0o644,
            body: Body::Inline(vec![2]),
        };
        let origin = ActionKey(Digest::of(b"action"));
        let bound = fixture
            .view
            .bind(Ino::ROOT, vec![hit], Some(origin), CALLER, |_| {});
        bound.expect("binds");
        let settled = Instant::now() + Duration::from_secs(1);
        std::thread::sleep(Duration::from_millis(round % 3 * 5));
        fixture.view.settle(&node, settled).expect("settles");
        let time = |ino| fixture.view.getattr(ino).expect("stat").attributes.mtime;
        let hit = fixture.view.child(Ino::ROOT, b"hit").expect("there").ino;
        assert!(time(hit) >= time(node.ino), "round {round}");
    }
}

#[test]
fn small_files_end_up_in_the_index() {
    let fixture = Fixture::new();
    let (node, mut file) = fixture.create(b"f.d");
    let path = fixture.view.storage.dir.scratch_file(backing(&node));
    file.write_all(b"f: f.rs\n").expect("writes");
    drop(file);
    fixture.view.settle(&node, soon()).expect("settles");
    assert!(matches!(node.state.lock().body, Body::Inline(_)));
    assert_eq!(fixture.read(&node), b"f: f.rs\n");
    assert!(!path.exists(), "the backing is gone");
}

#[test]
fn nothing_is_settled_while_somebody_writes() {
    let fixture = Fixture::new();
    let (node, mut file) = fixture.create(b"f");
    file.write_all(&vec![1; 20_000]).expect("writes");
    assert_eq!(fixture.view.settle(&node, soon()), Err(Errno::EBUSY));
    fixture.view.settle_all(Duration::ZERO);
    // The writer goes on, and the digest knows.
    file.write_all(&vec![2; 20_000]).expect("writes");
    drop(file);
    let whole = [vec![1; 20_000], vec![2; 20_000]].concat();
    let digest = fixture.view.content_digest(&node).expect("hashes");
    assert_eq!(digest, Digest::of(&whole));
    fixture.view.settle_all(Duration::ZERO);
    assert_eq!(fixture.view.getattr(node.ino).expect("stat").size, 40_000);
    assert!(matches!(
        node.state.lock().body,
        Body::Private {
            passthrough: false,
            ..
        }
    ));
}

#[test]
fn emptying_keeps_the_backing_the_kernel_writes_to() {
    let fixture = Fixture::new();
    let (node, mut file) = fixture.create(b"f");
    file.write_all(&vec![1; 20_000]).expect("writes");
    let changes = kachefs::fs::data::Changes {
        size: Some(0),
        ..Default::default()
    };
    let entry = fixture.view.setattr(node.ino, changes).expect("empties");
    assert_eq!(entry.size, 0);
    fs::File::write_all(&mut file, b"more").expect("writes");
    assert_eq!(
        fixture.view.getattr(node.ino).expect("stat").size,
        20_004,
        "at the writer's own offset"
    );
}

#[test]
fn pages_read_too_early_are_forgotten() {
    let fixture = Fixture::new();
    let (early, mut file) = fixture.create(b"early");
    file.write_all(&vec![1; 20_000]).expect("writes");
    fixture.read(&early);
    file.write_all(&vec![2; 20_000]).expect("writes");
    drop(file);
    let (late, mut file) = fixture.create(b"late");
    file.write_all(&vec![1; 20_000]).expect("writes");
    drop(file);
    fixture.read(&late);
    fixture.view.settle_all(Duration::ZERO);
    assert_eq!(
        *fixture.forgotten.lock().expect("not poisoned"),
        [early.ino]
    );
}

#[test]
fn only_directories_of_running_compilers_count() {
    let fixture = Fixture::new();
    let view = &fixture.view;
    let dir = |parent, name: &[u8]| view.mkdir(parent, name, 0o755, CALLER).expect("makes").ino;
    let deps = dir(Ino::ROOT, b"deps");
    let inner = dir(deps, b"rmetaX");
    let other = dir(Ino::ROOT, b"other");
    let me = std::process::id();
    let state = || [deps, inner, other, Ino::ROOT].map(|ino| view.creates_past(ino, me));
    assert_eq!(state(), [false; 4]);
    let one = view.writing(Writer::Compiler, vec![deps]);
    let two = view.writing(Writer::Compiler, vec![deps]);
    assert_eq!(state(), [true, true, false, false]);
    drop(one);
    assert_eq!(state(), [true, true, false, false]);
    drop(two);
    assert_eq!(state(), [false; 4]);
}

/// A build script may read what a program it runs still writes, so only tools that are done first count.
#[test]
fn in_a_scripts_directory_only_tools_count() {
    let fixture = Fixture::new();
    let view = &fixture.view;
    let _running = view.writing(Writer::Script, vec![Ino::ROOT]);
    let directory = tempfile::tempdir().expect("tempdir");
    for (name, counts) in [
        ("ar", true),
        ("as", true),
        ("x86_64-linux-gnu-ranlib", true),
        ("arc", false),
        ("sh", false),
    ] {
        let program = directory.path().join(name);
        fs::copy("/bin/sleep", &program).expect("copies");
        let mut child = std::process::Command::new(program)
            .arg("60")
            .spawn()
            .expect("starts");
        // It is what it was started as a moment later.
        let exe = format!("/proc/{}/exe", child.id());
        while fs::read_link(&exe).expect("runs").file_name() != Some(name.as_ref()) {
            std::thread::yield_now();
        }
        assert_eq!(view.creates_past(Ino::ROOT, child.id()), counts, "{name}");
        child.kill().expect("ends");
        child.wait().expect("ended");
    }
    assert!(!view.creates_past(Ino::ROOT, std::process::id()));
}

#[test]
fn a_time_that_was_set_is_kept() {
    let fixture = Fixture::new();
    let (node, mut file) = fixture.create(b"f");
    file.write_all(&vec![1; 20_000]).expect("writes");
    drop(file);
    let future = store::Timestamp {
        secs: 4_000_000_000,
        nanos: 7,
    };
    let changes = kachefs::fs::data::Changes {
        mtime: Some(future),
        ..Default::default()
    };
    let shown = fixture.view.setattr(node.ino, changes).expect("sets");
    assert_eq!(shown.attributes.mtime, future);
    fixture.view.settle(&node, soon()).expect("settles");
    let shown = fixture.view.getattr(node.ino).expect("stat");
    assert_eq!(shown.attributes.mtime, future);
}

#[test]
fn a_file_that_is_gone_before_its_grant_is_kept_is_forgotten() {
    let fixture = Fixture::new();
    let made = fixture
        .view
        .create_backed(Ino::ROOT, b"f", 0o644, CALLER)
        .expect("creates");
    // The kernel has the answer: whoever made the file removes it, and the kernel forgets it.
    fixture.view.unlink(Ino::ROOT, b"f").expect("unlinks");
    fixture.view.forget(made.0.ino, 1);
    fixture.view.granted(&made.0, Box::new(()));
    let node = Arc::downgrade(&made.0);
    drop(made);
    assert!(node.upgrade().is_none(), "nothing keeps it");
}
