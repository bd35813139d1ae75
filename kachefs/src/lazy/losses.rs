//! What a remote has lost: found, found again, and kept from growing.
//!
//! A remote that has lost something is likely to lose more: a lifecycle rule, or somebody with a broom, is at
//! work. What views show of it is fetched then while it is there, the smallest first: a build that has to make
//! one thing again should not find the next one lost.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use store::{Digest, Kept, Place, RemoteId};

use super::connection::{Haste, Unavailable};
use super::containers::Container;
use super::faults::FaultError;
use super::sending::SMALL;
use super::{Gone, Lazy, kept_unseen, reliance};
use crate::clock;
use crate::remote_config::Prefetch as Mode;
use crate::storage::Storage;

/// How long nothing is believed to be in a remote that has lost something: long enough for whoever removes
/// things to come to an end, and for a few builds.
const DOUBT: Duration = Duration::from_mins(10);

/// What is to be looked for.
#[derive(Default)]
pub struct Looks {
    asked: Mutex<Asked>,
    looked: Condvar,
}

/// How often all that is shown was to be looked after, and for which of these it was, in vain or not.
#[derive(Default)]
struct Asked {
    times: u64,
    tried: u64,
    done: u64,
    /// Whether more may be gone, and not only names are to be taken away of what is known to be lost.
    is_doubtful: bool,
    /// Since when the remote has been losing things, and when it last did.
    losing: Option<(Instant, Instant)>,
}

impl Asked {
    fn is_losing(&mut self) {
        let now = Instant::now();
        let since = self.losing_since().unwrap_or(now);
        self.losing = Some((since, now));
    }

    fn losing_since(&self) -> Option<Instant> {
        let (since, _) = self.losing.filter(|(_, last)| last.elapsed() < DOUBT)?;
        Some(since)
    }
}

impl Looks {
    /// Somebody may have removed things.
    pub(super) fn want(&self) {
        let mut asked = self.asked.lock();
        asked.times += 1;
        asked.is_doubtful = true;
    }

    /// Something is gone that should be there.
    fn lost(&self) {
        let mut asked = self.asked.lock();
        asked.times += 1;
        asked.is_doubtful = true;
        asked.is_losing();
    }

    /// Something there is not what it should be.
    fn damaged(&self) {
        let mut asked = self.asked.lock();
        asked.times += 1;
        asked.is_losing();
    }

    /// Since when the remote has been losing things, if it did so lately: what is said to be there is not
    /// believed.
    pub fn losing_since(&self) -> Option<Instant> {
        self.asked.lock().losing_since()
    }

    /// Whether there is something to look for.
    pub(super) fn is_wanted(&self) -> bool {
        let asked = self.asked.lock();
        asked.done < asked.times
    }

    /// Looks for it, and is told whether more may be gone than is known. Whether nothing is left to look for.
    pub fn look(&self, look: impl FnOnce(bool) -> bool) -> bool {
        let mut before = self.asked.lock();
        let (times, done) = (before.times, before.done);
        if done == times {
            return true;
        }
        let is_doubtful = std::mem::take(&mut before.is_doubtful);
        drop(before);
        let is_done = look(is_doubtful);
        let mut after = self.asked.lock();
        after.tried = times;
        after.is_doubtful |= is_doubtful && !is_done;
        if is_done {
            after.done = times;
        }
        drop(after);
        self.looked.notify_all();
        is_done
    }

    /// Waits until that was at least tried.
    fn wait(&self, deadline: Instant) {
        let mut asked = self.asked.lock();
        let last = asked.times;
        while asked.tried < last {
            if self.looked.wait_until(&mut asked, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Rescue {
    /// Waits until nothing more is being fetched.
    fn wait(&self, deadline: Instant) {
        let mut effort = self.effort.lock();
        while effort.is_under_way {
            if self.ended.wait_until(&mut effort, deadline).timed_out() {
                return;
            }
        }
    }

    fn end(&self) {
        self.effort.lock().is_under_way = false;
        self.ended.notify_all();
    }
}

impl Lazy {
    /// Something is gone that should be there: more may be.
    pub(super) fn lost_something(&self) {
        self.looks.lost();
        self.leases.wake();
    }

    /// Something there is not what it should be.
    pub(super) fn found_damage(&self) {
        self.looks.damaged();
        self.leases.wake();
    }
}

/// What is fetched because more may be lost.
#[derive(Default)]
pub struct Rescue {
    effort: Mutex<Effort>,
    ended: Condvar,
}

#[derive(Default)]
struct Effort {
    is_under_way: bool,
    /// Since when the remote has been losing things, and how many bytes were fetched since.
    since: Option<Instant>,
    spent: u64,
}

impl Storage {
    /// Where something was found to be gone, or damaged, waits until all that is shown was looked for, and fetched as
    /// far as it is: no longer than anything waits for an answer.
    pub fn wait_for_look(&self, deadline: Option<Instant>) {
        if let Some(connection) = self.lazy.connection() {
            let longest = Instant::now() + connection.config.wait;
            let deadline = deadline.map_or(longest, |deadline| deadline.min(longest));
            self.lazy.looks.wait(deadline);
            self.lazy.rescue.wait(deadline);
        }
    }

    /// Finds out which of these blobs, where only a remote has them, it has no more. Nobody looks for them
    /// there again.
    pub fn find_lost(
        &self,
        shown: impl IntoIterator<Item = (Digest, u64)>,
    ) -> Result<(), FaultError> {
        let Some(connection) = self.lazy.connection() else {
            return Ok(());
        };
        let mut held: HashMap<Container, Vec<(Digest, Kept)>> = HashMap::new();
        for (digest, size) in shown {
            if !self.cas.has(&digest, size)
                && let Some((_, kept)) = self.kept(&digest, size)
            {
                let container = Container::of(&digest, &kept.place);
                held.entry(container).or_default().push((digest, kept));
            }
        }
        let containers = held.keys().copied().collect();
        let gone = connection.look(async |remote| reliance::absent(&remote, containers).await)?;
        let lost = gone.iter().filter_map(|container| held.get(container));
        for (digest, kept) in lost.flatten() {
            self.lazy.note_absent(digest, kept.place);
            match self.forget(&connection, digest, kept, "it is gone, too") {
                Ok(()) | Err(FaultError::Gone(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Which of these blobs, which were found to be nowhere, a remote has again where they were, or where large
    /// ones always are: they are fetched from there from now on. Returns how many. Not what was damaged: that
    /// it is there says nothing.
    pub fn find_again(&self, lost: &[(Digest, u64)]) -> Result<usize, FaultError> {
        let Some(connection) = self.lazy.connection().filter(|_| !lost.is_empty()) else {
            return Ok(0);
        };
        let mut wanted: HashMap<Container, Vec<(Digest, u64, Place)>> = HashMap::new();
        for (digest, size, place) in self.places_of_old(connection.id, lost)? {
            let container = Container::of(&digest, &place);
            let blob = (digest, size, place);
            wanted.entry(container).or_default().push(blob);
        }
        let began_ms = clock::now_ms();
        let containers = wanted.keys().copied().collect();
        let absent = connection.look(async |remote| reliance::absent(&remote, containers).await)?;
        for container in absent {
            wanted.remove(&container);
        }
        let found: Vec<_> = wanted.into_values().flatten().collect();
        let mut batch = self.index.batch();
        for (digest, size, place) in &found {
            let kept = kept_unseen(*size, *place, began_ms);
            batch.put_kept(connection.id, digest, &kept)?;
        }
        batch.commit()?;
        let mut gone = self.lazy.gone.lock();
        for (digest, _, place) in &found {
            gone.pop(&(*digest, *place));
        }
        let found: HashSet<_> = found.iter().map(|(digest, ..)| digest).collect();
        Ok(found.len())
    }

    /// Where these blobs were, and where large ones always are.
    fn places_of_old(
        &self,
        remote: RemoteId,
        blobs: &[(Digest, u64)],
    ) -> Result<Vec<(Digest, u64, Place)>, FaultError> {
        let mut known: HashMap<Digest, Vec<(Place, Gone)>> = HashMap::new();
        for ((digest, place), how) in self.lazy.gone.lock().iter() {
            known.entry(*digest).or_default().push((*place, *how));
        }
        let mut places = Vec::new();
        for (digest, size) in blobs {
            let gone = known.remove(digest).unwrap_or_default();
            let own = (*size >= SMALL).then_some(Place::Own);
            let noted = self
                .index
                .lost(remote, digest)?
                .filter(|place| Some(*place) != own);
            let others = own.into_iter().chain(noted);
            let others = others.filter(|other| gone.iter().all(|(place, _)| place != other));
            places.extend(others.map(|place| (*digest, *size, place)));
            let absent = gone
                .iter()
                .filter(|(_, how)| matches!(how, Gone::Absent(_)));
            places.extend(absent.map(|(place, _)| (*digest, *size, *place)));
        }
        Ok(places)
    }

    /// Where things are being lost, fetches what of these blobs is not on this machine: aside, behind what
    /// anybody wants, and no more than is fetched early for a build.
    pub fn rescue(self: &Arc<Self>, shown: impl IntoIterator<Item = (Digest, u64)>) {
        let Some(since) = self.lazy.looks.losing_since() else {
            return;
        };
        let shown = shown.into_iter();
        let mut blobs: Vec<_> = shown
            .filter(|(digest, size)| !self.cas.has(digest, *size))
            .collect();
        let rescue = &self.lazy.rescue;
        {
            let mut effort = rescue.effort.lock();
            if blobs.is_empty() || effort.is_under_way {
                return;
            }
            effort.is_under_way = true;
            if effort.since != Some(since) {
                (effort.since, effort.spent) = (Some(since), 0);
            }
        }
        blobs.sort_unstable_by_key(|(_, size)| *size);
        let storage = Arc::clone(self);
        let work = move || {
            let fetched = storage.rescue_each(&blobs);
            storage.lazy.rescue.end();
            if fetched > 0 {
                tracing::info!(fetched, "fetched while they are there");
            }
        };
        let thread = std::thread::Builder::new().name("rescue".into());
        if let Err(error) = thread.spawn(work) {
            rescue.end();
            tracing::warn!(%error, "cannot start a thread");
        }
    }

    /// Fetches one after the other, until that makes no sense any more. Returns how many.
    fn rescue_each(&self, blobs: &[(Digest, u64)]) -> usize {
        let effort = &self.lazy.rescue.effort;
        let mut fetched = 0;
        for (digest, size) in blobs {
            let Some(connection) = self.lazy.connection() else {
                break;
            };
            let config = &connection.config;
            let spent = effort.lock().spent.saturating_add(*size);
            if connection.is_left_alone()
                || config.prefetch == Mode::Off
                || spent > config.prefetch_budget
            {
                break;
            }
            match self.bring(digest, *size, Haste::Early) {
                Ok(true) => {
                    effort.lock().spent = spent;
                    fetched += 1;
                }
                Ok(false) => {}
                Err(error @ (FaultError::Gone(_) | FaultError::Failed)) => {
                    tracing::debug!(%digest, %error, "not rescued");
                }
                Err(FaultError::Unavailable(error)) if !matches!(error, Unavailable::LeftAlone) => {
                    tracing::debug!(%digest, %error, "not rescued");
                }
                Err(error) => {
                    tracing::debug!(%digest, %error, "nothing more is rescued");
                    break;
                }
            }
        }
        fetched
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use store::StoreDir;

    use super::super::testing;
    use super::*;

    #[test]
    fn what_is_put_back_is_found_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [((digest, size), object), _] = testing::elsewhere(dir.path(), &storage, &connection);
        let aside = object.with_extension("aside");
        fs::rename(&object, &aside).expect("goes");
        storage.fault(&digest, size).expect_err("is gone");
        assert_eq!(storage.find_again(&[(digest, size)]).expect("looks"), 0);
        storage.fault(&digest, size).expect_err("is not asked for");
        fs::rename(&aside, &object).expect("comes back");
        assert_eq!(storage.find_again(&[(digest, size)]).expect("looks"), 1);
        storage.fault(&digest, size).expect("is there");
    }

    #[test]
    fn the_next_daemon_finds_again_what_was_in_a_pack() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let bytes = b"small";
        let blob = (Digest::of(bytes), bytes.len() as u64);
        storage.cas.ingest_bytes(bytes).expect("is here");
        storage.send_blobs(&connection, &[blob]).expect("sends");
        fs::remove_file(storage.cas.path(&blob.0)).expect("removes");
        let packs = dir.path().join("bucket/v1/packs");
        let aside = dir.path().join("aside");
        fs::rename(&packs, &aside).expect("goes");
        storage.fault(&blob.0, blob.1).expect_err("is gone");
        drop(storage);
        let storage = Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens");
        assert!(!storage.has(&blob.0, blob.1));
        assert_eq!(storage.find_again(&[blob]).expect("looks"), 0);
        fs::rename(&aside, &packs).expect("comes back");
        assert_eq!(storage.find_again(&[blob]).expect("looks"), 1);
        storage.fault(&blob.0, blob.1).expect("is there");
    }

    #[test]
    fn what_is_damaged_is_not_there_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [((digest, size), object), _] = testing::elsewhere(dir.path(), &storage, &connection);
        fs::write(&object, b"something else").expect("writes");
        storage.fault(&digest, size).expect_err("is damaged");
        assert_eq!(storage.find_again(&[(digest, size)]).expect("looks"), 0);
        assert!(storage.lazy.is_gone(&digest, &Place::Own));
    }

    fn waits_until(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !what() {
            assert!(Instant::now() < deadline, "in vain");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn what_is_not_lost_is_fetched_within_the_budget() {
        for (budget, expected) in [(70_000, 1), (69_999, 0), (u64::MAX, 2)] {
            let dir = tempfile::tempdir().expect("a directory");
            let (storage, connection) = testing::store(dir.path());
            let mut config = connection.config.clone();
            config.prefetch_budget = budget;
            config.save(&storage.dir).expect("saves");
            let blobs = testing::elsewhere(dir.path(), &storage, &connection).map(|(blob, _)| blob);
            let storage = Arc::new(storage);
            let here = || {
                let here = blobs
                    .iter()
                    .filter(|(digest, size)| storage.cas.has(digest, *size));
                here.count()
            };
            storage.rescue(blobs);
            assert_eq!(here(), 0, "nothing is lost");
            for _ in 0..2 {
                storage.lazy.lost_something();
                storage.rescue(blobs);
                waits_until(|| !storage.lazy.rescue.effort.lock().is_under_way);
                assert_eq!(here(), expected, "{budget}");
            }
        }
    }

    #[test]
    fn a_look_in_vain_is_repeated_and_keeps_nobody_waiting() {
        let looks = Looks::default();
        assert!(looks.look(|_| unreachable!("nothing is lost")));
        looks.lost();
        assert!(looks.losing_since().is_some());
        assert!(!looks.look(|is_doubtful| !is_doubtful));
        let far = Instant::now() + Duration::from_mins(5);
        looks.wait(far);
        assert!(looks.is_wanted());
        // More is lost meanwhile: that is looked for once more.
        assert!(looks.look(|is_doubtful| {
            looks.lost();
            is_doubtful
        }));
        assert!(looks.is_wanted());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| looks.wait(far));
            assert!(looks.look(|is_doubtful| is_doubtful));
            waits.join().expect("ends");
        });
        assert!(!looks.is_wanted());
    }

    #[test]
    fn what_is_damaged_is_there_and_others_need_not_be() {
        let looks = Looks::default();
        looks.damaged();
        assert!(looks.losing_since().is_some());
        assert!(looks.look(|is_doubtful| !is_doubtful));
    }

    #[test]
    fn who_may_have_removed_something_has_not() {
        let looks = Looks::default();
        looks.want();
        assert!(looks.is_wanted());
        assert!(looks.losing_since().is_none());
    }
}
