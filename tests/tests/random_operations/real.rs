//! The operations on a real directory, by system calls.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use harness::Must;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, RenameFlags};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, lseek};

use crate::operation::{NAMES, Op, Picture, Piece, Row, SLOTS, Seen, Time, Value};

/// Times of an inode, for comparing their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub i64, pub i64);

/// A directory and the files open in it.
pub struct Real {
    root: PathBuf,
    files: [Option<File>; SLOTS],
}

fn errno(error: &std::io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::UnknownErrno, Errno::from_raw)
}

fn row(meta: &fs::Metadata) -> Row {
    Row {
        mode: meta.mode(),
        links: meta.nlink(),
        size: if meta.is_dir() { 0 } else { meta.size() },
        uid: meta.uid(),
        gid: meta.gid(),
    }
}

fn spec(time: Time) -> TimeSpec {
    match time {
        Time::Omit => TimeSpec::UTIME_OMIT,
        Time::Now => TimeSpec::UTIME_NOW,
        Time::At(secs, nanos) => TimeSpec::new(secs, nanos),
    }
}

fn permissions(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode)
}

impl Real {
    /// Makes the directory.
    pub fn new(root: PathBuf) -> Self {
        fs::create_dir(&root).must(root.display());
        // Whatever the umask of the caller: the model knows one.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).must("chmod");
        Self::at(root)
    }

    /// A directory that is there.
    pub fn at(root: PathBuf) -> Self {
        Self {
            root,
            files: Default::default(),
        }
    }

    fn path(&self, place: &[usize]) -> PathBuf {
        place
            .iter()
            .fold(self.root.clone(), |path, name| path.join(NAMES[*name]))
    }

    fn file(&self, slot: usize) -> Result<&File, Errno> {
        self.files[slot].as_ref().ok_or(Errno::EBADF)
    }

    /// Does it.
    pub fn apply(&mut self, op: &Op) -> Seen {
        match op {
            Op::Open(slot, place, open, mode) => {
                let flags = OFlag::from_bits_retain(open.0) | OFlag::O_CLOEXEC;
                let opened = nix::fcntl::open(&self.path(place), flags, permissions(*mode))?;
                self.files[*slot] = Some(File::from(opened));
                Ok(Value::Done)
            }
            Op::Close(slot) => {
                let open = self.files[*slot].take();
                open.map(|_| Value::Done).ok_or(Errno::EBADF)
            }
            Op::Truncate(place, size) => {
                nix::unistd::truncate(&self.path(place), i64::from(*size))?;
                Ok(Value::Done)
            }
            Op::Stat(place) => fs::symlink_metadata(self.path(place))
                .map(|meta| Value::Row(row(&meta)))
                .map_err(|e| errno(&e)),
            Op::List(place) => list(&self.path(place)),
            Op::ReadLink(place) => fs::read_link(self.path(place))
                .map(|target| Value::Target(target.to_string_lossy().into_owned()))
                .map_err(|e| errno(&e)),
            Op::Write(..)
            | Op::WriteAt(..)
            | Op::Read(..)
            | Op::ReadAt(..)
            | Op::Seek(..)
            | Op::SeekData(..)
            | Op::SeekHole(..)
            | Op::TruncateOpen(..)
            | Op::Allocate(..)
            | Op::CopyRange(..)
            | Op::MapWrite(..)
            | Op::StatOpen(..)
            | Op::ChmodOpen(..)
            | Op::Fsync(..) => self.apply_open(op),
            _ => self.apply_name(op).map(|()| Value::Done),
        }
    }

    fn apply_open(&self, op: &Op) -> Seen {
        match op {
            Op::Write(slot, piece) => {
                let bytes = vec![piece.byte; piece.length as usize];
                Ok(Value::Count(nix::unistd::write(self.file(*slot)?, &bytes)?))
            }
            Op::WriteAt(slot, at, piece) => {
                let bytes = vec![piece.byte; piece.length as usize];
                let written = self.file(*slot)?.write_at(&bytes, u64::from(*at));
                written.map(Value::Count).map_err(|e| errno(&e))
            }
            Op::Read(slot, length) => {
                let mut bytes = vec![0; *length as usize];
                let read = nix::unistd::read(self.file(*slot)?, &mut bytes)?;
                bytes.truncate(read);
                Ok(Value::Bytes(bytes))
            }
            Op::ReadAt(slot, at, length) => read_at(self.file(*slot)?, *at, *length as usize),
            Op::Seek(slot, at) => {
                lseek(self.file(*slot)?, i64::from(*at), Whence::SeekSet)?;
                Ok(Value::Done)
            }
            Op::SeekData(slot, at) => seek(self.file(*slot)?, *at, Whence::SeekData),
            Op::SeekHole(slot, at) => seek(self.file(*slot)?, *at, Whence::SeekHole),
            Op::TruncateOpen(slot, size) => {
                nix::unistd::ftruncate(self.file(*slot)?, i64::from(*size))?;
                Ok(Value::Done)
            }
            Op::Allocate(slot, mode, at, length) => {
                let mode = FallocateFlags::from_bits_retain(*mode);
                let (at, length) = (i64::from(*at), i64::from(*length));
                nix::fcntl::fallocate(self.file(*slot)?, mode, at, length)?;
                Ok(Value::Done)
            }
            Op::CopyRange(from, read_at, to, write_at, length) => {
                let (mut read_at, mut write_at) = (i64::from(*read_at), i64::from(*write_at));
                let copied = nix::fcntl::copy_file_range(
                    self.file(*from)?,
                    Some(&mut read_at),
                    self.file(*to)?,
                    Some(&mut write_at),
                    *length as usize,
                )?;
                Ok(Value::Count(copied))
            }
            Op::MapWrite(slot, at, piece, sync) => {
                map_write(self.file(*slot)?, *at as usize, *piece, *sync)
            }
            Op::StatOpen(slot) => {
                let meta = self.file(*slot)?.metadata().map_err(|e| errno(&e))?;
                Ok(Value::Row(row(&meta)))
            }
            Op::ChmodOpen(slot, mode) => {
                nix::sys::stat::fchmod(self.file(*slot)?, permissions(*mode))?;
                Ok(Value::Done)
            }
            Op::Fsync(slot) => {
                nix::unistd::fsync(self.file(*slot)?)?;
                Ok(Value::Done)
            }
            _ => unreachable!("only operations on descriptors come here"),
        }
    }

    fn apply_name(&self, op: &Op) -> Result<(), Errno> {
        match op {
            Op::Mkdir(place, mode) => nix::unistd::mkdir(&self.path(place), permissions(*mode)),
            Op::Rmdir(place) => fs::remove_dir(self.path(place)).map_err(|e| errno(&e)),
            Op::Unlink(place) => nix::unistd::unlink(&self.path(place)),
            Op::Link(from, to) => {
                let (from, to) = (self.path(from), self.path(to));
                nix::unistd::linkat(AT_FDCWD, &from, AT_FDCWD, &to, AtFlags::empty())
            }
            Op::Symlink(place, target) => symlink(target, self.path(place)).map_err(|e| errno(&e)),
            Op::Mkfifo(place, mode) => nix::unistd::mkfifo(&self.path(place), permissions(*mode)),
            Op::Rename(from, to, flags) => {
                let flags = RenameFlags::from_bits_retain(*flags);
                let (from, to) = (self.path(from), self.path(to));
                nix::fcntl::renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags)
            }
            Op::Chmod(place, mode) => {
                let mode = fs::Permissions::from_mode(*mode);
                fs::set_permissions(self.path(place), mode).map_err(|e| errno(&e))
            }
            Op::Chown(place, uid, gid) => {
                let (uid, gid) = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
                let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
                nix::unistd::fchownat(AT_FDCWD, &self.path(place), uid, gid, flags)
            }
            Op::SetTimes(place, atime, mtime) => {
                let flags = UtimensatFlags::NoFollowSymlink;
                utimensat(
                    AT_FDCWD,
                    &self.path(place),
                    &spec(*atime),
                    &spec(*mtime),
                    flags,
                )
            }
            _ => unreachable!("only operations on names come here"),
        }
    }

    /// Closes everything and takes a picture of the tree, and of the times of each inode.
    pub fn finish(&mut self) -> (Picture, BTreeMap<String, [Stamp; 2]>) {
        self.files = Default::default();
        self.picture()
    }

    /// The tree as it is.
    pub fn picture(&self) -> (Picture, BTreeMap<String, [Stamp; 2]>) {
        let (mut picture, mut times) = (Picture::new(), BTreeMap::new());
        for path in harness::tree::walk(&self.root) {
            let name = path.strip_prefix(&self.root).must("a name below the root");
            let name = name.to_string_lossy().into_owned();
            let meta = fs::symlink_metadata(&path).must(path.display());
            let stamps = [
                Stamp(meta.mtime(), meta.mtime_nsec()),
                Stamp(meta.ctime(), meta.ctime_nsec()),
            ];
            times.insert(name.clone(), stamps);
            let content = if meta.is_file() {
                fs::read(&path).must(path.display())
            } else if meta.is_symlink() {
                let target = fs::read_link(&path).must(path.display());
                target.as_os_str().as_bytes().to_vec()
            } else {
                Vec::new()
            };
            picture.insert(name, (row(&meta), content));
        }
        (picture, times)
    }

    /// Whether opening that path would wait for the other end of a pipe.
    pub fn is_fifo(&self, place: &[usize]) -> bool {
        fs::metadata(self.path(place)).is_ok_and(|meta| meta.file_type().is_fifo())
    }
}

fn list(path: &Path) -> Seen {
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(path).map_err(|e| errno(&e))? {
        names.push(entry.map_err(|e| errno(&e))?.file_name());
    }
    let mut names: Vec<String> = names
        .into_iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(Value::Names(names))
}

fn read_at(file: &File, at: u32, length: usize) -> Seen {
    let mut bytes = vec![0; length];
    let read = file
        .read_at(&mut bytes, u64::from(at))
        .map_err(|e| errno(&e))?;
    bytes.truncate(read);
    Ok(Value::Bytes(bytes))
}

/// Where a file system sees holes is its own affair; that nothing but zeros lies in them is not.
fn seek(file: &File, at: u32, whence: Whence) -> Seen {
    let position = lseek(file, 0, Whence::SeekCur)?;
    let found = lseek(file, i64::from(at), whence);
    lseek(file, position, Whence::SeekSet)?;
    let size = file.metadata().map_err(|e| errno(&e))?.len();
    if u64::from(at) >= size {
        return found.map(|_| Value::Done);
    }
    // A file that cannot be read is believed.
    let length = usize::try_from(size).must("small");
    let Ok(Value::Bytes(bytes)) = read_at(file, 0, length) else {
        return Ok(Value::Done);
    };
    let zeros = |from: usize, to: usize| bytes[from..to].iter().all(|byte| *byte == 0);
    let from = at as usize;
    let (what, end) = match (whence, found) {
        // No data up to the end.
        (Whence::SeekData, Err(Errno::ENXIO)) => ("no data", bytes.len()),
        (Whence::SeekData, Ok(found)) => ("data", usize::try_from(found).must("an offset")),
        (_, Ok(found)) => {
            let found = usize::try_from(found).must("an offset");
            assert!(
                (from..=bytes.len()).contains(&found),
                "hole at {found} from {from}"
            );
            // At a hole everything up to the next data is zero.
            let next = lseek(file, i64::try_from(found).must("small"), Whence::SeekData);
            lseek(file, position, Whence::SeekSet)?;
            let end = next.map_or(bytes.len(), |next| usize::try_from(next).must("an offset"));
            assert!(zeros(found, end), "bytes in the hole {found}..{end}");
            return Ok(Value::Done);
        }
        (_, Err(error)) => return Err(error),
    };
    assert!(
        end >= from && end <= bytes.len() && zeros(from, end),
        "{what} at {end} from {from}"
    );
    Ok(Value::Done)
}

fn map_write(file: &File, at: usize, piece: Piece, sync: bool) -> Seen {
    let meta = file.metadata().map_err(|e| errno(&e))?;
    // Directories cannot be mapped, whatever size they show.
    let size = if meta.is_dir() { 1 } else { meta.len() };
    let size = usize::try_from(size).must("small");
    // Beyond the last page a mapping gives SIGBUS.
    let Some(length) = NonZeroUsize::new(size) else {
        return Ok(Value::Count(0));
    };
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of the whole file, which nobody shortens while it lives; it lies where
    // the kernel puts it and is used only below, within its length, before it is unmapped.
    let map = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }?;
    let from = at.min(size);
    let to = from.saturating_add(piece.length as usize).min(size);
    // SAFETY: `map` is a live, writable mapping of `size` bytes, aligned for bytes, and nothing
    // else refers to it while the slice lives.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.as_ptr().cast::<u8>(), size) };
    bytes[from..to].fill(piece.byte);
    if sync {
        // SAFETY: `map` and `size` are those of the mapping above.
        unsafe { msync(map, size, MsFlags::MS_SYNC) }?;
    }
    // SAFETY: the slice is not used after this.
    unsafe { munmap(map, size) }?;
    Ok(Value::Count(to - from))
}
