//! Kills the daemon of a sandbox at random moments, again and again, while something else goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};

use crate::{Must, Sandbox};

/// The least time between two kills. The rest is chance.
const PAUSE: Duration = Duration::from_millis(20);

/// Runs `work` while the daemon is killed, each time up to `longest` after it came back, and returns
/// what `work` returned and how often it was killed. Stops when `work` ends, or after `most` kills.
#[track_caller]
pub fn killing<T>(
    sandbox: &Sandbox,
    most: usize,
    longest: Duration,
    work: impl FnOnce(&AtomicBool) -> T,
) -> (T, usize) {
    let ended = AtomicBool::new(false);
    let spent = AtomicBool::new(false);
    let mut chance = Chance::new();
    eprintln!("seed {}", chance.0);
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            // Whoever waits for us must not wait for ever when a kill fails.
            let _spent = SetOnDrop(&spent);
            let mut kills = 0;
            while kills < most {
                let pause = longest.mul_f64(chance.next());
                thread::sleep(pause.max(PAUSE));
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                match kill(sandbox.current_daemon(), Signal::SIGKILL) {
                    Ok(()) => kills += 1,
                    // Dead already: `current_daemon` was quicker than the keeper.
                    Err(Errno::ESRCH) => {}
                    Err(error) => panic!("killing the daemon: {error}"),
                }
            }
            kills
        });
        let value = {
            let _ended = SetOnDrop(&ended);
            work(&spent)
        };
        let kills = killer.join().ok().must("the killer");
        (value, kills)
    })
}

/// Says `true` when dropped, also by a failing test.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Numbers nobody foresees (xorshift64).
pub struct Chance(u64);

impl Default for Chance {
    fn default() -> Self {
        Self::new()
    }
}

impl Chance {
    /// Starts anywhere.
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanos = now.map_or(1, |now| now.subsec_nanos());
        Self(u64::from(nanos) << 20 | u64::from(std::process::id()) | 1)
    }

    fn step(&mut self) {
        for (left, by) in [(true, 13), (false, 7), (true, 17)] {
            self.0 ^= if left { self.0 << by } else { self.0 >> by };
        }
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.step();
        usize::try_from((self.0 >> 20) % end as u64).unwrap_or(0)
    }

    /// A time up to `longest`.
    pub fn pause(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.next())
    }

    /// Between 0 and 1.
    fn next(&mut self) -> f64 {
        self.step();
        f64::from(u32::try_from(self.0 >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }
}
