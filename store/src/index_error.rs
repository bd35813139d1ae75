//! Why an index cannot be read or written: whether its contents are to blame or the machine it is on.
//!
//! RocksDB tells what the operating system said only as text; this is the one place that reads it.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::codec::CodecError;
use crate::index::SCHEMA_VERSION;

/// An index that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// RocksDB refuses.
    #[error("index {}: {source}", path.display())]
    Db {
        /// The index directory.
        path: PathBuf,
        /// What RocksDB says.
        source: rocksdb::Error,
    },
    /// The index was written by another generation of kachefs.
    #[error("index {}: schema {found}, this kachefs knows {SCHEMA_VERSION}", path.display())]
    Schema {
        /// The index directory.
        path: PathBuf,
        /// The schema found.
        found: String,
    },
    /// An index that is to be moved away and cannot be.
    #[error("index {}: cannot be moved to the quarantine: {source}", path.display())]
    Move {
        /// The index directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A value that does not decode.
    #[error("index: {0}")]
    Codec(#[from] CodecError),
    /// A key that is not of its column family's form.
    #[error("index: malformed key in {0}")]
    Key(&'static str),
}

/// What the operating system may say for reasons that are none of the index's: no fault of its
/// contents, and worth telling whoever waits.
const REASONS: [(Errno, &str); 9] = [
    (Errno::ENOSPC, "No space left on device"),
    (Errno::EDQUOT, "Disk quota exceeded"),
    (Errno::EROFS, "Read-only file system"),
    (Errno::ENFILE, "Too many open files in system"),
    (Errno::EMFILE, "Too many open files"),
    (Errno::ENOMEM, "Cannot allocate memory"),
    (Errno::EACCES, "Permission denied"),
    (Errno::EPERM, "Operation not permitted"),
    (Errno::EAGAIN, "Resource temporarily unavailable"),
];

impl IndexError {
    /// Which of the operating system's refusals is behind it, if it is one that fits anybody's call.
    pub fn errno(&self) -> Option<Errno> {
        let Self::Db { source, .. } = self else {
            return None;
        };
        // RocksDB passes the errno on only as text (strerror(3)), after what it was doing.
        let text = source.to_string();
        let said = |reason: &str| {
            let found = text.split(": ").any(|part| part.trim_end() == reason);
            found || text.contains("No space left") && reason.starts_with("No space left")
        };
        let found = REASONS.iter().find(|(_, reason)| said(reason));
        found.map(|(errno, _)| *errno)
    }

    /// Whether the contents of the index are to blame, and not the machine it is on.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Db { source, .. } => {
                use rocksdb::ErrorKind as Kind;
                let text = source.to_string();
                let in_use = text.contains("While lock file") || text.contains("lock hold by");
                !in_use
                    && self.errno().is_none()
                    && !matches!(source.kind(), Kind::Busy | Kind::TryAgain | Kind::TimedOut)
            }
            Self::Codec(_) | Self::Key(_) => true,
            Self::Schema { .. } | Self::Move { .. } => false,
        }
    }
}
