//! What `docs/cache-key.md` names as known gaps, of those that can be generated here: left out, so
//! that a difference is always news.
//!
//! `KACHEFS_FUZZ_GAPS=1` generates them too, to see whether they are still there.

use crate::world::Ask;

/// Each with the reason.
pub const KNOWN: &[(Ask, &str)] = &[(
    Ask::DirectoryName,
    "a part of a path in the output, not the path itself: another checkout has the first one's",
)];

/// The gaps to generate all the same.
pub fn wanted() -> &'static [(Ask, &'static str)] {
    if std::env::var_os("KACHEFS_FUZZ_GAPS").is_some_and(|value| value == "1") {
        KNOWN
    } else {
        &[]
    }
}
