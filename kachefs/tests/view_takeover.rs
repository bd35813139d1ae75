//! A view taken over from a daemon that died, without a mount: what the kernel still refers to is
//! there, and what it sends again is not done twice.

use std::sync::Arc;

use kachefs::fs::names::{NewNode, RenameMode};
use kachefs::fs::{Caller, Errno, View};
use kachefs::storage::Storage;
use store::{Ino, StoreDir, ViewId};

const CALLER: Caller = Caller { uid: 1, gid: 2 };
const VIEW: ViewId = ViewId(1);
const ROOT: Ino = Ino::ROOT;

struct Fixture {
    _dir: tempfile::TempDir,
    storage: Arc<Storage>,
}

impl Fixture {
    fn new() -> (Self, View) {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage =
            Arc::new(Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens"));
        let view = View::create(Arc::clone(&storage), VIEW, b"/nowhere".to_vec(), CALLER);
        (Self { _dir: dir, storage }, view.expect("creates"))
    }

    fn record(&self) -> store::ViewRecord {
        let views = self.storage.index.views().expect("lists");
        let mut views = views.into_iter();
        views.find(|(id, _)| *id == VIEW).expect("stored").1
    }

    /// What the next daemon has when the kernel kept the mount.
    fn take_over(&self) -> View {
        View::take_over(Arc::clone(&self.storage), VIEW, self.record()).expect("takes over")
    }

    /// What the next daemon has when the mount is made afresh.
    fn load(&self) -> View {
        View::load(Arc::clone(&self.storage), VIEW, self.record()).expect("loads")
    }

    fn scratch_files(&self) -> usize {
        let files = std::fs::read_dir(self.storage.dir.scratch()).expect("lists");
        files.count()
    }

    fn inodes(&self) -> usize {
        self.storage.index.inodes(VIEW).expect("lists").len()
    }
}

fn create(view: &View, name: &[u8]) -> Ino {
    let made = view.create_node(ROOT, name, NewNode::file(0o644), CALLER);
    made.expect("creates").0.ino
}

fn read(view: &View, ino: Ino) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let read = view.read(ino, 0, &mut bytes).expect("reads");
    bytes.truncate(read);
    bytes
}

fn ino_of(view: &View, name: &[u8]) -> Ino {
    view.child(ROOT, name).expect("there").ino
}

#[test]
fn what_was_unlinked_while_open_is_there_until_the_kernel_forgets_it() {
    let (fixture, view) = Fixture::new();
    let (small, large) = (create(&view, b"small"), create(&view, b"large"));
    view.write(small, 0, b"small").expect("writes");
    view.write(large, 0, &vec![7; 20_000]).expect("writes");
    let directory = view.mkdir(ROOT, b"dir", 0o755, CALLER).expect("makes").ino;
    view.unlink(ROOT, b"small").expect("unlinks");
    view.unlink(ROOT, b"large").expect("unlinks");
    view.rmdir(ROOT, b"dir").expect("removes");
    drop(view);

    let view = fixture.take_over();
    assert_eq!(read(&view, small), b"small");
    assert_eq!(read(&view, large), vec![7; 20_000]);
    for ino in [small, large, directory] {
        assert_eq!(view.getattr(ino).expect("stat").attributes.nlink, 0);
    }
    view.write(small, 5, b" and more").expect("writes");
    view.write(large, 0, b"new").expect("writes");
    drop(view);

    let view = fixture.take_over();
    assert_eq!(read(&view, small), b"small and more");
    assert_eq!(&read(&view, large)[..4], b"new\x07");
    for ino in [small, large, directory] {
        view.forget(ino, 1);
        assert_eq!(view.getattr(ino).err(), Some(Errno::ENOENT));
    }
    assert_eq!(fixture.scratch_files(), 0);
    view.save_dirty().expect("saves");
    assert_eq!(fixture.inodes(), 1, "the root alone");
}

#[test]
fn a_fresh_mount_drops_what_has_no_name() {
    let (fixture, view) = Fixture::new();
    for name in [&b"small"[..], b"large", b"forgotten"] {
        let ino = create(&view, name);
        let size = if name == b"small" { 10 } else { 20_000 };
        view.write(ino, 0, &vec![1; size]).expect("writes");
        view.unlink(ROOT, name).expect("unlinks");
        if name == b"forgotten" {
            view.forget(ino, 1);
        }
    }
    drop(view);
    assert_eq!((fixture.inodes(), fixture.scratch_files()), (4, 1));
    let view = fixture.load();
    assert_eq!((fixture.inodes(), fixture.scratch_files()), (1, 0));
    assert!(view.list(ROOT, 0, 10).expect("lists").is_empty());
}

#[test]
fn references_of_an_earlier_daemon_keep_an_inode() {
    let (fixture, view) = Fixture::new();
    let ino = create(&view, b"f");
    for _ in 0..5 {
        view.lookup(ROOT, b"f").expect("finds");
    }
    drop(view);

    let view = fixture.take_over();
    // One of ours for which the kernel had no use, and then everything, while the name is there.
    view.lookup(ROOT, b"f").expect("finds");
    view.lookup(ROOT, b"f").expect("finds");
    view.forget(ino, 1);
    view.forget(ino, 7);
    view.lookup(ROOT, b"f").expect("finds");
    view.unlink(ROOT, b"f").expect("unlinks");
    assert!(view.getattr(ino).is_ok(), "the kernel has it");
    view.forget(ino, 1);
    assert!(view.getattr(ino).is_err());

    // The successor's own inodes are counted exactly.
    let ino = create(&view, b"g");
    view.lookup(ROOT, b"g").expect("finds");
    view.unlink(ROOT, b"g").expect("unlinks");
    view.forget(ino, 1);
    assert!(view.getattr(ino).is_ok());
    view.forget(ino, 1);
    assert!(view.getattr(ino).is_err());
}

#[test]
fn what_was_made_is_not_made_again() {
    let (fixture, view) = Fixture::new();
    let news = || {
        [
            (&b"file"[..], NewNode::file(0o640)),
            (b"dir", NewNode::directory(ROOT, 0o750)),
            (b"link", NewNode::symlink(b"elsewhere")),
        ]
    };
    let mut made = Vec::new();
    for (name, new) in news() {
        made.push(
            view.create_node(ROOT, name, new, CALLER)
                .expect("makes")
                .0
                .ino,
        );
    }
    view.link(made[0], ROOT, b"second").expect("links");
    view.unlink(ROOT, b"second").expect("unlinks");
    drop(view);

    let view = fixture.take_over();
    for ((name, new), ino) in news().into_iter().zip(made) {
        let again = view.create_again(ROOT, name, new, CALLER).expect("is made");
        assert_eq!(again.ino, ino);
    }
    // What was not carried out is carried out now.
    for (name, new) in news() {
        let name = [name, b"2"].concat();
        view.create_again(ROOT, &name, new, CALLER).expect("makes");
    }
    assert_eq!(view.list(ROOT, 0, 10).expect("lists").len(), 6);
}

#[test]
fn something_else_of_that_name_is_in_the_way() {
    let (fixture, view) = Fixture::new();
    let ino = create(&view, b"f");
    view.mkdir(ROOT, b"d", 0o755, CALLER).expect("makes");
    view.symlink(ROOT, b"l", b"one", CALLER).expect("makes");
    view.write(ino, 0, b"written").expect("writes");
    create(&view, b"linked");
    let linked = ino_of(&view, b"linked");
    view.link(linked, ROOT, b"twice").expect("links");
    drop(view);

    let view = fixture.take_over();
    let other = Caller { uid: 9, gid: 2 };
    let refused = [
        (&b"f"[..], NewNode::file(0o644), CALLER),
        (b"linked", NewNode::file(0o644), CALLER),
        (b"d", NewNode::file(0o644), CALLER),
        (b"d", NewNode::directory(ROOT, 0o700), CALLER),
        (b"d", NewNode::directory(ROOT, 0o755), other),
        (b"l", NewNode::symlink(b"two"), CALLER),
    ];
    for (name, new, caller) in refused {
        let made = view.create_again(ROOT, name, new, caller);
        assert_eq!(made.err(), Some(Errno::EEXIST), "{name:?}");
    }
    assert_eq!(
        view.link_again(linked, ROOT, b"f").err(),
        Some(Errno::EEXIST)
    );
}

#[test]
fn names_given_and_taken_away_once() {
    let (fixture, view) = Fixture::new();
    let ino = create(&view, b"f");
    create(&view, b"gone");
    view.mkdir(ROOT, b"dir", 0o755, CALLER).expect("makes");
    create(&view, b"old");
    create(&view, b"older");
    view.link(ino, ROOT, b"g").expect("links");
    view.unlink(ROOT, b"gone").expect("unlinks");
    view.rmdir(ROOT, b"dir").expect("removes");
    let (old, new) = ((ROOT, &b"old"[..]), (ROOT, &b"new"[..]));
    view.rename(old, new, RenameMode::NoReplace, 8)
        .expect("renames");
    drop(view);

    let view = fixture.take_over();
    for _ in 0..2 {
        let linked = view.link_again(ino, ROOT, b"g").expect("is linked");
        assert_eq!((linked.ino, linked.attributes.nlink), (ino, 2));
        view.unlink_again(ROOT, b"gone").expect("is gone");
        view.rmdir_again(ROOT, b"dir").expect("is gone");
        view.rename_again(old, new, RenameMode::NoReplace, 8)
            .expect("is renamed");
        // Not yet carried out the first time, carried out the second.
        view.unlink_again(ROOT, b"older").expect("goes");
    }
    let missing = (ROOT, &b"missing"[..]);
    let neither = view.rename_again(missing, (ROOT, b"nowhere"), RenameMode::Replace, 10);
    assert_eq!(neither.err(), Some(Errno::ENOENT));
    assert_eq!(view.list(ROOT, 0, 10).expect("lists").len(), 3);
}

#[test]
fn an_exchange_is_carried_out_once() {
    let (fixture, view) = Fixture::new();
    let (one, two) = (create(&view, b"one"), create(&view, b"two"));
    let (first, second) = ((ROOT, &b"one"[..]), (ROOT, &b"two"[..]));
    view.rename(first, second, RenameMode::Exchange, 42)
        .expect("exchanges");
    drop(view);

    let view = fixture.take_over();
    let again = |view: &View, request| {
        view.rename_again(first, second, RenameMode::Exchange, request)
            .expect("exchanges");
        (ino_of(view, b"one"), ino_of(view, b"two"))
    };
    assert_eq!(again(&view, 42), (two, one));
    // Another one, that the predecessor had but did not carry out; and then had by two.
    assert_eq!(again(&view, 44), (one, two));
    drop(view);
    let view = fixture.take_over();
    assert_eq!(again(&view, 44), (one, two));
    drop(view);
    // On a new connection the numbers begin again.
    let view = fixture.load();
    assert_eq!(again(&view, 44), (two, one));
}

#[test]
fn a_listing_goes_on_where_it_was() {
    let (fixture, view) = Fixture::new();
    for n in 0..50 {
        create(&view, format!("f{n}").as_bytes());
    }
    let all = view.list(ROOT, 0, 100).expect("lists");
    view.unlink(ROOT, &all[3].name).expect("unlinks");
    drop(view);
    let view = fixture.take_over();
    let rest = view.list(ROOT, all[20].cookie, 100).expect("lists");
    let names = |rows: &[kachefs::fs::Listed]| {
        let rows = rows.iter();
        rows.map(|row| (row.cookie, row.name.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&rest), names(&all[21..]));
}
