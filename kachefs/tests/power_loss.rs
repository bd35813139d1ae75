//! A store opened after a power cut, without a mount: the disk is a copy of the store's directory,
//! from which the test takes what had not reached it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kachefs::fs::names::{NewNode, RenameMode};
use kachefs::fs::{Body, Caller, View};
use kachefs::storage::Storage;
use store::scan::RootNeedles;
use store::{Digest, Ino, Quarantine, ScratchId, StoreDir, ViewId};

const CALLER: Caller = Caller { uid: 1, gid: 2 };
const VIEW: ViewId = ViewId(1);

struct Machine {
    dir: tempfile::TempDir,
    storage: Arc<Storage>,
    view: View,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage = open(&dir.path().join("store"), "before");
        let view = View::create(Arc::clone(&storage), VIEW, b"/nowhere".to_vec(), CALLER);
        Self {
            dir,
            view: view.expect("creates"),
            storage,
        }
    }

    fn create(&self, name: &[u8], size: usize) -> Ino {
        let made = self
            .view
            .create_node(Ino::ROOT, name, NewNode::file(0o644), CALLER);
        let ino = made.expect("creates").0.ino;
        self.view.write(ino, 0, &bytes(size, 1)).expect("writes");
        ino
    }

    fn sync_point(&self) {
        let save = |epoch| {
            self.view.mark_written(epoch);
            Ok(self.view.save_dirty()?)
        };
        self.storage.sync_point(save, false).expect("a sync point");
    }

    /// What the disk would have if all of it were written now.
    fn disk(&self, name: &str) -> PathBuf {
        let copy = self.dir.path().join(name);
        copy_directory(self.storage.dir.root(), &copy);
        copy
    }

    fn scratch(&self, ino: Ino) -> ScratchId {
        let node = self.view.node(ino).expect("there");
        let state = node.state.lock();
        match state.body {
            Body::Private { id, .. } => id,
            ref other => panic!("not private: {other:?}"),
        }
    }
}

fn bytes(size: usize, version: u8) -> Vec<u8> {
    vec![version; size]
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("creates");
    for entry in fs::read_dir(from).expect("lists") {
        let entry = entry.expect("lists");
        let (path, name) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_directory(&path, &name);
        } else {
            fs::copy(&path, &name).expect("copies");
        }
    }
}

fn open(root: &Path, boot: &str) -> Arc<Storage> {
    let storage = Storage::open_in(StoreDir::new(root), Some(boot.to_owned()));
    Arc::new(storage.expect("opens"))
}

/// What the next daemon has.
fn load(root: &Path, boot: &str) -> (Arc<Storage>, View) {
    let storage = open(root, boot);
    let views = storage.index.views().expect("lists");
    let (_, record) = views.into_iter().next().expect("stored");
    let view = View::load(Arc::clone(&storage), VIEW, record).expect("loads");
    (storage, view)
}

/// The content of a file, when there is one.
fn content(view: &View, name: &[u8]) -> Option<Vec<u8>> {
    let ino = view.child(Ino::ROOT, name).ok()?.ino;
    let mut bytes = vec![0; 1 << 20];
    let read = view.read(ino, 0, &mut bytes).expect("reads");
    bytes.truncate(read);
    Some(bytes)
}

fn shorten(path: &Path) {
    let file = fs::File::options().write(true).open(path).expect("opens");
    file.set_len(10).expect("shortens");
}

#[test]
fn what_no_sync_point_has_seen_goes() {
    let machine = Machine::new();
    machine.create(b"small", 100);
    machine.create(b"large", 50_000);
    machine.sync_point();
    machine.create(b"new", 100);
    let torn = machine.create(b"torn", 50_000);
    let disk = machine.disk("disk");
    shorten(&StoreDir::new(&disk).scratch_file(machine.scratch(torn)));

    let (_storage, view) = load(&disk, "after");
    assert_eq!(content(&view, b"small"), Some(bytes(100, 1)));
    assert_eq!(content(&view, b"large"), Some(bytes(50_000, 1)));
    assert_eq!(content(&view, b"new"), None, "newer than what may be lost");
    assert_eq!(content(&view, b"torn"), None);
    let left = fs::read_dir(StoreDir::new(&disk).scratch()).expect("lists");
    let live = left.filter(|entry| entry.as_ref().is_ok_and(|e| e.path().extension().is_none()));
    assert_eq!(live.count(), 1, "the backing of what went is no more");
}

#[test]
fn a_death_of_the_daemon_takes_nothing() {
    let machine = Machine::new();
    machine.sync_point();
    machine.create(b"new", 100);
    machine.create(b"large", 50_000);
    let disk = machine.disk("disk");
    let (_storage, view) = load(&disk, "before");
    assert_eq!(content(&view, b"new"), Some(bytes(100, 1)));
    assert_eq!(content(&view, b"large"), Some(bytes(50_000, 1)));
}

#[test]
fn an_end_in_order_takes_nothing() {
    let machine = Machine::new();
    machine.create(b"large", 50_000);
    let save = |_| Ok(machine.view.save_dirty()?);
    machine.storage.sync_point(save, true).expect("the last");
    let disk = machine.disk("disk");
    let (storage, view) = load(&disk, "after");
    assert_eq!(content(&view, b"large"), Some(bytes(50_000, 1)));
    // In use again: what comes now is not vouched for.
    let made = view.create_node(Ino::ROOT, b"new", NewNode::file(0o644), CALLER);
    made.expect("creates");
    drop((storage, view));
    let (_storage, view) = load(&disk, "and after that");
    assert_eq!(content(&view, b"new"), None);
    assert_eq!(content(&view, b"large"), Some(bytes(50_000, 1)));
}

#[test]
fn what_was_synced_stays() {
    let machine = Machine::new();
    for (name, size) in [(&b"small"[..], 100), (b"large", 50_000)] {
        let ino = machine.create(name, size);
        machine.view.fsync(ino).expect("syncs");
        // Not synced again: old bytes, new ones or both, but the file is there.
        machine.view.write(ino, 0, &bytes(10, 2)).expect("writes");
    }
    let grown = machine.create(b"grown", 100);
    machine.view.fsync(grown).expect("syncs");
    machine
        .view
        .write(grown, 100, &bytes(50_000, 1))
        .expect("moves into a private file");
    machine.create(b"other", 100);
    let (storage, view) = load(&machine.disk("disk"), "after");
    for (name, size) in [(&b"small"[..], 100), (b"large", 50_000)] {
        let found = content(&view, name).expect("there");
        assert_eq!(found[10..], bytes(size - 10, 1));
    }
    assert_eq!(content(&view, b"grown").expect("there").len(), 50_100);
    assert_eq!(content(&view, b"other"), None);
    // For good.
    drop((storage, view));
    let (_storage, view) = load(&machine.dir.path().join("disk"), "once more");
    assert!(content(&view, b"large").is_some());
}

#[test]
fn what_a_file_replaces_lasts_as_long_as_the_file_may_not() {
    let machine = Machine::new();
    let names = [&b"synced"[..], b"vouched", b"emptied", b"unlinked"];
    for name in names {
        machine.create(name, 50_000);
    }
    machine.sync_point();
    let synced = machine.create(b"new", 50_000);
    machine.view.fsync(synced).expect("syncs");
    let earlier = machine.disk("earlier");
    machine.create(b"newer", 50_000);
    for (from, to) in [(&b"new"[..], &b"synced"[..]), (b"newer", b"vouched")] {
        machine
            .view
            .rename((Ino::ROOT, from), (Ino::ROOT, to), RenameMode::Replace, 1)
            .expect("renames");
    }
    let emptied = machine
        .view
        .child(Ino::ROOT, b"emptied")
        .expect("there")
        .ino;
    let changes = kachefs::fs::data::Changes {
        size: Some(0),
        ..Default::default()
    };
    machine.view.setattr(emptied, changes).expect("empties");
    machine
        .view
        .unlink(Ino::ROOT, b"unlinked")
        .expect("unlinks");
    for ino in 2..6 {
        machine.view.forget(Ino(ino), 1);
    }
    // The disk has the names of backings as they are now, and of the index only what it had.
    let scratch = StoreDir::new(&earlier).scratch();
    fs::remove_dir_all(&scratch).expect("removes");
    copy_directory(&machine.storage.dir.scratch(), &scratch);

    let (_storage, view) = load(&earlier, "after");
    for name in names {
        assert_eq!(content(&view, name), Some(bytes(50_000, 1)));
    }
    assert_eq!(content(&view, b"new"), Some(bytes(50_000, 1)));
    // And no longer than that.
    machine.sync_point();
    let left = fs::read_dir(machine.storage.dir.scratch()).expect("lists");
    assert_eq!(left.count(), 2, "those of the two new files");
}

#[test]
fn a_change_of_an_old_file_is_announced() {
    let machine = Machine::new();
    let ino = machine.create(b"large", 50_000);
    machine.sync_point();
    machine.view.write(ino, 100, &bytes(10, 2)).expect("writes");
    let (_storage, view) = load(&machine.disk("disk"), "after");
    assert_eq!(content(&view, b"large"), None, "a mixture, perhaps");
}

#[test]
fn torn_blobs_are_set_aside() {
    let machine = Machine::new();
    let needles = RootNeedles::new(&[]);
    let ingest = |ino| {
        let node = machine.view.node(ino).expect("there");
        machine
            .view
            .ingest(&node, &needles)
            .expect("ingests")
            .digest
    };
    let whole = ingest(machine.create(b"whole", 50_000));
    let torn = ingest(machine.create(b"torn", 60_000));
    let empty = ingest(machine.create(b"empty", 70_000));
    let disk = machine.disk("disk");
    let damage = |digest: &Digest, size| {
        let dir = StoreDir::new(&disk);
        let path = store::Cas::new(&dir).path(digest);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        let file = fs::File::options().write(true).open(&path).expect("opens");
        file.set_len(100).expect("shortens");
        file.set_len(size).expect("lengthens with zeros");
    };
    damage(&torn, 60_000);
    damage(&empty, 0);

    let (storage, view) = load(&disk, "after");
    assert_eq!(content(&view, b"whole"), Some(bytes(50_000, 1)));
    assert_eq!(content(&view, b"torn"), None);
    assert_eq!(content(&view, b"empty"), None);
    assert_eq!(storage.cas.verify(&whole).expect("whole"), 50_000);
    assert!(storage.cas.open(&torn).is_err(), "never served");
    let again = storage.cas.ingest_bytes(&bytes(60_000, 1)).expect("stores");
    assert!(again.new && again.digest == torn, "stored again");
    let aside = Quarantine::new(&StoreDir::new(&disk)).contents();
    assert_eq!(aside.expect("counts").files, 2);
}

#[test]
fn blobs_are_verified_when_the_clock_was_set_back() {
    let machine = Machine::new();
    let needles = RootNeedles::new(&[]);
    let node = machine.create(b"torn", 60_000);
    let node = machine.view.node(node).expect("there");
    let torn = machine
        .view
        .ingest(&node, &needles)
        .expect("ingests")
        .digest;
    machine.sync_point();
    // As if the sync point had been made an hour from now.
    let mut point = machine
        .storage
        .index
        .sync_point()
        .expect("reads")
        .expect("there");
    point.since.secs += 3600;
    let mut batch = machine.storage.index.batch();
    batch.put_sync_point(&point).expect("puts");
    batch.commit().expect("commits");
    let disk = machine.disk("disk");
    let dir = StoreDir::new(&disk);
    let path = store::Cas::new(&dir).path(&torn);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    fs::write(&path, bytes(60_000, 3)).expect("writes");
    let (storage, _view) = load(&disk, "after");
    assert!(storage.cas.open(&torn).is_err());
}

#[test]
fn numbers_the_index_forgot_are_not_given_out_twice() {
    let machine = Machine::new();
    let disk = machine.disk("disk");
    // The first private file: its claim is lost, the file is not.
    let ino = machine.create(b"large", 50_000);
    let dir = StoreDir::new(&disk);
    let id = machine.scratch(ino);
    fs::write(dir.scratch_file(id), b"left over").expect("writes");
    let (storage, _view) = load(&disk, "after");
    let (new, _) = storage.new_scratch().expect("makes");
    assert!(new > id, "{new:?} after {id:?}");
}
