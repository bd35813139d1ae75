//! Ways to damage a store whose daemon does not run.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use harness::chance::Chance;
use harness::{Must, tree};
use rocksdb::{DB, IteratorMode, Options};

/// What is done to a file.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    /// Some bytes are other ones.
    Flip,
    /// The end is missing.
    Truncate,
    /// All bytes are missing.
    Empty,
    /// The file is missing.
    Remove,
}

/// All of them.
pub const HARMS: [Harm; 4] = [Harm::Flip, Harm::Truncate, Harm::Empty, Harm::Remove];

/// The families of the index and what they hold.
pub const FAMILIES: [&str; 7] = [
    "meta", "views", "inodes", "dentries", "actions", "records", "files",
];

/// Does it.
#[track_caller]
pub fn harm(path: &Path, how: Harm, chance: &mut Chance) {
    if let Harm::Remove = how {
        return fs::remove_file(path).must(path.display());
    }
    // Blobs are read-only, also where the test is not root.
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).must(path.display());
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.must(path.display());
    let length = file.metadata().must("stat").len();
    match how {
        Harm::Empty => file.set_len(0).must("truncate"),
        Harm::Truncate => {
            let kept = chance.below(usize::try_from(length).must("small"));
            file.set_len(kept as u64).must("truncate");
        }
        _ => {
            for _ in 0..8 {
                let at = chance.below(usize::try_from(length).must("small")) as u64;
                let mut byte = [0];
                if file.read_at(&mut byte, at).must("read") == 1 {
                    byte[0] ^= 1 << chance.below(8);
                    file.write_all_at(&byte, at).must("write");
                }
            }
        }
    }
}

/// The files of the index of one kind: `sst`, `log` (the write-ahead logs), `MANIFEST`, `CURRENT`.
#[track_caller]
pub fn index_files(store: &Path, kind: &str) -> Vec<PathBuf> {
    tree::files(&store.join("index"))
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(kind) || path.extension().is_some_and(|ending| ending == kind)
        })
        .collect()
}

/// The blobs.
#[track_caller]
pub fn blobs(store: &Path) -> Vec<PathBuf> {
    tree::files(&store.join("blobs"))
}

/// A row of the index.
pub type Row = (Vec<u8>, Vec<u8>);

/// Looks at and changes the index as any program with RocksDB can.
#[track_caller]
pub fn with_index<T>(store: &Path, work: impl FnOnce(&DB) -> T) -> T {
    let path = store.join("index");
    let options = Options::default();
    let families = DB::list_cf(&options, &path).must("families");
    let db = DB::open_cf(&options, &path, families).must("the index");
    work(&db)
}

/// Everything in a family.
#[track_caller]
pub fn rows(db: &DB, family: &str) -> Vec<Row> {
    let handle = db.cf_handle(family).must(family);
    db.iterator_cf(handle, IteratorMode::Start)
        .map(|row| row.must(family))
        .map(|(key, value)| (key.into_vec(), value.into_vec()))
        .collect()
}

/// The key of the view mounted at a path.
#[track_caller]
pub fn view_at(db: &DB, path: &Path) -> Vec<u8> {
    let path = path.as_os_str().as_encoded_bytes();
    let found = rows(db, "views")
        .into_iter()
        .find(|(_, value)| tree::contains(value, path));
    found.must("the view").0
}

/// Stores a value.
#[track_caller]
pub fn put(db: &DB, family: &str, key: &[u8], value: &[u8]) {
    let handle = db.cf_handle(family).must(family);
    db.put_cf(handle, key, value).must("put");
}
