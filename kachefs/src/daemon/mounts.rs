//! The mounted views of one daemon: mount, unmount, and find the view behind a path.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use parking_lot::Mutex;
use store::{Tree, ViewId, ViewRecord};

use super::takeover::Keeper;
use super::{managed, pace};
use crate::fs::import::{Imported, import};
use crate::fs::view::READ_ONLY;
use crate::fs::{Caller, View};
use crate::fuse::{Adapter, KernelInvalidate, MAX_REQUEST};
use crate::keeper::wire;
use crate::mount::Access;
use crate::storage::Storage;
use crate::{holders, memory, mount};

/// FUSE worker threads per view: one keeps serving while another waits for the disk.
const WORKERS: usize = 2;

/// How long a session may take to notice that its mount is gone.
const SESSION_END: Duration = Duration::from_secs(3);

/// The same after a lazy unmount, when it is likely to have users left.
const LAZY_END: Duration = Duration::from_millis(200);

/// How long a mount may be in use by somebody who cannot be named before that is reported.
const PASSING_USE: Duration = Duration::from_secs(1);

/// Set for the daemon, it serves as if it were not allowed FUSE passthrough.
const NO_PASSTHROUGH: &str = "KACHEFS_NO_PASSTHROUGH";

/// More inode numbers than a view gives out between two saves of its record: those that were lost with
/// it are left out, for a wrapper may still know them.
const LOST_NUMBERS: u64 = 1 << 24;

/// One mounted view.
pub struct Mounted {
    /// The view.
    pub view: Arc<View>,
    /// Where it is mounted.
    pub path: PathBuf,
    /// Device number of its files, as `stat` shows it.
    pub(super) device: u64,
    /// Whether it has left the tree of mounts, and only its last users keep it alive.
    pub(super) leaving: bool,
    pub(super) session: JoinHandle<std::io::Result<()>>,
}

/// All mounted views.
pub struct Mounts {
    pub(super) storage: Arc<Storage>,
    pub(super) keeper: Arc<Keeper>,
    pub(super) mounted: Arc<Mutex<HashMap<ViewId, Mounted>>>,
    /// Held over a whole mount or unmount, so that two of them never meet on one path. No FUSE
    /// worker takes it: an unmount waits for them.
    pub(super) changing: Mutex<()>,
}

/// Whether an unmounted view comes back by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Management {
    /// A person unmounts it: it stays away.
    Ends,
    /// The daemon ends: the next one mounts it again.
    Stays,
}

/// What a view shows when it is mounted.
pub(super) enum Shown {
    /// What it showed before.
    AsItWas,
    /// Nothing.
    Empty,
    /// A tree.
    Tree(Box<Tree>, Access),
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
            mounted: Arc::default(),
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
        self.select(|mounted| !mounted.leaving)
    }

    /// Every view that may change: the mounted ones, and those that are still in use after a lazy
    /// unmount.
    pub fn in_use(&self) -> Vec<(PathBuf, Arc<View>)> {
        self.select(|_| true)
    }

    fn select(&self, wanted: impl Fn(&Mounted) -> bool) -> Vec<(PathBuf, Arc<View>)> {
        let mut all: Vec<_> = self
            .mounted
            .lock()
            .values()
            .filter(|mounted| wanted(mounted))
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

    /// Mounts the view of `path`, a canonical path, making it on first use.
    pub fn mount(&self, path: &Path) -> Result<MountOutcome> {
        let _changing = self.changing.lock();
        self.attach(path, Shown::AsItWas)
    }

    /// Shows a tree at `path`, a canonical path. It takes the place of an empty view, or, where nothing
    /// may be written, of whatever was shown there before; the directory must be empty.
    pub fn mount_tree(&self, path: &Path, tree: Tree, access: Access) -> Result<()> {
        let _changing = self.changing.lock();
        if let Ok(mut entries) = fs::read_dir(path)
            && mount::mounted_at(path)?.is_none()
            && entries.next().is_some()
        {
            bail!("{} is not empty", path.display());
        }
        match self.attach(path, Shown::Tree(Box::new(tree), access))? {
            MountOutcome::Already => bail!("{} is mounted already", path.display()),
            MountOutcome::Mounted(_) => Ok(()),
        }
    }

    /// Mounts under the lock.
    pub(super) fn attach(&self, path: &Path, shown: Shown) -> Result<MountOutcome> {
        if self.clear_path(path)? {
            return Ok(MountOutcome::Already);
        }
        self.check_place(path)?;
        match fs::metadata(path) {
            Ok(meta) if !meta.is_dir() => bail!("{} is not a directory", path.display()),
            Ok(_) => {}
            Err(_) => fs::create_dir_all(path)
                .with_context(|| format!("cannot create {}", path.display()))?,
        }
        // The directory below the mount stays reachable through this descriptor.
        let below = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let view = Arc::new(self.open_view(path, &shown)?);
        let access = prepare_view(&view, path, shown)?;
        let fuse = mount::mount(path, access)?;
        let kept = wire::duplicate(&fuse)?;
        // Taken over only when the mount is sure to be: until then everything is where it was.
        let served = self
            .handshake(&view, fuse)
            .and_then(|(session, connection)| {
                let imported = import(&view, &below, path, || pace::make_sync_point(self, false))?;
                Ok((run(&view, session)?, connection, imported))
            });
        let (session, connection, imported) = served.inspect_err(|_| {
            // Nothing serves it: leave no dead mount behind.
            let _ = mount::unmount(path, true);
        })?;
        let line = mount::mounted_at(path)?.context("the mount is gone already")?;
        mount::read_ahead(line.minor, MAX_REQUEST);
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
            leaving: false,
            session,
        };
        self.mounted.lock().insert(view.id, mounted);
        memory::give_back();
        Ok(MountOutcome::Mounted(imported))
    }

    /// Refuses places where a mount would hide the store or another view, and a directory that is
    /// plainly no target: everything in it would move into the store.
    fn check_place(&self, path: &Path) -> Result<()> {
        let overlap = |other: &Path| path.starts_with(other) || other.starts_with(path);
        let store = self.storage.dir.root();
        let store = store.canonicalize().unwrap_or_else(|_| store.to_owned());
        if overlap(&store) {
            bail!(
                "{} and the store in {} lie in each other; choose another store",
                path.display(),
                store.display()
            );
        }
        if let Some((mounted, _)) = self.all().iter().find(|(mounted, _)| overlap(mounted)) {
            bail!(
                "{} and the view mounted at {} lie in each other",
                path.display(),
                mounted.display()
            );
        }
        for name in ["Cargo.toml", ".git"] {
            if path.join(name).symlink_metadata().is_ok() {
                bail!(
                    "{} holds {name}: that is a checkout, not its target directory",
                    path.display()
                );
            }
        }
        Ok(())
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
            .any(|m| m.path == path && !m.leaving && !m.session.is_finished())
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

    /// Lets go of a view that was unmounted behind our back, or lazily. While somebody still uses
    /// it, its tree must not be loaded a second time.
    fn let_go(&self, path: &Path) -> Result<()> {
        let here: Vec<(ViewId, u64)> = self
            .mounted
            .lock()
            .iter()
            .filter(|(_, m)| m.path == path)
            .map(|(id, m)| (*id, m.device))
            .collect();
        for (id, device) in here {
            if !self.wait_for_end(id, SESSION_END) {
                bail!(
                    "{} was unmounted lazily and is still in use{}",
                    path.display(),
                    users(device)
                );
            }
            self.finish(id);
        }
        Ok(())
    }

    /// Waits a moment for the end of a session whose mount is gone; whether it came.
    fn wait_for_end(&self, id: ViewId, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self
            .mounted
            .lock()
            .get(&id)
            .is_some_and(|m| !m.session.is_finished())
        {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn open_view(&self, path: &Path, shown: &Shown) -> Result<View> {
        let views = self.storage.index.views()?;
        let bytes = path.as_os_str().as_bytes();
        // What is only read is in no way of what somebody has at this path.
        let name = match shown {
            Shown::Tree(_, Access::ReadOnly) => [bytes, READ_ONLY].concat(),
            _ => bytes.to_vec(),
        };
        let bytes = name.as_slice();
        let known = views.iter().find(|(_, record)| record.path == bytes);
        let storage = Arc::clone(&self.storage);
        let failed = |error: Errno| anyhow!("cannot open the view of {}: {error}", path.display());
        if let Some((id, record)) = known {
            let mut record = ViewRecord::clone(record);
            if self.storage.damage.forgot_numbers(*id) {
                record.next_ino = record.next_ino.saturating_add(LOST_NUMBERS);
            }
            return View::load(storage, *id, record).map_err(failed);
        }
        let next = views.iter().map(|(id, _)| id.0 + 1).max().unwrap_or(1);
        let id = ViewId(next.max(self.storage.damage.first_view()));
        let owner = owner_of(&fs::metadata(path)?);
        View::create(storage, id, bytes.to_vec(), owner).map_err(failed)
    }

    /// Unmounts the view at `path`, and says what was done.
    pub fn unmount(&self, path: &Path, lazy: bool, management: Management) -> Result<String> {
        let _changing = self.changing.lock();
        let found = self
            .mounted
            .lock()
            .iter()
            .find(|(_, mounted)| mounted.path == path && !mounted.leaving)
            .map(|(id, mounted)| (*id, mounted.device));
        let Some((id, device)) = found else {
            if management == Management::Ends && self.storage.dir.managed().remove(path)? {
                let path = path.display();
                return Ok(format!("{path} was not mounted, and stays so from now on"));
            }
            bail!("{} is not mounted", path.display());
        };
        let mut unmounted = unmount_unused(path, lazy, device);
        if unmounted == Err(Errno::EBUSY) && self.end_own_use(id, device) {
            unmounted = unmount_unused(path, lazy, device);
        }
        match unmounted {
            Ok(()) => {}
            // Somebody else unmounted it.
            Err(_) if mount::mounted_at(path)?.is_none() => {}
            Err(Errno::EBUSY) => bail!(
                "{} is in use{}; `kachefs unmount --lazy` detaches it all the same",
                path.display(),
                users(device)
            ),
            Err(error) => bail!("cannot unmount {}: {error}", path.display()),
        }
        let unmanaged = match management {
            Management::Ends => self.storage.dir.managed().remove(path).map(drop),
            Management::Stays => Ok(()),
        };
        // It is unmounted whatever the disk says to that.
        let unmanaged = unmanaged.with_context(|| {
            let path = path.display();
            format!("{path} is unmounted, but will come back by itself")
        });
        let patience = if lazy { LAZY_END } else { SESSION_END };
        if self.wait_for_end(id, patience) {
            self.finish(id);
            unmanaged?;
            return Ok(format!("unmounted {}", path.display()));
        }
        // A session with users left goes on, and its view with it.
        self.leave(id);
        unmanaged?;
        Ok(format!(
            "detached {}, still in use{}",
            path.display(),
            users(device)
        ))
    }

    /// Ends the compilers that make again what is lost of a view, if nobody else uses it: whoever wanted that
    /// is gone. Whether there were any.
    fn end_own_use(&self, id: ViewId, device: u64) -> bool {
        let Some(lineage) = self.storage.lazy.lineage.get() else {
            return false;
        };
        let only_ours = holders::are_all_in(&lineage.groups(id), device);
        if only_ours {
            lineage.leave(id);
        }
        only_ours
    }

    /// Unmounts every view; returns what could not be, as one line each.
    pub fn unmount_all(&self, lazy: bool, management: Management) -> Vec<String> {
        let mut failures: Vec<String> = self
            .all()
            .into_iter()
            .filter_map(|(path, _)| self.unmount(&path, lazy, management).err())
            .map(|error| format!("{error:#}"))
            .collect();
        if management == Management::Ends && failures.is_empty() {
            failures.extend(self.manage_nothing().err().map(|error| error.to_string()));
        }
        failures
    }

    fn manage_nothing(&self) -> std::io::Result<()> {
        let managed = self.storage.dir.managed();
        for target in managed.all()?.0 {
            managed.remove(&target.path())?;
        }
        Ok(())
    }

    /// What shows a view to the kernel.
    pub(super) fn adapter(&self, view: &Arc<View>) -> Adapter {
        let (mounted, keeper) = (Arc::clone(&self.mounted), Arc::clone(&self.keeper));
        let emptied = move |view: &View, pid| {
            if managed::emptied(&mounted, view, pid) {
                keeper.release(view.id);
            }
        };
        Adapter::new(Arc::clone(view), &self.storage.dir.socket())
            .passthrough(std::env::var_os(NO_PASSTHROUGH).is_none())
            .on_emptied(Box::new(emptied))
    }

    /// Agrees with the kernel upon a session, which serves nobody yet.
    fn handshake(
        &self,
        view: &Arc<View>,
        device: OwnedFd,
    ) -> Result<(fuser::Session<Adapter>, wire::Connection)> {
        let config = session_config();
        let adapter = self.adapter(view);
        let connection = adapter.connection();
        let session = fuser::Session::from_fd(adapter, device, config.acl, config)
            .context("the kernel refuses the FUSE session")?;
        let connection = *connection.get().context("no handshake with the kernel")?;
        Ok((session, connection))
    }

    /// Marks an unmounted view that is still in use, and stores what it has.
    fn leave(&self, id: ViewId) {
        let left = self.mounted.lock().get_mut(&id).map(|mounted| {
            mounted.leaving = true;
            (Arc::clone(&mounted.view), mounted.path.clone())
        });
        if let Some((view, path)) = left {
            store(&view, &path);
        }
    }

    /// Ends the life of a view in memory whose session has ended.
    fn finish(&self, id: ViewId) {
        let Some(mounted) = self.mounted.lock().remove(&id) else {
            return;
        };
        match mounted.session.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(path = %mounted.path.display(), %error, "session"),
            Err(_) => tracing::error!(path = %mounted.path.display(), "session thread panicked"),
        }
        store(&mounted.view, &mounted.path);
        self.keeper.release(id);
        if mounted.view.is_read_only() {
            self.storage.lazy.leases.wake();
        }
    }
}

fn owner_of(meta: &fs::Metadata) -> Caller {
    Caller {
        uid: meta.uid(),
        gid: meta.gid(),
    }
}

/// Makes a view show what it is to show, before anybody sees it.
fn prepare_view(view: &View, path: &Path, shown: Shown) -> Result<Access> {
    let failed = |error: Errno| anyhow!("the view of {}: {error}", path.display());
    match shown {
        Shown::AsItWas => Ok(Access::ReadWrite),
        Shown::Empty => {
            view.clear().map_err(failed)?;
            Ok(Access::ReadWrite)
        }
        Shown::Tree(tree, access) => {
            if access == Access::ReadOnly {
                view.clear().map_err(failed)?;
            } else if !view.is_empty() {
                bail!(
                    "there is a view of {} with files in it; mount and empty it first",
                    path.display()
                );
            }
            let meta = fs::metadata(path)?;
            view.fill(*tree, owner_of(&meta)).map_err(failed)?;
            Ok(access)
        }
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

/// Unmounts what nobody uses. Whoever just looks at a path in it has it in use while the kernel walks
/// there: who cannot be named is waited for.
fn unmount_unused(path: &Path, lazy: bool, device: u64) -> Result<(), Errno> {
    let deadline = Instant::now() + PASSING_USE;
    loop {
        match mount::unmount(path, lazy) {
            Err(Errno::EBUSY) if Instant::now() < deadline && holders::of(device).is_empty() => {
                std::thread::sleep(PASSING_USE / 100);
            }
            result => return result,
        }
    }
}

fn store(view: &View, path: &Path) {
    view.settle_all(Duration::ZERO);
    if let Err(error) = view.save_dirty().and_then(|()| view.set_mounted(false)) {
        tracing::error!(path = %path.display(), %error, "cannot store the view");
    }
}

/// ` by …`: the processes that hold a mount, for the end of a sentence.
fn users(device: u64) -> String {
    holders::describe(&holders::of(device)).map_or_else(String::new, |text| format!(" by {text}"))
}
