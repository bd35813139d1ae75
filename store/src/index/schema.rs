//! The names of families and the keys in them (the table is in the parent). Who changes what an older
//! kachefs would misread raises the version.

use crate::builds::BuildId;
use crate::digest::Digest;
use crate::shared::RemoteId;
use crate::view::{Ino, ViewId};

pub(crate) const META: &str = "meta";
pub(crate) const VIEWS: &str = "views";
pub(crate) const INODES: &str = "inodes";
pub(crate) const DENTRIES: &str = "dentries";
pub(crate) const ACTIONS: &str = "actions";
pub(crate) const RECORDS: &str = "records";
pub(crate) const FILES: &str = "files";
pub(crate) const BUILDS: &str = "builds";
pub(crate) const REQUESTS: &str = "requests";
pub(crate) const PARTS: &str = "parts";
pub(crate) const KEPT: &str = "kept";
pub(crate) const UPLOADS: &str = "uploads";
pub(super) const FAMILIES: [&str; 12] = [
    META, VIEWS, INODES, DENTRIES, ACTIONS, RECORDS, FILES, BUILDS, REQUESTS, PARTS, KEPT, UPLOADS,
];

pub(crate) const SCHEMA_VERSION: u32 = 8;
pub(super) const SCHEMA_KEY: &[u8] = b"schema";
pub(crate) const COUNTERS_KEY: &[u8] = b"counters";
pub(crate) const SCRATCH_KEY: &[u8] = b"next-scratch";
pub(crate) const EXCHANGES_KEY: &[u8] = b"exchanges/";
pub(crate) const SYNC_POINT_KEY: &[u8] = b"sync-point";

pub(super) fn exchanges_key(view: ViewId) -> Vec<u8> {
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

pub(crate) fn kept_key(remote: RemoteId, digest: &Digest) -> Vec<u8> {
    [remote.as_bytes(), digest.as_bytes()].concat()
}

/// Rows of builds come before rows of actions, so that they are found without those.
pub(super) const OF_BUILD: u8 = 0;
pub(super) const OF_ACTION: u8 = 1;

pub(super) fn build_prefix(view: ViewId, of: u8) -> Vec<u8> {
    [&view.0.to_be_bytes()[..], &[of]].concat()
}

pub(super) fn build_key(view: ViewId, of: u8, build: BuildId) -> Vec<u8> {
    [&build_prefix(view, of)[..], &build.0.to_be_bytes()].concat()
}
