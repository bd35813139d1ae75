//! The allocator: the system's, but buffers for requests have their pages from the start.
//!
//! The kernel copies a request into such a buffer and a `kill -9` can come in between. If it then
//! meets a page that is not there it does not make one for a dying process: it ends the request with
//! EIO instead of keeping it for the next daemon (`fuse_dev_do_read` in Linux). Pages that are
//! there it fills, dying process or not. fuser allocates the buffers, out of our reach but for this.
//!
//! Also tells the system's allocator how a daemon uses memory. Called by the daemon only.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::fuse::MAX_REQUEST;

/// fuser's buffers, one for each worker: 16 MiB and a page (`fuser/src/read_buf.rs`). Nothing else
/// here is as long.
const BUFFER: usize = (16 << 20) + PAGE;

const PAGE: usize = 4096;

/// How much of it a request can fill: data, and headers that take less than a page.
const USED: usize = MAX_REQUEST as usize + PAGE;

/// Blocks from this size on are mapped and unmapped, whatever the allocator would learn. It learns
/// from the first buffer given back that such blocks belong into the heap, and a heap that gives one
/// out again touches all of it: 16 MiB for each worker of a view that was mounted again.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 8 << 20;

/// Sets the allocator up, before there are other threads.
pub fn set_up() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
    }
}

/// Gives back to the system what is free: after something large has passed through the heap, such as
/// the records of a view. The allocator by itself keeps what lies below a block in use.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks, and touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

struct Allocator;

// SAFETY: every call goes to the system's allocator, whose promises it keeps.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same.
        let block = unsafe { System.alloc_zeroed(layout) };
        if layout.size() == BUFFER && !block.is_null() {
            populate(block);
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Gives the used part of a buffer its pages. Where the kernel cannot (before Linux 5.14) they come
/// when they are first written to.
fn populate(block: *mut u8) {
    let offset = block.addr() % PAGE;
    let start = block.wrapping_sub(offset);
    // SAFETY: the range begins in the block's first page and ends inside the block; populating
    // changes no content.
    unsafe {
        libc::madvise(start.cast(), offset + USED, libc::MADV_POPULATE_WRITE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_buffer_has_its_pages() {
        let buffer = vec![0_u8; BUFFER];
        let start = buffer.as_ptr().map_addr(|address| address - address % PAGE);
        let mut there = vec![0_u8; USED / PAGE];
        // SAFETY: the range lies in the buffer, and `there` has a byte for each of its pages.
        let asked = unsafe {
            libc::mincore(
                start.cast_mut().cast(),
                there.len() * PAGE,
                there.as_mut_ptr(),
            )
        };
        assert_eq!(asked, 0);
        assert!(there.iter().all(|page| page & 1 == 1));
        assert!(buffer.iter().all(|byte| *byte == 0));
    }
}
