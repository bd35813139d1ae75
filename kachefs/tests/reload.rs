//! A view loaded again after its daemon died at an unlucky moment, without a mount.

use std::fs::File;
use std::sync::Arc;

use kachefs::fs::names::NewNode;
use kachefs::fs::{Body, Caller, View};
use kachefs::storage::Storage;
use store::{Digest, Ino, StoreDir, ViewId};

const CALLER: Caller = Caller { uid: 1, gid: 2 };
const VIEW: ViewId = ViewId(1);

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

    /// What the next daemon sees.
    fn load(&self) -> View {
        let views = self.storage.index.views().expect("lists");
        let (_, record) = views
            .into_iter()
            .find(|(id, _)| *id == VIEW)
            .expect("stored");
        View::load(Arc::clone(&self.storage), VIEW, record).expect("loads")
    }
}

fn create(view: &View, name: &[u8]) -> Ino {
    let made = view.create_node(Ino::ROOT, name, NewNode::file(0o644), CALLER);
    let (node, _) = made.expect("creates");
    node.ino
}

fn read(view: &View, ino: Ino) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let read = view.read(ino, 0, &mut bytes).expect("reads");
    bytes.truncate(read);
    bytes
}

#[test]
fn bytes_left_to_the_index_are_there_for_every_use() {
    let (fixture, view) = Fixture::new();
    let bytes: Vec<u8> = (0..1000_u32).map(|n| (n % 251) as u8).collect();
    let [read_only, changed, grown, renamed] = [b"a", b"b", b"c", b"d"].map(|name| {
        let ino = create(&view, name);
        view.write(ino, 0, &bytes).expect("writes");
        ino
    });
    let left = |view: &View, ino: Ino| {
        let node = view.node(ino).expect("there");
        matches!(node.state.lock().body, Body::Stored { size: 1000 })
    };
    view.leave_small();
    for view in [&view, &fixture.load()] {
        assert!(left(view, read_only));
        let mut some = [0; 10];
        assert_eq!(view.read(read_only, 995, &mut some), Ok(5));
        assert_eq!(some[..5], bytes[995..]);
        let node = view.node(read_only).expect("there");
        assert_eq!(view.content_digest(&node), Ok(Digest::of(&bytes)));
        assert!(left(view, read_only), "reading brings nothing back");
    }

    view.write(changed, 1, b"new").expect("writes");
    view.write(grown, 9_000, b"new").expect("writes");
    // A change of a name or an attribute writes the record, and what is in it, again.
    view.link(renamed, Ino::ROOT, b"e").expect("links");
    assert!(left(&view, renamed));
    view.leave_small();
    let mut new = bytes.clone();
    new[1..4].copy_from_slice(b"new");
    for view in [&view, &fixture.load()] {
        assert_eq!(read(view, changed), new);
        assert_eq!(read(view, grown)[..1000], bytes);
        assert_eq!(read(view, renamed), bytes);
    }
}

#[test]
fn what_is_open_in_a_cleaned_view_keeps_its_bytes() {
    let (fixture, view) = Fixture::new();
    let files = [(b"small", 1000), (b"large", 100_000)].map(|(name, size)| {
        let (ino, bytes) = (create(&view, name), vec![7; size]);
        view.write(ino, 0, &bytes).expect("writes");
        view.leave_small();
        view.unlink(Ino::ROOT, name).expect("unlinks");
        (ino, bytes)
    });
    assert!(view.retire(), "it is empty");
    view.leave_small();
    drop(fixture.load());
    view.save_dirty().expect("saves");
    for (ino, bytes) in files {
        assert!(read(&view, ino) == bytes, "{} bytes", bytes.len());
    }
}

#[test]
fn a_file_sealed_but_not_yet_recorded_becomes_the_blob_it_is() {
    let (fixture, view) = Fixture::new();
    let bytes = vec![7; 100_000];
    let ino = create(&view, b"f");
    view.write(ino, 0, &bytes).expect("writes");
    let Body::Private { id, .. } = view.node(ino).expect("there").state.lock().body else {
        panic!("large files are private");
    };
    // What ingest does before it stores the record.
    let path = fixture.storage.dir.scratch_file(id);
    let digest = Digest::of(&bytes);
    let file = File::open(&path).expect("opens");
    fixture
        .storage
        .cas
        .adopt(&path, &file, digest, bytes.len() as u64)
        .expect("adopts");
    drop(view);

    let view = fixture.load();
    assert_eq!(read(&view, ino), bytes);
    view.write(ino, 0, b"changed").expect("writes");
    assert_eq!(&read(&view, ino)[..8], b"changed\x07");
    assert_eq!(
        fixture
            .storage
            .cas
            .verify(&digest)
            .expect("the blob is untouched"),
        100_000
    );
}

#[test]
fn what_was_written_after_the_record_is_there() {
    let (fixture, view) = Fixture::new();
    let ino = create(&view, b"f");
    view.write(ino, 0, &vec![1; 20_000]).expect("writes");
    let first = view.getattr(ino).expect("stat");
    std::thread::sleep(std::time::Duration::from_millis(20));
    view.write(ino, 20_000, &vec![2; 20_000]).expect("writes");
    let second = view.getattr(ino).expect("stat");
    // The record is still behind: the daemon is gone.
    drop(view);

    let view = fixture.load();
    let entry = view.getattr(ino).expect("stat");
    assert_eq!(entry.size, 40_000);
    assert!(second.attributes.mtime > first.attributes.mtime);
    assert_eq!(entry.attributes.mtime, second.attributes.mtime);
    assert_eq!(read(&view, ino)[20_000], 2);
}

#[test]
fn a_file_unlinked_while_open_leaves_nothing_behind() {
    let (fixture, view) = Fixture::new();
    let ino = create(&view, b"f");
    view.write(ino, 0, &vec![1; 20_000]).expect("writes");
    view.unlink(Ino::ROOT, b"f").expect("unlinks");
    assert_eq!(read(&view, ino).len(), 20_000);
    let scratch = || {
        std::fs::read_dir(fixture.storage.dir.scratch())
            .expect("lists")
            .count()
    };
    assert_eq!(scratch(), 1);
    view.forget(ino, 1);
    assert_eq!(scratch(), 0);
    assert!(view.node(ino).is_err());
}

#[test]
fn a_name_given_while_a_result_is_recorded_is_kept() {
    let (fixture, view) = Fixture::new();
    let view = Arc::new(view);
    let action = store::ActionKey(Digest::of(b"action"));
    let inodes: Vec<Ino> = (0..300_u32)
        .map(|i| {
            let ino = create(&view, format!("f{i}").as_bytes());
            view.write(ino, 0, &vec![1; 10_000]).expect("writes");
            ino
        })
        .collect();
    let linker = {
        let (view, inodes) = (Arc::clone(&view), inodes.clone());
        std::thread::spawn(move || {
            for (i, ino) in inodes.iter().enumerate() {
                view.link(*ino, Ino::ROOT, format!("g{i}").as_bytes())
                    .expect("links");
            }
        })
    };
    for ino in &inodes {
        let node = view.node(*ino).expect("there");
        let generation = node.state.lock().generation;
        let batch = fixture.storage.index.batch();
        view.commit_origin(batch, &[(node, generation)], action)
            .expect("commits");
    }
    linker.join().expect("links");
    drop(view);

    let view = fixture.load();
    for ino in inodes {
        let entry = view.getattr(ino).expect("stat");
        assert_eq!(entry.attributes.nlink, 2, "{ino:?}");
        assert_eq!(
            view.node(ino)
                .expect("there")
                .state
                .lock()
                .origin
                .as_deref()
                .copied(),
            Some(action)
        );
    }
}
