use super::*;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;

use store::StoreDir;
use wrapper::lease::Unharmed;

use crate::storage::Storage;

const CALLER: Caller = Caller { uid: 1, gid: 2 };
const FIRST: &str = "s-h1-aa-0first";
const SECOND: &str = "s-h2-bb-second";

#[test]
fn sessions_are_told_by_their_names() {
    let found = session(b"s-honlmf94n6-1vnym9a-1x30u22g857rvr0xv22zvs25e").expect("is one");
    assert_eq!(found.lock, b"s-honlmf94n6-1vnym9a.lock");
    let later = session(b"s-100000000000-0-a").expect("is one");
    assert!(later.begun > found.begun);
    for none in [
        "s-honlmf94n6-1vnym9a-working",
        "s-honlmf94n6-1vnym9a.lock",
        "s-honlmf94n6",
        "t-honlmf94n6-1vnym9a-1x30",
        "s-?-1vnym9a-1x30",
        "",
    ] {
        assert!(session(none.as_bytes()).is_none(), "{none}");
    }
}

/// A view with `debug/incremental`, and a place for a compiler to write to.
struct Fixture {
    dir: tempfile::TempDir,
    view: View,
    names: Names,
    _unharmed: Unharmed,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage = Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens");
        let path = b"/nowhere".to_vec();
        let view = View::create(Arc::new(storage), ViewId(1), path, CALLER).expect("creates");
        let debug = view
            .mkdir(Ino::ROOT, b"debug", 0o755, CALLER)
            .expect("mkdir");
        let made = view.mkdir(debug.ino, b"incremental", 0o755, CALLER);
        made.expect("mkdir");
        Self {
            dir,
            view,
            names: Names::default(),
            _unharmed: Unharmed::start(),
        }
    }

    /// Compiles a crate: what the compiler found, and makes `make` of it.
    fn compile(&self, make: impl FnOnce(&Path)) -> FsResult<()> {
        let to = self.dir.path().join("incremental");
        let _ = fs::remove_dir_all(&to);
        let place = Place {
            view: ViewId(1),
            path: b"debug/incremental".to_vec(),
            stem: "x-1".to_owned(),
        };
        let state = State::put(&self.names, &self.view, place, "x", &to).expect("puts");
        make(&to);
        state.take(&to, CALLER)
    }

    fn first(&self) {
        let made = self.compile(|to| {
            let session = to.join("x-0hash").join(FIRST);
            fs::create_dir_all(&session).expect("mkdir");
            fs::write(to.join("x-0hash/s-h1-aa.lock"), "").expect("writes");
            fs::write(session.join("old.o"), vec![1; 50_000]).expect("writes");
            fs::write(session.join("small.bin"), "small").expect("writes");
        });
        made.expect("takes");
    }

    /// A second compile, which links one file, leaves one out, and makes one.
    fn second(to: &Path) {
        let [old, new] = [FIRST, SECOND].map(|name| to.join("x-0hash").join(name));
        fs::create_dir(&new).expect("mkdir");
        fs::write(to.join("x-0hash/s-h2-bb.lock"), "").expect("writes");
        fs::hard_link(old.join("old.o"), new.join("old.o")).expect("links");
        fs::write(new.join("new.o"), vec![2; 50_000]).expect("writes");
    }

    fn list(&self, path: &str) -> Vec<String> {
        let node = self.view.resolve(path.as_bytes()).expect("is there");
        let rows = self.view.list(node.ino, 0, usize::MAX).expect("lists");
        let name = |row: &Listed| String::from_utf8_lossy(&row.name).into_owned();
        let mut names: Vec<_> = rows.iter().map(name).collect();
        names.sort();
        names
    }

    fn sessions(&self) -> Vec<String> {
        self.list("debug/incremental/x-0hash")
    }

    fn file(&self, session: &str, name: &str) -> (Ino, u32, Vec<u8>) {
        let path = format!("debug/incremental/x-0hash/{session}/{name}");
        let ino = self.view.resolve(path.as_bytes()).expect("is there").ino;
        let mut bytes = vec![0; 100_000];
        let read = self.view.read(ino, 0, &mut bytes).expect("reads");
        bytes.truncate(read);
        let nlink = self.view.getattr(ino).expect("stat").attributes.nlink;
        (ino, nlink, bytes)
    }
}

#[test]
fn a_compile_goes_on_from_the_last_one() {
    let fixture = Fixture::new();
    fixture.first();
    assert_eq!(fixture.sessions(), [FIRST, "s-h1-aa.lock"]);
    let (old, _, bytes) = fixture.file(FIRST, "old.o");
    assert_eq!(bytes, vec![1; 50_000]);

    let second = fixture.compile(|to| {
        let first = to.join("x-0hash").join(FIRST);
        assert!(to.join("x-0hash/s-h1-aa.lock").exists());
        assert_eq!(fs::read(first.join("small.bin")).expect("reads"), b"small");
        assert!(fs::metadata(first.join("old.o")).expect("stat").nlink() > 1);
        Fixture::second(to);
    });
    second.expect("takes");
    let names = [FIRST, "s-h1-aa.lock", SECOND, "s-h2-bb.lock"];
    assert_eq!(fixture.sessions(), names);
    assert_eq!(fixture.file(SECOND, "old.o"), (old, 2, vec![1; 50_000]));
    assert_eq!(fixture.file(SECOND, "new.o").2, vec![2; 50_000]);

    // The one before the last goes, and only what it alone had.
    let third = fixture.compile(|to| {
        assert!(!to.join("x-0hash").join(FIRST).exists(), "the last alone");
        let [old, new] = [SECOND, "s-h3-cc-third"].map(|name| to.join("x-0hash").join(name));
        fs::create_dir(&new).expect("mkdir");
        fs::write(to.join("x-0hash/s-h3-cc.lock"), "").expect("writes");
        fs::hard_link(old.join("old.o"), new.join("old.o")).expect("links");
    });
    third.expect("takes");
    let names = [SECOND, "s-h2-bb.lock", "s-h3-cc-third", "s-h3-cc.lock"];
    assert_eq!(fixture.sessions(), names);
    assert_eq!(fixture.file("s-h3-cc-third", "old.o").1, 2);
    assert_eq!(
        fixture.list("debug/incremental/x-0hash/s-h3-cc-third"),
        ["old.o"]
    );
}

#[test]
fn what_a_compiler_writes_to_is_its_own() {
    let fixture = Fixture::new();
    let kept = "cgu.pre-lto.bc";
    let first = fixture.compile(|to| {
        let session = to.join("x-0hash").join(FIRST);
        fs::create_dir_all(&session).expect("mkdir");
        fs::write(to.join("x-0hash/s-h1-aa.lock"), "").expect("writes");
        fs::write(session.join(kept), vec![1; 50_000]).expect("writes");
    });
    first.expect("takes");
    let second = fixture.compile(|to| {
        let [old, new] = [FIRST, SECOND].map(|name| to.join("x-0hash").join(name));
        fs::create_dir(&new).expect("mkdir");
        fs::write(to.join("x-0hash/s-h2-bb.lock"), "").expect("writes");
        fs::hard_link(old.join(kept), new.join(kept)).expect("links");
        fs::write(new.join(kept), vec![2; 60_000]).expect("writes");
    });
    second.expect("takes");
    let [old, new] = [FIRST, SECOND].map(|session| fixture.file(session, kept));
    assert_eq!((old.2, new.2), (vec![1; 50_000], vec![2; 60_000]));
    assert_ne!(old.0, new.0);
}

/// Somebody writes to what rustc does not: it is not taken for what it was.
#[test]
fn what_was_written_to_is_no_link() {
    let fixture = Fixture::new();
    fixture.first();
    let second = fixture.compile(|to| {
        Fixture::second(to);
        let linked = to.join("x-0hash").join(SECOND).join("old.o");
        fs::write(linked, vec![4; 40_000]).expect("writes");
    });
    second.expect("takes");
    let (ino, _, bytes) = fixture.file(SECOND, "old.o");
    assert_eq!(bytes, vec![4; 40_000]);
    assert_ne!(ino, fixture.file(FIRST, "old.o").0);
}

#[test]
fn sessions_of_others_stay() {
    let fixture = Fixture::new();
    fixture.first();
    let others = ["s-h0-aa-working", "s-h9-aa-later"];
    let made = fixture.compile(|to| {
        let parent = fixture.view.resolve(b"debug/incremental/x-0hash");
        let parent = parent.expect("is there").ino;
        for name in others {
            let made = fixture.view.mkdir(parent, name.as_bytes(), 0o755, CALLER);
            made.expect("mkdir");
        }
        let session = to.join("x-0hash/s-h2-bb-second");
        fs::create_dir(session).expect("mkdir");
        fs::write(to.join("x-0hash/s-h2-bb.lock"), "").expect("writes");
        fs::remove_dir_all(to.join("x-0hash").join(FIRST)).expect("removes");
    });
    made.expect("takes");
    let expected = [others[0], SECOND, "s-h2-bb.lock", others[1]];
    assert_eq!(fixture.sessions(), expected);
}

#[test]
fn a_compile_that_fails_changes_nothing() {
    let fixture = Fixture::new();
    fixture.first();
    let failed = fixture.compile(|to| {
        let working = to.join("x-0hash/s-h2-bb-working");
        fs::create_dir(&working).expect("mkdir");
        fs::write(working.join("new.o"), "half").expect("writes");
        fs::remove_dir_all(to.join("x-0hash").join(FIRST)).expect("removes");
    });
    failed.expect("takes nothing");
    assert_eq!(fixture.sessions(), [FIRST, "s-h1-aa.lock"]);
}

#[test]
fn what_is_none_of_it_stays_behind() {
    let fixture = Fixture::new();
    fixture.first();
    let view = &fixture.view;
    let parent = view.resolve(b"debug/incremental").expect("is there").ino;
    // Another crate, one whose session has no lock, and one with a directory within.
    for (name, within) in [("xy-0hash", "s-h1-aa-b"), ("x-1hash", "s-h1-aa-b")] {
        let above = view.mkdir(parent, name.as_bytes(), 0o755, CALLER);
        let above = above.expect("mkdir").ino;
        view.mkdir(above, within.as_bytes(), 0o755, CALLER)
            .expect("mkdir");
    }
    let compiled = fixture.compile(|to| {
        let found = list(to).expect("lists");
        let names: Vec<_> = found.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, [b"x-0hash"]);
        Fixture::second(to);
    });
    compiled.expect("takes");
    assert_eq!(
        fixture.list("debug/incremental"),
        ["x-0hash", "x-1hash", "xy-0hash"]
    );
    // Which directory it is, is known now.
    let other = view
        .resolve(b"debug/incremental/x-1hash")
        .expect("is there")
        .ino;
    let lock = fixture.dir.path().join("lock");
    fs::write(&lock, "").expect("writes");
    fs::set_permissions(&lock, Permissions::from_mode(0o600)).expect("chmod");
    let lock = Adopted {
        name: b"s-h1-aa.lock".to_vec(),
        path: lock,
        edit: None,
    };
    view.adopt(other, &[lock], Instant::now(), CALLER)
        .expect("adopts");
    let compiled = fixture.compile(|to| {
        assert!(to.join("x-0hash").exists() && !to.join("x-1hash").exists());
    });
    compiled.expect("takes nothing");
}

#[test]
fn nobody_can_write_past_the_view_to_what_was_an_output_too() {
    let fixture = Fixture::new();
    let output = fixture.dir.path().join("libx.rmeta");
    let made = fixture.compile(|to| {
        let session = to.join("x-0hash").join(FIRST);
        fs::create_dir_all(&session).expect("mkdir");
        fs::write(to.join("x-0hash/s-h1-aa.lock"), "").expect("writes");
        fs::write(&output, vec![1; 50_000]).expect("writes");
        fs::set_permissions(&output, Permissions::from_mode(0o644)).expect("chmod");
        fs::hard_link(&output, session.join("metadata.rmeta")).expect("links");
    });
    made.expect("takes");
    // What a compiler makes an output of again has the mode it had.
    let again = fixture.compile(|to| {
        let path = to.join("x-0hash").join(FIRST).join("metadata.rmeta");
        let mode = fs::metadata(path).expect("stat").mode();
        assert_eq!(mode & 0o777, 0o644);
    });
    again.expect("takes nothing");
    fs::write(&output, vec![3; 50_000]).expect("writes");
    assert_eq!(fixture.file(FIRST, "metadata.rmeta").2, vec![1; 50_000]);
}
