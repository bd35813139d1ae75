//! The FUSE adapter: fuser's calls become calls of [`View`], nothing more.
//!
//! The kernel is asked to remember everything: entries, negative entries and attributes carry
//! long timeouts, because the daemon is the only other writer and says when a name changes
//! ([`KernelInvalidate`]). File handles are inode numbers, so they mean the same to every process
//! that serves the mount.
//!
//! `requests` has a handler for each request and `convert` the kernel's words for ours; `create`,
//! `listing` and `tokens` do what takes more than one call, `elsewhere` what
//! waits for bytes, `handshake` comes before all of them, and
//! `notify` speaks to the kernel unasked.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{FileAttr, Generation, INodeNo, Request};
use store::Ino;
use wrapper::protocol::TOKEN_NAME;

use self::convert::attr;
use crate::fs::{FsResult, View};
use crate::keeper::wire::Connection;

mod buffers;
mod convert;
mod create;
mod elsewhere;
mod handshake;
mod listing;
mod notify;
mod requests;
mod tokens;

pub use notify::KernelInvalidate;

/// How long the kernel may remember: until told otherwise.
const TTL: Duration = Duration::from_hours(365 * 24);

/// What cargo knows about the compiler. With it cargo asks the compiler nothing, and a mount whose
/// daemon died is not mended by the wrapper: so the kernel must ask us for this name every time,
/// and fail when nobody answers.
const RUSTC_INFO: &str = ".rustc_info.json";

/// Inodes are never reused, so one generation is enough.
const GENERATION: Generation = Generation(0);

/// Largest read-ahead and write the kernel sends in one request (`fs.fuse.max_pages_limit` allows
/// twice as much). Every worker of every view has a buffer of this length.
pub const MAX_REQUEST: u32 = 512 << 10;

/// Serves one view to the kernel.
pub struct Adapter {
    view: Arc<View>,
    /// Whether the kernel is asked for passthrough.
    wants_passthrough: bool,
    /// Whether the kernel opens files straight onto their backings for us.
    passthrough: AtomicBool,
    socket: Vec<u8>,
    emptied: Option<Emptied>,
    connection: Arc<OnceLock<Connection>>,
}

/// Told before the kernel is answered that a process has removed the last name of the root, and
/// which process.
pub type Emptied = Box<dyn Fn(&View, u32) + Send + Sync>;

impl Adapter {
    /// An adapter for `view`; `socket` is where its daemon listens.
    pub fn new(view: Arc<View>, socket: &Path) -> Self {
        Self {
            view,
            wants_passthrough: true,
            passthrough: AtomicBool::new(false),
            socket: socket.as_os_str().as_bytes().to_vec(),
            emptied: None,
            connection: Arc::default(),
        }
    }

    /// Sets whether the kernel is asked for passthrough.
    #[must_use]
    pub fn passthrough(mut self, wanted: bool) -> Self {
        self.wants_passthrough = wanted;
        self
    }

    /// Sets who is told that the view was emptied.
    #[must_use]
    pub fn on_emptied(mut self, emptied: Emptied) -> Self {
        self.emptied = Some(emptied);
        self
    }

    fn after_removal(&self, request: &Request, parent: INodeNo) {
        if let Some(emptied) = &self.emptied
            && parent == INodeNo::ROOT
            && self.view.is_empty()
        {
            emptied(&self.view, request.pid());
        }
    }

    /// Where to find, after the handshake, what was agreed upon with the kernel.
    pub fn connection(&self) -> Arc<OnceLock<Connection>> {
        Arc::clone(&self.connection)
    }

    fn lookup_entry(&self, parent: Ino, name: &OsStr) -> FsResult<FileAttr> {
        if name == TOKEN_NAME {
            return self.token_entry(parent);
        }
        self.view
            .lookup(parent, name.as_bytes())
            .map(|entry| attr(&entry))
    }
}

/// How long the kernel may remember what a name means.
fn ttl(name: &OsStr) -> &'static Duration {
    if name == RUSTC_INFO {
        &Duration::ZERO
    } else {
        &TTL
    }
}
