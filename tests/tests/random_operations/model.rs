//! The operations on a model in memory: what POSIX and Linux say must happen, for root with a umask
//! of 022. It knows no times.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::operation::{NAMES, Op, Open, Picture, Place, Row, SLOTS, Seen, Value};

const UMASK: u32 = 0o022;
const ROOT: usize = 0;
/// `MAXSYMLINKS`.
const LINKS_MAX: u32 = 40;
const NO_REPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

#[derive(Clone, Debug)]
enum Body {
    Dir {
        names: BTreeMap<&'static str, usize>,
        parent: usize,
    },
    File(Vec<u8>),
    Link(&'static str),
    Fifo,
}

#[derive(Clone, Debug)]
struct Inode {
    body: Body,
    perm: u32,
    uid: u32,
    gid: u32,
    links: u64,
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    inode: usize,
    flags: i32,
    position: usize,
}

impl Descriptor {
    fn reads(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_WRONLY
    }

    fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    fn appends(&self) -> bool {
        self.flags & libc::O_APPEND != 0
    }
}

/// What a path leads to.
struct Found {
    parent: usize,
    /// `None` when the path ends with the directory itself.
    name: Option<&'static str>,
    inode: Option<usize>,
}

/// The obvious implementation.
#[derive(Debug)]
pub struct Model {
    inodes: Vec<Inode>,
    files: [Option<Descriptor>; SLOTS],
}

/// The name as one of the few that there are; what symbolic links point to is added.
fn known(name: &str) -> &'static str {
    NAMES
        .into_iter()
        .find(|known| *known == name)
        .unwrap_or("nowhere")
}

impl Model {
    /// An empty directory.
    pub fn new() -> Self {
        let root = Inode {
            body: Body::Dir {
                names: BTreeMap::new(),
                parent: ROOT,
            },
            perm: 0o755,
            uid: 0,
            gid: 0,
            links: 2,
        };
        Self {
            inodes: vec![root],
            files: [None; SLOTS],
        }
    }

    fn names(&self, dir: usize) -> Result<&BTreeMap<&'static str, usize>, Errno> {
        match &self.inodes[dir].body {
            Body::Dir { names, .. } => Ok(names),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn names_mut(&mut self, dir: usize) -> &mut BTreeMap<&'static str, usize> {
        match &mut self.inodes[dir].body {
            Body::Dir { names, .. } => names,
            _ => unreachable!("the caller found a directory"),
        }
    }

    fn is_dir(&self, inode: usize) -> bool {
        matches!(self.inodes[inode].body, Body::Dir { .. })
    }

    fn walk(
        &self,
        from: usize,
        parts: &[&'static str],
        follow: bool,
        followed: &mut u32,
    ) -> Result<Found, Errno> {
        let mut at = from;
        for (index, part) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let names = self.names(at)?;
            let mut found = match *part {
                "." => Found {
                    parent: at,
                    name: None,
                    inode: Some(at),
                },
                name => Found {
                    parent: at,
                    name: Some(name),
                    inode: names.get(name).copied(),
                },
            };
            if let Some(inode) = found.inode
                && let Body::Link(target) = self.inodes[inode].body
                && (!last || follow)
            {
                *followed += 1;
                if *followed > LINKS_MAX {
                    return Err(Errno::ELOOP);
                }
                let parts: Vec<_> = target
                    .split('/')
                    .map(|part| if part == "." { "." } else { known(part) })
                    .collect();
                found = self.walk(at, &parts, true, followed)?;
            }
            if last {
                return Ok(found);
            }
            at = found.inode.ok_or(Errno::ENOENT)?;
        }
        unreachable!("places are not empty")
    }

    fn find(&self, place: &Place, follow: bool) -> Result<Found, Errno> {
        let parts: Vec<_> = place.iter().map(|name| NAMES[*name]).collect();
        self.walk(ROOT, &parts, follow, &mut 0)
    }

    fn existing(&self, place: &Place, follow: bool) -> Result<usize, Errno> {
        self.find(place, follow)?.inode.ok_or(Errno::ENOENT)
    }

    /// The directory and the name where something new goes.
    fn vacant(&self, place: &Place) -> Result<(usize, &'static str), Errno> {
        let found = self.find(place, false)?;
        match (found.inode, found.name) {
            (None, Some(name)) => Ok((found.parent, name)),
            _ => Err(Errno::EEXIST),
        }
    }

    fn add(&mut self, parent: usize, name: &'static str, body: Body, mode: u32) -> usize {
        let directory = matches!(body, Body::Dir { .. });
        let (mut perm, mut gid) = (mode, 0);
        if self.inodes[parent].perm & libc::S_ISGID != 0 {
            gid = self.inodes[parent].gid;
            if directory {
                perm |= libc::S_ISGID;
            }
        }
        self.inodes.push(Inode {
            body,
            perm,
            uid: 0,
            gid,
            links: 1 + u64::from(directory),
        });
        self.inodes[parent].links += u64::from(directory);
        let new = self.inodes.len() - 1;
        self.names_mut(parent).insert(name, new);
        new
    }

    fn drop_name(&mut self, parent: usize, name: &'static str, inode: usize) {
        self.names_mut(parent).remove(name);
        if self.is_dir(inode) {
            self.inodes[inode].links = 0;
            self.inodes[parent].links -= 1;
        } else {
            self.inodes[inode].links -= 1;
        }
    }

    fn row(&self, inode: usize) -> Row {
        let node = &self.inodes[inode];
        let (kind, size) = match &node.body {
            Body::Dir { .. } => (libc::S_IFDIR, 0),
            Body::File(bytes) => (libc::S_IFREG, bytes.len()),
            Body::Link(target) => (libc::S_IFLNK, target.len()),
            Body::Fifo => (libc::S_IFIFO, 0),
        };
        Row {
            mode: kind | node.perm,
            links: node.links,
            size: size as u64,
            uid: node.uid,
            gid: node.gid,
        }
    }

    fn open(&mut self, slot: usize, place: &Place, open: Open, mode: u32) -> Result<(), Errno> {
        let flag = |flag| open.0 & flag == flag;
        let exclusive = flag(libc::O_CREAT | libc::O_EXCL);
        let follow = !flag(libc::O_NOFOLLOW) && !exclusive;
        let found = self.find(place, follow)?;
        let inode = match found.inode {
            Some(_) if exclusive => return Err(Errno::EEXIST),
            Some(inode) => inode,
            None if !flag(libc::O_CREAT) => return Err(Errno::ENOENT),
            None => {
                let name = found.name.ok_or(Errno::EISDIR)?;
                self.add(found.parent, name, Body::File(Vec::new()), mode & !UMASK)
            }
        };
        let access = open.0 & libc::O_ACCMODE;
        let writes = access != libc::O_RDONLY || flag(libc::O_TRUNC);
        match &mut self.inodes[inode].body {
            Body::Link(_) => return Err(Errno::ELOOP),
            Body::Dir { .. } if writes || flag(libc::O_CREAT) => return Err(Errno::EISDIR),
            Body::Dir { .. } => {}
            _ if flag(libc::O_DIRECTORY) => return Err(Errno::ENOTDIR),
            Body::File(bytes) if flag(libc::O_TRUNC) => bytes.clear(),
            _ => {}
        }
        self.files[slot] = Some(Descriptor {
            inode,
            flags: open.0,
            position: 0,
        });
        Ok(())
    }

    fn descriptor(&self, slot: usize) -> Result<Descriptor, Errno> {
        self.files[slot].ok_or(Errno::EBADF)
    }

    fn bytes(&mut self, inode: usize) -> Result<&mut Vec<u8>, Errno> {
        match &mut self.inodes[inode].body {
            Body::File(bytes) => Ok(bytes),
            Body::Dir { .. } => Err(Errno::EISDIR),
            _ => Err(Errno::EINVAL),
        }
    }

    fn write(&mut self, slot: usize, at: Option<usize>, new: &[u8]) -> Seen {
        let file = self.descriptor(slot)?;
        if !file.writes() {
            return Err(Errno::EBADF);
        }
        let bytes = self.bytes(file.inode)?;
        let from = if file.appends() {
            bytes.len()
        } else {
            at.unwrap_or(file.position)
        };
        let end = from + new.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[from..end].copy_from_slice(new);
        if at.is_none()
            && let Some(file) = &mut self.files[slot]
        {
            file.position = end;
        }
        Ok(Value::Count(new.len()))
    }

    fn read(&mut self, slot: usize, at: Option<usize>, length: usize) -> Seen {
        let file = self.descriptor(slot)?;
        if !file.reads() {
            return Err(Errno::EBADF);
        }
        let bytes = self.bytes(file.inode)?;
        let from = at.unwrap_or(file.position).min(bytes.len());
        let end = (from + length).min(bytes.len());
        let read = bytes[from..end].to_vec();
        if at.is_none()
            && let Some(file) = &mut self.files[slot]
        {
            file.position += read.len();
        }
        Ok(Value::Bytes(read))
    }

    fn allocate(&mut self, slot: usize, mode: i32, at: usize, length: usize) -> Seen {
        let file = self.descriptor(slot)?;
        let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let punch = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
        if punch && !keep {
            return Err(Errno::EOPNOTSUPP);
        }
        if !file.writes() {
            return Err(Errno::EBADF);
        }
        let bytes = self.bytes(file.inode)?;
        let end = at + length;
        if punch || mode & libc::FALLOC_FL_ZERO_RANGE != 0 {
            let (from, to) = (at.min(bytes.len()), end.min(bytes.len()));
            bytes[from..to].fill(0);
        }
        if !keep && bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(Value::Done)
    }

    fn copy(&mut self, from: (usize, usize), to: (usize, usize), length: usize) -> Seen {
        let (source, target) = (self.descriptor(from.0)?, self.descriptor(to.0)?);
        if self.is_dir(source.inode) || self.is_dir(target.inode) {
            return Err(Errno::EISDIR);
        }
        if !source.reads() || !target.writes() || target.appends() {
            return Err(Errno::EBADF);
        }
        let bytes = self.bytes(source.inode)?;
        let start = from.1.min(bytes.len());
        let copied = bytes[start..(start + length).min(bytes.len())].to_vec();
        let count = copied.len();
        let meet = to.1 + count > from.1 && to.1 < from.1 + count;
        if source.inode == target.inode && meet {
            return Err(Errno::EINVAL);
        }
        if count > 0 {
            let bytes = self.bytes(target.inode)?;
            if bytes.len() < to.1 + count {
                bytes.resize(to.1 + count, 0);
            }
            bytes[to.1..to.1 + count].copy_from_slice(&copied);
        }
        Ok(Value::Count(count))
    }

    fn map_write(&mut self, slot: usize, at: usize, length: usize, byte: u8) -> Seen {
        let file = self.descriptor(slot)?;
        if self.is_dir(file.inode) {
            return Err(Errno::EACCES);
        }
        let bytes = self.bytes(file.inode)?;
        let (from, to) = (at.min(bytes.len()), (at + length).min(bytes.len()));
        if !bytes.is_empty() {
            if !file.writes() || !file.reads() {
                return Err(Errno::EACCES);
            }
            self.bytes(file.inode)?[from..to].fill(byte);
        }
        Ok(Value::Count(to - from))
    }

    /// Whether `outer` is `inner` or holds it, directly or not.
    fn holds(&self, outer: usize, mut inner: usize) -> bool {
        loop {
            if inner == outer {
                return true;
            }
            match self.inodes[inner].body {
                Body::Dir { parent, .. } if inner != ROOT => inner = parent,
                _ => return false,
            }
        }
    }

    fn rename(&mut self, from: &Place, to: &Place, flags: u32) -> Result<(), Errno> {
        if flags == NO_REPLACE | EXCHANGE {
            return Err(Errno::EINVAL);
        }
        let (source, target) = (self.find(from, false)?, self.find(to, false)?);
        let (Some(from_name), Some(to_name)) = (source.name, target.name) else {
            unreachable!("names are not dots");
        };
        let (from_parent, to_parent) = (source.parent, target.parent);
        let moved = source.inode.ok_or(Errno::ENOENT)?;
        match target.inode {
            Some(_) if flags == NO_REPLACE => return Err(Errno::EEXIST),
            None if flags == EXCHANGE => return Err(Errno::ENOENT),
            _ => {}
        }
        if self.holds(moved, to_parent) {
            return Err(Errno::EINVAL);
        }
        if let Some(there) = target.inode {
            if self.holds(there, from_parent) {
                let exchange = flags == EXCHANGE;
                return Err(if exchange {
                    Errno::EINVAL
                } else {
                    Errno::ENOTEMPTY
                });
            }
            if there == moved {
                return Ok(());
            }
            if flags == EXCHANGE {
                self.put(from_parent, from_name, there);
                self.put(to_parent, to_name, moved);
                let [gone, come] = [moved, there].map(|inode| u64::from(self.is_dir(inode)));
                self.inodes[from_parent].links = self.inodes[from_parent].links + come - gone;
                self.inodes[to_parent].links = self.inodes[to_parent].links + gone - come;
                return Ok(());
            }
            match (self.is_dir(moved), self.is_dir(there)) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                (true, true) if !self.names(there)?.is_empty() => return Err(Errno::ENOTEMPTY),
                _ => {}
            }
            self.drop_name(to_parent, to_name, there);
        }
        let is_dir = u64::from(self.is_dir(moved));
        self.names_mut(from_parent).remove(from_name);
        self.put(to_parent, to_name, moved);
        self.inodes[from_parent].links -= is_dir;
        self.inodes[to_parent].links += is_dir;
        Ok(())
    }

    fn put(&mut self, dir: usize, name: &'static str, inode: usize) {
        self.names_mut(dir).insert(name, inode);
        if let Body::Dir { parent, .. } = &mut self.inodes[inode].body {
            *parent = dir;
        }
    }

    fn chown(&mut self, inode: usize, uid: u32, gid: u32) {
        let is_dir = self.is_dir(inode);
        let node = &mut self.inodes[inode];
        (node.uid, node.gid) = (uid, gid);
        if !is_dir {
            node.perm &= !libc::S_ISUID;
            if node.perm & libc::S_IXGRP != 0 {
                node.perm &= !libc::S_ISGID;
            }
        }
    }

    /// Does it.
    pub fn apply(&mut self, op: &Op) -> Seen {
        match op {
            Op::Open(slot, place, open, mode) => {
                self.open(*slot, place, *open, *mode)?;
            }
            Op::Close(slot) => drop(self.files[*slot].take().ok_or(Errno::EBADF)?),
            Op::Write(slot, piece) => {
                return self.write(*slot, None, &vec![piece.byte; piece.length as usize]);
            }
            Op::WriteAt(slot, at, piece) => {
                let bytes = vec![piece.byte; piece.length as usize];
                return self.write(*slot, Some(*at as usize), &bytes);
            }
            Op::Read(slot, length) => return self.read(*slot, None, *length as usize),
            Op::ReadAt(slot, at, length) => {
                return self.read(*slot, Some(*at as usize), *length as usize);
            }
            Op::Seek(slot, at) => {
                let file = self.files[*slot].as_mut().ok_or(Errno::EBADF)?;
                file.position = *at as usize;
            }
            Op::SeekData(slot, at) | Op::SeekHole(slot, at) => {
                let file = self.descriptor(*slot)?;
                if *at as usize >= self.bytes(file.inode)?.len() {
                    return Err(Errno::ENXIO);
                }
            }
            Op::TruncateOpen(slot, size) => {
                let file = self.descriptor(*slot)?;
                if !file.writes() {
                    return Err(Errno::EINVAL);
                }
                self.bytes(file.inode)?.resize(*size as usize, 0);
            }
            Op::Truncate(place, size) => {
                let inode = self.existing(place, true)?;
                self.bytes(inode)?.resize(*size as usize, 0);
            }
            Op::Allocate(slot, mode, at, length) => {
                return self.allocate(*slot, *mode, *at as usize, *length as usize);
            }
            Op::CopyRange(from, read_at, to, write_at, length) => {
                let (from, to) = ((*from, *read_at as usize), (*to, *write_at as usize));
                return self.copy(from, to, *length as usize);
            }
            Op::MapWrite(slot, at, piece, _) => {
                return self.map_write(*slot, *at as usize, piece.length as usize, piece.byte);
            }
            Op::StatOpen(slot) => {
                return Ok(Value::Row(self.row(self.descriptor(*slot)?.inode)));
            }
            Op::ChmodOpen(slot, mode) => {
                let inode = self.descriptor(*slot)?.inode;
                self.inodes[inode].perm = *mode;
            }
            Op::Fsync(slot) => drop(self.descriptor(*slot)?),
            _ => return self.apply_name(op),
        }
        Ok(Value::Done)
    }

    fn apply_name(&mut self, op: &Op) -> Seen {
        match op {
            Op::Stat(place) => return Ok(Value::Row(self.row(self.existing(place, false)?))),
            Op::List(place) => {
                let names = self.names(self.existing(place, true)?)?;
                return Ok(Value::Names(
                    names.keys().map(|name| (*name).to_owned()).collect(),
                ));
            }
            Op::ReadLink(place) => {
                return match self.inodes[self.existing(place, false)?].body {
                    Body::Link(target) => Ok(Value::Target(target.to_owned())),
                    _ => Err(Errno::EINVAL),
                };
            }
            Op::Mkdir(place, mode) => {
                let (parent, name) = self.vacant(place)?;
                let body = Body::Dir {
                    names: BTreeMap::new(),
                    parent,
                };
                self.add(parent, name, body, mode & 0o1777 & !UMASK);
            }
            Op::Rmdir(place) | Op::Unlink(place) => {
                let found = self.find(place, false)?;
                let (Some(inode), Some(name)) = (found.inode, found.name) else {
                    return Err(Errno::ENOENT);
                };
                let rmdir = matches!(op, Op::Rmdir(_));
                match (rmdir, self.is_dir(inode)) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    (true, true) if !self.names(inode)?.is_empty() => return Err(Errno::ENOTEMPTY),
                    _ => self.drop_name(found.parent, name, inode),
                }
            }
            Op::Link(from, to) => {
                let inode = self.existing(from, false)?;
                let (parent, name) = self.vacant(to)?;
                if self.is_dir(inode) {
                    return Err(Errno::EPERM);
                }
                self.inodes[inode].links += 1;
                self.names_mut(parent).insert(name, inode);
            }
            Op::Symlink(place, target) => {
                let (parent, name) = self.vacant(place)?;
                self.add(parent, name, Body::Link(target), 0o777);
            }
            Op::Mkfifo(place, mode) => {
                let (parent, name) = self.vacant(place)?;
                self.add(parent, name, Body::Fifo, mode & !UMASK);
            }
            Op::Rename(from, to, flags) => self.rename(from, to, *flags)?,
            Op::Chmod(place, mode) => {
                let inode = self.existing(place, true)?;
                self.inodes[inode].perm = *mode;
            }
            Op::Chown(place, uid, gid) => {
                let inode = self.existing(place, false)?;
                self.chown(inode, *uid, *gid);
            }
            Op::SetTimes(_, crate::operation::Time::Omit, crate::operation::Time::Omit) => {}
            Op::SetTimes(place, ..) => drop(self.existing(place, false)?),
            _ => unreachable!("only operations on names come here"),
        }
        Ok(Value::Done)
    }

    /// Whether a slot holds an open directory, for which data and holes mean nothing.
    pub fn holds_directory(&self, slot: usize) -> bool {
        self.files[slot].is_some_and(|file| self.is_dir(file.inode))
    }

    /// The whole tree.
    pub fn picture(&self) -> Picture {
        let mut picture = Picture::new();
        let mut open = vec![(String::new(), ROOT)];
        while let Some((path, inode)) = open.pop() {
            let content = match &self.inodes[inode].body {
                Body::Dir { names, .. } => {
                    let prefix = if path.is_empty() {
                        path.clone()
                    } else {
                        format!("{path}/")
                    };
                    open.extend(
                        names
                            .iter()
                            .map(|(name, at)| (format!("{prefix}{name}"), *at)),
                    );
                    Vec::new()
                }
                Body::File(bytes) => bytes.clone(),
                Body::Link(target) => target.as_bytes().to_vec(),
                Body::Fifo => Vec::new(),
            };
            if inode != ROOT {
                picture.insert(path, (self.row(inode), content));
            }
        }
        picture
    }
}
