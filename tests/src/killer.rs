//! Kills the daemon of a sandbox at random moments, again and again, while something else goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};

use crate::chance::Chance;
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
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            // Whoever waits for us must not wait for ever when a kill fails.
            let _spent = SetOnDrop(&spent);
            let mut kills = 0;
            while kills < most {
                let pause = longest.mul_f64(chance.part());
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

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
