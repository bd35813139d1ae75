//! What kachefs keeps elsewhere, for other machines: blobs and facts in S3 or a directory.
//!
//! A [`Remote`] keeps objects by name and is believed nothing: a blob is held against its digest
//! ([`blob`]), a fact against a signature ([`signed`]). This crate moves bytes and tells what is wrong
//! with them; what they mean is the business of `kachefs`.

pub mod blob;
mod check;
mod directory;
mod error;
mod location;
mod name;
pub mod pack;
mod s3;
pub mod signed;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

pub use check::{Checked, check};
pub use directory::DirectoryRemote;
pub use error::RemoteError;
pub use location::{Location, LocationError, S3Location};
pub use name::{Kind, NameError, ObjectName, TreeName};
pub use s3::S3Remote;

/// A place that keeps objects by name.
///
/// An object is written once as a whole and then there for everybody, or not at all. Every call ends
/// within the [`Limits`], and is tried again within them where that may help.
#[async_trait]
pub trait Remote: Send + Sync {
    /// The bytes of an object, all of them or those in `range`; `None` when there is no such object.
    /// [`RemoteError::TooLarge`] when they are more than `most`; fewer than asked for when the object
    /// ends before.
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError>;

    /// Writes an object.
    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError>;

    /// What is known of an object without reading it; `None` when there is none.
    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError>;

    /// The objects of a kind, in the order of their names, behind `after`. At most a thousand or so: ask
    /// again behind the last one until there are none.
    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError>;

    /// Removes an object. It is no error that there is none.
    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError>;

    /// What somebody wrote last before that time, and never finished: no object, and seen by nobody. Removes
    /// it where `remove` says so. Returns how many bytes each is.
    async fn unfinished(&self, before: SystemTime, remove: bool) -> Result<Vec<u64>, RemoteError> {
        // Most leave nothing.
        let _ = (before, remove);
        Ok(Vec::new())
    }
}

/// What to write.
#[derive(Clone, Debug)]
pub enum Body {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file, from its start to its end.
    File(PathBuf),
}

/// What to do where an object of this name is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Put {
    /// Take its place.
    Replace,
    /// Leave it.
    IfAbsent,
}

/// What came of writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// The object is there now.
    New,
    /// One was there already, and still is: another, or this one where an answer got lost and it was
    /// sent again.
    Existed,
}

/// An object, seen from outside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Its name.
    pub name: ObjectName,
    /// Its length in bytes.
    pub size: u64,
    /// When it was written, by the clock of the remote.
    pub modified: SystemTime,
}

/// How long to wait for a remote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// For a connection.
    pub connect: Duration,
    /// For everything of a call, with all its tries; and a second more for each [`Limits::SLOWEST`] that
    /// it moves.
    pub call: Duration,
    /// How often a call is tried.
    pub tries: u32,
}

impl Limits {
    /// Bytes per second below which a remote counts as one that does not answer.
    pub const SLOWEST: u64 = 256 << 10;

    /// How long a call may take that moves so many bytes.
    fn moving(&self, bytes: u64) -> Duration {
        self.call + Duration::from_secs(bytes / Self::SLOWEST)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            call: Duration::from_secs(30),
            tries: 3,
        }
    }
}

/// The remote at a location.
pub async fn open(location: &Location, limits: Limits) -> Result<Arc<dyn Remote>, RemoteError> {
    Ok(match location {
        Location::Directory(path) => Arc::new(DirectoryRemote::new(path.clone(), limits)),
        Location::S3(location) => Arc::new(S3Remote::new(location, limits).await?),
    })
}
