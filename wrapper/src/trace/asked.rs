//! What the wrapper must know of a watched program while that still runs.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What is mapped.
const LENGTH: NonZeroUsize = NonZeroUsize::new(size_of::<AtomicBool>()).expect("not zero");

/// Whether something may have asked how the program was called ([`super::Scope::arguments`]). The watcher says
/// so, which is another process.
#[derive(Debug)]
pub struct Asked(NonNull<AtomicBool>);

// SAFETY: it owns the memory, in which there is an atomic.
unsafe impl Send for Asked {}
// SAFETY: as above.
unsafe impl Sync for Asked {}

impl Asked {
    /// Nothing has. To be made before the program is started.
    pub fn new() -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: maps memory where nothing is, zeroes, which are an atomic that is false.
        let memory = unsafe { mmap_anonymous(None, LENGTH, protection, MapFlags::MAP_SHARED) }?;
        Ok(Self(memory.cast()))
    }

    fn flag(&self) -> &AtomicBool {
        // SAFETY: mapped until this value goes, and never used but as an atomic.
        unsafe { self.0.as_ref() }
    }

    /// Something may have.
    pub(crate) fn set(&self) {
        self.flag().store(true, Ordering::Release);
    }

    /// Whether something may have.
    pub(crate) fn is_set(&self) -> bool {
        self.flag().load(Ordering::Acquire)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // SAFETY: it is as long, and nobody else in this process has it.
        let unmapped = unsafe { munmap(self.0.cast(), LENGTH.get()) };
        debug_assert!(unmapped.is_ok(), "it was mapped so");
    }
}
