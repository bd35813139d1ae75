//! Facts out of the index, by their types. What does not decode is an error: nothing here mends.

use rocksdb::{Direction, IteratorMode, ReadOptions};

use super::schema::{
    ACTIONS, DENTRIES, FILES, INODES, META, RECORDS, SCRATCH_KEY, SYNC_POINT_KEY, VIEWS,
    exchanges_key, inode_key,
};
use super::{Index, IndexError};
use crate::action::{ActionEntry, ActionKey, InputRecord, InvocationDigest};
use crate::codec::{Record, decode};
use crate::sync_point::SyncPoint;
use crate::view::{DentryRecord, Exchanges, FileMemo, Ino, InodeRecord, ViewId, ViewRecord};

/// Keys and values as they are stored.
type Rows = Vec<(Vec<u8>, Vec<u8>)>;

impl Index {
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

    pub(super) fn get_raw(
        &self,
        family: &'static str,
        key: &[u8],
    ) -> Result<Option<Vec<u8>>, IndexError> {
        self.db
            .get_cf(self.family(family), key)
            .map_err(|source| self.db_error(source))
    }

    pub(super) fn get<R: Record>(
        &self,
        family: &'static str,
        key: &[u8],
    ) -> Result<Option<R>, IndexError> {
        let value = self
            .db
            .get_pinned_cf(self.family(family), key)
            .map_err(|source| self.db_error(source))?;
        Ok(value.map(|bytes| decode(&bytes)).transpose()?)
    }

    pub(super) fn scan(&self, family: &'static str, prefix: &[u8]) -> Result<Rows, IndexError> {
        let mut rows = Vec::new();
        self.each(family, prefix, |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            Ok(())
        })?;
        Ok(rows)
    }

    pub(super) fn each(
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
