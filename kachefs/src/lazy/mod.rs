//! What is elsewhere: blobs and results that only the store's remote holds.
//!
//! A name in a view may point at a blob whose bytes are not on this machine. Its first read is a
//! *fault*: `faults` fetches the bytes, verifies them and keeps them, of a large blob only those that are
//! read (`ranges`, `partial`), and some before they are (`prefetch`). `learn` asks the remote for
//! results nobody made here, `uploads` sends what was made here (`queue` says
//! when, `sending` how blobs go), `manifests` sends what a build is made
//! of as one object, `trees` whole views. `lineage` is how what is nowhere any more is made again. `facts`
//! says what objects hold, `secrets` what never leaves the machine. `gc` removes what nothing names from a
//! remote (`containers`); `reliance` keeps it from what is counted on, `leases` from what is shown here.
//! `losses` finds out what a remote has lost, and fetches what it has not lost yet.
//!
//! Nothing of it may break a build or keep it waiting: every call has a limit, and a remote that does
//! not answer is left alone for a while (`breaker`).

pub mod breaker;
mod connection;
mod containers;
mod counted;
mod facts;
mod faults;
pub mod gc;
mod learn;
pub mod leases;
mod lineage;
mod losses;
pub mod manifests;
mod pace;
mod partial;
pub mod prefetch;
mod queue;
mod ranges;
mod reliance;
pub mod secrets;
mod sending;
#[cfg(test)]
mod testing;
pub mod trees;
mod uploads;

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use lru::LruCache;
use parking_lot::Mutex;
use remote::RemoteError;
use store::{Digest, Kept, Place, StoreDir, UploadId};

pub use connection::{Connection, Unavailable};
pub use counted::TrafficNow;
pub use faults::FaultError;
pub use lineage::{Lineage, Lost};
pub use queue::Pushed;

use self::learn::Asked;
use self::leases::Leases;
use self::losses::{Looks, Rescue};
use self::manifests::OpenBuilds;
use self::partial::Partials;
use self::prefetch::Prefetch;
use self::queue::Queue;
use crate::clock;
use crate::flight::Flights;
use crate::remote_config::RemoteConfig;

/// Blobs that are remembered as gone.
const GONE: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");

/// How long a blob is not looked for again where it was not, or where it was refused (for want of a right, or
/// of something on this machine): who asks for it has it made instead.
const GONE_FOR: Duration = Duration::from_mins(5);

/// Why a blob is not looked for where it should be.
#[derive(Clone, Copy, Debug)]
enum Gone {
    /// What is there is not what it should be, or not for long.
    Unfit,
    /// It was not there, then.
    Absent(Instant),
    /// It was refused, then.
    Refused(Instant),
}

/// What a store knows of its remote.
pub struct Lazy {
    dir: StoreDir,
    configured: Mutex<Configured>,
    faults: Arc<Flights<Digest>>,
    /// Large blobs of which some is here.
    partials: Partials,
    asked: Asked,
    /// Blobs that were not where they should be, or not what they should be. What names them is not
    /// believed without a look.
    gone: Mutex<LruCache<(Digest, Place), Gone>>,
    /// Whether the store is about to be closed: no blob comes any more.
    closed: AtomicBool,
    /// What is fetched before it is wanted.
    pub prefetch: Prefetch,
    /// Builds under way.
    pub builds: OpenBuilds,
    /// What is still to be sent.
    pub queue: Arc<Queue>,
    /// What is needed of the remote.
    pub leases: Arc<Leases>,
    /// What is to be looked for because something is lost.
    pub looks: Looks,
    rescue: Rescue,
    /// What makes again what is lost.
    pub lineage: OnceLock<Box<dyn Lineage>>,
}

/// The configuration as it was last read.
#[derive(Default)]
struct Configured {
    /// Of the configuration and of the key: device, inode, length and time of last change.
    stamps: Option<[Option<[i128; 4]>; 2]>,
    connection: Option<Arc<Connection>>,
}

impl Lazy {
    /// Nothing is asked before anybody wants something. `last` is the last upload that was noted.
    pub fn new(dir: StoreDir, last: Option<UploadId>) -> Self {
        Self {
            dir,
            configured: Mutex::default(),
            faults: Arc::default(),
            partials: Partials::default(),
            asked: Asked::default(),
            gone: Mutex::new(LruCache::new(GONE)),
            closed: AtomicBool::new(false),
            queue: Arc::new(Queue::new(last)),
            builds: OpenBuilds::default(),
            prefetch: Prefetch::default(),
            leases: Arc::default(),
            looks: Looks::default(),
            rescue: Rescue::default(),
            lineage: OnceLock::new(),
        }
    }

    /// The remote, if the store has one. What it is may change at any time: the configuration is looked
    /// at each time, and read when it has changed.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        let stamps = [self.dir.configuration(), self.dir.signing_key()].map(|path| stamp(&path));
        let mut configured = self.configured.lock();
        if configured.stamps == Some(stamps) {
            return configured.connection.clone();
        }
        match self.connect() {
            Ok(connection) => configured.connection = connection,
            // Half of a change, most likely: what only the remote has is not gone.
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "the configuration of the remote cannot be used");
            }
        }
        configured.stamps = Some(stamps);
        configured.connection.clone()
    }

    fn connect(&self) -> Result<Option<Arc<Connection>>> {
        let Some(config) = RemoteConfig::load(&self.dir)? else {
            return Ok(None);
        };
        let connection = Connection::new(&self.dir, config)?;
        tracing::info!(remote = connection.place(), "remote");
        Ok(Some(Arc::new(connection)))
    }

    /// Whether a blob was found not to be at a place in the remote, or damaged there.
    fn is_gone(&self, digest: &Digest, place: &Place) -> bool {
        match self.gone.lock().peek(&(*digest, *place)) {
            Some(Gone::Unfit) => true,
            Some(Gone::Absent(when) | Gone::Refused(when)) => when.elapsed() < GONE_FOR,
            None => false,
        }
    }

    fn note_gone(&self, digest: &Digest, place: Place, how: Gone) {
        self.gone.lock().put((*digest, place), how);
    }

    /// It was not there a moment ago.
    fn note_absent(&self, digest: &Digest, place: Place) {
        self.note_gone(digest, place, Gone::Absent(Instant::now()));
    }

    /// Whether a blob was ever found not to be there.
    fn was_gone(&self, digest: &Digest, place: &Place) -> bool {
        self.gone.lock().contains(&(*digest, *place))
    }

    /// From now on no blob is stored that comes from elsewhere: the last sync point is about to be made,
    /// after which nothing is looked at again.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// The remote, if something may be sent to it.
    pub fn writable(&self) -> Option<Arc<Connection>> {
        self.connection()
            .filter(|connection| !connection.config.read_only)
    }
}

/// What tells that a file has changed; `None` where there is none.
fn stamp(path: &Path) -> Option<[i128; 4]> {
    let meta = fs::metadata(path).ok()?;
    let changed = i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec());
    Some([
        i128::from(meta.dev()),
        i128::from(meta.ino()),
        i128::from(meta.len()),
        changed,
    ])
}

fn not_encoded(source: io::Error) -> RemoteError {
    RemoteError::Io {
        path: "results".to_owned(),
        source,
    }
}

/// Something that others said at that time is in a remote, where nobody has looked; `size` as below.
fn kept_unseen(size: u64, place: Place, known_ms: u64) -> Kept {
    Kept {
        size,
        place,
        seen_ms: 0,
        known_ms,
    }
}

/// Something that was written to a remote just now; `size` is 0 for what is no blob.
fn kept_now(size: u64, place: Place) -> Kept {
    let now_ms = clock::now_ms();
    Kept {
        size,
        place,
        seen_ms: now_ms,
        known_ms: now_ms,
    }
}
