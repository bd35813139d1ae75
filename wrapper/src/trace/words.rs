//! What the watcher and the shim (`shim/lib.rs`, which this file is part of, too) have agreed on.

use core::ffi::CStr;

/// Where the shim has the instruction whose calls the filter lets pass: an address that programs and
/// kernels leave alone.
pub(super) const GATE: usize = 0x6b61_6368_0000;

/// Paths that begin so are said to the watcher. Nothing is called so.
pub(super) const WORD: &[u8] = b"/proc/self/kachefs-";

/// To ask for this has the watcher write which directories hold nothing that programs are loaded with
/// ([`super::ring::Ring::vain`]).
pub(super) const SEARCH: &CStr = c"/proc/self/kachefs-search";

/// To open this, with one's process number in hexadecimal behind it, is to ask for the memory to write
/// to. The watcher answers with a descriptor.
pub(super) const ATTACH: &[u8] = b"/proc/self/kachefs-shim/";

/// What jemalloc goes by (jemalloc(3), "TUNING").
pub(super) const ALLOCATOR: &str = "MALLOC_CONF";

/// How that begins where a watched compiler is told it, and nobody else would begin it: what is so already.
pub const ALLOCATOR_IS_TOLD: &str = "abort_conf:false,narenas:";

/// Where the dynamic linker looks, in each directory, for libraries made for its processor (ld.so(8),
/// "Hardware capabilities").
pub(super) const FOR_PROCESSORS: [&[u8]; 6] = [
    b"glibc-hwcaps",
    b"tls",
    b"haswell",
    b"xeon_phi",
    b"avx512_1",
    b"x86_64",
];
