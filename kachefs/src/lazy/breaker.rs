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
    /// How long a try may take: nobody else makes one meanwhile.
    longest: Duration,
    /// Something came of the try behind a pause.
    tried: Condvar,
}

struct State {
    failures: u32,
    pause: Duration,
    /// Until when nobody tries.
    open_until: Option<Instant>,
    /// How often it was opened, closed, and found out from others that it answers: what comes of calls that began
    /// before says nothing new.
    era: u64,
    /// The one that does, behind a pause.
    trying: Option<Try>,
    /// Whether a pause was cut short because others were answered.
    hastened: bool,
    /// Whether it is this pause, so that the next try is promising.
    is_promising: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Try {
    since: Instant,
    is_promising: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            failures: 0,
            pause: FIRST_PAUSE,
            open_until: None,
            era: 0,
            trying: None,
            hastened: false,
            is_promising: false,
        }
    }
}

impl State {
    fn leave_at(&mut self, now: Instant, longest: Duration) -> Option<Leave> {
        match self.open_until {
            None => Some(Leave {
                is_try: false,
                era: self.era,
            }),
            Some(until) if now < until => None,
            Some(_) => {
                self.open_until = Some(now + self.pause.max(longest));
                let is_promising = std::mem::take(&mut self.is_promising);
                self.trying = Some(Try {
                    since: now,
                    is_promising,
                });
                Some(Leave {
                    is_try: true,
                    era: self.era,
                })
            }
        }
    }
}

/// Leave to make a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leave {
    /// Whether it is the one behind a pause, which finds out whether the remote answers; else it counts as long as
    /// it does, and who waits before the call asks again.
    pub is_try: bool,
    era: u64,
}

impl Breaker {
    /// One of which a try may take so long.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            ..Self::default()
        }
    }

    /// Whether a call may be made. Behind a pause, one may. If that is never made, another one may after the time a
    /// try may take, or as long a pause.
    pub fn leave(&self) -> Option<Leave> {
        self.state.lock().leave_at(Instant::now(), self.longest)
    }

    /// The same for somebody who does not do without it where others are about to find out whether it answers: as
    /// long as a try takes where it is known to answer others, else no longer than [`IMPATIENCE`].
    pub fn leave_with_others(&self) -> Option<Leave> {
        let mut state = self.state.lock();
        let leave = state.leave_at(Instant::now(), self.longest);
        let (None, Some(tries)) = (leave, state.trying) else {
            return leave;
        };
        let is_undecided = |state: &mut State| state.trying == Some(tries);
        let patience = if tries.is_promising {
            self.longest
        } else {
            IMPATIENCE.min(self.longest)
        };
        let deadline = tries.since + patience;
        self.tried
            .wait_while_until(&mut state, is_undecided, deadline);
        state.leave_at(Instant::now(), self.longest)
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
            state.is_promising = true;
            // What comes of a try from before is no news.
            state.era += 1;
            if state.trying.take().is_some() {
                self.tried.notify_all();
            }
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
        state.is_promising = false;
        state.pause = FIRST_PAUSE;
        let was_open = state.open_until.take().is_some();
        state.era += u64::from(was_open);
        was_open
    }

    /// A call with this leave was not answered; `waited` when all of its time went by, which costs a build more
    /// than an error does. Whether the remote is left alone from now on.
    pub fn failed(&self, leave: Leave, waited: bool) -> bool {
        self.failed_at(leave, waited, Instant::now())
    }

    fn failed_at(&self, leave: Leave, waited: bool, now: Instant) -> bool {
        let mut state = self.state.lock();
        if leave.era != state.era {
            return false;
        }
        state.failures += 1;
        if state.open_until.is_some() {
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
        state.era += 1;
        true
    }
}

#[cfg(test)]
impl Breaker {
    /// A call that begins now is not answered, after all of its time.
    pub fn waits_in_vain(&self) -> bool {
        let leave = self.state.lock().any_leave();
        self.failed(leave, true)
    }
}

#[cfg(test)]
impl State {
    fn any_leave(&self) -> Leave {
        Leave {
            is_try: false,
            era: self.era,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits in these tests are far shorter.
    const LONG: Duration = Duration::from_mins(1);

    fn leave_at(breaker: &Breaker, now: Instant) -> Option<Leave> {
        breaker.state.lock().leave_at(now, breaker.longest)
    }

    fn allows(breaker: &Breaker, now: Instant) -> bool {
        leave_at(breaker, now).is_some()
    }

    fn is_try(leave: Option<Leave>) -> Option<bool> {
        leave.map(|leave| leave.is_try)
    }

    fn fails_at(breaker: &Breaker, waited: bool, now: Instant) -> bool {
        let leave = breaker.state.lock().any_leave();
        breaker.failed_at(leave, waited, now)
    }

    #[test]
    fn who_waits_does_not_wait_for_the_pause() {
        let breaker = Breaker::default();
        breaker.hasten();
        assert!(!breaker.is_open(), "nothing is to be hastened");
        assert!(breaker.waits_in_vain());
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
        assert!(breaker.waits_in_vain());
        breaker.try_now();
        assert_eq!(is_try(breaker.leave()), Some(true));
        breaker.waits_in_vain();
        breaker.try_now();
        assert_eq!(breaker.leave(), None);
        breaker.answered();
        breaker.waits_in_vain();
        breaker.try_now();
        assert_eq!(is_try(breaker.leave()), Some(true));
    }

    #[test]
    fn it_opens_after_some_errors_or_one_long_wait() {
        let now = Instant::now();
        let breaker = Breaker::default();
        assert!(!fails_at(&breaker, false, now));
        assert!(!fails_at(&breaker, false, now));
        assert!(allows(&breaker, now));
        assert!(fails_at(&breaker, false, now));
        assert!(!allows(&breaker, now));
        let breaker = Breaker::default();
        assert!(fails_at(&breaker, true, now));
        assert!(!allows(&breaker, now) && breaker.is_open());
    }

    #[test]
    fn one_tries_again_and_an_answer_closes_it() {
        let now = Instant::now();
        let breaker = Breaker::default();
        fails_at(&breaker, true, now);
        let later = now + FIRST_PAUSE;
        assert!(allows(&breaker, later), "one may try");
        assert!(!allows(&breaker, later), "the others wait");
        fails_at(&breaker, true, later);
        assert!(!allows(&breaker, later + FIRST_PAUSE), "twice as long");
        assert!(allows(&breaker, later + FIRST_PAUSE * 2));
        assert!(breaker.answered());
        assert!(allows(&breaker, later) && !breaker.answered());
        for _ in 0..20 {
            fails_at(&breaker, true, now);
        }
        assert!(allows(&breaker, now + LONGEST_PAUSE), "it never gives up");
    }

    #[test]
    fn who_may_try_and_does_not_keeps_nobody_from_it() {
        let now = Instant::now();
        let breaker = Breaker::default();
        assert_eq!(is_try(leave_at(&breaker, now)), Some(false));
        fails_at(&breaker, true, now);
        for pauses in 1..4 {
            let later = now + FIRST_PAUSE * pauses;
            assert_eq!(is_try(leave_at(&breaker, later)), Some(true));
            assert_eq!(leave_at(&breaker, later), None);
        }
    }

    #[test]
    fn what_began_before_says_nothing_of_what_came_since() {
        let breaker = Breaker::default();
        let calls = [(); 4].map(|()| breaker.leave().expect("it answers"));
        assert!(breaker.failed(calls[0], true));
        breaker.try_now();
        let tries = breaker.leave().expect("one may");
        // Not the end of that try.
        assert!(!breaker.failed(calls[1], true));
        assert!(breaker.state.lock().trying.is_some());
        assert!(breaker.answered());
        assert!(!breaker.failed(calls[2], true), "it has answered since");
        assert!(!breaker.failed(tries, true));
        assert_eq!(is_try(breaker.leave()), Some(false));
    }

    #[test]
    fn a_try_from_before_says_nothing_of_a_promise() {
        let breaker = Breaker::new(LONG);
        breaker.waits_in_vain();
        breaker.hasten();
        std::thread::sleep(IMPATIENCE);
        let old = breaker.leave().expect("one may");
        breaker.try_now();
        let new = breaker.leave().expect("others are answered");
        assert!(old.is_try && new.is_try);
        assert!(!breaker.failed(old, true));
        let trying = breaker.state.lock().trying.expect("the new one goes on");
        assert!(trying.is_promising);
        assert!(breaker.answered());
    }

    #[test]
    fn nobody_tries_while_a_try_may_take() {
        let breaker = Breaker::new(LONG);
        let now = Instant::now();
        fails_at(&breaker, true, now);
        let later = now + FIRST_PAUSE;
        assert_eq!(is_try(leave_at(&breaker, later)), Some(true));
        assert_eq!(leave_at(&breaker, later + FIRST_PAUSE * 2), None);
        fails_at(&breaker, true, later + FIRST_PAUSE);
        assert_eq!(
            is_try(leave_at(&breaker, later + FIRST_PAUSE * 3)),
            Some(true)
        );
        assert!(allows(&breaker, later + FIRST_PAUSE * 3 + LONG));
    }

    /// What somebody gets who asks while another one tries, and how long that takes.
    fn asks_beside_a_try(breaker: &Breaker, end: impl FnOnce(Leave)) -> (Option<bool>, Duration) {
        let tries = breaker.leave().expect("one may try");
        assert!(tries.is_try);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let began = Instant::now();
                (is_try(breaker.leave_with_others()), began.elapsed())
            });
            std::thread::sleep(Duration::from_millis(50));
            end(tries);
            waits.join().expect("ends")
        })
    }

    #[test]
    fn who_cannot_do_without_waits_for_what_comes_of_a_try() {
        let breaker = Breaker::new(LONG);
        breaker.waits_in_vain();
        assert_eq!(breaker.leave_with_others(), None, "nobody tries");
        // Others are answered: as long as the try takes.
        breaker.try_now();
        let (leave, _) = asks_beside_a_try(&breaker, |tries| {
            std::thread::sleep(IMPATIENCE);
            assert!(!breaker.failed(tries, true));
        });
        assert_eq!(leave, None);
        breaker.hasten();
        std::thread::sleep(IMPATIENCE);
        let (leave, _) = asks_beside_a_try(&breaker, |_| assert!(breaker.answered()));
        assert_eq!(leave, Some(false));
    }

    #[test]
    fn nobody_waits_long_for_a_try_of_which_nothing_is_known() {
        let breaker = Breaker::new(LONG);
        breaker.waits_in_vain();
        breaker.hasten();
        std::thread::sleep(IMPATIENCE);
        let (leave, took) = asks_beside_a_try(&breaker, |_| {});
        assert_eq!(leave, None);
        assert!(took < LONG / 2, "{took:?}");
        // Once for each try.
        let began = Instant::now();
        assert_eq!(breaker.leave_with_others(), None);
        assert!(began.elapsed() < IMPATIENCE / 2, "{:?}", began.elapsed());
    }
}
