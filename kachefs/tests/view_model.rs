//! Random operations on a view and on a model of it, without a mount: same results, same tree,
//! and the same tree again after the view is loaded from the index.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use kachefs::fs::data::Changes;
use kachefs::fs::names::{NewNode, RenameMode};
use kachefs::fs::outputs::Bound;
use kachefs::fs::{Body, Caller, Errno, FsResult, View};
use kachefs::storage::Storage;
use proptest::prelude::*;
use store::{ActionKey, Digest, Ino, Kind, StoreDir, ViewId};

const CALLER: Caller = Caller { uid: 1, gid: 2 };

/// Directories and names to choose from: few, so that operations meet.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Clone, Debug)]
enum Op {
    Create(Place),
    Mkdir(Place),
    Symlink(Place),
    Link(Place, Place),
    Unlink(Place),
    Rmdir(Place),
    Rename(Place, Place, u8),
    Write(Place, u32, Vec<u8>),
    Truncate(Place, u32),
    Bind(Place, Vec<u8>),
    Ingest(Place),
    /// Time passes: bytes of small files are left to the index.
    Rest,
}

/// A path of up to three names.
type Place = Vec<usize>;

/// What a name in the model names.
#[derive(Clone, Debug, PartialEq)]
enum Inode {
    Dir(BTreeMap<&'static str, usize>),
    File(Vec<u8>),
    Link,
}

/// The obvious implementation.
#[derive(Clone, Debug)]
struct Model {
    inodes: Vec<Inode>,
}

impl Model {
    fn find(&self, path: &[usize]) -> FsResult<usize> {
        path.iter().try_fold(0, |at, name| match &self.inodes[at] {
            Inode::Dir(names) => names.get(NAMES[*name]).copied().ok_or(Errno::ENOENT),
            _ => Err(Errno::ENOTDIR),
        })
    }

    fn parent(&self, place: &Place) -> FsResult<(usize, &'static str)> {
        let (name, parents) = place.split_last().expect("places are not empty");
        let at = self.find(parents)?;
        match self.inodes[at] {
            Inode::Dir(_) => Ok((at, NAMES[*name])),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn names(&mut self, at: usize) -> &mut BTreeMap<&'static str, usize> {
        match &mut self.inodes[at] {
            Inode::Dir(names) => names,
            _ => unreachable!("only directories are asked for names"),
        }
    }

    fn add(&mut self, place: &Place, inode: Inode) -> FsResult<()> {
        let (parent, name) = self.parent(place)?;
        if self.names(parent).contains_key(name) {
            return Err(Errno::EEXIST);
        }
        self.inodes.push(inode);
        let new = self.inodes.len() - 1;
        self.names(parent).insert(name, new);
        Ok(())
    }

    fn file(&mut self, place: &Place) -> FsResult<&mut Vec<u8>> {
        let at = self.find(place)?;
        match &mut self.inodes[at] {
            Inode::File(bytes) => Ok(bytes),
            Inode::Dir(_) => Err(Errno::EISDIR),
            Inode::Link => Err(Errno::ENXIO),
        }
    }

    fn remove(&mut self, place: &Place, directory: bool) -> FsResult<()> {
        let (parent, name) = self.parent(place)?;
        let at = *self.names(parent).get(name).ok_or(Errno::ENOENT)?;
        match &self.inodes[at] {
            Inode::Dir(_) if !directory => return Err(Errno::EISDIR),
            Inode::Dir(names) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
            Inode::File(_) | Inode::Link if directory => return Err(Errno::ENOTDIR),
            _ => {}
        }
        self.names(parent).remove(name);
        Ok(())
    }

    fn rename(&mut self, from: &Place, to: &Place, mode: u8) -> FsResult<()> {
        let (from_parent, from_name) = self.parent(from)?;
        let source = *self
            .names(from_parent)
            .get(from_name)
            .ok_or(Errno::ENOENT)?;
        let (to_parent, to_name) = self.parent(to)?;
        let target = self.names(to_parent).get(to_name).copied();
        match (mode, target) {
            (1, Some(_)) => return Err(Errno::EEXIST),
            (2, None) => return Err(Errno::ENOENT),
            (_, Some(target)) if target == source => return Ok(()),
            _ => {}
        }
        if mode == 2 {
            self.names(from_parent)
                .insert(from_name, target.expect("checked"));
            self.names(to_parent).insert(to_name, source);
            return Ok(());
        }
        let source_is_dir = matches!(self.inodes[source], Inode::Dir(_));
        match target.map(|target| &self.inodes[target]) {
            Some(Inode::Dir(_)) if !source_is_dir => return Err(Errno::EISDIR),
            Some(Inode::Dir(names)) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
            Some(Inode::File(_) | Inode::Link) if source_is_dir => return Err(Errno::ENOTDIR),
            _ => {}
        }
        self.names(from_parent).remove(from_name);
        self.names(to_parent).insert(to_name, source);
        Ok(())
    }

    fn apply(&mut self, op: &Op) -> FsResult<()> {
        match op {
            Op::Create(place) => self.add(place, Inode::File(Vec::new())),
            Op::Mkdir(place) => self.add(place, Inode::Dir(BTreeMap::new())),
            Op::Symlink(place) => self.add(place, Inode::Link),
            Op::Link(from, to) => {
                let at = self.find(from)?;
                if matches!(self.inodes[at], Inode::Dir(_)) {
                    return Err(Errno::EPERM);
                }
                let (parent, name) = self.parent(to)?;
                if self.names(parent).contains_key(name) {
                    return Err(Errno::EEXIST);
                }
                self.names(parent).insert(name, at);
                Ok(())
            }
            Op::Unlink(place) => self.remove(place, false),
            Op::Rmdir(place) => self.remove(place, true),
            Op::Rename(from, to, mode) => self.rename(from, to, *mode),
            Op::Write(place, at, data) => {
                let bytes = self.file(place)?;
                let end = *at as usize + data.len();
                if !data.is_empty() && bytes.len() < end {
                    bytes.resize(end, 0);
                }
                if !data.is_empty() {
                    bytes[*at as usize..end].copy_from_slice(data);
                }
                Ok(())
            }
            Op::Truncate(place, size) => {
                self.file(place)?.resize(*size as usize, 0);
                Ok(())
            }
            Op::Bind(place, data) => {
                let (parent, name) = self.parent(place)?;
                if let Some(at) = self.names(parent).get(name).copied()
                    && matches!(self.inodes[at], Inode::Dir(_))
                {
                    return Err(Errno::EISDIR);
                }
                self.inodes.push(Inode::File(data.clone()));
                let new = self.inodes.len() - 1;
                self.names(parent).insert(name, new);
                Ok(())
            }
            Op::Ingest(place) => self.file(place).map(drop),
            Op::Rest => Ok(()),
        }
    }

    /// Path, content and number of names of everything.
    fn dump(&self) -> BTreeMap<String, (Inode, u32)> {
        let mut links = vec![0; self.inodes.len()];
        let mut rows = Vec::new();
        let mut open = vec![(String::new(), 0)];
        while let Some((path, at)) = open.pop() {
            if let Inode::Dir(names) = &self.inodes[at] {
                open.extend(
                    names
                        .iter()
                        .map(|(name, at)| (format!("{path}/{name}"), *at)),
                );
            }
            links[at] += 1;
            rows.push((path, at));
        }
        rows.into_iter()
            .map(|(path, at)| {
                let inode = self.inodes[at].clone();
                match inode {
                    Inode::Dir(names) => {
                        let subdirectories = names
                            .values()
                            .filter(|at| matches!(self.inodes[**at], Inode::Dir(_)))
                            .count();
                        let links = u32::try_from(subdirectories).expect("few") + 2;
                        (path, (Inode::Dir(BTreeMap::new()), links))
                    }
                    inode => (path, (inode, links[at])),
                }
            })
            .collect()
    }
}

struct Real<'a>(&'a View);

impl Real<'_> {
    fn find(&self, path: &[usize]) -> FsResult<Ino> {
        path.iter().try_fold(Ino::ROOT, |at, name| {
            self.0
                .child(at, NAMES[*name].as_bytes())
                .map(|node| node.ino)
        })
    }

    fn parent(&self, place: &Place) -> FsResult<(Ino, &'static [u8])> {
        let (name, parents) = place.split_last().expect("places are not empty");
        let at = self.find(parents)?;
        match self.0.node(at)?.kind {
            Kind::Dir => Ok((at, NAMES[*name].as_bytes())),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// What the kernel would do: only regular files are opened and written.
    fn with_file(&self, place: &Place, act: impl FnOnce(Ino) -> FsResult<()>) -> FsResult<()> {
        let ino = self.find(place)?;
        match self.0.node(ino)?.kind {
            Kind::File => act(ino),
            Kind::Dir => Err(Errno::EISDIR),
            _ => Err(Errno::ENXIO),
        }
    }

    fn apply(&self, op: &Op) -> FsResult<()> {
        match op {
            Op::Create(place) => {
                let (parent, name) = self.parent(place)?;
                let (node, _) = self
                    .0
                    .create_node(parent, name, NewNode::file(0o644), CALLER)?;
                self.0.forget(node.ino, 1);
                Ok(())
            }
            Op::Mkdir(place) => {
                let (parent, name) = self.parent(place)?;
                let made = self.0.mkdir(parent, name, 0o755, CALLER)?;
                self.0.forget(made.ino, 1);
                Ok(())
            }
            Op::Symlink(place) => {
                let (parent, name) = self.parent(place)?;
                let made = self.0.symlink(parent, name, b"target", CALLER)?;
                self.0.forget(made.ino, 1);
                Ok(())
            }
            Op::Link(from, to) => {
                let ino = self.find(from)?;
                // The kernel checks the source's kind before it looks at the new name.
                if self.0.node(ino)?.kind == Kind::Dir {
                    return Err(Errno::EPERM);
                }
                let (parent, name) = self.parent(to)?;
                self.0.link(ino, parent, name)?;
                self.0.forget(ino, 1);
                Ok(())
            }
            Op::Unlink(place) => {
                let (parent, name) = self.parent(place)?;
                self.0.unlink(parent, name)
            }
            Op::Rmdir(place) => {
                let (parent, name) = self.parent(place)?;
                self.0.rmdir(parent, name)
            }
            Op::Rename(from, to, mode) => {
                let from = self.parent(from)?;
                self.0.child(from.0, from.1)?;
                let to = self.parent(to)?;
                let mode = [
                    RenameMode::Replace,
                    RenameMode::NoReplace,
                    RenameMode::Exchange,
                ][*mode as usize];
                self.0.rename(from, to, mode, 0)
            }
            Op::Write(place, at, data) => {
                self.with_file(place, |ino| self.0.write(ino, u64::from(*at), data))
            }
            Op::Truncate(place, size) => self.with_file(place, |ino| {
                let size = Some(u64::from(*size));
                self.0
                    .setattr(
                        ino,
                        Changes {
                            size,
                            ..Changes::default()
                        },
                    )
                    .map(drop)
            }),
            Op::Bind(place, data) => {
                let (parent, name) = self.parent(place)?;
                let stored = self.0.storage.cas.ingest_bytes(data).expect("ingests");
                let body = Body::Blob {
                    digest: stored.digest,
                    size: stored.size,
                };
                let bound = Bound {
                    name: name.to_vec(),
                    perm: 0o644,
                    body,
                };
                let origin = ActionKey(Digest::of(b"action"));
                self.0
                    .bind(parent, vec![bound], Some(origin), CALLER, |_| ())
            }
            Op::Rest => {
                self.0.leave_small();
                Ok(())
            }
            Op::Ingest(place) => {
                let ino = self.find(place)?;
                match self.0.node(ino)?.kind {
                    Kind::File => {}
                    Kind::Dir => return Err(Errno::EISDIR),
                    _ => return Err(Errno::ENXIO),
                }
                let needles = store::scan::RootNeedles::new(&[]);
                let taken = self.0.ingest(&self.0.node(ino)?, &needles)?;
                assert_eq!(taken.digest, Digest::of(&self.read(ino)));
                Ok(())
            }
        }
    }

    fn read(&self, ino: Ino) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let read = self.0.read(ino, 0, &mut bytes).expect("reads");
        bytes.truncate(read);
        bytes
    }

    fn dump(&self) -> BTreeMap<String, (Inode, u32)> {
        let mut rows = BTreeMap::new();
        let mut open = vec![(String::new(), Ino::ROOT)];
        while let Some((path, ino)) = open.pop() {
            let entry = self.0.getattr(ino).expect("listed inodes exist");
            let inode = match entry.kind {
                Kind::Dir => {
                    for row in self.0.list(ino, 0, usize::MAX).expect("lists") {
                        let name = String::from_utf8_lossy(&row.name).into_owned();
                        open.push((format!("{path}/{name}"), row.ino));
                    }
                    Inode::Dir(BTreeMap::new())
                }
                Kind::File => {
                    let bytes = self.read(ino);
                    assert_eq!(bytes.len() as u64, entry.size, "{path}");
                    Inode::File(bytes)
                }
                _ => Inode::Link,
            };
            rows.insert(path, (inode, entry.attributes.nlink));
        }
        rows
    }
}

fn place() -> impl Strategy<Value = Place> {
    prop::collection::vec(0..NAMES.len(), 1..4)
}

/// Lengths around the inline limit.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        (any::<u8>(), 8_000_usize..20_000).prop_map(|(byte, length)| vec![byte; length]),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => place().prop_map(Op::Create),
        4 => place().prop_map(Op::Mkdir),
        1 => place().prop_map(Op::Symlink),
        2 => (place(), place()).prop_map(|(a, b)| Op::Link(a, b)),
        2 => place().prop_map(Op::Unlink),
        1 => place().prop_map(Op::Rmdir),
        4 => (place(), place(), 0..3_u8).prop_map(|(a, b, m)| Op::Rename(a, b, m)),
        4 => (place(), 0..10_000_u32, bytes()).prop_map(|(p, at, d)| Op::Write(p, at, d)),
        2 => (place(), 0..20_000_u32).prop_map(|(p, s)| Op::Truncate(p, s)),
        3 => (place(), bytes()).prop_map(|(p, d)| Op::Bind(p, d)),
        2 => place().prop_map(Op::Ingest),
        3 => Just(Op::Rest),
    ]
}

/// The kernel refuses these before any file system sees them.
fn never_asked(op: &Op) -> bool {
    let Op::Rename(from, to, _) = op else {
        return false;
    };
    let inside =
        |outer: &Place, inner: &Place| inner.len() > outer.len() && inner.starts_with(outer);
    inside(from, to) || inside(to, from)
}

fn storage() -> Arc<Storage> {
    static STORAGE: OnceLock<(tempfile::TempDir, Arc<Storage>)> = OnceLock::new();
    let (_, storage) = STORAGE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage = Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens");
        (dir, Arc::new(storage))
    });
    Arc::clone(storage)
}

fn next_view() -> ViewId {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(1);
    ViewId(NEXT.fetch_add(1, Ordering::Relaxed))
}

proptest! {
    #[test]
    fn view_equals_model(ops in prop::collection::vec(op(), 1..60)) {
        let storage = storage();
        let id = next_view();
        let view = View::create(Arc::clone(&storage), id, b"/nowhere".to_vec(), CALLER)
            .expect("creates");
        let mut model = Model { inodes: vec![Inode::Dir(BTreeMap::new())] };
        let real = Real(&view);
        for op in &ops {
            if never_asked(op) {
                continue;
            }
            prop_assert_eq!(real.apply(op), model.apply(op), "{:?}", op);
        }
        let expected = model.dump();
        prop_assert_eq!(&real.dump(), &expected);
        let (_, record) = storage
            .index
            .views()
            .expect("lists")
            .into_iter()
            .find(|(known, _)| *known == id)
            .expect("stored");
        let loaded = View::load(storage, id, record).expect("loads");
        prop_assert_eq!(&Real(&loaded).dump(), &expected);
    }
}
