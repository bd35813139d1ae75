//! Opening the index: RocksDB's options, how much memory they allow, and the check of the schema.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode,
    Options,
};

use super::schema::{COUNTERS_KEY, FAMILIES, META, SCHEMA_KEY, SCHEMA_VERSION};
use super::{Counters, Index, IndexError};
use crate::limits;

/// Memory for blocks read, and for changes not yet written to tables: of all families together, so
/// that the daemon stays as small with many of them in use.
const BLOCK_CACHE: usize = 12 << 20;
const WRITE_BUFFERS: usize = 16 << 20;

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

#[cfg(test)]
mod tests {
    use super::*;

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
