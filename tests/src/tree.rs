//! Pictures of directory trees: names, bytes, modes, times and links, to be compared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{Must, archive};

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file, with its length and a hash of its bytes.
    File(u64, u64),
    /// A directory.
    Dir,
    /// A symbolic link, with what it points to.
    Symlink(PathBuf),
}

/// Everything a test can see of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is and holds.
    pub content: Content,
    /// The permission bits.
    pub mode: u32,
    /// The modification time: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// How many names the file has (1 for directories, whose count differs between file systems).
    pub links: u64,
    /// The first name in the tree of the same inode, if that is another one.
    pub same_as: Option<PathBuf>,
}

/// A picture of everything below a directory, without the directory itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree(pub BTreeMap<PathBuf, Entry>);

impl Tree {
    /// Takes the picture; every byte of every file is read.
    #[track_caller]
    pub fn of(root: &Path) -> Self {
        let mut tree = Self::default();
        let mut inodes = BTreeMap::new();
        for path in walk(root) {
            let name = path
                .strip_prefix(root)
                .must("a name below the root")
                .to_owned();
            let meta = fs::symlink_metadata(&path).must(path.display());
            let content = if meta.is_dir() {
                Content::Dir
            } else if meta.is_symlink() {
                Content::Symlink(fs::read_link(&path).must(path.display()))
            } else {
                let (length, hash) = digest(&path);
                assert_eq!(
                    length,
                    meta.len(),
                    "bytes read and size of {}",
                    path.display()
                );
                Content::File(length, hash)
            };
            let first = inodes
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| name.clone());
            let same_as = (*first != name).then(|| first.clone());
            let entry = Entry {
                mode: meta.mode() & 0o7777,
                mtime: (meta.mtime(), meta.mtime_nsec()),
                links: if meta.is_dir() { 1 } else { meta.nlink() },
                content,
                same_as,
            };
            tree.0.insert(name, entry);
        }
        tree
    }

    /// The picture of what a build left in a target, but for what no two runs have in common: times,
    /// the sessions in incremental directories, the order of what cargo remembers of the compiler,
    /// and the names of objects in an rlib (see [`deps_of_any_run`]).
    #[track_caller]
    pub fn of_any_run(target: &Path) -> Self {
        let mut tree = Self::of(target);
        tree.keep(|name| !is_session(name));
        for (name, entry) in &mut tree.0 {
            entry.mtime = (0, 0);
            if name.ends_with(".rustc_info.json") {
                let text = fs::read(target.join(name)).must(name.display());
                let json: serde_json::Value = serde_json::from_slice(&text).must(name.display());
                entry.content = Content::File(0, hash(json.to_string().as_bytes()));
            }
            if is_dep_info(name) {
                // Plain cargo, too, lists the sources of a crate in one order or another.
                let mut bytes = fs::read(target.join(name)).must(name.display());
                bytes.sort_unstable();
                entry.content = Content::File(bytes.len() as u64, hash(&bytes));
            }
            if let Content::File(_, hash) = &mut entry.content
                && name
                    .extension()
                    .is_some_and(|extension| extension == "rlib")
            {
                *hash = archive_hash(&target.join(name));
            }
        }
        tree
    }

    /// Without built build scripts: after a hit, or in a daemon's lifetime, launchers stand in for
    /// them; where the daemon died meanwhile they are themselves.
    #[must_use]
    pub fn without_build_scripts(mut self) -> Self {
        self.0.retain(|path, _| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_program = name.starts_with("build-script-") || name.starts_with("build_script_");
            !is_program || name.ends_with(".d")
        });
        self
    }

    /// Without the incremental directories, which only compilers make and no hit brings.
    #[must_use]
    pub fn without_incremental(mut self) -> Self {
        self.keep(|name| !name.iter().any(|part| part == "incremental"));
        self
    }

    /// Keeps some names, and counts the links among those alone: rustc links what it leaves in
    /// `deps` from its session.
    fn keep(&mut self, keep: impl Fn(&Path) -> bool) {
        self.0.retain(|name, _| keep(name));
        let mut more: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for first in self.0.values().filter_map(|entry| entry.same_as.clone()) {
            *more.entry(first).or_default() += 1;
        }
        for (name, entry) in &mut self.0 {
            let first = entry.same_as.as_ref().unwrap_or(name);
            entry.links = 1 + more.get(first).copied().unwrap_or(0);
        }
    }

    /// The test fails, naming what differs, unless everything in this picture is the same in the
    /// other, which may hold more.
    #[track_caller]
    pub fn assert_within(&self, other: &Self, what: &str) {
        let mut same = other.clone();
        same.0.retain(|name, _| self.0.contains_key(name));
        self.assert_same(&same, what);
    }

    /// The test fails, naming what differs, unless the pictures are equal in everything.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let differing: Vec<_> = names
            .into_iter()
            .filter(|name| self.0.get(*name) != other.0.get(*name))
            .map(|name| {
                format!(
                    "{}: {:?} / {:?}",
                    name.display(),
                    self.0.get(name),
                    other.0.get(name)
                )
            })
            .collect();
        assert!(
            differing.is_empty(),
            "{what}: {} of {} names differ (before / after):\n{}",
            differing.len(),
            self.0.len(),
            differing
                .iter()
                .take(20)
                .cloned()
                .collect::<Vec<_>>()
                .join("\n")
        );
    }

    /// Only files, with only length, hash and mode: what one build must have in common with
    /// another that ran at another time.
    pub fn outputs(&self) -> Outputs {
        let file = |(name, entry): (&PathBuf, &Entry)| match entry.content {
            Content::File(length, hash) => Some((name.clone(), (length, hash, entry.mode))),
            _ => None,
        };
        self.0.iter().filter_map(file).collect()
    }
}

/// Length, hash and mode of files, by their names.
pub type Outputs = BTreeMap<PathBuf, (u64, u64, u32)>;

/// The outputs of every `deps` directory of a target directory.
#[track_caller]
pub fn deps(target: &Path) -> Outputs {
    let profiles = fs::read_dir(target)
        .must(target.display())
        .flatten()
        .map(|entry| entry.path());
    let mut all = BTreeMap::new();
    for dir in profiles
        .map(|profile| profile.join("deps"))
        .filter(|deps| deps.is_dir())
    {
        let prefix = dir
            .strip_prefix(target)
            .must("deps lies in the target")
            .to_owned();
        let outputs = Tree::of(&dir).outputs();
        all.extend(
            outputs
                .into_iter()
                .map(|(name, output)| (prefix.join(name), output)),
        );
    }
    assert!(
        !all.is_empty(),
        "no file in any deps directory of {}",
        target.display()
    );
    all
}

/// Like [`deps`], for a comparison with another run of the compiler.
///
/// rustc compiling incrementally names the objects in an rlib after the run: two runs at the same
/// path differ in those names and in nothing else. They are left out of the hash of an rlib.
#[track_caller]
pub fn deps_of_any_run(target: &Path) -> Outputs {
    let mut all = deps(target);
    for (name, (_, hash, _)) in &mut all {
        if name
            .extension()
            .is_some_and(|extension| extension == "rlib")
        {
            *hash = archive_hash(&target.join(name));
        }
    }
    all
}

/// The test fails, naming the files, unless two sets of outputs are byte for byte the same.
#[track_caller]
pub fn assert_same_outputs(one: &Outputs, other: &Outputs, what: &str) {
    let names: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let differing: Vec<_> = names
        .into_iter()
        .filter(|name| one.get(*name) != other.get(*name))
        .map(|name| {
            format!(
                "{}: {:?} / {:?}",
                name.display(),
                one.get(name),
                other.get(name)
            )
        })
        .collect();
    assert!(
        differing.is_empty(),
        "{what}: {} of {} files differ (length, hash, mode):\n{}",
        differing.len(),
        one.len(),
        differing.join("\n")
    );
}

/// All names below `root`, parents first, sorted.
#[track_caller]
pub fn walk(root: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).must(dir.display()) {
            let entry = entry.must(dir.display());
            if entry.file_type().must(entry.path().display()).is_dir() {
                pending.push(entry.path());
            }
            all.push(entry.path());
        }
    }
    all.sort();
    all
}

/// The regular files below `root`.
#[track_caller]
pub fn files(root: &Path) -> Vec<PathBuf> {
    walk(root)
        .into_iter()
        .filter(|path| !path.is_symlink() && path.is_file())
        .collect()
}

/// The files below `root` that hold `needle`.
#[track_caller]
pub fn files_holding(root: &Path, needle: &Path) -> Vec<PathBuf> {
    let needle = needle.as_os_str().as_encoded_bytes();
    let holds = |path: &PathBuf| contains(&fs::read(path).must(path.display()), needle);
    files(root).into_iter().filter(holds).collect()
}

/// Whether `needle` is somewhere in `haystack`.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|&byte| byte == first) {
        rest = &rest[at..];
        if rest.starts_with(needle) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// Copies a directory of plain files and directories, except what `skip` names at the top.
#[track_caller]
pub fn copy(from: &Path, to: &Path, skip: &[&str]) {
    fs::create_dir_all(to).must(to.display());
    for path in walk(from) {
        let name = path.strip_prefix(from).must("a name below the root");
        if skip.iter().any(|top| name.starts_with(top)) {
            continue;
        }
        if path.is_dir() {
            fs::create_dir_all(to.join(name)).must(name.display());
        } else {
            fs::copy(&path, to.join(name)).must(name.display());
        }
    }
}

/// The sum of the sizes of all files below `root`.
#[track_caller]
pub fn total_size(root: &Path) -> u64 {
    files(root)
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|meta| meta.len())
        .sum()
}

/// Whether a name lies in the session of a compiler: `incremental/<crate>/<session>`.
fn is_session(name: &Path) -> bool {
    let mut below = name.iter().skip_while(|part| *part != "incremental");
    below.nth(2).is_some()
}

#[track_caller]
fn archive_hash(path: &Path) -> u64 {
    let bytes = fs::read(path).must(path.display());
    archive::digest(&bytes).must(format!("{} is an archive", path.display()))
}

/// What cargo keeps of a compiler's dep-info: `.fingerprint/<unit>/dep-<kind>-<name>`.
fn is_dep_info(name: &Path) -> bool {
    let is_fingerprint = name.iter().any(|part| part == ".fingerprint");
    let file = name.file_name().and_then(|file| file.to_str());
    is_fingerprint && file.is_some_and(|file| file.starts_with("dep-"))
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn digest(path: &Path) -> (u64, u64) {
    let mut file = File::open(path).must(path.display());
    // Good enough to tell two builds apart; nothing here defends against an attacker.
    let mut hasher = std::hash::DefaultHasher::new();
    let (mut buffer, mut length) = (vec![0; 256 * 1024], 0);
    loop {
        let count = file.read(&mut buffer).must(path.display());
        if count == 0 {
            return (length, hasher.finish());
        }
        hasher.write(&buffer[..count]);
        length += count as u64;
    }
}
