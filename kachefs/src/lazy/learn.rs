//! Results of other machines: asked for when nobody here has one, and taken into the index, where a
//! lookup finds them like our own.
//!
//! A build's manifest is one request for all of its results; what it does not hold is asked for one
//! invocation at a time. Nothing is asked for twice within a minute: who edits a file and builds again
//! does not wait for the answer that nobody else has built it either.
//!
//! What was learned long ago may have been removed since: a result is not bound whose blobs are not here and
//! were not said to be there within a third of the grace. Then it is asked for once more, as if nobody
//! had it.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use remote::{ObjectName, RemoteError};
use store::{
    ActionEntry, Digest, Fact, IndexError, InputRecord, InvocationDigest, Kept, Place,
    record_digest,
};

use super::connection::{Connection, Unavailable};
use super::facts::{self, Results};
use super::kept_unseen;
use crate::clock;
use crate::flight::Flights;
use crate::storage::Storage;

/// How long an answer counts.
const COUNTS: Duration = Duration::from_mins(1);

/// Answers remembered.
const ANSWERS: NonZeroUsize = NonZeroUsize::new(64 * 1024).expect("not zero");

/// What was asked lately.
pub(super) struct Asked {
    when: Mutex<LruCache<Digest, Instant>>,
    under_way: Arc<Flights<Digest>>,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            when: Mutex::new(LruCache::new(ANSWERS)),
            under_way: Arc::default(),
        }
    }
}

impl Asked {
    /// An answer counts no longer than what was learned with it.
    fn is_due(&self, question: &Digest, connection: &Connection) -> bool {
        let when = self.when.lock().get(question).copied();
        let counts = COUNTS.min(connection.recent());
        when.is_none_or(|when| when.elapsed() >= counts)
    }
}

impl Storage {
    /// Whether a result that names these blobs may be bound: they are on this disk, or were lately known to be
    /// in a remote that answers. See [`Storage::doubted`].
    pub fn may_be_bound(&self, blobs: impl IntoIterator<Item = (Digest, u64)>) -> bool {
        let blobs = blobs.into_iter();
        let mut elsewhere = blobs.filter(|(digest, size)| !self.cas.has(digest, *size));
        elsewhere.all(|(digest, size)| {
            let connection = self.lately(&digest, size);
            connection.is_some_and(|connection| !connection.is_left_alone())
        })
    }

    /// Which of these blobs have to be fetched before a result that names them is bound, because the remote that
    /// has them is losing things, or had lost them once.
    pub fn doubted(&self, blobs: impl IntoIterator<Item = (Digest, u64)>) -> Vec<(Digest, u64)> {
        if self.lazy.connection().is_none() {
            return Vec::new();
        }
        let is_losing = self.lazy.looks.losing_since().is_some();
        let blobs = blobs.into_iter();
        let elsewhere = blobs.filter(|(digest, size)| !self.cas.has(digest, *size));
        let was_gone = |(digest, size): &(Digest, u64)| {
            let kept = self.kept(digest, *size);
            kept.is_none_or(|(_, kept)| {
                kept.seen_ms == Kept::DOUBTED || self.lazy.was_gone(digest, &kept.place)
            })
        };
        elsewhere
            .filter(|blob| is_losing || was_gone(blob))
            .collect()
    }

    /// Fetches these; whether all of them are here then.
    pub fn bring_doubted(&self, doubted: &[(Digest, u64)]) -> bool {
        let brought = self.bring_all(doubted);
        if let Err(error) = &brought {
            tracing::debug!(%error, "not bound");
        }
        brought.is_ok()
    }

    /// The remote, if it was lately known to hold a blob.
    fn lately(&self, digest: &Digest, size: u64) -> Option<Arc<Connection>> {
        let (connection, kept) = self.kept(digest, size)?;
        connection.is_recent(kept.known_ms).then_some(connection)
    }

    /// Asks the remote for results of an invocation, unless that was done lately. Whether there may be
    /// something now that was not there before.
    pub fn learn(&self, invocation: &InvocationDigest) -> bool {
        self.ask(&invocation.0, |connection| {
            let name = ObjectName::action(invocation);
            let object = get(connection, &name).ok()?;
            let results = object.map(|object| Results::read(&object));
            let facts = results.map(|results| results.open(invocation, connection.trust()));
            Some(facts.unwrap_or_default())
        })
    }

    /// Asks the remote for the results of a build, unless that was done lately. Whether there may be
    /// something now that was not there before.
    pub fn learn_build(&self, fingerprint: &Digest) -> bool {
        self.ask(fingerprint, |connection| {
            let object = get(connection, &ObjectName::build(fingerprint)).ok()?;
            let manifest = object
                .and_then(|object| facts::read_build(fingerprint, &object, connection.trust()));
            let manifest = manifest.unwrap_or_default();
            self.lazy
                .builds
                .published(*fingerprint, &manifest.facts, false);
            self.lazy.prefetch.learned(*fingerprint, &manifest.reads);
            Some(manifest.facts)
        })
    }

    fn ask(
        &self,
        question: &Digest,
        answer: impl FnOnce(&Connection) -> Option<Vec<Fact>>,
    ) -> bool {
        let Some(connection) = self.lazy.connection() else {
            return false;
        };
        if !self.lazy.asked.is_due(question, &connection) {
            return false;
        }
        let _flight = match self.lazy.asked.under_way.take_off(*question) {
            Ok(flight) => flight,
            Err(boarding) => return boarding.wait(connection.patience(0)),
        };
        if !self.lazy.asked.is_due(question, &connection) {
            // Somebody has just asked.
            return true;
        }
        let (began, began_ms) = (Instant::now(), clock::now_ms());
        // No answer is none: asked again next time, if the remote answers by then.
        let Some(facts) = answer(&connection) else {
            return false;
        };
        let taken = self.take_in(&connection, &facts, began_ms);
        self.lazy.asked.when.lock().put(*question, began);
        match taken {
            Ok(new) => new > 0,
            Err(error) => {
                tracing::warn!(%error, "results of the remote");
                false
            }
        }
    }

    /// Takes facts into the index that were asked for at that time, but for what is known already. Returns
    /// how many were new, or not known for long.
    fn take_in(
        &self,
        connection: &Connection,
        facts: &[Fact],
        began_ms: u64,
    ) -> Result<usize, IndexError> {
        let mut batch = self.index.batch();
        let mut new = 0;
        let is_there = |fact: &&Fact| {
            let blobs = fact.entries.iter().flat_map(|(_, entry)| entry.blobs());
            let mut blobs = blobs.collect::<Vec<_>>().into_iter();
            let places = places_in(fact);
            let is_gone = |digest: &Digest| self.lazy.is_gone(digest, &place_of(&places, digest));
            !blobs.any(|(digest, size)| is_gone(&digest) && !self.cas.has(&digest, size))
        };
        // Others' results must not take the place of ours.
        let mut of_invocation: HashMap<InvocationDigest, usize> = HashMap::new();
        let mut is_one_of_few = |fact: &&Fact| {
            let count = of_invocation.entry(fact.invocation).or_default();
            *count += 1;
            *count <= facts::RESULTS
        };
        // What one lists others may list as well. The newest comes first.
        let mut records: HashMap<_, InputRecord> = HashMap::new();
        let known = facts.iter().filter(is_there);
        for fact in known.filter(|fact| is_one_of_few(fact)) {
            let record = record_digest(&fact.invocation, &fact.record)?;
            let places = places_in(fact);
            let known_record = self.index.record(&fact.invocation, &record)?;
            let mut is_new = known_record.is_none();
            for (key, entry) in &fact.entries {
                let known = self.index.action(key)?;
                let blobs = known.iter().flat_map(ActionEntry::blobs);
                let mut blobs = blobs.collect::<Vec<_>>().into_iter();
                let is_had = |(digest, size)| {
                    self.cas.has(&digest, size) || self.lately(&digest, size).is_some()
                };
                // Ours first: it was made here.
                if known.is_some() && blobs.all(is_had) {
                    continue;
                }
                is_new = true;
                if known.as_ref() != Some(entry) {
                    batch.put_action(key, entry)?;
                }
                // One that is only confirmed goes on to be ours, if it was.
                let row = entry.kept_as(key)?;
                if self.index.kept(connection.id, &row)?.is_none() {
                    let kept = kept_unseen(0, Place::Own, began_ms);
                    batch.put_kept(connection.id, &row, &kept)?;
                }
                for (digest, size) in entry.blobs() {
                    if self.cas.has(&digest, size) {
                        continue;
                    }
                    let place = place_of(&places, &digest);
                    let said = kept_unseen(size, place, began_ms);
                    let kept = self.index.as_said(connection.id, &digest, said)?;
                    batch.put_kept(connection.id, &digest, &kept)?;
                }
            }
            if is_new {
                let record = records
                    .entry((fact.invocation, record))
                    .or_insert_with(|| known_record.unwrap_or_else(|| fact.record.clone()));
                if record.loads.is_none() {
                    record.loads.clone_from(&fact.record.loads);
                }
                new += 1;
            }
        }
        for ((invocation, _), record) in &records {
            batch.put_record(invocation, record)?;
        }
        batch.commit()?;
        tracing::debug!(facts = facts.len(), new, "learned from the remote");
        Ok(new)
    }
}

/// Where a result says that blobs are, but for those that are objects of their own.
fn places_in(fact: &Fact) -> HashMap<Digest, Place> {
    fact.packed.iter().copied().collect()
}

fn place_of(places: &HashMap<Digest, Place>, digest: &Digest) -> Place {
    places.get(digest).copied().unwrap_or(Place::Own)
}

/// An object with facts, if there is one.
fn get(connection: &Connection, name: &ObjectName) -> Result<Option<bytes::Bytes>, Unavailable> {
    // Not as long as the largest object may take: a build waits.
    let patience = connection.patience(0);
    let asked = connection.call(async |remote| {
        let got = tokio::time::timeout(patience, remote.get(name, None, facts::LARGEST)).await;
        got.unwrap_or_else(|_| {
            Err(RemoteError::TimedOut {
                place: connection.place(),
                limit: patience,
            })
        })
    });
    match asked {
        Ok(object) => Ok(object),
        Err(Unavailable::Remote(error @ RemoteError::TooLarge { .. })) => {
            tracing::warn!(%error, "results of the remote");
            Ok(None)
        }
        Err(error) => {
            tracing::debug!(%error, %name, "not asked");
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use store::{ActionKey, Loads};

    use super::super::{GONE_FOR, Gone, testing};
    use super::*;

    #[test]
    fn what_a_losing_remote_has_is_doubtful() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [(lost, object), (other, _)] = testing::elsewhere(dir.path(), &storage, &connection);
        assert!(storage.may_be_bound([lost, other]));
        assert!(storage.doubted([lost, other]).is_empty());
        fs::remove_file(object).expect("removes");
        storage.fault(&lost.0, lost.1).expect_err("is gone");
        assert!(!storage.may_be_bound([lost, other]));
        assert!(storage.may_be_bound([other]));
        assert_eq!(storage.doubted([other]), [other]);
        assert!(!storage.bring_doubted(&[lost, other]));
        assert!(storage.bring_doubted(&[other]));
        assert!(storage.doubted([other]).is_empty(), "it is here");
    }

    #[test]
    fn what_was_gone_once_is_doubtful() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [(blob, object), (other, _)] = testing::elsewhere(dir.path(), &storage, &connection);
        let long_ago = Instant::now().checked_sub(GONE_FOR);
        let long_ago = long_ago.expect("the clock goes back that far");
        let lazy = &storage.lazy;
        lazy.note_gone(&blob.0, Place::Own, Gone::Absent(long_ago));
        assert!(storage.may_be_bound([blob, other]), "somebody says so");
        assert_eq!(storage.doubted([blob, other]), [blob]);
        fs::remove_file(object).expect("removes");
        assert!(!storage.bring_doubted(&[blob]));
        assert!(!storage.may_be_bound([blob]));
    }

    #[test]
    fn of_records_that_list_the_same_one_says_what_was_loaded() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let invocation = InvocationDigest(Digest::of(b"i"));
        let fact = |created_ms: u64, loads| Fact {
            invocation,
            record: InputRecord {
                created_ms,
                loads,
                ..testing::record()
            },
            entries: vec![(
                ActionKey(Digest::of(&created_ms.to_be_bytes())),
                testing::result(Vec::new(), Vec::new()),
            )],
            packed: Vec::new(),
        };
        let loads = Loads::new(["a-1"], ["liba-1.rlib"]);
        let other = Loads::new(["a-1"], ["liba-1.rmeta"]);
        let facts = [
            fact(9, None),
            fact(8, Some(loads.clone())),
            fact(7, Some(other.clone())),
        ];
        let new = storage.take_in(&connection, &facts, 9).expect("takes them");
        assert_eq!(new, 3);
        // What is said later is not what was loaded here.
        let new = storage.take_in(&connection, &[fact(6, Some(other))], 9);
        assert_eq!(new.expect("takes it"), 1);
        let records = storage.index.records(&invocation).expect("reads");
        let said: Vec<_> = records.into_iter().map(|record| record.loads).collect();
        assert_eq!(said, [Some(loads)]);
    }
}
