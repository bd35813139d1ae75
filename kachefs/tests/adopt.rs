//! Files taken over that were made elsewhere in the store, without a mount.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kachefs::fs::adopt::Adopted;
use kachefs::fs::names::NewNode;
use kachefs::fs::{Caller, Errno, View};
use kachefs::storage::Storage;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use store::{Ino, StoreDir, ViewId};
use wrapper::lease::Unharmed;

const CALLER: Caller = Caller { uid: 1, gid: 2 };
const VIEW: ViewId = ViewId(1);

struct Fixture {
    dir: tempfile::TempDir,
    _unharmed: Unharmed,
    storage: Arc<Storage>,
    view: View,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("made")).expect("mkdir");
        let storage =
            Arc::new(Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens"));
        let view = View::create(Arc::clone(&storage), VIEW, b"/nowhere".to_vec(), CALLER);
        Self {
            dir,
            _unharmed: Unharmed::start(),
            storage,
            view: view.expect("creates"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("made").join(name)
    }

    /// Makes a file, and says that it is to be taken over.
    fn made(&self, name: &str, bytes: &[u8]) -> Adopted<'static> {
        fs::write(self.path(name), bytes).expect("writes");
        self.named(name)
    }

    fn named(&self, name: &str) -> Adopted<'static> {
        Adopted {
            name: name.as_bytes().to_vec(),
            path: self.path(name),
            edit: None,
        }
    }

    fn adopt(&self, files: &[Adopted<'_>]) -> Result<(), Errno> {
        let soon = Instant::now() + Duration::from_millis(20);
        self.view.adopt(Ino::ROOT, files, soon, CALLER)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        read(&self.view, name)
    }

    fn backings(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.storage.dir.scratch()).expect("lists");
        files.map(|file| file.expect("a file").path()).collect()
    }

    /// Asserts that nothing was taken over, and that nothing is left of the attempt.
    fn assert_untouched(&self, names: &[&str]) {
        for name in names {
            let found = self.view.lookup(Ino::ROOT, name.as_bytes());
            assert_eq!(found.map(drop), Err(Errno::ENOENT), "{name}");
        }
        assert_eq!(self.backings(), Vec::<PathBuf>::new());
        let hidden = fs::read_dir(self.dir.path().join("made")).expect("lists");
        for name in hidden.map(|file| file.expect("a file").file_name()) {
            let name = name.to_string_lossy();
            assert!(!name.starts_with('.'), "{name}");
        }
    }
}

fn read(view: &View, name: &str) -> Vec<u8> {
    let entry = view.lookup(Ino::ROOT, name.as_bytes()).expect("is there");
    let mut bytes = vec![0; 1 << 20];
    let read = view.read(entry.ino, 0, &mut bytes).expect("reads");
    bytes.truncate(read);
    bytes
}

#[test]
fn large_files_are_linked_and_small_ones_read() {
    let fixture = Fixture::new();
    let large = vec![7; 100_000];
    let files = [
        fixture.made("libx.rlib", &large),
        fixture.made("x.d", b"x: y\n"),
    ];
    let mode = fs::Permissions::from_mode(0o751);
    fs::set_permissions(fixture.path("libx.rlib"), mode).expect("chmod");
    let inode = fs::metadata(fixture.path("libx.rlib")).expect("stat").ino();
    fixture.adopt(&files).expect("takes over");
    assert_eq!(fixture.read("libx.rlib"), large);
    assert_eq!(fixture.read("x.d"), b"x: y\n");
    let backings = fixture.backings();
    assert_eq!(backings.len(), 1, "{backings:?}");
    assert_eq!(fs::metadata(&backings[0]).expect("stat").ino(), inode);
    let entry = fixture.view.lookup(Ino::ROOT, b"libx.rlib");
    let entry = entry.expect("is there");
    let attributes = &entry.attributes;
    assert_eq!(
        (attributes.perm, attributes.uid, attributes.gid),
        (0o751, 1, 2)
    );
    assert_eq!(entry.size, 100_000);

    // What becomes of the name it had is nobody's business any more.
    fs::remove_file(fixture.path("libx.rlib")).expect("removes");
    let record = fixture.storage.index.views().expect("lists").remove(0).1;
    let loaded = View::load(Arc::clone(&fixture.storage), VIEW, record).expect("loads");
    assert_eq!(read(&loaded, "libx.rlib"), large);
    let again = loaded.lookup(Ino::ROOT, b"libx.rlib").expect("is there");
    assert_eq!(again.attributes.mtime, entry.attributes.mtime);
}

#[test]
fn what_is_to_be_held_instead_is() {
    let fixture = Fixture::new();
    let mut files = [
        fixture.made("short.d", b"aside"),
        fixture.made("long.d", &vec![2; 20_000]),
    ];
    let doubled = |text: &[u8]| text.repeat(2);
    for file in &mut files {
        file.edit = Some(&doubled);
    }
    fixture.adopt(&files).expect("takes over");
    assert_eq!(fixture.read("short.d"), b"asideaside");
    assert_eq!(fixture.read("long.d"), vec![2; 40_000]);
    let source = fs::read(fixture.path("long.d")).expect("reads");
    assert_eq!(source, vec![2; 20_000]);
}

#[test]
fn names_that_are_there_are_replaced() {
    let fixture = Fixture::new();
    let old = fixture.made("libx.rmeta", &vec![1; 50_000]);
    fixture.adopt(&[old]).expect("takes over");
    fs::remove_file(fixture.path("libx.rmeta")).expect("removes");
    let new = fixture.made("libx.rmeta", &vec![2; 60_000]);
    fixture.adopt(&[new]).expect("takes over");
    assert_eq!(fixture.read("libx.rmeta"), vec![2; 60_000]);
}

#[test]
fn what_somebody_writes_to_is_not_taken() {
    let fixture = Fixture::new();
    let files = [
        fixture.made("libx.rmeta", &vec![1; 50_000]),
        fixture.made("libx.rlib", &vec![1; 50_000]),
    ];
    let mut writer = File::options()
        .append(true)
        .open(fixture.path("libx.rlib"))
        .expect("opens");
    assert_eq!(fixture.adopt(&files), Err(Errno::EBUSY));
    fixture.assert_untouched(&["libx.rmeta", "libx.rlib"]);
    writer.write_all(b"more").expect("writes");
    drop(writer);
    fixture.adopt(&files).expect("takes over");
    assert_eq!(fixture.read("libx.rlib").len(), 50_004);
}

#[test]
fn all_or_none() {
    let fixture = Fixture::new();
    let there = || fixture.made("libx.rlib", &vec![1; 50_000]);
    let gone = fixture.named("gone");
    assert_eq!(fixture.adopt(&[there(), gone]), Err(Errno::ENOENT));
    fixture.assert_untouched(&["libx.rlib"]);

    let taken = fixture.made("taken", &vec![2; 50_000]);
    let directory = NewNode::directory(Ino::ROOT, 0o755);
    let made = fixture
        .view
        .create_node(Ino::ROOT, b"taken", directory, CALLER);
    made.expect("creates");
    assert_eq!(fixture.adopt(&[there(), taken]), Err(Errno::EISDIR));
    fixture.assert_untouched(&["libx.rlib"]);
}

#[test]
fn only_plain_files_are_taken() {
    let fixture = Fixture::new();
    fs::write(fixture.dir.path().join("secret"), vec![1; 50_000]).expect("writes");
    symlink("../secret", fixture.path("link")).expect("links");
    mkfifo(&fixture.path("pipe"), Mode::S_IRWXU).expect("makes a pipe");
    fs::create_dir(fixture.path("directory")).expect("mkdir");
    for (name, expected) in [
        ("link", Errno::ELOOP),
        ("pipe", Errno::EINVAL),
        ("directory", Errno::EINVAL),
    ] {
        let adopted = fixture.adopt(&[fixture.named(name)]);
        assert_eq!(adopted, Err(expected), "{name}");
        fixture.assert_untouched(&[name]);
    }
}
