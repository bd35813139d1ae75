//! What is recorded about views: their names, inodes and content pointers.
//!
//! Plain data; the file system that gives it meaning lives in the daemon.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::action::ActionKey;
use crate::codec::{Record, whole};
use crate::digest::Digest;
use crate::sync_point::Epoch;

/// Number of a view; never reused within a store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ViewId(pub u32);

/// Number of an inode within its view; never reused, and the node id the kernel sees.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory of every view (`FUSE_ROOT_ID` in `linux/fuse.h`).
    pub const ROOT: Self = Self(1);
}

impl fmt::Debug for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Number of a private backing file in the store's scratch area.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ScratchId(pub u64);

/// A point in time: seconds and nanoseconds since the epoch. Packed, because every inode in memory
/// has three.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
#[repr(Rust, packed(4))]
pub struct Timestamp {
    /// Whole seconds; negative before 1970.
    pub secs: i64,
    /// Nanoseconds past the second, below 1,000,000,000.
    pub nanos: u32,
}

/// What kind of file an inode is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Dir,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

/// Where the bytes of an inode are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Content {
    /// No bytes: directories and special files.
    None,
    /// The target of a symbolic link.
    Link(Vec<u8>),
    /// A small file, kept in the index itself.
    Inline(Vec<u8>),
    /// An immutable blob, shared by any number of inodes.
    Blob {
        /// Its name.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// A private backing file; its length is that of the file itself.
    Private(ScratchId),
}

/// What `stat` shows of an inode, apart from size and kind.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits, `0o7777` at most.
    pub perm: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names of the inode; for a directory 2 plus its subdirectories.
    pub nlink: u32,
    /// Device number of a device file, else 0.
    pub rdev: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
}

/// One inode as stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InodeRecord {
    /// Kind of file.
    pub kind: Kind,
    /// What `stat` shows.
    pub attributes: Attributes,
    /// Where the bytes are.
    pub content: Content,
    /// The action whose output the content is; cleared by any write.
    pub origin: Option<ActionKey>,
    /// When the content last changed.
    pub changed: Epoch,
    /// Whether a program has ever made the file durable with `fsync`: from then on it is never
    /// dropped.
    pub fsynced: bool,
}

/// An inode as it was stored before there were sync points.
#[derive(Deserialize)]
struct InodeRecord1 {
    kind: Kind,
    attributes: Attributes,
    content: Content,
    origin: Option<ActionKey>,
}

impl Record for InodeRecord {
    const NAME: &'static str = "inode";
    const VERSION: u8 = 2;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        let convert = |old: InodeRecord1| Self {
            kind: old.kind,
            attributes: old.attributes,
            content: old.content,
            origin: old.origin,
            changed: Epoch(0),
            fsynced: false,
        };
        (version == 1).then(|| whole(body).map(convert))
    }
}

/// One name in a directory as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DentryRecord {
    /// The directory.
    pub parent: Ino,
    /// The name, without slashes.
    pub name: Vec<u8>,
    /// The inode it names.
    pub ino: Ino,
}

/// One view as stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ViewRecord {
    /// Where the view is mounted: an absolute path.
    pub path: Vec<u8>,
    /// Whether the daemon should mount it when it starts.
    pub mounted: bool,
    /// No inode at or above this number was ever given out.
    pub next_ino: u64,
}

impl Record for ViewRecord {
    const NAME: &'static str = "view";
    const VERSION: u8 = 1;
}

/// The numbers of the exchanging renames a view carried out last, stored with the exchange itself:
/// names alone do not tell whether one was carried out once or not at all.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Exchanges(Vec<u64>);

impl Exchanges {
    /// As many as can be under way at once, and more.
    const KEPT: usize = 16;

    /// Whether the request with this number was carried out.
    pub fn contains(&self, request: u64) -> bool {
        self.0.contains(&request)
    }

    /// These and one more; the oldest beyond the limit goes.
    #[must_use]
    pub fn with(&self, request: u64) -> Self {
        let skipped = (self.0.len() + 1).saturating_sub(Self::KEPT);
        let kept = self.0.iter().skip(skipped).copied();
        Self(kept.chain([request]).collect())
    }
}

impl Record for Exchanges {
    const NAME: &'static str = "exchanges";
    const VERSION: u8 = 1;
}

/// The digest a file on the disk had when it had these attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileMemo {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Digest of the content.
    pub digest: Digest,
}

impl Record for FileMemo {
    const NAME: &'static str = "file memo";
    const VERSION: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    #[test]
    fn inode_layout_is_fixed() {
        let time = Timestamp { secs: -1, nanos: 5 };
        let record = InodeRecord {
            kind: Kind::File,
            attributes: Attributes {
                perm: 0o644,
                uid: 1,
                gid: 2,
                nlink: 3,
                rdev: 0,
                atime: time,
                mtime: time,
                ctime: time,
            },
            content: Content::Inline(b"hi".to_vec()),
            origin: None,
            changed: Epoch(300),
            fsynced: true,
        };
        let bytes = encode(&record).expect("encodes");
        let golden = [
            2, 0, 0xa4, 3, 1, 2, 3, 0, 1, 5, 1, 5, 1, 5, 2, 2, b'h', b'i', 0, 0xac, 2, 1,
        ];
        assert_eq!(
            bytes, golden,
            "a changed layout needs a new InodeRecord::VERSION"
        );
        assert_eq!(decode::<InodeRecord>(&bytes).expect("decodes"), record);
        // As stores before sync points have it.
        let mut older = golden[..19].to_vec();
        older[0] = 1;
        let converted = InodeRecord {
            changed: Epoch(0),
            fsynced: false,
            ..record
        };
        assert_eq!(decode::<InodeRecord>(&older).expect("decodes"), converted);
        older.push(0);
        assert!(decode::<InodeRecord>(&older).is_err(), "trailing bytes");
    }

    #[test]
    fn exchanges_layout_is_fixed() {
        let record = (0..20).fold(Exchanges::default(), |noted, n| noted.with(n * 100));
        assert!(!record.contains(300) && record.contains(400) && record.contains(1900));
        let bytes = encode(&Exchanges(vec![2, 300])).expect("encodes");
        assert_eq!(bytes, [1, 2, 2, 0xac, 2]);
        let decoded = decode::<Exchanges>(&bytes).expect("decodes");
        assert_eq!(decoded, Exchanges(vec![2, 300]));
    }

    #[test]
    fn view_layout_is_fixed() {
        let record = ViewRecord {
            path: b"/t".to_vec(),
            mounted: true,
            next_ino: 300,
        };
        let bytes = encode(&record).expect("encodes");
        assert_eq!(bytes, [1, 2, b'/', b't', 1, 0xac, 2]);
        assert_eq!(decode::<ViewRecord>(&bytes).expect("decodes"), record);
    }
}
