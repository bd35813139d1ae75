//! A breaker: a remote that does not answer is left alone for a while, so that builds go on without it
//! at full speed, and is tried again by itself.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Failures in a row after which the remote is left alone.
const FAILURES: u32 = 3;

/// How long at first, and at most: each try that fails doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How long it is left alone while somebody waits for it, who asked for that; and how long others wait for what
/// comes of a try.
const IMPATIENCE: Duration = Duration::from_secs(1);

/// Whether a remote is worth a try.
#[derive(Default)]
pub struct Breaker {
    state: Mutex<State>,
    /// Something came of the try behind a pause.
    tried: Condvar,
}

struct State {
    failures: u32,
    pause: Duration,
    /// Until when nobody tries.
    open_until: Option<Instant>,
    /// Since when one does, behind a pause.
    trying: Option<Instant>,
    /// Whether a pause was cut short because others were answered.
    hastened: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            failures: 0,
            pause: FIRST_PAUSE,
            open_until: None,
            trying: None,
            hastened: false,
        }
    }
}

impl State {
    fn leave_at(&mut self, now: Instant) -> Option<Leave> {
        match self.open_until {
            None => Some(Leave::WhileItAnswers),
            Some(until) if now < until => None,
            Some(_) => {
                self.open_until = Some(now + self.pause);
                self.trying = Some(now);
                Some(Leave::ToTry)
            }
        }
    }
}

/// Leave to make a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// As long as the remote answers: who waits before the call asks again.
    WhileItAnswers,
    /// It is the one behind a pause, which finds out whether the remote answers.
    ToTry,
}

impl Breaker {
    /// Whether a call may be made. Behind a pause, one may. If that is never made, another one may behind as
    /// long a pause.
    pub fn leave(&self) -> Option<Leave> {
        self.state.lock().leave_at(Instant::now())
    }

    /// The same for somebody who does not do without it where others are about to find out that it answers: that
    /// takes no longer than [`IMPATIENCE`] where it does.
    pub fn leave_with_others(&self) -> Option<Leave> {
        let mut state = self.state.lock();
        let leave = state.leave_at(Instant::now());
        let (None, Some(since)) = (leave, state.trying) else {
            return leave;
        };
        let is_undecided = |state: &mut State| state.trying == Some(since);
        let deadline = since + IMPATIENCE;
        self.tried
            .wait_while_until(&mut state, is_undecided, deadline);
        state.leave_at(Instant::now())
    }

    /// Somebody waits: the next try is at most [`IMPATIENCE`] away.
    pub fn hasten(&self) {
        let soon = Instant::now() + IMPATIENCE;
        let mut state = self.state.lock();
        state.open_until = state.open_until.map(|until| until.min(soon));
    }

    /// The remote answers, as others have found: the next call may be made at once. Not again before one of its
    /// own calls is answered, or they would shorten every pause of one that has its own reasons to fail.
    pub fn try_now(&self) {
        let mut state = self.state.lock();
        if state.open_until.is_some() && !std::mem::replace(&mut state.hastened, true) {
            state.open_until = Some(Instant::now());
        }
    }

    /// Whether the remote is being left alone.
    pub fn is_open(&self) -> bool {
        self.state.lock().open_until.is_some()
    }

    /// Whether a call would not be made now.
    pub fn is_paused(&self) -> bool {
        let until = self.state.lock().open_until;
        until.is_some_and(|until| Instant::now() < until)
    }

    /// A call was answered. Whether the remote had been left alone before.
    pub fn answered(&self) -> bool {
        let mut state = self.state.lock();
        state.failures = 0;
        if state.trying.take().is_some() {
            self.tried.notify_all();
        }
        state.hastened = false;
        state.pause = FIRST_PAUSE;
        state.open_until.take().is_some()
    }

    /// A call was not answered; `waited` when all of its time went by, which costs a build more than
    /// an error does. Whether the remote is left alone from now on.
    pub fn failed(&self, waited: bool) -> bool {
        self.failed_at(waited, Instant::now())
    }

    fn failed_at(&self, waited: bool, now: Instant) -> bool {
        let mut state = self.state.lock();
        state.failures += 1;
        if state.open_until.is_some() {
            // Calls that were under way when it opened say nothing new.
            if state.trying.take().is_none() {
                return false;
            }
            self.tried.notify_all();
            state.pause = (state.pause * 2).min(LONGEST_PAUSE);
            state.open_until = Some(now + state.pause);
            return false;
        }
        if !waited && state.failures < FAILURES {
            return false;
        }
        state.open_until = Some(now + state.pause);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave_at(breaker: &Breaker, now: Instant) -> Option<Leave> {
        breaker.state.lock().leave_at(now)
    }

    fn allows(breaker: &Breaker, now: Instant) -> bool {
        leave_at(breaker, now).is_some()
    }

    #[test]
    fn who_waits_does_not_wait_for_the_pause() {
        let breaker = Breaker::default();
        breaker.hasten();
        assert!(!breaker.is_open(), "nothing is to be hastened");
        assert!(breaker.failed(true));
        breaker.hasten();
        let now = Instant::now();
        assert!(!allows(&breaker, now));
        assert!(allows(&breaker, now + IMPATIENCE));
    }

    #[test]
    fn others_cut_one_pause_short() {
        let breaker = Breaker::default();
        breaker.try_now();
        assert!(!breaker.is_open(), "nothing is to be cut short");
        assert!(breaker.failed(true));
        breaker.try_now();
        assert_eq!(breaker.leave(), Some(Leave::ToTry));
        breaker.failed(true);
        breaker.try_now();
        assert_eq!(breaker.leave(), None);
        breaker.answered();
        breaker.failed(true);
        breaker.try_now();
        assert_eq!(breaker.leave(), Some(Leave::ToTry));
    }

    #[test]
    fn it_opens_after_some_errors_or_one_long_wait() {
        let now = Instant::now();
        let breaker = Breaker::default();
        assert!(!breaker.failed_at(false, now));
        assert!(!breaker.failed_at(false, now));
        assert!(allows(&breaker, now));
        assert!(breaker.failed_at(false, now));
        assert!(!allows(&breaker, now));
        let breaker = Breaker::default();
        assert!(breaker.failed_at(true, now));
        assert!(!allows(&breaker, now) && breaker.is_open());
    }

    #[test]
    fn one_tries_again_and_an_answer_closes_it() {
        let now = Instant::now();
        let breaker = Breaker::default();
        breaker.failed_at(true, now);
        let later = now + FIRST_PAUSE;
        assert!(allows(&breaker, later), "one may try");
        assert!(!allows(&breaker, later), "the others wait");
        breaker.failed_at(true, later);
        assert!(!allows(&breaker, later + FIRST_PAUSE), "twice as long");
        assert!(allows(&breaker, later + FIRST_PAUSE * 2));
        assert!(breaker.answered());
        assert!(allows(&breaker, later) && !breaker.answered());
        for _ in 0..20 {
            breaker.failed_at(true, now);
        }
        assert!(allows(&breaker, now + LONGEST_PAUSE), "it never gives up");
    }

    #[test]
    fn who_may_try_and_does_not_keeps_nobody_from_it() {
        let now = Instant::now();
        let breaker = Breaker::default();
        assert_eq!(leave_at(&breaker, now), Some(Leave::WhileItAnswers));
        breaker.failed_at(true, now);
        for pauses in 1..4 {
            let later = now + FIRST_PAUSE * pauses;
            assert_eq!(leave_at(&breaker, later), Some(Leave::ToTry));
            assert_eq!(leave_at(&breaker, later), None);
        }
    }

    #[test]
    fn who_cannot_do_without_waits_for_what_comes_of_a_try() {
        let breaker = Breaker::default();
        breaker.failed(true);
        assert_eq!(breaker.leave_with_others(), None, "nobody tries");
        for is_answered in [true, false] {
            breaker.failed(true);
            breaker.try_now();
            assert_eq!(breaker.leave_with_others(), Some(Leave::ToTry));
            let leave = std::thread::scope(|scope| {
                let waits = scope.spawn(|| breaker.leave_with_others());
                std::thread::sleep(IMPATIENCE / 5);
                if is_answered {
                    breaker.answered();
                } else {
                    breaker.failed(true);
                }
                waits.join().expect("ends")
            });
            assert_eq!(leave, is_answered.then_some(Leave::WhileItAnswers));
        }
        // Not longer than it takes where it answers, and that once for each try.
        breaker.answered();
        breaker.failed(true);
        breaker.try_now();
        breaker.leave();
        let began = Instant::now();
        for _ in 0..3 {
            assert_eq!(breaker.leave_with_others(), None);
        }
        assert!(began.elapsed() < 2 * IMPATIENCE, "{:?}", began.elapsed());
    }
}
