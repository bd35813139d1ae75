//! Files as databases and linkers open them.

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::path::Path;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::Must;

/// Opens a file for both, making it when it is not there.
#[track_caller]
pub fn read_write(path: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).must(path.display())
}

/// A mapping of a whole file, unmapped when dropped.
pub struct Map {
    start: std::ptr::NonNull<std::ffi::c_void>,
    length: usize,
}

impl Map {
    /// Maps a file that nobody shortens meanwhile.
    #[track_caller]
    pub fn new(file: &File, flags: MapFlags) -> Self {
        let length = usize::try_from(file.metadata().must("fstat").len()).must("small");
        let size = NonZeroUsize::new(length).must("not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping where the kernel puts it; it is used only through `set` and `get`,
        // within its length, and no test shortens the file while it is mapped.
        let start = unsafe { mmap(None, size, protection, flags, file, 0) }.must("mmap");
        Self { start, length }
    }

    /// Writes one byte.
    #[track_caller]
    pub fn set(&self, at: usize, byte: u8) {
        assert!(at < self.length);
        // SAFETY: `at` lies within the live, writable mapping.
        unsafe { self.start.cast::<u8>().add(at).write_volatile(byte) };
    }

    /// Reads one byte.
    #[track_caller]
    pub fn get(&self, at: usize) -> u8 {
        assert!(at < self.length);
        // SAFETY: `at` lies within the live, readable mapping.
        unsafe { self.start.cast::<u8>().add(at).read_volatile() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nothing refers to it any more.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}
