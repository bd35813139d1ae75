//! What can go wrong between here and a remote.

use std::io;
use std::time::Duration;

use crate::Body;
use crate::name::ObjectName;

/// Why a remote did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It cannot be reached, is overloaded, or broke off. Later it may be different.
    #[error("{place} cannot be reached: {reason}")]
    Unreachable {
        /// Which remote.
        place: String,
        /// What the last try came to.
        reason: String,
    },
    /// It took longer than it may.
    #[error("{place} did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// Which remote.
        place: String,
        /// How long it had.
        limit: Duration,
    },
    /// It does not let us: no credentials, wrong ones, or no permission.
    #[error("{place} refuses access: {reason}")]
    Denied {
        /// Which remote.
        place: String,
        /// Its words.
        reason: String,
    },
    /// It understood and said no: no such bucket, not a request it knows.
    #[error("{place}: {reason}")]
    Refused {
        /// Which remote.
        place: String,
        /// Its words.
        reason: String,
    },
    /// An object is larger than anything that belongs there.
    #[error("{name} is larger than {most} bytes")]
    TooLarge {
        /// Which object.
        name: ObjectName,
        /// What it may have.
        most: u64,
    },
    /// A file or directory of this machine.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

impl RemoteError {
    /// Whether the same call may succeed later, with nobody doing anything.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut { .. })
    }
}

/// How long a body is. That a file of this machine cannot be read is no fault of the remote.
pub(crate) async fn size(body: &Body) -> Result<u64, RemoteError> {
    let path = match body {
        Body::Bytes(bytes) => return Ok(bytes.len() as u64),
        Body::File(path) => path,
    };
    let opened = tokio::fs::File::open(path).await;
    let meta = match opened {
        Ok(file) => file.metadata().await,
        Err(error) => Err(error),
    };
    meta.map(|meta| meta.len())
        .map_err(|source| RemoteError::Io {
            path: path.display().to_string(),
            source,
        })
}
