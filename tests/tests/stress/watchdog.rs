//! Knows what every hand does and until when it must have done it. An operation that takes longer
//! is reported, with what it and everybody else waits for; then the FUSE connections are cut, so
//! that the test fails instead of hanging.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harness::{Cmd, Outcome, mounts, processes};

/// How long a few system calls may take, on a machine that is busy with builds.
pub const CALLS: Duration = Duration::from_mins(1);
/// How long a kachefs command may take.
pub const COMMAND: Duration = Duration::from_secs(90);
/// How long a build may take: it may wait for others that compile the same.
pub const BUILD: Duration = Duration::from_mins(5);

/// How often the watchdog looks.
const INTERVAL: Duration = Duration::from_millis(200);

type Hands = Arc<Mutex<Vec<Arc<Doing>>>>;

/// What one hand does now.
struct Doing {
    hand: String,
    now: Mutex<Option<(String, Instant)>>,
}

/// Watches the hands of one sandbox.
pub struct Watchdog {
    hands: Hands,
    bit: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts to watch the sandbox at `root`.
    pub fn start(root: PathBuf) -> Self {
        let hands: Hands = Arc::default();
        let (bit, ended): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let (watched, biting, over) = (Arc::clone(&hands), Arc::clone(&bit), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            // A detached mount is not in the table any more, but its connection may be what hangs.
            let mut seen = BTreeSet::new();
            while !over.load(Ordering::Relaxed) {
                seen.extend(mounts::below(&root).iter().map(|mount| mount.minor));
                let late = late(&watched);
                if !late.is_empty() {
                    biting.store(true, Ordering::Relaxed);
                    report(&root, &late, &seen);
                    cut(&root, &seen);
                    return;
                }
                thread::sleep(INTERVAL);
            }
        });
        Self {
            hands,
            bit,
            ended,
            thread: Some(thread),
        }
    }

    /// A new hand.
    pub fn hand(&self, name: &str) -> Hand {
        let doing = Arc::new(Doing {
            hand: name.to_owned(),
            now: Mutex::new(None),
        });
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        hands.push(Arc::clone(&doing));
        Hand(doing)
    }

    /// Whether the watchdog had to bite.
    pub fn bit(&self) -> bool {
        self.bit.load(Ordering::Relaxed)
    }

    /// The test fails if the watchdog had to bite.
    #[track_caller]
    pub fn assert_content(&self) {
        assert!(!self.bit(), "the watchdog bit");
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has said on stderr what it had to say.
            let _ = thread.join();
        }
    }
}

/// One thread of the test.
pub struct Hand(Arc<Doing>);

impl Hand {
    /// What it is called in reports.
    pub fn name(&self) -> &str {
        &self.0.hand
    }

    /// Does something that must end within `limit`.
    pub fn during<T>(&self, what: &str, limit: Duration, work: impl FnOnce() -> T) -> T {
        self.set(Some((what.to_owned(), Instant::now() + limit)));
        let value = work();
        self.set(None);
        value
    }

    /// Runs a command that must end within `limit`.
    #[track_caller]
    pub fn run(&self, what: &str, limit: Duration, command: Cmd) -> Outcome {
        // The watchdog comes first: it knows what everybody else waits for.
        let command = command.timeout(limit + Duration::from_secs(30));
        self.during(what, limit, || command.run())
    }

    fn set(&self, doing: Option<(String, Instant)>) {
        *self.0.now.lock().unwrap_or_else(PoisonError::into_inner) = doing;
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.set(None);
    }
}

/// Whose time is over, and what they do.
fn late(hands: &Hands) -> Vec<String> {
    let now = Instant::now();
    let hands = hands.lock().unwrap_or_else(PoisonError::into_inner);
    hands
        .iter()
        .filter_map(|doing| {
            let at = doing.now.lock().unwrap_or_else(PoisonError::into_inner);
            let (what, deadline) = at.as_ref()?;
            (now > *deadline).then(|| format!("{}: {what}", doing.hand))
        })
        .collect()
}

fn report(root: &Path, late: &[String], connections: &BTreeSet<u32>) {
    eprintln!("watchdog: too long: {late:#?}");
    eprintln!(
        "this process:\n{}",
        processes::describe_one(std::process::id())
    );
    eprintln!("the sandbox:\n{}", processes::describe(root));
    for minor in connections {
        let waiting = format!("/sys/fs/fuse/connections/{minor}/waiting");
        if let Ok(waiting) = fs::read_to_string(waiting) {
            eprintln!("connection {minor}: {} requests wait", waiting.trim());
        }
    }
}

fn cut(root: &Path, connections: &BTreeSet<u32>) {
    mounts::cut_below(root);
    for minor in connections {
        // Most are gone by now.
        let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
    }
}
