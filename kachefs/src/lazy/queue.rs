//! The queue of what is to be uploaded: who waits for it, who wakes it, how far it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use store::{IndexError, UploadId};

use super::connection::Unavailable;
use crate::storage::Storage;

/// How long a result waits for others, to share packs with them.
const GATHER: Duration = Duration::from_secs(1);

/// What waits to be sent.
pub struct Queue {
    next: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Something was noted, or somebody wants it sent now.
    wanted: bool,
    hurry: bool,
    /// Rounds ended, and why the last one failed.
    rounds: u64,
    failure: Option<String>,
    is_passing: bool,
}

/// How far uploads are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pushed {
    /// Results that are still to be sent.
    pub left: u64,
    /// How often that was tried.
    pub rounds: u64,
    /// Why the last try failed.
    pub failure: Option<String>,
    /// Whether another one may not.
    pub is_passing: bool,
}

impl Queue {
    pub(super) fn new(last: Option<UploadId>) -> Self {
        Self {
            next: AtomicU64::new(last.map_or(0, |last| last.0 + 1)),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The number of what is noted next.
    pub(super) fn next_id(&self) -> UploadId {
        UploadId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn wake(&self, hurry: bool) {
        let mut state = self.state.lock();
        state.wanted = true;
        state.hurry |= hurry;
        self.changed.notify_all();
    }

    /// Waits until there is something to do, and then for more of it.
    pub(super) fn wait(&self, longest: Duration) {
        let deadline = Instant::now() + longest;
        let mut state = self.state.lock();
        while !state.wanted {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let deadline = Instant::now() + GATHER;
        while !state.hurry {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.wanted = false;
        state.hurry = false;
    }

    pub(super) fn round_ended(&self, failure: Option<&anyhow::Error>) {
        let unavailable = failure.and_then(|error| error.downcast_ref::<Unavailable>());
        let mut state = self.state.lock();
        state.rounds += 1;
        state.failure = failure.map(|error| format!("{error:#}"));
        state.is_passing = unavailable.is_some_and(Unavailable::is_passing);
        self.changed.notify_all();
    }
}

impl Storage {
    /// Has everything sent that waits, now. Returns how far that is.
    pub fn push(&self) -> Result<Pushed, IndexError> {
        let queue = &self.lazy.queue;
        if let Some(connection) = self.lazy.writable() {
            connection.hasten_sending();
        }
        queue.wake(true);
        let left = self.index.upload_count()?;
        let state = queue.state.lock();
        Ok(Pushed {
            left,
            rounds: state.rounds,
            failure: state.failure.clone(),
            is_passing: state.is_passing,
        })
    }
}
