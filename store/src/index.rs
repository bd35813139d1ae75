//! The index: every fact of a store, in RocksDB.
//!
//! | column family | key | value |
//! |---|---|---|
//! | `meta` | name | schema version, counters, next scratch id |
//! | `meta` | `exchanges/`, view | [`Exchanges`] |
//! | `meta` | `sync-point` | [`SyncPoint`] |
//! | `views` | view | [`ViewRecord`] |
//! | `inodes` | view, ino | [`InodeRecord`] |
//! | `dentries` | view, parent ino, name | ino |
//! | `actions` | [`ActionKey`] | [`ActionEntry`] |
//! | `records` | [`InvocationDigest`], digest of the record | [`InputRecord`] |
//! | `files` | path | [`FileMemo`] |
//!
//! Numbers in keys are big-endian, so iteration follows their order. A [`Batch`] is atomic. A
//! commit goes through the write-ahead log without a sync: it survives the death of the process,
//! and a power cut may take back the most recent ones, in order (RocksDB wiki, "WAL").

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    DBRecoveryMode, Direction, IteratorMode, Options, ReadOptions, WriteBatch,
};
use serde::{Deserialize, Serialize};

use crate::action::{ActionEntry, ActionKey, InputRecord, InvocationDigest};
use crate::codec::{CodecError, Record, decode, encode};
use crate::digest::Digest;
pub use crate::index_error::IndexError;
use crate::layout::StoreDir;
use crate::limits;
use crate::mark::Mark;
use crate::sync_point::SyncPoint;
use crate::view::{DentryRecord, Exchanges, FileMemo, Ino, InodeRecord, ViewId, ViewRecord};
use crate::watermark::Watermark;

/// Keys and values as they are stored.
type Rows = Vec<(Vec<u8>, Vec<u8>)>;

pub(crate) const META: &str = "meta";
pub(crate) const VIEWS: &str = "views";
pub(crate) const INODES: &str = "inodes";
pub(crate) const DENTRIES: &str = "dentries";
pub(crate) const ACTIONS: &str = "actions";
pub(crate) const RECORDS: &str = "records";
pub(crate) const FILES: &str = "files";
const FAMILIES: [&str; 7] = [META, VIEWS, INODES, DENTRIES, ACTIONS, RECORDS, FILES];

pub(crate) const SCHEMA_VERSION: u32 = 2;
const SCHEMA_KEY: &[u8] = b"schema";
pub(crate) const COUNTERS_KEY: &[u8] = b"counters";
pub(crate) const SCRATCH_KEY: &[u8] = b"next-scratch";
pub(crate) const EXCHANGES_KEY: &[u8] = b"exchanges/";
pub(crate) const SYNC_POINT_KEY: &[u8] = b"sync-point";

/// Memory for blocks read, and for changes not yet written to tables: of all families together, so
/// that the daemon stays as small with many of them in use.
const BLOCK_CACHE: usize = 12 << 20;
const WRITE_BUFFERS: usize = 16 << 20;

/// Input records kept per invocation: enough for the branches one switches between.
const RECORDS_PER_INVOCATION: usize = 16;

/// What is counted over the life of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Numbers by counter.
    pub numbers: BTreeMap<Counter, u64>,
    /// Actions not cached, by the name of the reason.
    pub uncacheable: BTreeMap<String, u64>,
}

impl Record for Counters {
    const NAME: &'static str = "counters";
    const VERSION: u8 = 1;
}

/// One thing that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Counter {
    /// Actions served without running a compiler.
    Hits,
    /// Cacheable actions that ran.
    Misses,
    /// Cacheable actions that ran and failed.
    Failed,
    /// Bytes that hits referred to.
    BytesReferenced,
    /// Bytes new to the CAS.
    BytesStored,
    /// Bytes hashed on the way into the CAS, whether new or not.
    BytesIngested,
    /// Milliseconds of compiling that hits spared.
    SavedMs,
}

/// The facts of one store.
pub struct Index {
    pub(crate) db: DB,
    path: PathBuf,
    counters: Mutex<Counters>,
    /// The number of the last commit that was there when it was opened.
    opened_at: u64,
    /// The number in the mark; none at first.
    marked: AtomicU64,
    watermark: OnceLock<Watermark>,
    refusing: AtomicBool,
}

/// Changes that become true together.
pub struct Batch<'a> {
    index: &'a Index,
    changes: WriteBatch,
    counted: bool,
}

impl Index {
    /// Opens the index at `path`, making it when it is not there.
    ///
    /// A log that ends in something unreadable is followed up to there. Whoever wants to know, or
    /// meets an index that is damaged otherwise, uses [`crate::recover`].
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        Self::open_with(path, DBRecoveryMode::PointInTime)
    }

    pub(crate) fn open_with(path: &Path, mode: DBRecoveryMode) -> Result<Self, IndexError> {
        let failed = |source: rocksdb::Error| {
            let text = source.to_string();
            let path = path.to_owned();
            // What only a later schema has.
            match text.split_once("Column families not opened: ") {
                Some((_, found)) => IndexError::Schema {
                    path,
                    found: found.to_owned(),
                },
                None => IndexError::Db { path, source },
            }
        };
        let of_family = family_options(&Cache::new_lru_cache(BLOCK_CACHE));
        let families = FAMILIES.map(|name| ColumnFamilyDescriptor::new(name, of_family.clone()));
        let mut options = db_options();
        options.set_wal_recovery_mode(mode);
        let db = DB::open_cf_descriptors(&options, path, families).map_err(failed)?;
        let mut index = Self {
            opened_at: db.latest_sequence_number(),
            db,
            path: path.to_owned(),
            counters: Mutex::new(Counters::default()),
            marked: AtomicU64::new(u64::MAX),
            watermark: OnceLock::new(),
            refusing: AtomicBool::new(false),
        };
        index.check_schema()?;
        match index.get(META, COUNTERS_KEY) {
            Ok(counters) => index.counters = Mutex::new(counters.unwrap_or_default()),
            // They start anew; `mend` names what was there.
            Err(IndexError::Codec(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(index)
    }

    /// A value that no kachefs writes there is overwritten: what it stood for is unknown, and the
    /// records say themselves whether they can be read.
    fn check_schema(&self) -> Result<(), IndexError> {
        let found = self.get_raw(META, SCHEMA_KEY)?;
        let version = found.and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?)));
        match version {
            Some(SCHEMA_VERSION) => Ok(()),
            Some(found) if found > SCHEMA_VERSION => Err(IndexError::Schema {
                path: self.path.clone(),
                found: found.to_string(),
            }),
            _ => self
                .db
                .put_cf(self.family(META), SCHEMA_KEY, SCHEMA_VERSION.to_be_bytes())
                .map_err(|source| self.db_error(source)),
        }
    }

    /// Leaves the number of each commit in `file` from now on, before it is acknowledged. Returns
    /// whether the index held all that an earlier process had acknowledged there, when it was opened.
    pub fn follow(&self, file: File) -> io::Result<bool> {
        let watermark = Watermark::new(file)?;
        let whole = watermark.highest() <= self.opened_at;
        watermark.restart(self.db.latest_sequence_number());
        // There is one keeper.
        let _ = self.watermark.set(watermark);
        Ok(whole)
    }

    /// The number of the last commit that was there when it was opened.
    pub(crate) fn opened_at(&self) -> u64 {
        self.opened_at
    }

    /// Notes in the store how far the index has come; `synced` after a sync with nothing since.
    pub fn leave_mark(&self, store: &StoreDir, synced: bool) -> io::Result<()> {
        let number = self.db.latest_sequence_number();
        if self.marked.swap(number, Ordering::Relaxed) == number && !synced {
            return Ok(());
        }
        Mark::leave(&store.mark(), number, synced)
    }

    /// Whether the last change was refused. RocksDB goes on refusing after some errors, however
    /// well the disk is by then.
    pub fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
    }

    /// Forgets every view, and with it what the kernel may still refer to.
    pub(crate) fn forget_views(&self) -> Result<(), IndexError> {
        // Longer, and greater, than any key that is a number or starts with one.
        const END: &[u8] = &[0xff; 16];
        let start: &[u8] = &[];
        let mut changes = WriteBatch::default();
        for family in [VIEWS, INODES, DENTRIES] {
            changes.delete_range_cf(self.family(family), start, END);
        }
        for (key, _) in self.scan(META, EXCHANGES_KEY)? {
            changes.delete_cf(self.family(META), key);
        }
        let written = self.db.write(changes);
        written.map_err(|source| self.db_error(source))
    }

    /// Changes nothing, through the log and all.
    pub fn probe(&self) -> Result<(), IndexError> {
        let mut batch = self.batch();
        batch.count(&[], None);
        batch.commit()
    }

    /// An empty batch.
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            index: self,
            changes: WriteBatch::default(),
            counted: false,
        }
    }

    /// Every view of the store.
    pub fn views(&self) -> Result<Vec<(ViewId, ViewRecord)>, IndexError> {
        self.scan(VIEWS, &[])?
            .into_iter()
            .map(|(key, value)| {
                let id = key
                    .as_slice()
                    .try_into()
                    .map_err(|_| IndexError::Key(VIEWS))?;
                Ok((ViewId(u32::from_be_bytes(id)), decode(&value)?))
            })
            .collect()
    }

    /// Every inode of a view.
    pub fn inodes(&self, view: ViewId) -> Result<Vec<(Ino, InodeRecord)>, IndexError> {
        let mut inodes = Vec::new();
        self.each_inode(view, |ino, record| inodes.push((ino, record)))?;
        Ok(inodes)
    }

    /// Shows every inode of a view, one after the other: all of them at once, with the bytes of small
    /// files, are many times what a view takes in memory.
    pub fn each_inode(
        &self,
        view: ViewId,
        mut show: impl FnMut(Ino, InodeRecord),
    ) -> Result<(), IndexError> {
        self.each(INODES, &view.0.to_be_bytes(), |key, value| {
            let ino = key[4..].try_into().map_err(|_| IndexError::Key(INODES))?;
            show(Ino(u64::from_be_bytes(ino)), decode(value)?);
            Ok(())
        })
    }

    /// One inode of a view.
    pub fn inode(&self, view: ViewId, ino: Ino) -> Result<Option<InodeRecord>, IndexError> {
        self.get(INODES, &inode_key(view, ino))
    }

    /// Every name of a view.
    pub fn dentries(&self, view: ViewId) -> Result<Vec<DentryRecord>, IndexError> {
        self.scan(DENTRIES, &view.0.to_be_bytes())?
            .into_iter()
            .map(|(key, value)| {
                let malformed = || IndexError::Key(DENTRIES);
                let (parent, name) = key[4..].split_first_chunk::<8>().ok_or_else(malformed)?;
                let ino = value.as_slice().try_into().map_err(|_| malformed())?;
                Ok(DentryRecord {
                    parent: Ino(u64::from_be_bytes(*parent)),
                    name: name.to_vec(),
                    ino: Ino(u64::from_be_bytes(ino)),
                })
            })
            .collect()
    }

    /// The exchanges a view carried out last.
    pub fn exchanges(&self, view: ViewId) -> Result<Exchanges, IndexError> {
        Ok(self.get(META, &exchanges_key(view))?.unwrap_or_default())
    }

    /// The last sync point; `None` in a store that never had one.
    pub fn sync_point(&self) -> Result<Option<SyncPoint>, IndexError> {
        self.get(META, SYNC_POINT_KEY)
    }

    /// What the action cache holds under `key`.
    pub fn action(&self, key: &ActionKey) -> Result<Option<ActionEntry>, IndexError> {
        self.get(ACTIONS, key.0.as_bytes())
    }

    /// The input records of an invocation, newest first.
    pub fn records(&self, invocation: &InvocationDigest) -> Result<Vec<InputRecord>, IndexError> {
        let mut records = self
            .scan(RECORDS, invocation.0.as_bytes())?
            .into_iter()
            .map(|(_, value)| Ok(decode::<InputRecord>(&value)?))
            .collect::<Result<Vec<_>, IndexError>>()?;
        records.sort_by_key(|record| std::cmp::Reverse(record.created_ms));
        Ok(records)
    }

    /// The digest last computed for the file at `path`.
    pub fn file_memo(&self, path: &[u8]) -> Result<Option<FileMemo>, IndexError> {
        self.get(FILES, path)
    }

    /// No scratch id at or above this one was ever given out.
    pub fn next_scratch(&self) -> Result<u64, IndexError> {
        match self.get_raw(META, SCRATCH_KEY)? {
            None => Ok(1),
            Some(bytes) => Ok(u64::from_be_bytes(
                bytes
                    .as_slice()
                    .try_into()
                    .map_err(|_| IndexError::Key(META))?,
            )),
        }
    }

    /// Everything counted so far.
    pub fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }

    /// Writes everything held in memory to the disk and waits for it.
    pub fn sync(&self) -> Result<(), IndexError> {
        self.db
            .flush_wal(true)
            .map_err(|source| self.db_error(source))
    }

    pub(crate) fn family(&self, name: &'static str) -> &ColumnFamily {
        self.db
            .cf_handle(name)
            .expect("every family of FAMILIES was opened")
    }

    pub(crate) fn db_error(&self, source: rocksdb::Error) -> IndexError {
        IndexError::Db {
            path: self.path.clone(),
            source,
        }
    }

    fn get_raw(&self, family: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.db
            .get_cf(self.family(family), key)
            .map_err(|source| self.db_error(source))
    }

    fn get<R: Record>(&self, family: &'static str, key: &[u8]) -> Result<Option<R>, IndexError> {
        let value = self
            .db
            .get_pinned_cf(self.family(family), key)
            .map_err(|source| self.db_error(source))?;
        Ok(value.map(|bytes| decode(&bytes)).transpose()?)
    }

    fn scan(&self, family: &'static str, prefix: &[u8]) -> Result<Rows, IndexError> {
        let mut rows = Vec::new();
        self.each(family, prefix, |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            Ok(())
        })?;
        Ok(rows)
    }

    fn each(
        &self,
        family: &'static str,
        prefix: &[u8],
        mut show: impl FnMut(&[u8], &[u8]) -> Result<(), IndexError>,
    ) -> Result<(), IndexError> {
        let mode = IteratorMode::From(prefix, Direction::Forward);
        let mut options = ReadOptions::default();
        // A view is read once, to be loaded: that must not push out what is asked for again.
        options.fill_cache(family != INODES && family != DENTRIES);
        for row in self.db.iterator_cf_opt(self.family(family), options, mode) {
            let (key, value) = row.map_err(|source| self.db_error(source))?;
            if !key.starts_with(prefix) {
                break;
            }
            show(&key, &value)?;
        }
        Ok(())
    }
}

pub(crate) fn db_options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_max_total_wal_size(64 << 20);
    // Logs that later tables build upon are missed when they are missing.
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_open_files(i32::try_from(limits::share(256)).unwrap_or(256));
    options.set_db_write_buffer_size(WRITE_BUFFERS);
    options
}

fn family_options(cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_write_buffer_size(8 << 20);
    options
}

fn exchanges_key(view: ViewId) -> Vec<u8> {
    [EXCHANGES_KEY, &view.0.to_be_bytes()].concat()
}

pub(crate) fn inode_key(view: ViewId, ino: Ino) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&view.0.to_be_bytes());
    key[4..].copy_from_slice(&ino.0.to_be_bytes());
    key
}

pub(crate) fn dentry_key(view: ViewId, parent: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = inode_key(view, parent).to_vec();
    key.extend_from_slice(name);
    key
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

    /// Adds an input record to an invocation; the oldest beyond the limit goes.
    pub fn put_record(
        &mut self,
        invocation: &InvocationDigest,
        record: &InputRecord,
    ) -> Result<(), IndexError> {
        let key = record_key(invocation, record)?;
        let mut known = self.index.records(invocation)?;
        known.retain(|old| record_key(invocation, old).is_ok_and(|old| old != key));
        for old in known.iter().skip(RECORDS_PER_INVOCATION - 1) {
            self.changes
                .delete_cf(self.index.family(RECORDS), record_key(invocation, old)?);
        }
        self.put(RECORDS, &key, record)
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

    fn put<R: Record>(
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

/// A record is named by what it lists, not by when it was made.
fn record_key(invocation: &InvocationDigest, record: &InputRecord) -> Result<Vec<u8>, CodecError> {
    let timeless = encode(&InputRecord {
        created_ms: 0,
        ..record.clone()
    })?;
    let mut key = invocation.0.as_bytes().to_vec();
    key.extend_from_slice(Digest::of(&timeless).as_bytes());
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn oldest_records_go_first() {
        let (_dir, index) = index();
        let invocation = InvocationDigest(Digest::of(b"i"));
        let total = RECORDS_PER_INVOCATION as u64 + 3;
        for created_ms in 0..total {
            let mut batch = index.batch();
            let record = InputRecord {
                sources: vec![vec![u8::try_from(created_ms).expect("small")]],
                env: Vec::new(),
                created_ms,
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

    #[test]
    fn counters_survive_reopening() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("index");
        {
            let index = Index::open(&path).expect("opens");
            let mut batch = index.batch();
            batch.count(&[(Counter::Hits, 2)], Some("unknown-flag"));
            batch.commit().expect("commits");
        }
        let counters = Index::open(&path).expect("opens").counters();
        assert_eq!(counters.numbers[&Counter::Hits], 2);
        assert_eq!(counters.uncacheable["unknown-flag"], 1);
    }

    #[test]
    fn another_schema_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("index");
        {
            let index = Index::open(&path).expect("opens");
            index
                .db
                .put_cf(index.family(META), SCHEMA_KEY, 99_u32.to_be_bytes())
                .expect("puts");
        }
        let error = Index::open(&path).err().expect("refused").to_string();
        assert!(error.contains("schema 99"), "{error}");
    }
}
