//! The one clock of every view.
//!
//! Cargo compares modification times across files, some stamped by the kernel and some by us. So
//! all of them come from the kernel's coarse realtime clock (`ktime_get_coarse_real_ts64`, what
//! the VFS stamps with), never from the precise one. When the administrator sets the clock back,
//! views follow as every disk does: a clock of our own ahead of the kernel's would make edited
//! sources look older than what was built from them.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use store::Timestamp;

/// The time by which files are stamped now.
pub fn now() -> Timestamp {
    // Fails only for clocks the kernel does not have (clock_gettime(2)).
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_or_else(
        |_| Timestamp::default(),
        |time| Timestamp {
            secs: time.tv_sec(),
            nanos: u32::try_from(time.tv_nsec()).unwrap_or(0),
        },
    )
}

/// How long this machine runs, asleep or not: what counts between machines, where an `Instant` stands still in
/// suspend (`clock_gettime(2)`).
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        Duration::new(seconds, u32::try_from(time.tv_nsec()).unwrap_or(0))
    })
}

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    let now = now();
    u64::try_from(now.secs).unwrap_or(0) * 1000 + u64::from(now.nanos / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_what_the_kernel_stamps() {
        let dir = tempfile::tempdir().expect("tempdir");
        let before = now();
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").expect("writes");
        let after = now();
        let meta = std::fs::metadata(&path).expect("stat");
        let stamped = Timestamp {
            secs: std::os::unix::fs::MetadataExt::mtime(&meta),
            nanos: u32::try_from(std::os::unix::fs::MetadataExt::mtime_nsec(&meta)).expect("ns"),
        };
        // File systems with multigrain timestamps may stamp up to one tick (4 ms) finer.
        assert!(before <= stamped, "{before:?} {stamped:?}");
        assert!(stamped.secs - after.secs <= 1, "{stamped:?} {after:?}");
    }
}
