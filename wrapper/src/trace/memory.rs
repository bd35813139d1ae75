//! Texts in another process's memory.

use std::io::{self, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

/// The longest path, with its NUL (limits.h).
const PATH_MAX: usize = 4096;

/// Few are longer.
const USUAL: usize = 160;

/// Reads may be cut only where one part ends (`process_vm_readv(2)`); a page may be the last.
const PAGE: usize = 4096;

/// The path at an address; `None` for a null pointer.
pub(super) fn path(pid: Pid, address: u64) -> io::Result<Option<Vec<u8>>> {
    if address == 0 {
        return Ok(None);
    }
    // Most are short, and what is not asked for is not copied.
    for length in [USUAL, PATH_MAX] {
        let mut text = bytes(pid, address, length)?;
        if let Some(end) = text.iter().position(|byte| *byte == 0) {
            text.truncate(end);
            return Ok(Some(text));
        }
    }
    Err(io::Error::other("a path without an end"))
}

/// Up to `length` bytes at an address, fewer where the memory ends.
pub(super) fn bytes(pid: Pid, address: u64, length: usize) -> io::Result<Vec<u8>> {
    let base = usize::try_from(address).map_err(io::Error::other)?;
    let mut buffer = vec![0; length];
    let first = length.min(PAGE - base % PAGE);
    let parts = [
        RemoteIoVec { base, len: first },
        RemoteIoVec {
            base: base.wrapping_add(first),
            len: length - first,
        },
    ];
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut buffer)], &parts)?;
    buffer.truncate(read);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_text_of_this_process() {
        let text = c"/a/path";
        let read = path(Pid::this(), text.as_ptr() as u64).expect("reads");
        assert_eq!(read.as_deref(), Some(&b"/a/path"[..]));
        assert_eq!(path(Pid::this(), 0).expect("reads"), None);
        assert!(path(Pid::this(), 8).is_err());
    }
}
