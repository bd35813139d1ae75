//! Large pages for compilers of C.
//!
//! GCC takes memory from the kernel two megabytes at a time and soon uses all of it, a tenth of its time
//! for the faults of single pages. Where the kernel gives large pages to those who ask for them (Linux:
//! `admin-guide/mm/transhuge`, `enabled` being `madvise`), one fault brings what five hundred do. Where it
//! gives them to all or to none, asking changes nothing. Nor does it change an address, or what is
//! compiled.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::start::names;
use crate::system;

/// Programs of GCC that compile.
const COMPILERS: [&[u8]; 2] = [b"cc1", b"cc1plus"];

/// What a compiler gets in large pages. Those that take more are few, and the memory that lies ready in
/// large pieces is soon used up: to make more of it can take longer than faults do.
const MOST: usize = 64 << 20;

/// Half of a large page on x86-64: two such pieces side by side hold one.
const LEAST: usize = 1 << 20;

/// What this program may still get in large pages.
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// Has this program get large pages, if it is one that gains by them.
///
/// # Safety
///
/// The path the program was called by is none or a text.
pub unsafe fn start(program: *const c_char) {
    // SAFETY: the caller's.
    let program = unsafe { system::text(program) }.unwrap_or_default();
    let [name, _] = names(program);
    if COMPILERS.contains(&name) {
        LEFT.store(MOST, Ordering::Relaxed);
    }
}

/// Takes a piece from what is left, unless it is more, or memory of another kind.
fn is_to_be_large(length: usize, protection: c_int, flags: c_int) -> bool {
    const READ_WRITE: c_int = 0x1 | 0x2;
    const MAP_SHARED: c_int = 0x01;
    const MAP_PRIVATE: c_int = 0x02;
    const MAP_ANONYMOUS: c_int = 0x20;
    const MAP_GROWSDOWN: c_int = 0x100;
    const MAP_NORESERVE: c_int = 0x4000;
    const MAP_STACK: c_int = 0x2_0000;
    // What is reserved need not be used.
    const OTHERS: c_int = MAP_SHARED | MAP_GROWSDOWN | MAP_NORESERVE | MAP_STACK;
    const KINDS: c_int = MAP_PRIVATE | MAP_ANONYMOUS | OTHERS;
    let is_of_kind = flags & KINDS == MAP_PRIVATE | MAP_ANONYMOUS && protection == READ_WRITE;
    let take = |left: usize| left.checked_sub(length);
    is_of_kind
        && length >= LEAST
        && LEFT
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
}

functions!(mmap, mmap64 =
    (address: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: isize)
    -> *mut c_void {
    const HUGE_PAGE: usize = 14;
    let (first, second) = (protection as usize, flags as usize);
    let arguments = [address as usize, length, first, second, fd as usize];
    let result = system::returned(system::map(arguments, offset as usize));
    if result != -1 && is_to_be_large(length, protection, flags) {
        // A kernel that has none says so, and all is as before.
        system::call(system::MADVISE, [result as usize, length, HUGE_PAGE, 0, 0]);
    }
    result as *mut c_void
});
