//! Files made, changed, renamed, linked and removed in every way, with a model of what must be
//! there. Sizes lie around the border between what the index holds and what has a backing file.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use harness::{Chance, Must};
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

use crate::World;
use crate::watchdog::{CALLS, Hand};

/// Names there can be.
const NAMES: usize = 48;
/// Files up to this size live in the index of the store.
const BORDER: usize = 8192;
/// Operations between two looks at everything.
const BETWEEN_LOOKS: usize = 150;

/// What must be there.
struct Model {
    dir: PathBuf,
    /// Which file a name names.
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

/// Plays until the time is over.
pub fn play(world: &World, hand: &Hand, dir: &Path, chance: &mut Chance) {
    let mut model = Model {
        dir: dir.to_owned(),
        names: BTreeMap::new(),
        files: BTreeMap::new(),
        next: 0,
    };
    for part in ["a", "b"] {
        fs::create_dir_all(dir.join(part)).must("mkdir");
    }
    while !world.is_over() {
        for _ in 0..BETWEEN_LOOKS {
            let what = hand.during("one change of a file", CALLS, || model.change(chance));
            let path = model.dir.display();
            what.1
                .must(format!("{}: {} in {path}", hand.name(), what.0));
            world.did("changes of files");
        }
        hand.during("look at all files", CALLS, || model.look(chance));
        world.did("looks at all files");
    }
    hand.during("remove all files", CALLS, || {
        model.look(chance);
        fs::remove_dir_all(dir).must("remove");
    });
}

/// A size: mostly small, often about the border, now and then large.
fn size(chance: &mut Chance) -> usize {
    match chance.below(10) {
        0 => 0,
        1..4 => chance.below(300),
        4..7 => BORDER - 3 + chance.below(6),
        7..9 => chance.below(100_000),
        _ => chance.below(1_200_000),
    }
}

impl Model {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn any_name(chance: &mut Chance) -> String {
        let part = if chance.percent(50) { "a" } else { "b" };
        format!("{part}/file-{}", chance.below(NAMES / 2))
    }

    fn known(&self, chance: &mut Chance) -> Option<(String, u64)> {
        let at = chance.below(self.names.len().max(1));
        let (name, file) = self.names.iter().nth(at)?;
        Some((name.clone(), *file))
    }

    fn bytes(&mut self, file: u64) -> &mut Vec<u8> {
        self.files.get_mut(&file).must("a file of the model")
    }

    /// Takes a name away, and the file with the last of its names.
    fn unname(&mut self, name: &str) {
        if let Some(file) = self.names.remove(name)
            && !self.names.values().any(|other| *other == file)
        {
            self.files.remove(&file);
        }
    }

    fn create(&mut self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let path = self.path(name);
        let made = OpenOptions::new().write(true).create_new(true).open(path);
        if self.names.contains_key(name) {
            let error = made.err().must("O_EXCL on a name that is there");
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{name}");
            return Ok(());
        }
        made?.write_all_at(&bytes, 0)?;
        self.names.insert(name.to_owned(), self.next);
        self.files.insert(self.next, bytes);
        self.next += 1;
        Ok(())
    }

    /// One change, in the view and in the model.
    fn change(&mut self, chance: &mut Chance) -> (&'static str, io::Result<()>) {
        let count = size(chance);
        let Some((name, file)) = self.known(chance).filter(|_| !chance.percent(25)) else {
            let bytes = chance.bytes(count);
            return ("create", self.create(&Self::any_name(chance), bytes));
        };
        let path = self.path(&name);
        let other = Self::any_name(chance);
        match chance.below(10) {
            0 => (
                "write anew",
                self.write_anew(&path, file, chance.bytes(count)),
            ),
            1 | 2 => (
                "write",
                self.write(&path, file, &chance.bytes(count), chance),
            ),
            3 => ("truncate", self.truncate(&path, file, count)),
            4 => ("map", self.map(&path, file, chance)),
            5 => ("rename", self.rename(&name, file, &other)),
            6 => ("exchange", self.exchange(&name, file, &other)),
            7 => ("link", self.link(&name, file, &other)),
            8 => ("unlink", self.unlink(&name, file, chance)),
            _ => ("read", self.read(&path, file, chance)),
        }
    }

    fn write_anew(&mut self, path: &Path, file: u64, bytes: Vec<u8>) -> io::Result<()> {
        // Truncates what all the names of the file show.
        File::create(path)?.write_all_at(&bytes, 0)?;
        *self.bytes(file) = bytes;
        Ok(())
    }

    fn write(
        &mut self,
        path: &Path,
        file: u64,
        data: &[u8],
        chance: &mut Chance,
    ) -> io::Result<()> {
        let bytes = self.bytes(file);
        // Also behind the end, which leaves a hole.
        let behind = chance.below(9000);
        let at = chance.below(bytes.len() + 1 + behind);
        let handle = OpenOptions::new().write(true).open(path)?;
        handle.write_all_at(data, at as u64)?;
        if !data.is_empty() {
            bytes.resize(bytes.len().max(at + data.len()), 0);
            bytes[at..at + data.len()].copy_from_slice(data);
        }
        if chance.percent(5) {
            handle.sync_all()?;
        }
        Ok(())
    }

    fn truncate(&mut self, path: &Path, file: u64, size: usize) -> io::Result<()> {
        let handle = OpenOptions::new().write(true).open(path)?;
        handle.set_len(size as u64)?;
        self.bytes(file).resize(size, 0);
        Ok(())
    }

    fn map(&mut self, path: &Path, file: u64, chance: &mut Chance) -> io::Result<()> {
        let Some(length) = NonZeroUsize::new(self.bytes(file).len()) else {
            return Ok(());
        };
        let at = chance.below(length.get());
        let count = chance.below(length.get() - at).min(20_000);
        let data = chance.bytes(count);
        let handle = OpenOptions::new().read(true).write(true).open(path)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping of a file of this length, which only this thread knows and changes.
        let map = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &handle, 0) }?;
        // SAFETY: the range lies in the mapping, and nobody else has a reference to it.
        unsafe {
            let start = map.as_ptr().cast::<u8>().add(at);
            std::ptr::copy_nonoverlapping(data.as_ptr(), start, count);
        }
        let synced = if chance.percent(30) {
            // SAFETY: the mapping is there, and has this length.
            unsafe { msync(map, length.get(), MsFlags::MS_SYNC) }
        } else {
            Ok(())
        };
        // SAFETY: the mapping is there, and nothing refers to it any more.
        unsafe { munmap(map, length.get()) }?;
        synced?;
        self.bytes(file)[at..at + count].copy_from_slice(&data);
        Ok(())
    }

    fn rename(&mut self, name: &str, file: u64, other: &str) -> io::Result<()> {
        fs::rename(self.path(name), self.path(other))?;
        // Two names of one file: rename(2) does nothing.
        if self.names.get(other) != Some(&file) {
            self.unname(other);
            self.names.remove(name);
            self.names.insert(other.to_owned(), file);
        }
        Ok(())
    }

    fn exchange(&mut self, name: &str, file: u64, other: &str) -> io::Result<()> {
        let (from, to) = (self.path(name), self.path(other));
        let flags = RenameFlags::RENAME_EXCHANGE;
        let exchanged = renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags);
        let Some(theirs) = self.names.get(other).copied() else {
            assert_eq!(exchanged, Err(nix::errno::Errno::ENOENT), "{other}");
            return Ok(());
        };
        exchanged?;
        self.names.insert(name.to_owned(), theirs);
        self.names.insert(other.to_owned(), file);
        Ok(())
    }

    fn link(&mut self, name: &str, file: u64, other: &str) -> io::Result<()> {
        let linked = fs::hard_link(self.path(name), self.path(other));
        if self.names.contains_key(other) {
            let error = linked.err().must("a link over a name that is there");
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{other}");
            return Ok(());
        }
        linked?;
        self.names.insert(other.to_owned(), file);
        Ok(())
    }

    fn unlink(&mut self, name: &str, file: u64, chance: &mut Chance) -> io::Result<()> {
        let path = self.path(name);
        let open = File::open(&path)?;
        fs::remove_file(&path)?;
        // Whoever has it open still reads it.
        if chance.percent(50) {
            assert_same(&open, self.bytes(file), chance.percent(50), &path)?;
        }
        self.unname(name);
        let error = fs::symlink_metadata(&path).err().must("it is gone");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name}");
        Ok(())
    }

    fn read(&mut self, path: &Path, file: u64, chance: &mut Chance) -> io::Result<()> {
        let links = self.names.values().filter(|other| **other == file).count();
        let handle = File::open(path)?;
        assert_eq!(
            handle.metadata()?.nlink(),
            links as u64,
            "{}",
            path.display()
        );
        assert_same(&handle, self.bytes(file), chance.percent(50), path)
    }

    /// Everything is there, and nothing else.
    #[track_caller]
    fn look(&mut self, chance: &mut Chance) {
        let mut found = Vec::new();
        for part in ["a", "b"] {
            for entry in fs::read_dir(self.path(part)).must(part) {
                let name = entry.must(part).file_name();
                found.push(format!("{part}/{}", name.to_string_lossy()));
            }
        }
        found.sort();
        let expected: Vec<_> = self.names.keys().cloned().collect();
        assert_eq!(found, expected, "the names of {}", self.dir.display());
        for (name, file) in self.names.clone() {
            let path = self.path(&name);
            self.read(&path, file, chance).must(path.display());
        }
    }
}

/// The file holds these bytes; with `anew` asked of the daemon, not of the page cache.
#[track_caller]
fn assert_same(mut file: &File, expected: &[u8], anew: bool, path: &Path) -> io::Result<()> {
    if anew {
        posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    let mut bytes = Vec::with_capacity(expected.len());
    file.read_to_end(&mut bytes)?;
    let differs = bytes
        .iter()
        .zip(expected)
        .position(|(one, other)| one != other);
    assert!(
        bytes.len() == expected.len() && differs.is_none(),
        "{}: {} bytes, expected {}, the first that differs is {differs:?}",
        path.display(),
        bytes.len(),
        expected.len()
    );
    Ok(())
}
