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
//! | `builds` | view, 0, build | [`BuildRecord`] |
//! | `builds` | view, 1, build, number | [`LoggedAction`] |
//! | `requests` | view, 1, build, number | [`KeptRequest`] |
//! | `parts` | digest of a [`Unit`], time, [`ActionKey`] | [`Parts`] |
//! | `kept` | [`RemoteId`], digest of a blob, or [`ActionKey`] | [`Kept`] |
//! | `uploads` | number | [`Upload`] |
//!
//! Numbers in keys are big-endian, so iteration follows their order. A [`Batch`] is atomic. A
//! commit goes through the write-ahead log without a sync: it survives the death of the process,
//! and a power cut may take back the most recent ones, in order (RocksDB wiki, "WAL").
//!
//! `schema` has the names of families and keys, `open` the options, `read` gets facts out by their
//! types, `batch` puts them in, `counters` are kept in memory too, `shared` is what concerns remotes.
//!
//! [`ActionEntry`]: crate::action::ActionEntry
//! [`ActionKey`]: crate::action::ActionKey
//! [`BuildRecord`]: crate::builds::BuildRecord
//! [`Exchanges`]: crate::view::Exchanges
//! [`FileMemo`]: crate::view::FileMemo
//! [`InodeRecord`]: crate::view::InodeRecord
//! [`InputRecord`]: crate::action::InputRecord
//! [`InvocationDigest`]: crate::action::InvocationDigest
//! [`Kept`]: crate::shared::Kept
//! [`KeptRequest`]: crate::builds::KeptRequest
//! [`LoggedAction`]: crate::builds::LoggedAction
//! [`Parts`]: crate::builds::Parts
//! [`RemoteId`]: crate::shared::RemoteId
//! [`SyncPoint`]: crate::sync_point::SyncPoint
//! [`Unit`]: crate::builds::Unit
//! [`Upload`]: crate::shared::Upload
//! [`ViewRecord`]: crate::view::ViewRecord

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rocksdb::{ColumnFamily, DB, WriteBatch};

pub use crate::index_error::IndexError;
use crate::layout::StoreDir;
use crate::mark::Mark;
use crate::watermark::Watermark;

mod batch;
mod builds;
mod counters;
mod open;
mod read;
mod schema;
mod shared;

pub use batch::Batch;
pub use counters::{Counter, Counters};
pub(crate) use open::db_options;
pub(crate) use schema::{
    ACTIONS, BUILDS, COUNTERS_KEY, DENTRIES, EXCHANGES_KEY, FILES, INODES, KEPT, META, PARTS,
    RECORDS, REQUESTS, SCHEMA_VERSION, SCRATCH_KEY, SYNC_POINT_KEY, UPLOADS, VIEWS, dentry_key,
    inode_key,
};
pub use shared::{UploadId, record_digest};

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

impl Index {
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
}
