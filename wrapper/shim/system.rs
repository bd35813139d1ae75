//! Calls of the kernel, and what the C library is needed for.

use core::arch::asm;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};

use crate::words::GATE;

pub const AT_FDCWD: c_int = -100;
pub const AT_SYMLINK_NOFOLLOW: c_int = 0x100;
pub const ENOENT: isize = 2;
pub const EACCES: isize = 13;
pub const EINVAL: isize = 22;
pub const ENOSYS: isize = 38;

pub const PREAD: isize = 17;
pub const CLOSE: isize = 3;
pub const LSTAT: isize = 6;
pub const MMAP: isize = 9;
pub const MPROTECT: isize = 10;
pub const ACCESS: isize = 21;
pub const MADVISE: isize = 28;
pub const EXECVE: isize = 59;
pub const GETPID: isize = 39;
pub const GETCWD: isize = 79;
pub const READLINK: isize = 89;
pub const OPENAT: isize = 257;
pub const NEWFSTATAT: isize = 262;
pub const READLINKAT: isize = 267;
pub const STATX: isize = 332;

unsafe extern "C" {
    pub static mut environ: *mut *mut c_char;
    fn __errno_location() -> *mut c_int;
    pub fn malloc(size: usize) -> *mut c_void;
    pub fn calloc(count: usize, size: usize) -> *mut c_void;
    pub fn free(memory: *mut c_void);
}

/// A path and what a call takes beside it.
pub type Arguments = [usize; 5];

/// `syscall; ret`
const CODE: [u8; 3] = [0x0f, 0x05, 0xc3];

/// Whether the gate is there.
static GATE_MADE: AtomicBool = AtomicBool::new(false);

pub fn has_gate() -> bool {
    GATE_MADE.load(Ordering::Acquire)
}

/// A page that says whether this process speaks through the ring: it attached, and the memory is not that
/// of a process it forked, where the kernel wipes the page (`madvise(2)`, MADV_WIPEONFORK). What those
/// ask is handed over: the watcher must know of each process by itself.
static READY: AtomicPtr<AtomicU8> = AtomicPtr::new(core::ptr::null_mut());

pub fn is_ready() -> bool {
    let page = READY.load(Ordering::Acquire);
    // SAFETY: if there is one, it was mapped for this and stays.
    !page.is_null() && unsafe { &*page }.load(Ordering::Relaxed) != 0
}

/// Everything is there: from now on this process speaks through the ring.
pub fn make_ready() -> Option<()> {
    const WIPE_ON_FORK: usize = 18;
    let page = map_own(0, PAGE, READ_WRITE, PRIVATE | ANONYMOUS, -1)?;
    if call(MADVISE, [page as usize, PAGE, WIPE_ON_FORK, 0, 0]) != 0 {
        return None;
    }
    let page = page.cast::<AtomicU8>();
    // SAFETY: mapped just now.
    unsafe { &*page }.store(1, Ordering::Relaxed);
    READY.store(page, Ordering::Release);
    Some(())
}

const PAGE: usize = 4096;
const READ_WRITE: usize = 1 | 2;
const PRIVATE: usize = 0x02;
const ANONYMOUS: usize = 0x20;

/// A call as any other: the filter hands it over if it is watched.
pub fn call(number: isize, arguments: Arguments) -> isize {
    let [first, second, third, fourth, fifth] = arguments;
    let result;
    // SAFETY: the caller's arguments are what the kernel's call takes; it changes these registers.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second,
             in("rdx") third, in("r10") fourth, in("r8") fifth, in("r9") 0,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// The same through the gate, which must be there.
pub fn pass(number: isize, arguments: Arguments) -> isize {
    let [first, second, third, fourth, fifth] = arguments;
    let result;
    // SAFETY: as above; the code at the gate returns and uses no other register.
    unsafe {
        asm!("call {gate}", gate = in(reg) GATE, inlateout("rax") number => result, in("rdi") first,
             in("rsi") second, in("rdx") third, in("r10") fourth, in("r8") fifth, in("r9") 0,
             lateout("rcx") _, lateout("r11") _);
    }
    result
}

/// `mmap(2)`.
pub fn map(arguments: Arguments, offset: usize) -> isize {
    let [first, second, third, fourth, fifth] = arguments;
    let result;
    // SAFETY: as that of a call; this one takes one argument more.
    unsafe {
        asm!("syscall", inlateout("rax") MMAP => result, in("rdi") first, in("rsi") second,
             in("rdx") third, in("r10") fourth, in("r8") fifth, in("r9") offset,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Maps memory of our own, where nothing is.
fn map_own(
    at: usize,
    length: usize,
    protection: usize,
    flags: usize,
    fd: isize,
) -> Option<*mut u8> {
    let result = map([at, length, protection, flags, fd as usize], 0);
    (result > 0).then_some(result as *mut u8)
}

/// Maps what is shared with the watcher.
pub fn share(length: usize, fd: isize) -> Option<*mut u8> {
    const SHARED: usize = 0x01;
    map_own(0, length, READ_WRITE, SHARED, fd)
}

/// Makes the gate, where the address space is free.
pub fn make_gate() -> Option<()> {
    const READ_RUN: usize = 1 | 4;
    // Kernels before 4.17 take the address for a wish.
    const NOT_IN_PLACE_OF_ANOTHER: usize = 0x10_0000;
    let flags = PRIVATE | ANONYMOUS | NOT_IN_PLACE_OF_ANOTHER;
    let memory = map_own(GATE, PAGE, READ_WRITE, flags, -1)?;
    if memory as usize != GATE {
        return None;
    }
    // SAFETY: the page was mapped just now and is longer.
    unsafe { core::ptr::copy_nonoverlapping(CODE.as_ptr(), memory, CODE.len()) };
    let made = call(MPROTECT, [GATE, PAGE, READ_RUN, 0, 0]);
    GATE_MADE.store(made == 0, Ordering::Release);
    has_gate().then_some(())
}

/// What the C library's functions return for a call's result.
pub fn returned(result: isize) -> isize {
    if (-4095..0).contains(&result) {
        fail(-result)
    } else {
        result
    }
}

/// Sets `errno`.
pub fn fail(error: isize) -> isize {
    // SAFETY: the C library says where this thread's is.
    unsafe { *__errno_location() = error as c_int };
    -1
}

/// The function of this name that comes after ours, if there is one, and any is to be found: C libraries
/// before 2.34 have the finder in another library, which may not be there.
pub fn next(name: &CStr) -> *mut c_void {
    type Find = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
    const RTLD_NEXT: *mut c_void = -1_isize as *mut c_void;
    let find: *const c_void;
    // SAFETY: reads the place where the dynamic linker has put the address, or nothing.
    unsafe { asm!(".weak dlsym", "mov {}, qword ptr [rip + dlsym@GOTPCREL]", out(reg) find) };
    if find.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: it is the function of that name; it looks another up.
    unsafe { core::mem::transmute::<*const c_void, Find>(find)(RTLD_NEXT, name.as_ptr()) }
}

/// The bytes of a text of the program's.
///
/// # Safety
///
/// It is none, or ends in a NUL and stays as it is meanwhile. What cannot be one is taken for none.
pub unsafe fn text<'a>(text: *const c_char) -> Option<&'a [u8]> {
    // SAFETY: the caller's.
    (text as usize >= PAGE).then(|| unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// The value of a variable of this program's environment, whose name comes with its `=`.
///
/// # Safety
///
/// Nobody changes the environment meanwhile.
pub unsafe fn variable<'a>(name: &[u8]) -> Option<&'a [u8]> {
    // SAFETY: the caller's; it is a list of texts that ends in none.
    unsafe {
        let place = entry(|text| text.starts_with(name))?;
        text(*place)?.strip_prefix(name)
    }
}

/// Where the environment has the first entry of this kind.
///
/// # Safety
///
/// As [`variable`].
pub unsafe fn entry(is: impl Fn(&[u8]) -> bool) -> Option<*mut *mut c_char> {
    // SAFETY: the caller's; it is a list of texts that ends in none.
    unsafe {
        let mut place = environ;
        if place.is_null() {
            return None;
        }
        while !is(text(*place)?) {
            place = place.add(1);
        }
        Some(place)
    }
}

/// Takes the first entry of this kind out of the environment.
///
/// # Safety
///
/// Nobody else uses the environment, which the kernel has put into memory of this program's own.
pub unsafe fn take(is: impl Fn(&[u8]) -> bool) -> Option<*mut c_char> {
    // SAFETY: the caller's.
    unsafe {
        let mut place = entry(is)?;
        let taken = *place;
        while !(*place).is_null() {
            *place = *place.add(1);
            place = place.add(1);
        }
        Some(taken)
    }
}

/// Overwrites a text with nothing: `/proc/self/environ` shows a gap.
///
/// # Safety
///
/// It is a text in memory of this program's own that nobody uses any more.
pub unsafe fn wipe(entry: *mut c_char) {
    // SAFETY: the caller's.
    unsafe { entry.write_bytes(0, CStr::from_ptr(entry).count_bytes()) };
}

pub fn abort() -> ! {
    // SAFETY: an instruction that is none ends the program.
    unsafe { asm!("ud2", options(noreturn)) }
}
