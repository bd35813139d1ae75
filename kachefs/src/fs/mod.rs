//! The file system proper: views, inodes and content pointers, in plain Rust types.
//!
//! Arguments in, `Result<_, Errno>` out; nothing here knows FUSE, so everything can be tested
//! without a mount. `view` has the nodes, `load` gets them from the index, `records` puts them there.
//! `names` changes names, `directory` holds them, `again` changes them for requests sent twice, `data`
//! changes bytes, `outputs` is what the action service asks of a view (digests, ingest, bind),
//! `passthrough` lets compilers write past the daemon, `small` leaves bytes to the index, `import`
//! takes over an existing directory, `adopt` and `whole` take over what compilers made elsewhere, `clear`
//! ends everything in a view, `check` gives up files whose bytes are not in the store any more. What a
//! power cut may take back is the business of `durability` (how it is kept small) and `recovery` (what is
//! dropped after one).
//!
//! Locks: the view's `structure` lock orders changes of names; each node has one lock for its
//! state. Whoever holds `structure` may hold several node locks; everybody else holds at most one
//! and waits for no other node while holding it. The node table and the lists of what is behind
//! (dirty, forgotten, suspected) have innermost locks.

pub mod adopt;
pub mod again;
pub mod check;
pub mod clear;
pub mod data;
pub mod directory;
pub mod durability;
pub mod import;
mod load;
pub mod names;
pub mod node;
pub mod outputs;
pub mod passthrough;
mod records;
pub mod recovery;
mod small;
pub mod snapshot;
pub mod trees;
pub mod view;
pub mod whole;

pub use nix::errno::Errno;
pub use node::{Body, Node};
pub use store::Attributes;
pub use view::{Caller, Entry, Invalidate, Listed, View};

/// The result of a file system operation.
pub type FsResult<T> = Result<T, Errno>;

/// Files up to this many bytes live in the index: most files of a target by count (fingerprints,
/// dep-info, time stamps) need no backing file at all.
pub const INLINE_MAX: usize = 8 * 1024;

/// Longest name of a directory entry in bytes (`NAME_MAX`); the kernel leaves the check to us.
pub const NAME_MAX: usize = 255;

/// Turns an I/O error into the errno the caller sees.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// A failed commit: told in the log, and to the caller what the disk said, or EIO.
pub(crate) fn index_failed(error: &store::IndexError) -> Errno {
    tracing::error!(%error, "index");
    error.errno().unwrap_or(Errno::EIO)
}
