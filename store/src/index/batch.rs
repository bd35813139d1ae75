//! Changes of the index: collected, then true together or not at all.

use std::sync::atomic::Ordering;

use rocksdb::WriteBatch;

use super::schema::{
    ACTIONS, COUNTERS_KEY, DENTRIES, FILES, INODES, META, RECORDS, SCRATCH_KEY, SYNC_POINT_KEY,
    VIEWS, dentry_key, exchanges_key, inode_key,
};
use super::{Counter, Index, IndexError};
use crate::action::{ActionEntry, ActionKey, InputRecord, InputRecord2, InvocationDigest};
use crate::codec::{CodecError, Record, encode};
use crate::digest::Digest;
use crate::sync_point::SyncPoint;
use crate::view::{Exchanges, FileMemo, Ino, InodeRecord, ViewId, ViewRecord};

/// Input records kept per invocation: enough for the branches one switches between.
const RECORDS_PER_INVOCATION: usize = 16;

/// Changes that become true together.
pub struct Batch<'a> {
    pub(super) index: &'a Index,
    changes: WriteBatch,
    counted: bool,
}

impl Index {
    /// An empty batch.
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            index: self,
            changes: WriteBatch::default(),
            counted: false,
        }
    }
}

impl Batch<'_> {
    /// Stores a view.
    pub fn put_view(&mut self, view: ViewId, record: &ViewRecord) -> Result<(), IndexError> {
        self.put(VIEWS, &view.0.to_be_bytes(), record)
    }

    /// Stores an inode.
    pub fn put_inode(
        &mut self,
        view: ViewId,
        ino: Ino,
        record: &InodeRecord,
    ) -> Result<(), IndexError> {
        self.put(INODES, &inode_key(view, ino), record)
    }

    /// Removes an inode.
    pub fn delete_inode(&mut self, view: ViewId, ino: Ino) {
        self.changes
            .delete_cf(self.index.family(INODES), inode_key(view, ino));
    }

    /// Gives `ino` the name `name` in `parent`, instead of what had it.
    pub fn put_dentry(&mut self, view: ViewId, parent: Ino, name: &[u8], ino: Ino) {
        self.changes.put_cf(
            self.index.family(DENTRIES),
            dentry_key(view, parent, name),
            ino.0.to_be_bytes(),
        );
    }

    /// Removes a name.
    pub fn delete_dentry(&mut self, view: ViewId, parent: Ino, name: &[u8]) {
        self.changes
            .delete_cf(self.index.family(DENTRIES), dentry_key(view, parent, name));
    }

    /// Stores which exchanges a view carried out last.
    pub fn put_exchanges(&mut self, view: ViewId, record: &Exchanges) -> Result<(), IndexError> {
        self.put(META, &exchanges_key(view), record)
    }

    /// Forgets them.
    pub fn delete_exchanges(&mut self, view: ViewId) {
        self.changes
            .delete_cf(self.index.family(META), exchanges_key(view));
    }

    /// Stores the last sync point.
    pub fn put_sync_point(&mut self, point: &SyncPoint) -> Result<(), IndexError> {
        self.put(META, SYNC_POINT_KEY, point)
    }

    /// Forgets every digest of a file on the disk.
    pub fn forget_file_memos(&mut self) -> Result<(), IndexError> {
        for (path, _) in self.index.scan(FILES, &[])? {
            self.changes.delete_cf(self.index.family(FILES), path);
        }
        Ok(())
    }

    /// Stores what the action cache holds under `key`.
    pub fn put_action(&mut self, key: &ActionKey, entry: &ActionEntry) -> Result<(), IndexError> {
        self.put(ACTIONS, key.0.as_bytes(), entry)
    }

    /// Adds an input record to an invocation; the oldest beyond the limit goes. Of one that lists the same what it
    /// says of what was loaded stays, if the new one says nothing.
    pub fn put_record(
        &mut self,
        invocation: &InvocationDigest,
        record: &InputRecord,
    ) -> Result<(), IndexError> {
        let key = record_key(invocation, record)?;
        let known = self.index.records(invocation)?;
        let is_same = |old: &InputRecord| record_key(invocation, old).is_ok_and(|old| old == key);
        let (same, others): (Vec<_>, Vec<_>) = known.into_iter().partition(is_same);
        for old in others.iter().skip(RECORDS_PER_INVOCATION - 1) {
            self.changes
                .delete_cf(self.index.family(RECORDS), record_key(invocation, old)?);
        }
        let said = same.into_iter().find_map(|old| old.loads);
        let record = InputRecord {
            loads: record.loads.clone().or(said),
            ..record.clone()
        };
        self.put(RECORDS, &key, &record)
    }

    /// Remembers the digest of a file on the disk.
    pub fn put_file_memo(&mut self, path: &[u8], memo: &FileMemo) -> Result<(), IndexError> {
        self.put(FILES, path, memo)
    }

    /// Declares that scratch ids below `next` may have been given out.
    pub fn put_next_scratch(&mut self, next: u64) {
        self.changes
            .put_cf(self.index.family(META), SCRATCH_KEY, next.to_be_bytes());
    }

    /// Adds to counters, and one to the named uncacheable reason.
    pub fn count(&mut self, add: &[(Counter, u64)], uncacheable: Option<&str>) {
        self.counted = true;
        let mut counters = self.index.counters.lock();
        for (counter, n) in add {
            *counters.numbers.entry(*counter).or_default() += n;
        }
        if let Some(reason) = uncacheable {
            *counters.uncacheable.entry(reason.to_owned()).or_default() += 1;
        }
    }

    /// Makes the changes true, all or none.
    pub fn commit(mut self) -> Result<(), IndexError> {
        if self.counted {
            // Encoded and written under the lock, so an older count never overwrites a newer one.
            let counters = self.index.counters.lock();
            let bytes = encode(&*counters)?;
            self.changes
                .put_cf(self.index.family(META), COUNTERS_KEY, bytes);
            return self.write();
        }
        self.write()
    }

    fn write(self) -> Result<(), IndexError> {
        let index = self.index;
        let written = index.db.write(self.changes);
        index.refusing.store(written.is_err(), Ordering::Relaxed);
        if let (Ok(()), Some(watermark)) = (&written, index.watermark.get()) {
            watermark.raise(index.db.latest_sequence_number());
        }
        written.map_err(|source| index.db_error(source))
    }

    pub(super) fn delete(&mut self, family: &'static str, key: &[u8]) {
        self.changes.delete_cf(self.index.family(family), key);
    }

    pub(super) fn delete_range(&mut self, family: &'static str, from: &[u8], to: &[u8]) {
        let family = self.index.family(family);
        self.changes.delete_range_cf(family, from, to);
    }

    pub(super) fn put<R: Record>(
        &mut self,
        family: &'static str,
        key: &[u8],
        record: &R,
    ) -> Result<(), IndexError> {
        self.changes
            .put_cf(self.index.family(family), key, encode(record)?);
        Ok(())
    }
}

/// A record is named by what it lists, not by when it was made, nor by what it says for the next one: as it was
/// when it said nothing, in version 2, so that rows have the names they had.
pub(super) fn record_key(
    invocation: &InvocationDigest,
    record: &InputRecord,
) -> Result<Vec<u8>, CodecError> {
    let listed = encode(&InputRecord2::listing(record))?;
    let mut key = invocation.0.as_bytes().to_vec();
    key.extend_from_slice(Digest::of(&listed).as_bytes());
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Loads;
    use crate::view::DentryRecord;

    fn index() -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().expect("tempdir");
        let index = Index::open(&dir.path().join("index")).expect("opens");
        (dir, index)
    }

    #[test]
    fn names_of_views_do_not_mix() {
        let (_dir, index) = index();
        let mut batch = index.batch();
        batch.put_dentry(ViewId(1), Ino(1), b"a", Ino(2));
        batch.put_dentry(ViewId(1), Ino(2), b"b", Ino(3));
        batch.put_dentry(ViewId(256), Ino(1), b"a", Ino(9));
        batch.commit().expect("commits");
        let names = index.dentries(ViewId(1)).expect("reads");
        assert_eq!(
            names,
            [
                DentryRecord {
                    parent: Ino(1),
                    name: b"a".to_vec(),
                    ino: Ino(2)
                },
                DentryRecord {
                    parent: Ino(2),
                    name: b"b".to_vec(),
                    ino: Ino(3)
                },
            ]
        );
        let mut batch = index.batch();
        batch.delete_dentry(ViewId(1), Ino(1), b"a");
        batch.commit().expect("commits");
        assert_eq!(index.dentries(ViewId(1)).expect("reads").len(), 1);
        assert_eq!(index.dentries(ViewId(256)).expect("reads").len(), 1);
    }

    #[test]
    fn records_that_list_the_same_are_one_whatever_they_say_was_loaded() {
        let (_dir, index) = index();
        let invocation = InvocationDigest(Digest::of(b"i"));
        let told = |name: &str| Some(Loads::new(["a-1"], [name]));
        let put = |created_ms, loads: Option<Loads>| {
            let record = InputRecord {
                observed: None,
                sources: vec![b"s".to_vec()],
                env: Vec::new(),
                created_ms,
                loads,
            };
            let mut batch = index.batch();
            batch.put_record(&invocation, &record).expect("puts");
            batch.commit().expect("commits");
            let key = record_key(&invocation, &record).expect("a key");
            // Version 2 of it, made at no time.
            let older = Digest::of(&[2, 1, 1, b's', 0, 0, 0]);
            assert_eq!(
                key,
                [invocation.0.as_bytes(), &older.as_bytes()[..]].concat()
            );
            let mut known = index.records(&invocation).expect("reads");
            assert_eq!(known.len(), 1);
            known.remove(0).loads
        };
        assert_eq!(put(5, told("one")), told("one"));
        assert_eq!(put(6, None), told("one"));
        // The clock of who told the one may be ahead.
        assert_eq!(put(4, told("other")), told("other"));
    }

    #[test]
    fn oldest_records_go_first() {
        let (_dir, index) = index();
        let invocation = InvocationDigest(Digest::of(b"i"));
        let total = RECORDS_PER_INVOCATION as u64 + 3;
        for created_ms in 0..total {
            let mut batch = index.batch();
            let record = InputRecord {
                observed: None,
                sources: vec![vec![u8::try_from(created_ms).expect("small")]],
                env: Vec::new(),
                created_ms,
                loads: None,
            };
            batch.put_record(&invocation, &record).expect("puts");
            batch.commit().expect("commits");
        }
        let kept: Vec<u64> = index
            .records(&invocation)
            .expect("reads")
            .iter()
            .map(|r| r.created_ms)
            .collect();
        assert_eq!(kept, (3..total).rev().collect::<Vec<_>>());
    }
}
