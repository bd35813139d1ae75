//! When to make a sync point: as rarely as the kernel itself writes, in quiet moments if there are
//! any, and once more when the daemon ends in order.
//!
//! The thread holds no lock that a request needs while it waits for the disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::statvfs::statvfs;
use nix::time::{ClockId, clock_gettime};

use super::mounts::Mounts;
use crate::storage::Storage;

/// Instead of [`INTERVAL`], in milliseconds and without waiting for a quiet moment: for tests.
const TEST_INTERVAL: &str = "KACHEFS_TEST_SYNC_MS";

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);

/// The kernel writes what is older than this (`vm.dirty_expire_centisecs`): so we make it write
/// nothing that it would not write anyway.
const INTERVAL: Duration = Duration::from_secs(30);

/// Without a change for so long, nobody is at work.
const QUIET: Duration = Duration::from_secs(3);

/// How much longer than [`INTERVAL`] a sync point waits for a quiet moment.
const PATIENCE: Duration = Duration::from_secs(15);

/// Bytes that wait for their removal until they are worth a sync point of their own.
const WORTHWHILE: u64 = 256 << 20;

/// Of a disk: when less than one in so many blocks is free, what waits for its removal goes at once.
const SCARCE: u64 = 32;

/// How far the clock may go back unnoticed; sync points are said to be earlier by more than that.
const STEP: i64 = 1;

/// Makes a sync point; `ended` when nothing changes after it.
pub fn make_sync_point(mounts: &Mounts, ended: bool) -> Result<()> {
    let save = |epoch| {
        for (path, view) in mounts.in_use() {
            view.mark_written(epoch);
            view.save_dirty()
                .with_context(|| format!("cannot store records of {}", path.display()))?;
        }
        Ok(())
    };
    mounts.storage.sync_point(save, ended)
}

/// Makes sync points for as long as anybody has mounts.
pub fn make_now_and_then(mounts: &Arc<Mounts>) -> Result<()> {
    let mounts = Arc::downgrade(mounts);
    let mut pace = Pace::from_environment(Instant::now());
    let mut clock = Clock::now();
    let run = move || {
        loop {
            std::thread::sleep(pace.tick);
            let Some(mounts) = mounts.upgrade() else {
                return;
            };
            look(&mounts, &mut pace, &mut clock);
        }
    };
    std::thread::Builder::new()
        .name("sync-points".into())
        .spawn(run)
        .context("cannot start a thread")?;
    Ok(())
}

fn look(mounts: &Mounts, pace: &mut Pace, clock: &mut Clock) {
    let storage = &mounts.storage;
    if let Some(seconds) = clock.went_back()
        && let Err(error) = storage.clock_went_back(seconds)
    {
        let error = format!("{error:#}");
        tracing::error!(error, "the clock went back, and that cannot be stored");
    }
    let now = Instant::now();
    pace.see(storage.epochs.changes(), storage.retired().1, now);
    if !pace.is_due(now, is_urgent(storage)) {
        return;
    }
    // Before it, so that what changes meanwhile is seen as new.
    pace.made(now);
    if let Err(error) = make_sync_point(mounts, false) {
        let error = format!("{error:#}");
        tracing::error!(error, "no sync point");
    }
    let took = now.elapsed();
    if took > TICK {
        tracing::info!(?took, "sync point");
    }
}

/// Whether what waits for its removal takes room that is needed.
fn is_urgent(storage: &Storage) -> bool {
    let (bytes, waits) = storage.retired();
    let scarce = || {
        statvfs(storage.dir.root())
            .is_ok_and(|disk| disk.blocks_available() < disk.blocks() / SCARCE)
    };
    bytes > WORTHWHILE || waits && scarce()
}

/// Decides when.
struct Pace {
    tick: Duration,
    interval: Duration,
    quiet: Duration,
    patience: Duration,
    /// How many changes there were at the last look.
    seen: u64,
    /// Since when there is something to vouch for.
    first: Option<Instant>,
    /// When a change was last seen.
    last: Instant,
}

impl Pace {
    fn from_environment(now: Instant) -> Self {
        let pace = |interval, quiet, patience| Self {
            tick: TICK.min(interval),
            interval,
            quiet,
            patience,
            seen: 0,
            first: None,
            last: now,
        };
        let test = std::env::var(TEST_INTERVAL).ok();
        match test.and_then(|text| text.parse().ok()) {
            Some(millis) => {
                let interval = Duration::from_millis(millis);
                pace(interval, Duration::ZERO, Duration::ZERO)
            }
            None => pace(INTERVAL, QUIET, PATIENCE),
        }
    }

    /// Takes in how many changes the epoch has seen, and whether something waits.
    fn see(&mut self, changes: u64, waits: bool, now: Instant) {
        if changes != self.seen {
            self.seen = changes;
            self.last = now;
        }
        if changes > 0 || waits {
            self.first.get_or_insert(now);
        }
    }

    fn is_due(&self, now: Instant, urgent: bool) -> bool {
        let Some(first) = self.first else {
            return false;
        };
        let waited = now.saturating_duration_since(first);
        let quiet = now.saturating_duration_since(self.last) >= self.quiet;
        let patience = self.interval + self.patience;
        urgent || waited >= self.interval && (quiet || waited >= patience)
    }

    fn made(&mut self, now: Instant) {
        self.seen = 0;
        self.first = None;
        self.last = now;
    }
}

/// Notices when somebody sets the clock back.
struct Clock(i64);

impl Clock {
    /// How far the time of day is ahead of the time since boot, in seconds.
    fn now() -> Self {
        let seconds = |clock| clock_gettime(clock).map_or(0, |time| time.tv_sec());
        Self(seconds(ClockId::CLOCK_REALTIME) - seconds(ClockId::CLOCK_BOOTTIME))
    }

    /// The seconds it was set back since the last call, if so.
    fn went_back(&mut self) -> Option<i64> {
        let before = std::mem::replace(self, Self::now()).0;
        // Corrections by a fraction of a second go unnoticed, and are within the slack.
        (self.0 < before - STEP).then(|| before - self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(start: Instant) -> Pace {
        Pace {
            tick: TICK,
            interval: INTERVAL,
            quiet: QUIET,
            patience: PATIENCE,
            seen: 0,
            first: None,
            last: start,
        }
    }

    /// The seconds at which sync points are made when `changes` says how many there were by then.
    fn made(seconds: u64, changes: impl Fn(u64) -> u64, urgent: impl Fn(u64) -> bool) -> Vec<u64> {
        let start = Instant::now();
        let mut pace = pace(start);
        let (mut all, mut before) = (Vec::new(), 0);
        for second in 0..seconds {
            let now = start + Duration::from_secs(second);
            pace.see(changes(second) - before, false, now);
            if pace.is_due(now, urgent(second)) {
                pace.made(now);
                before = changes(second);
                all.push(second);
            }
        }
        all
    }

    #[test]
    fn idle_disks_are_left_alone() {
        assert!(made(1000, |_| 0, |_| false).is_empty());
        assert!(made(1000, |_| 0, |_| true).is_empty(), "nothing to free");
    }

    #[test]
    fn one_for_a_short_build_when_the_kernel_would_write() {
        assert_eq!(made(500, |s| s.min(8), |_| false), [31]);
    }

    #[test]
    fn a_long_build_is_interrupted_rarely() {
        let all = made(100, |s| s, |_| false);
        assert_eq!(all, [46, 92]);
    }

    #[test]
    fn a_quiet_moment_is_taken() {
        // At work from 0 to 33, and again from 37.
        let changes = |s: u64| s.min(33) + s.saturating_sub(37);
        assert_eq!(made(60, changes, |_| false), [36]);
    }

    #[test]
    fn room_that_is_needed_waits_for_nothing() {
        assert_eq!(made(20, |s| s, |s| s == 5), [5]);
    }

    #[test]
    fn a_steady_clock_goes_nowhere() {
        let mut clock = Clock::now();
        assert_eq!(clock.went_back(), None);
        clock.0 += 3600;
        let seconds = clock.went_back().expect("an hour");
        assert!((3599..=3601).contains(&seconds));
        assert_eq!(clock.went_back(), None);
    }
}
