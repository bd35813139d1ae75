//! realpath(3), which reads a link for each part of a path and does so within the C library.

use core::ffi::{c_char, c_void};
use core::ptr;

use crate::ask::{self, PATH_MAX};
use crate::system;

/// As many links as the kernel follows (path_resolution(7)).
const MOST_LINKS: u32 = 40;

/// Why a path was not resolved here.
enum Not {
    /// It has no real path, as this error says.
    Real(isize),
    /// The C library is to do it.
    Done,
}

/// The path so far, with room for a NUL, and what is still to be resolved.
struct Resolving {
    done: [u8; PATH_MAX],
    length: usize,
    rest: [u8; PATH_MAX],
    /// Where it begins.
    start: usize,
    /// Where the last link leads.
    target: [u8; PATH_MAX],
}

impl Resolving {
    /// Begins anew, from zeroes.
    fn begin(&mut self, path: &[u8]) -> Result<(), Not> {
        self.start = PATH_MAX;
        if path.first() != Some(&b'/') {
            let directory = ask::working_directory(&mut self.done).ok_or(Not::Done)?;
            if directory != b"/" {
                self.length = directory.len();
            }
        }
        put_before(&mut self.rest, &mut self.start, path)
    }

    fn run(&mut self) -> Result<(), Not> {
        let mut links = 0;
        loop {
            let rest = &self.rest[self.start..];
            let slashes = rest.iter().take_while(|byte| **byte == b'/').count();
            let rest = &rest[slashes..];
            let length = rest.iter().take_while(|byte| **byte != b'/').count();
            let from = self.start + slashes;
            self.start = from + length;
            match &rest[..length] {
                [] => return Ok(()),
                b"." => {}
                b".." => self.up(),
                _ => {
                    self.down(from, length)?;
                    self.follow(&mut links)?;
                }
            }
        }
    }

    fn up(&mut self) {
        let done = &self.done[..self.length];
        self.length = done.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    }

    fn down(&mut self, from: usize, length: usize) -> Result<(), Not> {
        let next = self.length + 1 + length;
        if next >= PATH_MAX {
            return Err(Not::Done);
        }
        self.done[self.length] = b'/';
        self.done[self.length + 1..next].copy_from_slice(&self.rest[from..from + length]);
        self.length = next;
        Ok(())
    }

    /// Goes where the last part leads, if it is a link.
    fn follow(&mut self, links: &mut u32) -> Result<(), Not> {
        let path = self.path();
        let size = ask::read_link(path, &mut self.target);
        if size == -system::EINVAL {
            return self.is_left_rightly();
        }
        let Ok(size) = usize::try_from(size) else {
            // Of what else may fail, C libraries tell differently.
            return Err(match -size {
                error @ (system::ENOENT | system::EACCES) => Not::Real(error),
                _ => Not::Done,
            });
        };
        *links += 1;
        if *links > MOST_LINKS || size == 0 || size >= PATH_MAX {
            return Err(Not::Done);
        }
        if self.target[0] == b'/' {
            self.length = 0;
        } else {
            self.up();
        }
        put_before(&mut self.rest, &mut self.start, &self.target[..size])
    }

    /// What is no link must be a directory if anything follows. The next link that is read says so;
    /// where none is read, the C library is to.
    fn is_left_rightly(&mut self) -> Result<(), Not> {
        let rest = &self.rest[self.start..];
        let mut parts = rest
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty());
        let goes_unread = match parts.next() {
            None => !rest.is_empty(),
            Some(part) => matches!(part, b"." | b".."),
        };
        if goes_unread && !self.is_directory() {
            return Err(Not::Done);
        }
        Ok(())
    }

    /// Whether the last part, of which it is known that it is no link, is a directory.
    fn is_directory(&mut self) -> bool {
        const MODE: usize = 3;
        const KIND: u64 = 0o170_000;
        const DIRECTORY: u64 = 0o040_000;
        let mut status = [0_u64; 18];
        let place = status.as_mut_ptr() as usize;
        let asked = system::pass(system::LSTAT, [self.path() as usize, place, 0, 0, 0]);
        asked == 0 && status[MODE] & KIND == DIRECTORY
    }

    /// What is resolved so far, ending in a NUL.
    fn path(&mut self) -> *const c_char {
        // Bytes of a longer one may be left behind it.
        self.done[self.length] = 0;
        self.done.as_ptr().cast()
    }
}

/// Has a text, before which a slash is thought, come before what is still to be resolved.
fn put_before(rest: &mut [u8; PATH_MAX], start: &mut usize, text: &[u8]) -> Result<(), Not> {
    let new = start.checked_sub(text.len() + 1).ok_or(Not::Done)?;
    rest[new] = b'/';
    rest[new + 1..*start].copy_from_slice(text);
    *start = new;
    Ok(())
}

fn resolve(path: *const c_char, resolved: *mut c_char) -> Result<*mut c_char, Not> {
    if !system::is_ready() {
        return Err(Not::Done);
    }
    // SAFETY: as for the C library, it is a text.
    let path = unsafe { system::text(path) }.ok_or(Not::Done)?;
    if path.is_empty() || path.len() >= PATH_MAX {
        return Err(Not::Done);
    }
    // A thread's stack may have less room.
    // SAFETY: takes any size.
    let memory = unsafe { system::calloc(1, size_of::<Resolving>()) }.cast::<Resolving>();
    if memory.is_null() {
        return Err(Not::Done);
    }
    // SAFETY: there is room, it is nobody else's until it is freed, and zeroes are bytes and numbers.
    unsafe {
        let result = resolve_in(&mut *memory, path, resolved);
        system::free(memory.cast());
        result
    }
}

fn resolve_in(
    resolving: &mut Resolving,
    path: &[u8],
    resolved: *mut c_char,
) -> Result<*mut c_char, Not> {
    let result = resolving.begin(path).and_then(|()| resolving.run());
    if resolving.length == 0 {
        resolving.done[0] = b'/';
        resolving.length = 1;
    }
    let length = resolving.length + 1;
    let from = resolving.path();
    let to = match result {
        Ok(()) if resolved.is_null() => {
            // SAFETY: takes any size.
            unsafe { system::malloc(length) }.cast::<c_char>()
        }
        // One that is missing says how far it got, where there is room to.
        Ok(()) | Err(Not::Real(_)) => resolved,
        Err(Not::Done) => return Err(Not::Done),
    };
    if !to.is_null() {
        // SAFETY: there is room for as much as the longest path, or for just this one.
        unsafe { ptr::copy_nonoverlapping(from, to, length) };
    }
    result.map(|()| to)
}

/// Behind its names, of which a program may have others of its own.
unsafe fn real_path(path: *const c_char, resolved: *mut c_char) -> *mut c_char {
    type Function = unsafe extern "C" fn(*const c_char, *mut c_char) -> *mut c_char;
    match resolve(path, resolved) {
        Ok(path) => path,
        Err(Not::Real(error)) => {
            system::fail(error);
            ptr::null_mut()
        }
        Err(Not::Done) => {
            let function = system::next(c"realpath");
            if function.is_null() {
                system::fail(system::ENOSYS);
                return ptr::null_mut();
            }
            // SAFETY: the C library's function of that name, given what it takes.
            unsafe { core::mem::transmute::<*mut c_void, Function>(function)(path, resolved) }
        }
    }
}

/// As realpath(3).
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realpath(path: *const c_char, resolved: *mut c_char) -> *mut c_char {
    // SAFETY: the caller's.
    unsafe { real_path(path, resolved) }
}

/// As `canonicalize_file_name(3)`.
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn canonicalize_file_name(path: *const c_char) -> *mut c_char {
    // SAFETY: the caller's.
    unsafe { real_path(path, ptr::null_mut()) }
}

/// What programs call that are made to check sizes (`_FORTIFY_SOURCE`).
///
/// # Safety
///
/// As for [`realpath`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __realpath_chk(
    path: *const c_char,
    resolved: *mut c_char,
    size: usize,
) -> *mut c_char {
    if size < PATH_MAX {
        system::abort();
    }
    // SAFETY: the caller's.
    unsafe { real_path(path, resolved) }
}
