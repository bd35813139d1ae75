//! A store with a remote, for the tests of this module.

use std::collections::VecDeque;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use remote::signed::Trust;
use remote::{
    Body, DirectoryRemote, Kind, Location, Object, ObjectName, Put, Remote, RemoteError, Written,
};
use store::{ActionEntry, ActionResult, Digest, InputRecord, Origin, Output, StoreDir};

use super::connection::Connection;
use crate::remote_config::{GRACE, PREFETCH_BUDGET, Prefetch, RemoteConfig, WAIT};
use crate::storage::Storage;

/// A store whose remote is an empty directory, both below `dir`.
pub fn store(dir: &Path) -> (Storage, Arc<Connection>) {
    store_with(dir, |_| {})
}

/// The same, with something in its directory before anybody looks.
pub fn store_with(dir: &Path, prepare: impl FnOnce(&StoreDir)) -> (Storage, Arc<Connection>) {
    let bucket = dir.join("bucket");
    fs::create_dir(&bucket).expect("makes");
    DirectoryRemote::make(&bucket).expect("makes");
    let storage = Storage::open(StoreDir::new(dir.join("store"))).expect("opens");
    prepare(&storage.dir);
    let config = RemoteConfig {
        location: Location::Directory(bucket),
        read_only: false,
        trust: Trust::Everybody,
        wait: WAIT,
        upload_limit: None,
        prefetch: Prefetch::default(),
        prefetch_budget: PREFETCH_BUDGET,
        grace: GRACE,
    };
    config.save(&storage.dir).expect("saves");
    let connection = storage.lazy.connection().expect("a remote");
    (storage, connection)
}

/// Blobs that only the remote has, too large for packs, and the objects they are in.
pub fn elsewhere(
    dir: &Path,
    storage: &Storage,
    connection: &Arc<Connection>,
) -> [((Digest, u64), PathBuf); 2] {
    let blobs = [1, 2].map(|byte| {
        let bytes = vec![byte; 70_000];
        storage.cas.ingest_bytes(&bytes).expect("is here");
        (Digest::of(&bytes), bytes.len() as u64)
    });
    let (_, reliances) = storage.send_blobs(connection, &blobs).expect("sends");
    for reliance in reliances {
        reliance.give_back(connection);
    }
    // This machine has lost them.
    for (digest, _) in &blobs {
        fs::remove_file(storage.cas.path(digest)).expect("removes");
    }
    let bucket = dir.join("bucket");
    blobs.map(|blob| (blob, bucket.join(ObjectName::blob(&blob.0).as_str())))
}

/// A result.
pub fn result(outputs: Vec<Output>, stdout: Vec<u8>) -> ActionEntry {
    ActionEntry::Result(ActionResult {
        crate_name: "c".into(),
        outputs,
        stdout,
        stderr: Vec::new(),
        origin: Origin::default(),
        compile_ms: 1,
    })
}

/// What a run read that read nothing.
pub fn record() -> InputRecord {
    InputRecord {
        sources: Vec::new(),
        env: Vec::new(),
        observed: None,
        created_ms: 1,
        loads: None,
    }
}

/// The names of objects of a kind whose names are not spread over directories.
pub fn objects(dir: &Path, kind: Kind) -> Vec<String> {
    match fs::read_dir(dir.join("bucket").join(kind.prefix())) {
        Ok(entries) => entries
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// A remote that gives these answers to reads, one after the other, and takes nothing.
pub struct Answers(pub Mutex<VecDeque<&'static [u8]>>);

#[async_trait]
impl Remote for Answers {
    async fn get(
        &self,
        _: &ObjectName,
        _: Option<Range<u64>>,
        _: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        Ok(self.0.lock().pop_front().map(Bytes::from_static))
    }

    async fn put(&self, _: &ObjectName, _: Body, _: Put) -> Result<Written, RemoteError> {
        Ok(Written::Existed)
    }

    async fn head(&self, _: &ObjectName) -> Result<Option<Object>, RemoteError> {
        Ok(None)
    }

    async fn list(&self, _: Kind, _: Option<&ObjectName>) -> Result<Vec<Object>, RemoteError> {
        Ok(Vec::new())
    }

    async fn delete(&self, _: &ObjectName) -> Result<(), RemoteError> {
        Ok(())
    }
}
