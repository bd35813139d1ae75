//! The mounted views of one daemon: mount, unmount, and find the view behind a path.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use parking_lot::Mutex;
use store::{ViewId, ViewRecord};

use super::takeover::Keeper;
use crate::fs::import::{Imported, import};
use crate::fs::{Caller, View};
use crate::fuse::{Adapter, KernelInvalidate};
use crate::keeper::wire;
use crate::mount;
use crate::storage::Storage;

/// FUSE worker threads per view: one keeps serving while another waits for the disk.
const WORKERS: usize = 2;

/// How long a session may take to notice that its mount is gone.
const SESSION_END: Duration = Duration::from_secs(3);

/// One mounted view.
pub struct Mounted {
    /// The view.
    pub view: Arc<View>,
    /// Where it is mounted.
    pub path: PathBuf,
    /// Device number of its files, as `stat` shows it.
    pub(super) device: u64,
    pub(super) session: JoinHandle<std::io::Result<()>>,
}

/// All mounted views.
pub struct Mounts {
    pub(super) storage: Arc<Storage>,
    pub(super) keeper: Arc<Keeper>,
    pub(super) mounted: Mutex<HashMap<ViewId, Mounted>>,
    /// Held over a whole mount or unmount, so that two of them never meet on one path.
    pub(super) changing: Mutex<()>,
}

/// What a mount request did.
#[derive(Debug, PartialEq, Eq)]
pub enum MountOutcome {
    /// The view was mounted there already.
    Already,
    /// Mounted, and this much was taken over from the directory.
    Mounted(Imported),
}

impl Mounts {
    /// No mounts yet.
    pub fn new(storage: Arc<Storage>, keeper: Arc<Keeper>) -> Result<Self> {
        Ok(Self {
            storage,
            keeper,
            mounted: Mutex::default(),
            changing: Mutex::new(()),
        })
    }

    /// The view of that number, if it is mounted.
    pub fn view(&self, id: ViewId) -> Option<Arc<View>> {
        self.mounted
            .lock()
            .get(&id)
            .map(|mounted| Arc::clone(&mounted.view))
    }

    /// Every mounted view, by path.
    pub fn all(&self) -> Vec<(PathBuf, Arc<View>)> {
        let mut all: Vec<_> = self
            .mounted
            .lock()
            .values()
            .map(|mounted| (mounted.path.clone(), Arc::clone(&mounted.view)))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// The view a path lies in, and the rest of the path below its mountpoint.
    pub fn locate(&self, path: &Path) -> Option<(Arc<View>, PathBuf)> {
        self.mounted.lock().values().find_map(|mounted| {
            let rest = path.strip_prefix(&mounted.path).ok()?;
            Some((Arc::clone(&mounted.view), rest.to_owned()))
        })
    }

    /// Device numbers of all mounted views.
    pub fn devices(&self) -> Vec<u64> {
        self.mounted
            .lock()
            .values()
            .map(|mounted| mounted.device)
            .collect()
    }

    /// Mounts again what an earlier daemon had mounted when it ended without unmounting.
    pub fn remount_all(&self) {
        let views = match self.storage.index.views() {
            Ok(views) => views,
            Err(error) => {
                tracing::error!(%error, "cannot list views");
                return;
            }
        };
        for (_, record) in views.into_iter().filter(|(_, record)| record.mounted) {
            let path = PathBuf::from(std::ffi::OsString::from_vec(record.path));
            match self.mount(&path) {
                // Taken over.
                Ok(MountOutcome::Already) => {}
                Ok(_) => tracing::info!(path = %path.display(), "mounted again"),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(path = %path.display(), error, "not mounted again");
                }
            }
        }
    }

    /// Mounts the view of `path`, a canonical path, making it on first use.
    pub fn mount(&self, path: &Path) -> Result<MountOutcome> {
        let _changing = self.changing.lock();
        if self.clear_path(path)? {
            return Ok(MountOutcome::Already);
        }
        match fs::metadata(path) {
            Ok(meta) if !meta.is_dir() => bail!("{} is not a directory", path.display()),
            Ok(_) => {}
            Err(_) => fs::create_dir_all(path)
                .with_context(|| format!("cannot create {}", path.display()))?,
        }
        let view = Arc::new(self.open_view(path)?);
        let imported = import(&view, path)?;
        let fuse = mount::mount(path)?;
        let kept = wire::duplicate(&fuse)?;
        let (session, connection) = serve(&view, fuse, &self.storage).inspect_err(|_| {
            // Nothing serves it: leave no dead mount behind.
            let _ = mount::unmount(path, true);
        })?;
        let line = mount::mounted_at(path)?.context("the mount is gone already")?;
        self.keeper.hold(
            &wire::Session {
                view: view.id,
                path: path.as_os_str().as_bytes().to_vec(),
                minor: line.minor,
                connection,
            },
            kept.as_fd(),
        );
        view.set_mounted(true)?;
        let device = nix::sys::stat::makedev(0, u64::from(line.minor));
        let mounted = Mounted {
            view: Arc::clone(&view),
            path: path.to_owned(),
            device,
            session,
        };
        self.mounted.lock().insert(view.id, mounted);
        Ok(MountOutcome::Mounted(imported))
    }

    /// Makes sure that no mount is at `path`, except ours: then says so.
    fn clear_path(&self, path: &Path) -> Result<bool> {
        let Some(line) = mount::mounted_at(path)? else {
            self.let_go(path)?;
            return Ok(false);
        };
        if line.fs_type != mount::FS_TYPE {
            bail!(
                "{} is already a mountpoint ({})",
                path.display(),
                line.fs_type
            );
        }
        if self
            .mounted
            .lock()
            .values()
            .any(|m| m.path == path && !m.session.is_finished())
        {
            return Ok(true);
        }
        // A kachefs mount that is not ours: either dead, or served by the daemon of another
        // store.
        if mount::answers(path).is_ok() {
            bail!("{} is mounted from another store", path.display());
        }
        self.let_go(path)?;
        mount::unmount(path, true)
            .with_context(|| format!("cannot clear the dead mount at {}", path.display()))?;
        Ok(false)
    }

    /// Lets go of a view that was unmounted behind our back. While somebody still uses it (a lazy
    /// unmount), its tree must not be loaded a second time.
    fn let_go(&self, path: &Path) -> Result<()> {
        let deadline = Instant::now() + SESSION_END;
        while self
            .mounted
            .lock()
            .values()
            .any(|m| m.path == path && !m.session.is_finished())
        {
            if Instant::now() > deadline {
                bail!(
                    "{} was unmounted lazily and is still in use",
                    path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut mounted = self.mounted.lock();
        let ids: Vec<ViewId> = mounted
            .iter()
            .filter(|(_, m)| m.path == path)
            .map(|(id, _)| *id)
            .collect();
        let gone: Vec<Mounted> = ids.iter().filter_map(|id| mounted.remove(id)).collect();
        drop(mounted);
        for mounted in gone {
            self.finish(mounted, false);
        }
        Ok(())
    }

    fn open_view(&self, path: &Path) -> Result<View> {
        let views = self.storage.index.views()?;
        let bytes = path.as_os_str().as_bytes();
        let known = views.iter().find(|(_, record)| record.path == bytes);
        let storage = Arc::clone(&self.storage);
        let failed = |error: Errno| anyhow!("cannot open the view of {}: {error}", path.display());
        if let Some((id, record)) = known {
            return View::load(storage, *id, ViewRecord::clone(record)).map_err(failed);
        }
        let id = ViewId(views.iter().map(|(id, _)| id.0 + 1).max().unwrap_or(1));
        let meta = fs::metadata(path)?;
        let owner = Caller {
            uid: std::os::unix::fs::MetadataExt::uid(&meta),
            gid: std::os::unix::fs::MetadataExt::gid(&meta),
        };
        View::create(storage, id, bytes.to_vec(), owner).map_err(failed)
    }

    /// Unmounts the view at `path`.
    pub fn unmount(&self, path: &Path, lazy: bool) -> Result<()> {
        let _changing = self.changing.lock();
        let id = self
            .mounted
            .lock()
            .iter()
            .find(|(_, mounted)| mounted.path == path)
            .map(|(id, _)| *id)
            .ok_or_else(|| anyhow!("{} is not mounted", path.display()))?;
        match mount::unmount(path, lazy) {
            // EINVAL: somebody else unmounted it.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(Errno::EBUSY) => bail!("{} is in use", path.display()),
            Err(error) => bail!("cannot unmount {}: {error}", path.display()),
        }
        let mounted = self.mounted.lock().remove(&id);
        if let Some(mounted) = mounted {
            self.finish(mounted, lazy);
        }
        Ok(())
    }

    /// Ends the life of an unmounted view, here and with the keeper.
    fn finish(&self, mounted: Mounted, lazy: bool) {
        let id = mounted.view.id;
        finish(mounted, lazy);
        self.keeper.release(id);
    }

    /// Unmounts every view; returns what could not be, as one line each.
    pub fn unmount_all(&self, lazy: bool) -> Vec<String> {
        self.all()
            .into_iter()
            .filter_map(|(path, _)| self.unmount(&path, lazy).err())
            .map(|error| format!("{error:#}"))
            .collect()
    }
}

/// How every view is served.
pub(super) fn session_config() -> fuser::Config {
    let mut config = fuser::Config::default();
    config.n_threads = Some(WORKERS);
    config.acl = if mount::is_shared() {
        fuser::SessionACL::All
    } else {
        fuser::SessionACL::Owner
    };
    config
}

/// Runs a session until its mount is gone.
pub(super) fn run(
    view: &View,
    session: fuser::Session<Adapter>,
) -> Result<JoinHandle<std::io::Result<()>>> {
    view.set_invalidate(Box::new(KernelInvalidate(session.notifier())));
    std::thread::Builder::new()
        .name(format!("view-{}", view.id.0))
        .spawn(move || session.run())
        .context("cannot start the session thread")
}

fn serve(
    view: &Arc<View>,
    device: OwnedFd,
    storage: &Storage,
) -> Result<(JoinHandle<std::io::Result<()>>, wire::Connection)> {
    let config = session_config();
    let adapter = Adapter::new(Arc::clone(view), &storage.dir.socket());
    let connection = adapter.connection();
    let session = fuser::Session::from_fd(adapter, device, config.acl, config)
        .context("the kernel refuses the FUSE session")?;
    let connection = *connection.get().context("no handshake with the kernel")?;
    Ok((run(view, session)?, connection))
}

/// Ends the life of an unmounted view in memory.
fn finish(mounted: Mounted, lazy: bool) {
    let Mounted {
        view,
        path,
        session,
        ..
    } = mounted;
    // After a lazy unmount the session lives on for as long as somebody holds a file open.
    if !lazy {
        match session.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(path = %path.display(), %error, "session"),
            Err(_) => tracing::error!(path = %path.display(), "session thread panicked"),
        }
    }
    if let Err(error) = view.save_dirty().and_then(|()| view.set_mounted(false)) {
        tracing::error!(path = %path.display(), %error, "cannot store the view");
    }
}
