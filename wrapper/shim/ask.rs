//! The functions that ask what is there.

use core::ffi::{CStr, c_char, c_int, c_void};
use core::ops::Range;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::loads;
use crate::ring::{Found, Ring, Said};
use crate::system::{self, AT_FDCWD, AT_SYMLINK_NOFOLLOW, Arguments};
use crate::words::WORD;

/// The longest path, with its NUL (limits.h).
pub const PATH_MAX: usize = 4096;

/// What is done with a path: the numbers of `trace::Access`.
pub const OPEN: u8 = 0;
pub const STATUS: u8 = 1;
pub const LINK: u8 = 2;

/// What lies in these is asked of the watcher alone, which knows what it means.
const SPECIAL: [&[u8]; 3] = [b"/proc/", b"/sys/", b"/dev/"];
/// But this is a directory like any other.
const SHARED_MEMORY: &[u8] = b"/dev/shm/";

/// To ask for this, as for all that begins with [`WORD`], has the watcher read what was written.
const FULL: &CStr = c"/proc/self/kachefs-full";

/// Where the records go.
static RING: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
/// Who we are there.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// What was said lately is not said again: who says the same twice has read it but once.
static SAID: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];

/// Has the records of this process go there.
pub fn attach(memory: *mut u8, process: u32) {
    PROCESS.store(process, Ordering::Relaxed);
    RING.store(memory, Ordering::Release);
}

/// Where a call finds its path, and where it writes to.
struct Asked {
    call: isize,
    does: u8,
    directory: c_int,
    path: *const c_char,
    arguments: Arguments,
    written: Range<usize>,
}

impl Asked {
    /// Makes the call, and says what was asked.
    fn ask(self) -> isize {
        self.try_ask().unwrap_or_else(|| {
            let result = system::call(self.call, self.arguments);
            self.forget_if_word();
            result
        })
    }

    /// What was said to somebody else than will be from now on, is forgotten.
    fn forget_if_word(&self) {
        // SAFETY: as below.
        let path = unsafe { system::text(self.path) };
        if path.is_some_and(|path| path.starts_with(WORD)) {
            for said in &SAID {
                said.store(0, Ordering::Relaxed);
            }
        }
    }

    /// `None` where it has to be handed over.
    fn try_ask(&self) -> Option<isize> {
        if !system::is_ready() {
            return None;
        }
        // SAFETY: as the C library's functions, these take a text.
        let path = unsafe { system::text(self.path) }?;
        let at = path.as_ptr() as usize;
        // What is written over what was asked could not be said any more.
        if self.written.start <= at + path.len() && at < self.written.end {
            return None;
        }
        match path.first()? {
            b'/' => self.ask_of(b"", path),
            _ if self.directory == AT_FDCWD => self.ask_from_here(path),
            _ => None,
        }
    }

    /// By itself, because of the memory it takes.
    #[inline(never)]
    fn ask_from_here(&self, path: &[u8]) -> Option<isize> {
        let mut buffer = [0; PATH_MAX];
        let directory = working_directory(&mut buffer)?;
        // What is below the root may be special, and seldom asked for so.
        (directory != b"/").then(|| self.ask_of(directory, path))?
    }

    fn ask_of(&self, directory: &[u8], path: &[u8]) -> Option<isize> {
        if is_special(directory, path) || ring().is_closed() {
            return None;
        }
        let result = system::pass(self.call, self.arguments);
        let found = self.found(result);
        if say(self.does, found, directory, path) {
            return Some(result);
        }
        // Perhaps there is room when the watcher has read.
        let full = FULL.as_ptr() as usize;
        system::call(system::ACCESS, [full, 0, 0, 0, 0]);
        if say(self.does, found, directory, path) {
            return Some(result);
        }
        if self.does == OPEN && result >= 0 {
            system::call(system::CLOSE, [result as usize, 0, 0, 0, 0]);
        }
        None
    }

    /// Whether something is at the path, going by a call's result.
    fn found(&self, result: isize) -> Found {
        match result {
            0.. => Found::Something,
            // Of these there are thousands (a header is looked for in one directory after another).
            _ if result == -system::ENOENT && self.does == LINK => Found::Nothing,
            _ if result == -system::ENOENT => Found::NoWay,
            _ if self.is_there(result) => Found::Something,
            _ => Found::Nothing,
        }
    }

    /// Whether something is at the path, whatever a call that failed says about it.
    fn is_there(&self, result: isize) -> bool {
        let reads_link = matches!(self.call, system::READLINK | system::READLINKAT);
        // The kernel takes a size for a number with a sign.
        let has_room = (1..=i32::MAX as usize).contains(&self.written.len());
        if reads_link && result == -system::EINVAL && has_room {
            // No link, then, but something.
            return true;
        }
        let mut status = [0_u64; 18];
        let place = status.as_mut_ptr() as usize;
        let flag = AT_SYMLINK_NOFOLLOW as usize;
        let arguments = [self.directory as usize, self.path as usize, place, flag, 0];
        system::pass(system::NEWFSTATAT, arguments) == 0
    }
}

/// This process's working directory, if it has a name.
pub fn working_directory(buffer: &mut [u8; PATH_MAX]) -> Option<&[u8]> {
    let place = buffer.as_mut_ptr() as usize;
    let length = system::call(system::GETCWD, [place, PATH_MAX, 0, 0, 0]);
    // With its NUL.
    let length = usize::try_from(length).ok()?.checked_sub(1)?;
    let path = buffer.get(..length)?;
    (path.first() == Some(&b'/')).then_some(path)
}

/// Whether a path is the kernel's or the machine's.
fn is_special(directory: &[u8], path: &[u8]) -> bool {
    let whole = if directory.is_empty() {
        path
    } else {
        directory
    };
    let within = |prefix: &&[u8]| {
        let name = &prefix[..prefix.len() - 1];
        whole.starts_with(prefix) || (whole == name && !directory.is_empty())
    };
    !whole.starts_with(SHARED_MEMORY) && SPECIAL.iter().any(within)
}

/// Whether something can be seen at a name in a directory, which is told like any other question.
pub fn is_there(directory: &[u8], name: &[u8]) -> bool {
    let Some(path) = loads::join::<PATH_MAX>(directory, name) else {
        return false;
    };
    let path = path.as_ptr().cast();
    let asked = Asked {
        call: system::ACCESS,
        does: STATUS,
        directory: AT_FDCWD,
        path,
        arguments: [path as usize, 0, 0, 0, 0],
        written: 0..0,
    };
    asked.ask() == 0
}

/// Where records go, if this process speaks through it.
pub fn ring_if_ready() -> Option<Ring> {
    system::is_ready().then(ring)
}

/// Where records go, once everything is ready.
fn ring() -> Ring {
    // SAFETY: the memory was mapped before anything was ready, and stays.
    unsafe { Ring::at(RING.load(Ordering::Acquire)) }
}

/// Says what was asked and whether it is there; `false` if there is no room.
pub fn say(does: u8, found: Found, directory: &[u8], path: &[u8]) -> bool {
    let mark = mark(does, directory, path);
    let slot = &SAID[(mark % SAID.len() as u64) as usize];
    if slot.load(Ordering::Acquire) == mark {
        return true;
    }
    let separator: &[u8] = if directory.is_empty() || directory.ends_with(b"/") {
        &[]
    } else {
        b"/"
    };
    let text = directory.len() + separator.len() + path.len();
    let Ok(text) = u16::try_from(text) else {
        return false;
    };
    let said = Said {
        process: PROCESS.load(Ordering::Relaxed),
        text,
        does,
        found,
    };
    let written = ring().write(said, &[directory, separator, path]);
    if written {
        slot.store(mark, Ordering::Release);
    }
    written
}

/// A number that differs where what was asked does: 64 well mixed bits, never zero.
fn mark(does: u8, directory: &[u8], path: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |state: u64, word: u64| {
        let product = u128::from(state ^ word) * u128::from(ODD ^ state.rotate_left(32));
        (product as u64) ^ ((product >> 64) as u64)
    };
    let mut state = ODD ^ u64::from(does);
    for part in [directory, path] {
        let (words, rest) = part.as_chunks::<8>();
        for word in words {
            state = mix(state, u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        state = mix(state, u64::from_le_bytes(last));
        state = mix(state, part.len() as u64);
    }
    state.max(1)
}

/// Whether opening so only reads, and reads what lies at the path itself.
fn only_reads(flags: c_int) -> bool {
    const O_ACCMODE: c_int = 0o3;
    const O_CREAT: c_int = 0o100;
    const O_TRUNC: c_int = 0o1000;
    const O_PATH: c_int = 0o10_000_000;
    const O_TMPFILE: c_int = 0o20_000_000;
    flags & (O_ACCMODE | O_CREAT | O_TRUNC | O_PATH | O_TMPFILE) == 0
}

fn opened(directory: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    let arguments = [
        directory as usize,
        path as usize,
        flags as usize,
        mode as usize,
        0,
    ];
    let result = if only_reads(flags) {
        let (call, does) = (system::OPENAT, OPEN);
        Asked {
            call,
            does,
            directory,
            path,
            arguments,
            written: 0..0,
        }
        .ask()
    } else {
        system::call(system::OPENAT, arguments)
    };
    system::returned(result) as c_int
}

/// A `stat` of any kind: what comes behind its path, and where the answer goes.
fn status(
    call: isize,
    (directory, path): (c_int, *const c_char),
    flags: c_int,
    rest: [usize; 3],
    answer: usize,
) -> c_int {
    /// More than any of the kernel's answers takes.
    const ANSWER: usize = 256;
    let does = if flags & AT_SYMLINK_NOFOLLOW == 0 {
        STATUS
    } else {
        LINK
    };
    let [third, fourth, fifth] = rest;
    let asked = Asked {
        call,
        does,
        directory,
        path,
        arguments: [directory as usize, path as usize, third, fourth, fifth],
        written: answer..answer.saturating_add(ANSWER),
    };
    system::returned(asked.ask()) as c_int
}

fn fstatat_at(directory: c_int, path: *const c_char, buffer: *mut c_void, flags: c_int) -> c_int {
    let rest = [buffer as usize, flags as usize, 0];
    status(
        system::NEWFSTATAT,
        (directory, path),
        flags,
        rest,
        buffer as usize,
    )
}

fn link(directory: c_int, path: *const c_char, buffer: *mut c_char, size: usize) -> isize {
    let asked = Asked {
        call: system::READLINKAT,
        does: LINK,
        directory,
        path,
        arguments: [directory as usize, path as usize, buffer as usize, size, 0],
        written: buffer as usize..(buffer as usize).saturating_add(size),
    };
    system::returned(asked.ask())
}

// The mode of open(2) is an argument that callers may leave out: it is then whatever its register
// holds, as in the C library, and nobody looks at it.
functions!(open, open64 = (path: *const c_char, flags: c_int, mode: u32) -> c_int {
    opened(AT_FDCWD, path, flags, mode)
});
functions!(openat, openat64 = (directory: c_int, path: *const c_char, flags: c_int, mode: u32) -> c_int {
    opened(directory, path, flags, mode)
});
functions!(stat, stat64 = (path: *const c_char, buffer: *mut c_void) -> c_int {
    fstatat_at(AT_FDCWD, path, buffer, 0)
});
functions!(lstat, lstat64 = (path: *const c_char, buffer: *mut c_void) -> c_int {
    fstatat_at(AT_FDCWD, path, buffer, AT_SYMLINK_NOFOLLOW)
});
functions!(fstatat, fstatat64 =
    (directory: c_int, path: *const c_char, buffer: *mut c_void, flags: c_int) -> c_int {
    fstatat_at(directory, path, buffer, flags)
});
// What programs made with a C library before 2.33 call.
functions!(__xstat, __xstat64 = (_version: c_int, path: *const c_char, buffer: *mut c_void) -> c_int {
    fstatat_at(AT_FDCWD, path, buffer, 0)
});
functions!(__lxstat, __lxstat64 = (_version: c_int, path: *const c_char, buffer: *mut c_void) -> c_int {
    fstatat_at(AT_FDCWD, path, buffer, AT_SYMLINK_NOFOLLOW)
});
functions!(__fxstatat, __fxstatat64 =
    (_version: c_int, directory: c_int, path: *const c_char, buffer: *mut c_void, flags: c_int) -> c_int {
    fstatat_at(directory, path, buffer, flags)
});
functions!(statx =
    (directory: c_int, path: *const c_char, flags: c_int, mask: u32, buffer: *mut c_void) -> c_int {
    let rest = [flags as usize, mask as usize, buffer as usize];
    status(system::STATX, (directory, path), flags, rest, buffer as usize)
});
functions!(access = (path: *const c_char, mode: c_int) -> c_int {
    let asked = Asked {
        call: system::ACCESS,
        does: STATUS,
        directory: AT_FDCWD,
        path,
        arguments: [path as usize, mode as usize, 0, 0, 0],
        written: 0..0,
    };
    system::returned(asked.ask()) as c_int
});
functions!(readlink = (path: *const c_char, buffer: *mut c_char, size: usize) -> isize {
    link(AT_FDCWD, path, buffer, size)
});
functions!(readlinkat = (directory: c_int, path: *const c_char, buffer: *mut c_char, size: usize) -> isize {
    link(directory, path, buffer, size)
});

/// Reads a link for [`crate::real_path`], whose path is whole and ends in a NUL.
pub fn read_link(path: *const c_char, buffer: &mut [u8]) -> isize {
    let range = buffer.as_mut_ptr_range();
    let written = range.start as usize..range.end as usize;
    let asked = Asked {
        call: system::READLINK,
        does: LINK,
        directory: AT_FDCWD,
        path,
        arguments: [path as usize, written.start, buffer.len(), 0, 0],
        written,
    };
    asked.ask()
}
