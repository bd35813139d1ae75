//! Many views of one daemon, everything at once, for a long time: no hang, no error, no wrong hit,
//! and a daemon that stays small.
//!
//! Every view is a hand of its own: it builds its project, then plays its scenario until the time
//! is over. A watchdog knows what each hand does and since when; invariants are checked now and
//! then and, more of them, at the end. Everything follows from a printed seed, but for how the
//! hands meet.
//!
//! `KACHEFS_TEST_LONG=1`: 24 views for 20 minutes. `KACHEFS_TEST_VIEWS` and `KACHEFS_TEST_SECONDS`
//! say otherwise, `KACHEFS_TEST_SEED` repeats.

mod asking;
mod builds;
mod churn;
mod invariants;
mod large;
mod life_cycle;
mod listing;
mod reading;
mod watchdog;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use harness::killer::killing;
use harness::{Chance, Must, Sandbox};
use nix::sys::signal::{Signal, kill};

use crate::builds::Builder;
use crate::watchdog::Watchdog;

/// What a run is.
struct Plan {
    views: usize,
    duration: Duration,
    seed: u64,
    /// Longest time the daemon lives; for ever when none is given.
    longest_life: Option<Duration>,
}

impl Plan {
    fn new(longest_life: Option<Duration>) -> Self {
        let long = std::env::var_os("KACHEFS_TEST_LONG").is_some();
        let number = |name: &str, otherwise: usize| {
            let given = std::env::var(name).ok();
            given.map_or(otherwise, |number| number.parse().must(name))
        };
        let views = number("KACHEFS_TEST_VIEWS", if long { 24 } else { 6 });
        let seconds = number("KACHEFS_TEST_SECONDS", if long { 1200 } else { 15 });
        Self {
            views,
            duration: Duration::from_secs(seconds.try_into().must("seconds")),
            seed: Chance::seed(),
            longest_life,
        }
    }
}

/// What all hands share.
pub struct World {
    /// Store, daemon and views.
    pub sandbox: Sandbox,
    watchdog: Watchdog,
    deadline: Instant,
    stopped: AtomicBool,
    done: Mutex<BTreeMap<&'static str, u64>>,
    /// Most memory the daemon was seen to use, and the names it had then.
    most: Mutex<(u64, u64)>,
}

impl World {
    /// Whether the hands should come to an end.
    pub fn is_over(&self) -> bool {
        self.stopped.load(Ordering::Relaxed) || Instant::now() >= self.deadline
    }

    /// Counts something that was done.
    pub fn did(&self, what: &'static str) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done.entry(what).or_default() += 1;
    }

    /// Notes how much memory the daemon uses, for how many names.
    pub fn used(&self, bytes: u64, names: u64) {
        let mut most = self.most.lock().unwrap_or_else(PoisonError::into_inner);
        *most = (*most).max((bytes, names));
    }

    /// How often something was done.
    pub fn times(&self, what: &str) -> u64 {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.get(what).copied().unwrap_or(0)
    }
}

/// What is played in a view once its project is built.
#[derive(Clone, Copy, Debug)]
enum Scenario {
    Builds,
    BuildsWhileRead,
    Churn,
    LifeCycle,
    Large,
    Listing,
}

/// Half of the hands build; the first six are one of each kind, and a second builder.
const SCENARIOS: [Scenario; 8] = [
    Scenario::Builds,
    Scenario::Churn,
    Scenario::BuildsWhileRead,
    Scenario::LifeCycle,
    Scenario::Large,
    Scenario::Listing,
    Scenario::Builds,
    Scenario::BuildsWhileRead,
];

/// Ends all hands when one fails.
struct StopsOnPanic<'a>(&'a World);

impl Drop for StopsOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stopped.store(true, Ordering::Relaxed);
        }
    }
}

fn play(world: &World, scenario: Scenario, builder: &mut Builder, mut chance: Chance) {
    let index = builder.index();
    let hand = world.watchdog.hand(&format!("view {index} ({scenario:?})"));
    builder.build_first(world, &hand);
    let dir = builder.target().join("stress");
    match scenario {
        Scenario::Builds => builder.play(world, &hand, &mut chance),
        Scenario::BuildsWhileRead => thread::scope(|scope| {
            let target = builder.target();
            let name = format!("view {index} (reading)");
            let reader = scope.spawn(move || {
                let _stops = StopsOnPanic(world);
                reading::play(world, &world.watchdog.hand(&name), &target);
            });
            builder.play(world, &hand, &mut chance);
            reader.join().ok().must("the reader");
        }),
        Scenario::Churn => churn::play(world, &hand, &dir, &mut chance),
        Scenario::LifeCycle => life_cycle::play(world, &hand, builder, &mut chance),
        Scenario::Large => large::play(world, &hand, &dir, &mut chance),
        Scenario::Listing => listing::play(world, &hand, &dir, &mut chance),
    }
    // Whatever was played, the view still builds what its sources say.
    builder.build_and_run(world, &hand);
}

/// Mounts the views, lets all hands play, and checks what must hold then.
fn run(plan: &Plan) {
    let limit = plan.duration + Duration::from_mins(8);
    let sandbox = Sandbox::with_limit(limit);
    let mut builders: Vec<_> = (0..plan.views)
        .map(|index| Builder::new(&sandbox, index))
        .collect();
    let targets: Vec<PathBuf> = builders.iter().map(Builder::target).collect();
    sandbox.mount(&targets[0]);
    let rest = invariants::Usage::at_rest(&sandbox);
    for target in &targets[1..] {
        sandbox.mount(target);
    }
    let world = World {
        watchdog: Watchdog::start(sandbox.root().to_owned()),
        sandbox,
        deadline: Instant::now() + plan.duration,
        stopped: AtomicBool::new(false),
        done: Mutex::default(),
        most: Mutex::default(),
    };
    let before = world.sandbox.counters();
    let began = Instant::now();
    let mut all_hands = || {
        thread::scope(|scope| {
            let world = &world;
            let asking = scope.spawn(move || {
                let _stops = StopsOnPanic(world);
                asking::play(world, &world.watchdog.hand("asking"));
            });
            let hands: Vec<_> = builders
                .iter_mut()
                .enumerate()
                .map(|(index, builder)| {
                    let scenario = match SCENARIOS[index % SCENARIOS.len()] {
                        // An unmount is not asked for again when the daemon dies of it.
                        Scenario::LifeCycle if plan.longest_life.is_some() => Scenario::Builds,
                        scenario => scenario,
                    };
                    let chance = Chance::of(plan.seed.wrapping_add(index as u64));
                    scope.spawn(move || {
                        let _stops = StopsOnPanic(world);
                        play(world, scenario, builder, chance);
                    })
                })
                .collect();
            let failed = hands
                .into_iter()
                .filter_map(|hand| hand.join().err())
                .count();
            world.stopped.store(true, Ordering::Relaxed);
            asking.join().ok().must("who asks");
            assert_eq!(failed, 0, "hands that failed; each said why");
        });
    };
    let kills = match plan.longest_life {
        None => {
            all_hands();
            0
        }
        Some(longest) => killing(&world.sandbox, usize::MAX, longest, |_| all_hands()).1,
    };
    world.watchdog.assert_content();
    for _ in 0..kills {
        world.did("daemons killed");
    }
    let took = began.elapsed();
    let counted = world.sandbox.counters() - &before;
    invariants::counted(&world, &counted);
    invariants::at_rest(&world, &targets, &rest, kills);
    let done = world.done.lock().unwrap_or_else(PoisonError::into_inner);
    let (bytes, names) = *world.most.lock().unwrap_or_else(PoisonError::into_inner);
    eprintln!(
        "{} views, {} s, {kills} kills\n{done:#?}\n{counted:#?}\n\
         {bytes} bytes of memory at most, with {names} names",
        plan.views,
        took.as_secs()
    );
}

#[test]
fn the_watchdog_ends_what_hangs() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let watchdog = Watchdog::start(sandbox.root().to_owned());
    let hand = watchdog.hand("who waits");
    let made = hand.during("make a file", Duration::from_mins(1), || {
        fs::write(target.join("one"), "")
    });
    made.must("a daemon that answers");
    watchdog.assert_content();
    let daemon = sandbox.stop_daemon();
    let since = Instant::now();
    let made = hand.during("make another", Duration::from_secs(2), || {
        fs::write(target.join("other"), "")
    });
    kill(daemon, Signal::SIGCONT).must("going on");
    made.err().must("nobody answered");
    assert!(since.elapsed() < Duration::from_secs(20), "and soon");
    assert!(watchdog.bit());
}

#[test]
fn everything_at_once() {
    run(&Plan::new(None));
}

#[test]
fn everything_at_once_while_the_daemon_is_killed() {
    // Less often than in `takeover`, so that compiles come to an end in between.
    run(&Plan::new(Some(Duration::from_secs(6))));
}
