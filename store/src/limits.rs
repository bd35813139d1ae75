//! How many files this process may have open, and what the store takes of that.
//!
//! RocksDB stops for good when it cannot open its next log, so each part gets a share that leaves
//! room for the others, however low the limit is. Pure, but for asking the kernel.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Lowest share that a part can work with.
const LEAST: u64 = 16;

/// Lets this process open as many files as it may.
pub fn raise() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // When the kernel refuses, the shares are those of the lower limit.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// How many descriptors a part may keep open that would like to keep `wanted`: at most a quarter of
/// all.
pub fn share(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    share_of(limit, wanted)
}

fn share_of(limit: u64, wanted: u64) -> u64 {
    wanted.min((limit / 4).max(LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_leave_room() {
        assert_eq!(share_of(1 << 20, 512), 512);
        assert_eq!(share_of(1024, 512), 256);
        assert_eq!(share_of(128, 512), 32);
        assert_eq!(share_of(8, 512), LEAST);
        assert!(share(512) >= LEAST);
    }
}
