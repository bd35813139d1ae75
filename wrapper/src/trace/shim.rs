//! The shim's way into the programs that are watched (`shim/lib.rs`).
//!
//! It lies in memory of the watcher's, from where the dynamic linker loads it, so that there is no file
//! to be found, kept and fit. Where it cannot be had, every call is handed over.

use std::env;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::ptr::NonNull;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::Program;
use super::loader;
use super::ring::{self, Ring, Said};
use super::search;
use super::words;

#[cfg(test)]
mod tests;

/// The shim itself; empty where there is none for this machine.
static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));

/// The variable that asks for it (ld.so(8)).
const PRELOAD: &str = "LD_PRELOAD";

/// What every program is to load (ld.so(8)).
const PRELOADED: &str = "/etc/ld.so.preload";

/// Set to do without.
const UNSHIMMED: &str = "KACHEFS_UNSHIMMED";

/// The C library that has all it needs in one place.
const OLDEST_LIBRARY: (u32, u32) = (2, 34);

/// The memory that holds the shim, and that which programs write to.
pub(super) struct Shim {
    library: OwnedFd,
    memory: OwnedFd,
    ring: Ring,
    mapped: NonNull<libc::c_void>,
    text: Vec<u8>,
    /// Where the program's loader looks for libraries first.
    search: Vec<u8>,
    /// Whether something that was written cannot be read.
    is_lost: bool,
}

impl Shim {
    /// Makes it; `None` where it would not work.
    pub(super) fn new() -> Option<Self> {
        if LIBRARY.is_empty() || env::var_os(UNSHIMMED).is_some() || !has_library() {
            return None;
        }
        // As with the variable below, but for the whole system.
        if fs::metadata(PRELOADED).is_ok_and(|file| file.len() > 0) {
            return None;
        }
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut library = File::from(memfd_create("kachefs-shim", flags).ok()?);
        library.write_all(LIBRARY).ok()?;
        // All that load it have it open.
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(
            &library,
            FcntlArg::F_ADD_SEALS(seals | SealFlag::F_SEAL_SEAL),
        )
        .ok()?;
        // As they will.
        can_run(&File::open(path(&library)).ok()?).ok()?;
        let memory = memfd_create("kachefs-ring", MFdFlags::MFD_CLOEXEC).ok()?;
        let length = NonZeroUsize::new(ring::LENGTH)?;
        // All at once: a program that finds no memory there would be killed.
        let size = libc::off_t::try_from(ring::LENGTH).ok()?;
        fallocate(&memory, FallocateFlags::empty(), 0, size).ok()?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: maps memory where nothing is.
        let mapped =
            unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &memory, 0) }.ok()?;
        Some(Self {
            library: library.into(),
            memory,
            // SAFETY: just mapped, until this value goes, with which the ring does.
            ring: unsafe { Ring::at(mapped.as_ptr().cast()) },
            mapped,
            text: vec![0; ring::ROOM],
            search: Vec::new(),
            is_lost: false,
        })
    }

    /// What is to be kept open.
    pub(super) fn descriptors(&self) -> [RawFd; 2] {
        [self.library.as_raw_fd(), self.memory.as_raw_fd()]
    }

    /// Has a program load it, unless that is to load others already: those are often there to change
    /// what the C library's functions say, and the shim would not ask them. It is given the libraries it
    /// is loaded with, if those are known, by their paths.
    pub(super) fn put_before(&mut self, program: &mut Program) {
        let Program {
            command,
            libraries,
            allocator,
            ..
        } = program;
        let variable = |name: &str| {
            let set = command.get_envs().find(|(set, _)| *set == name);
            set.map_or_else(|| env::var_os(name), |(_, value)| value.map(OsString::from))
        };
        let (others, search) = (variable(PRELOAD), variable(search::VARIABLE));
        let is_allocator_told = variable(words::ALLOCATOR).is_some();
        self.search = search.unwrap_or_default().into_encoded_bytes();
        if others.is_none_or(|others| others.is_empty()) && is_native(command) {
            let own = path(&self.library);
            // The shim comes first, and takes all of it out of the environment. Should it not be loaded after
            // all, what the program starts is given the libraries, too.
            let all = [own.as_bytes()].into_iter();
            let all: Vec<&[u8]> = all.chain(libraries.iter().map(Vec::as_slice)).collect();
            command.env(PRELOAD, OsStr::from_bytes(&all.join(&b':')));
            // Which the shim takes out, too.
            if !allocator.is_empty() && !is_allocator_told {
                command.env(words::ALLOCATOR, OsStr::from_bytes(allocator));
            }
        }
    }

    /// Answers a call with the memory to write to; false if that did not work.
    pub(super) fn hand_over(&self, listener: &OwnedFd, call: u64) -> bool {
        let (Ok(srcfd), Ok(flags), Ok(newfd_flags)) = (
            u32::try_from(self.memory.as_raw_fd()),
            u32::try_from(libc::SECCOMP_ADDFD_FLAG_SEND),
            u32::try_from(libc::O_CLOEXEC),
        ) else {
            return false;
        };
        let mut answer = libc::seccomp_notif_addfd {
            id: call,
            flags,
            srcfd,
            newfd: 0,
            newfd_flags,
        };
        let request = libc::SECCOMP_IOCTL_NOTIF_ADDFD;
        // SAFETY: passes what the request takes.
        let answered = unsafe { libc::ioctl(listener.as_raw_fd(), request, &raw mut answer) };
        Errno::result(answered).is_ok()
    }

    /// Tells which of the directories that the loader looks in first hold nothing for programs of the
    /// system.
    pub(super) fn tell_vain(&self) {
        if self.ring.vain().is_none() {
            self.ring.set_vain(&search::vain(&self.search));
        }
    }

    /// Whether so much was written that it should be read.
    pub(super) fn is_filling(&self) -> bool {
        !self.is_lost && self.ring.unread() > ring::ROOM / 2
    }

    /// Has programs write nothing any more, but hand over what they ask.
    pub(super) fn close(&self) {
        self.ring.close();
    }

    /// Reads everything that was written, and tells it to `note`. What is being written is waited for,
    /// but not for long: who writes may have died, and whoever makes a call waits for us. False if
    /// something that was written cannot be read, now or before; nothing is written any more, then.
    pub(super) fn read(&mut self, mut note: impl FnMut(Said, &[u8])) -> bool {
        const YIELDS: u32 = 100;
        const PAUSE: Duration = Duration::from_millis(1);
        const MOST_WAITS: u32 = YIELDS + 500;
        let mut waits = 0;
        while !self.is_lost {
            if let Some((said, length)) = self.ring.read(&mut self.text) {
                note(said, &self.text[..length]);
                waits = 0;
            } else if self.ring.unread() == 0 {
                return true;
            } else if waits == MOST_WAITS {
                self.ring.close();
                self.is_lost = true;
            } else if waits < YIELDS {
                thread::yield_now();
                waits += 1;
            } else {
                thread::sleep(PAUSE);
                waits += 1;
            }
        }
        false
    }
}

/// Whether a program could load it.
fn is_native(command: &Command) -> bool {
    let begin = |path: &Path| -> io::Result<bool> {
        let mut head = Vec::new();
        File::open(path)?
            .take(loader::HEAD as u64)
            .read_to_end(&mut head)?;
        Ok(loader::is_native(&head))
    };
    let program = Path::new(command.get_program());
    if program.components().count() > 1 {
        let directory = command.get_current_dir().unwrap_or(Path::new(""));
        return begin(&directory.join(program)).unwrap_or(false);
    }
    let list = env::var_os("PATH").unwrap_or_default();
    let mut found = env::split_paths(&list).map(|directory| begin(&directory.join(program)));
    found.find_map(Result::ok).unwrap_or(false)
}

/// Where others find a file that this process has open.
fn path(file: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

impl Drop for Shim {
    fn drop(&mut self) {
        // SAFETY: it is as long, and nobody else in this process has it.
        let unmapped = unsafe { munmap(self.mapped, ring::LENGTH) };
        debug_assert!(unmapped.is_ok(), "it was mapped so");
    }
}

/// Whether the C library of this process, and so most likely of what it starts, is new enough.
#[cfg(target_env = "gnu")]
fn has_library() -> bool {
    // SAFETY: returns a text that stays.
    let version = unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) };
    let version = version.to_str().unwrap_or_default();
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    let version = numbers.next().zip(numbers.next());
    version.is_some_and(|version| version >= OLDEST_LIBRARY)
}

#[cfg(not(target_env = "gnu"))]
fn has_library() -> bool {
    false
}

/// Whether code may be run from memory like this one; some systems forbid it.
fn can_run(library: &File) -> io::Result<()> {
    let length = NonZeroUsize::new(LIBRARY.len()).ok_or(io::ErrorKind::InvalidData)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
    // SAFETY: maps memory where nothing is, which nobody gets to know.
    unsafe {
        let mapped = mmap(None, length, protection, MapFlags::MAP_PRIVATE, library, 0)?;
        munmap(mapped, length.get())?;
    }
    Ok(())
}
