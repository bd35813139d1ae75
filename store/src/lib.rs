//! The bytes and facts of kachefs.
//!
//! This crate keeps blobs (the [`Cas`]), facts about actions and views (the [`Index`]) and the
//! record types both are made of. It knows nothing of FUSE, cargo or rustc, and never decides
//! what a fact means: the `wrapper` crate does that, the `kachefs` daemon ties both together.
//!
//! One process owns a store at a time, see [`StoreDir::lock`].

pub mod action;
mod boot;
pub mod builds;
pub mod cas;
pub mod codec;
pub mod digest;
pub mod index;
mod index_error;
pub mod layout;
pub mod limits;
mod log_types;
pub mod managed;
mod mark;
mod mend;
pub mod quarantine;
pub mod recover;
pub mod scan;
pub mod shared;
pub mod sync_point;
pub mod tree;
pub mod view;
mod watermark;

pub use action::{
    ActionEntry, ActionKey, ActionResult, EnvHash, InputRecord, InvocationDigest, Loads, Look,
    Observation, Origin, Output, OutputContent, Root, RootSet, ScriptResult, TreeContent,
    TreeEntry,
};
pub use boot::this_boot;
pub use cas::{Cas, CasError, Ingested};
pub use codec::CodecError;
pub use digest::{Digest, Hasher, ParseDigestError};
pub use index::{Batch, Counter, Index, IndexError, UploadId, record_digest};
pub use layout::{KeeperLock, LayoutError, StoreDir, StoreLock};
pub use managed::{Managed, ManagedTarget};
pub use quarantine::{Quarantine, Thing};
pub use recover::{History, Recovered};
pub use scan::RootScanner;
pub use shared::{BuildManifest, Fact, Kept, Place, RemoteId, Upload};
pub use sync_point::{Epoch, SyncPoint};
pub use tree::{Tree, TreeBody, TreeInode};
pub use view::{
    Attributes, Content, DentryRecord, Exchanges, FileMemo, Ino, InodeRecord, Kind, ScratchId,
    Timestamp, ViewId, ViewRecord,
};
