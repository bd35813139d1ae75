//! A remote that has lost something is likely to lose more: a lifecycle rule, or somebody with a broom, is at
//! work. What views show of it is fetched then while it is there, the smallest first: a build that has to make
//! one thing again should not find the next one lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use store::Digest;

use super::connection::{Haste, Unavailable};
use super::faults::FaultError;
use crate::storage::Storage;

/// Whether that is under way.
#[derive(Default)]
pub struct Rescue {
    is_under_way: AtomicBool,
}

impl Storage {
    /// Fetches what of these blobs is not on this machine, aside and behind what anybody wants, and no more than
    /// is fetched early for a build.
    pub fn rescue(self: &Arc<Self>, shown: impl IntoIterator<Item = (Digest, u64)>) {
        let shown = shown.into_iter();
        let mut blobs: Vec<_> = shown
            .filter(|(digest, size)| !self.cas.has(digest, *size))
            .collect();
        let is_under_way = &self.lazy.rescue.is_under_way;
        if blobs.is_empty() || is_under_way.swap(true, Ordering::AcqRel) {
            return;
        }
        blobs.sort_unstable_by_key(|(_, size)| *size);
        let storage = Arc::clone(self);
        let work = move || {
            storage.rescue_each(&blobs);
            let is_under_way = &storage.lazy.rescue.is_under_way;
            is_under_way.store(false, Ordering::Release);
        };
        let thread = std::thread::Builder::new().name("rescue".into());
        if let Err(error) = thread.spawn(work) {
            is_under_way.store(false, Ordering::Release);
            tracing::warn!(%error, "cannot start a thread");
        }
    }

    fn rescue_each(&self, blobs: &[(Digest, u64)]) {
        let budget = self
            .lazy
            .connection()
            .map(|remote| remote.config.prefetch_budget);
        let (mut left, mut fetched) = (budget.unwrap_or_default(), 0);
        for (digest, size) in blobs {
            let Some(rest) = left.checked_sub(*size) else {
                break;
            };
            match self.bring(digest, *size, Haste::Early) {
                Ok(true) => (left, fetched) = (rest, fetched + 1),
                Ok(false) => {}
                Err(FaultError::Unavailable(Unavailable::LeftAlone) | FaultError::Closed) => break,
                Err(error) => tracing::debug!(%digest, %error, "not rescued"),
            }
        }
        if fetched > 0 {
            tracing::info!(fetched, "fetched while they are there");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use remote::ObjectName;
    use store::Place;

    use super::super::connection::Connection;
    use super::super::{GONE_FOR, Gone, kept_unseen, testing};
    use super::*;
    use crate::clock;

    /// Blobs that only the remote has, too large for packs.
    fn elsewhere(storage: &Storage, connection: &Connection) -> [(Digest, u64); 2] {
        let blobs = [1, 2].map(|byte| {
            let bytes = vec![byte; 70_000];
            storage.cas.ingest_bytes(&bytes).expect("is here");
            (Digest::of(&bytes), bytes.len() as u64)
        });
        storage.send_blobs(connection, &blobs).expect("sends");
        for (digest, _) in &blobs {
            fs::remove_file(storage.cas.path(digest)).expect("removes");
        }
        blobs
    }

    fn object(dir: &Path, digest: &Digest) -> std::path::PathBuf {
        let name = ObjectName::blob(digest).to_string();
        dir.join("bucket").join(name)
    }

    #[test]
    fn what_a_losing_remote_has_is_fetched_before_it_is_bound() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [lost, other] = elsewhere(&storage, &connection);
        assert!(storage.may_be_bound([lost, other]));
        assert!(!storage.cas.has(&other.0, other.1), "nobody wants it");
        fs::remove_file(object(dir.path(), &lost.0)).expect("removes");
        storage.fault(&lost.0, lost.1).expect_err("is gone");
        assert!(!storage.may_be_bound([lost, other]));
        assert!(storage.may_be_bound([other]));
        assert!(storage.cas.has(&other.0, other.1));
    }

    #[test]
    fn what_was_gone_is_fetched_before_it_is_bound_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let [(digest, size), _] = elsewhere(&storage, &connection);
        let long_ago = Instant::now().checked_sub(GONE_FOR);
        let long_ago = long_ago.expect("the clock goes back that far");
        let lazy = &storage.lazy;
        lazy.note_gone(&digest, Place::Own, Gone::Since(long_ago));
        // Somebody says again that it is there.
        let learn = || {
            let mut batch = storage.index.batch();
            let kept = kept_unseen(size, Place::Own, clock::now_ms());
            batch.put_kept(connection.id, &digest, &kept).expect("puts");
            batch.commit().expect("commits");
        };
        learn();
        let object = object(dir.path(), &digest);
        let aside = object.with_extension("aside");
        fs::rename(&object, &aside).expect("goes");
        assert!(!storage.may_be_bound([(digest, size)]));
        learn();
        assert!(!storage.has(&digest, size), "it was just not there");
        fs::rename(&aside, &object).expect("comes back");
        lazy.note_gone(&digest, Place::Own, Gone::Since(long_ago));
        assert!(storage.may_be_bound([(digest, size)]));
        assert!(storage.cas.has(&digest, size));
    }

    #[test]
    fn what_is_put_back_is_found_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let blobs = elsewhere(&storage, &connection);
        let [(digest, size), _] = blobs;
        let object = object(dir.path(), &digest);
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
    fn the_rest_of_what_is_shown_is_rescued() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let blobs = elsewhere(&storage, &connection);
        let storage = Arc::new(storage);
        storage.rescue(blobs);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !blobs
            .iter()
            .all(|(digest, size)| storage.cas.has(digest, *size))
        {
            assert!(Instant::now() < deadline, "not fetched");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
