//! Whether a daemon that ended is followed by another.
//!
//! Somebody who kills daemons is no reason to give up, a daemon that cannot live is: its clients
//! would wait for ever. Pure: told how a daemon's life went, it says what to do.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// Failures in a row after which it is hopeless.
const FAILURES: u32 = 10;

/// A daemon that dies by itself so soon after it was ready died of what it took over.
const SETTLED: Duration = Duration::from_secs(10);

/// How much longer than after the last failure to wait after another one.
const PAUSE: Duration = Duration::from_millis(20);

/// How a daemon's life went.
#[derive(Debug)]
pub struct Life {
    end: End,
    /// How long it served, if it came to that.
    served: Option<Duration>,
}

#[derive(Debug)]
enum End {
    Status(ExitStatus),
    Never(String),
    Hung,
}

impl Life {
    /// It ended with a status.
    pub fn of(status: ExitStatus, served: Option<Duration>) -> Self {
        Self {
            end: End::Status(status),
            served,
        }
    }

    /// It could not even be started.
    pub fn never(why: String) -> Self {
        Self {
            end: End::Never(why),
            served: None,
        }
    }

    /// It did not come up, and was killed.
    pub fn hung() -> Self {
        Self {
            end: End::Hung,
            served: None,
        }
    }

    fn is_failure(&self) -> bool {
        let killed =
            matches!(&self.end, End::Status(status) if status.signal() == Some(libc::SIGKILL));
        self.served.is_none_or(|served| !killed && served < SETTLED)
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            End::Status(status) => write!(f, "died ({status})"),
            End::Never(why) => f.write_str(why),
            End::Hung => f.write_str("did not come up in time"),
        }
    }
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// End with this exit code.
    End(u8),
    /// Start another, after a pause.
    Restart(Duration),
    /// Let go of everything.
    GiveUp,
}

/// What is remembered of earlier lives.
#[derive(Debug, Default)]
pub struct Policy {
    failures: u32,
    /// Whether any daemon has ever served.
    served: bool,
}

impl Policy {
    /// Judges one life; `nothing_held` when no mount depends on a next one.
    pub fn judge(&mut self, life: &Life, nothing_held: bool) -> Verdict {
        if matches!(&life.end, End::Status(status) if status.success()) {
            return Verdict::End(0);
        }
        self.served |= life.served.is_some();
        if !self.served && nothing_held {
            // Whoever started us reads why in the last line of the log: say nothing after it.
            return Verdict::End(1);
        }
        if matches!(life.end, End::Hung) {
            return Verdict::GiveUp;
        }
        if !life.is_failure() {
            self.failures = 0;
            return Verdict::Restart(Duration::ZERO);
        }
        self.failures += 1;
        if self.failures >= FAILURES {
            Verdict::GiveUp
        } else {
            Verdict::Restart(PAUSE * (self.failures - 1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(raw: i32, served_ms: Option<u64>) -> Life {
        Life::of(
            ExitStatus::from_raw(raw),
            served_ms.map(Duration::from_millis),
        )
    }

    #[test]
    fn an_orderly_end_is_the_end() {
        let mut policy = Policy::default();
        assert_eq!(policy.judge(&life(0, Some(5)), false), Verdict::End(0));
    }

    #[test]
    fn a_first_daemon_that_cannot_start_is_not_tried_again() {
        for never in [life(1 << 8, None), Life::never("no".into()), Life::hung()] {
            assert_eq!(Policy::default().judge(&never, true), Verdict::End(1));
        }
    }

    #[test]
    fn killing_never_wears_it_out() {
        let mut policy = Policy::default();
        for _ in 0..1000 {
            assert_eq!(
                policy.judge(&life(9, Some(1)), true),
                Verdict::Restart(Duration::ZERO)
            );
            // Every now and then one is killed before it is ready.
            for _ in 0..5 {
                assert!(matches!(
                    policy.judge(&life(9, None), false),
                    Verdict::Restart(_)
                ));
            }
        }
    }

    #[test]
    fn what_dies_of_itself_is_given_up() {
        // SIGABRT soon after it was ready; exit status 1 before.
        for (raw, served) in [(6, Some(10)), (1 << 8, None)] {
            let mut policy = Policy::default();
            policy.judge(&life(9, Some(1)), false);
            for _ in 1..FAILURES {
                assert!(matches!(
                    policy.judge(&life(raw, served), false),
                    Verdict::Restart(_)
                ));
            }
            assert_eq!(policy.judge(&life(raw, served), false), Verdict::GiveUp);
        }
        let mut policy = Policy::default();
        for _ in 0..100 {
            let late = life(6, Some(60_000));
            assert_eq!(policy.judge(&late, false), Verdict::Restart(Duration::ZERO));
        }
        assert_eq!(policy.judge(&Life::hung(), false), Verdict::GiveUp);
    }
}
