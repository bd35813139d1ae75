//! The daemon: one process that owns a store, serves its views and answers compilers.
//!
//! `server` speaks the socket protocol, `mounts` keeps the mounted views, `managed` knows which of
//! them come back by themselves, `pace` decides when to say that everything is on the disk,
//! `takeover` goes on with the mounts of a daemon that died, `health` notices a store that went away or
//! does not take writes. Started by a keeper, for `kachefs mount`; ends on `kachefs daemon stop`, SIGTERM
//! or SIGINT, unmounting everything.

pub mod builds;
pub mod client;
pub mod health;
mod leases;
mod managed;
pub mod mounts;
mod pace;
pub mod server;
pub mod stats;
pub mod takeover;
pub mod trees;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use store::StoreDir;
use wrapper::lease::Unharmed;

use self::mounts::{Management, Mounts};
use self::takeover::{Inherited, Keeper};
use crate::memory;
use crate::service::Service;
use crate::storage::Storage;

/// How long the stored record of a file may stay behind its bytes.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// After so many of them the bytes of small files are left to the index.
const LEAVE_AFTER: u32 = 30;

/// Everything the daemon's threads share.
pub struct Daemon {
    /// The store.
    pub storage: Arc<Storage>,
    /// The mounted views.
    pub mounts: Arc<Mounts>,
    /// The action service.
    pub service: Arc<Service>,
    /// Who starts the next one.
    pub keeper: Arc<Keeper>,
    /// When this process started.
    pub started: Instant,
    _unharmed: Unharmed,
}

impl Daemon {
    /// Opens the store, goes on with what an earlier daemon served, and mounts the other managed
    /// targets again.
    pub fn start(
        dir: StoreDir,
        mut keeper: Keeper,
        inherited: Vec<Inherited>,
    ) -> Result<(Arc<Self>, UnixListener)> {
        memory::set_up();
        let unharmed = Unharmed::start();
        let storage = Arc::new(Storage::open(dir)?);
        if let Some(acknowledged) = keeper.acknowledged()
            && !storage.index.follow(acknowledged)?
        {
            storage.damage.forgets();
        }
        // From here on compilers wait for us instead of going without the cache.
        let listener = listen(&storage.dir)?;
        let keeper = Arc::new(keeper);
        let mounts = Arc::new(Mounts::new(Arc::clone(&storage), Arc::clone(&keeper))?);
        // Before anybody reads: what is lost may be made again, as soon as all views are there.
        let service = Service::new(Arc::clone(&storage), Arc::clone(&mounts));
        let taken = mounts.take_over(inherited);
        mounts.remount_all(&taken);
        service.open();
        save_now_and_then(&mounts)?;
        pace::make_now_and_then(&mounts)?;
        let written = service.builds.write_now_and_then();
        written.context("cannot start a thread")?;
        let uploading = storage.upload_now_and_then();
        uploading.context("cannot start a thread")?;
        leases::renew_now_and_then(&mounts)?;
        let daemon = Arc::new(Self {
            storage,
            mounts,
            service,
            keeper,
            started: Instant::now(),
            _unharmed: unharmed,
        });
        Ok((daemon, listener))
    }

    /// Unmounts everything, also what is in use, and waits for what is still being recorded.
    pub fn shut_down(&self) {
        self.service.lineage.close();
        self.service.drain();
        self.service.builds.write();
        self.mounts.unmount_all(true, Management::Stays);
        save(&self.mounts);
        self.storage.lazy.close();
        // Whoever still uses a detached mount can change it until we are gone.
        let ended = self.mounts.in_use().is_empty();
        match pace::make_sync_point(&self.mounts, ended) {
            Ok(()) => leave_mark(&self.storage, true),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "last sync point");
            }
        }
        let _ = std::fs::remove_file(self.storage.dir.socket());
    }
}

/// Notes how far the index has come, unless another store has taken the place of this one.
fn leave_mark(storage: &Storage, synced: bool) {
    if !storage.is_in_place() {
        return;
    }
    if let Err(error) = storage.index.leave_mark(&storage.dir, synced) {
        tracing::debug!(%error, "cannot note how far the index has come");
    }
}

/// Stores the records that are behind.
fn save(mounts: &Mounts) {
    for (path, view) in mounts.in_use() {
        view.drop_suspects();
        view.expire_grants();
        view.settle_idle();
        if let Err(error) = view.save_dirty() {
            tracing::warn!(path = %path.display(), %error, "cannot store file records");
        }
    }
}

/// Stores records that are behind, for as long as anybody has mounts.
fn save_now_and_then(mounts: &Arc<Mounts>) -> Result<()> {
    let mounts = Arc::downgrade(mounts);
    let save = move || {
        for turn in 1_u32.. {
            let Some(mounts) = mounts.upgrade() else {
                return;
            };
            save(&mounts);
            leave_mark(&mounts.storage, false);
            let is_time = turn.is_multiple_of(LEAVE_AFTER);
            for (_, view) in mounts.in_use() {
                if is_time || view.has_many_small() {
                    view.leave_small();
                }
            }
            if is_time {
                memory::give_back();
            }
            drop(mounts);
            std::thread::sleep(SAVE_INTERVAL);
        }
    };
    std::thread::Builder::new()
        .name("saver".into())
        .spawn(save)
        .context("cannot start a thread")?;
    Ok(())
}

/// Binds the socket in the private run directory. The store's lock is held, so a socket that is
/// there belongs to nobody.
fn listen(dir: &StoreDir) -> Result<UnixListener> {
    let run = dir.run();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(&run)? {
        std::fs::remove_file(entry?.path())?;
    }
    bind(&dir.socket()).with_context(|| format!("cannot listen on {}", dir.socket().display()))
}

fn bind(socket: &Path) -> std::io::Result<UnixListener> {
    match UnixListener::bind(socket) {
        // `sun_path` holds 108 bytes (unix(7)); the directory's descriptor makes any path short.
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            let run = std::fs::File::open(socket.parent().unwrap_or(socket))?;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&run);
            let name = socket.file_name().unwrap_or_default();
            UnixListener::bind(Path::new(&format!("/proc/self/fd/{fd}")).join(name))
        }
        result => result,
    }
}
