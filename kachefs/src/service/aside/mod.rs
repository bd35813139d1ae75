//! Where compilers write: into a directory of the store, aside from the view.
//!
//! Most of what a compiler makes on its way (objects, archives, directories for metadata) it takes away
//! again itself, and in a view each of those is a handful of requests. So it is told another directory
//! to write to, and what it has made there gets its names in the view as the outputs of a hit do: the
//! metadata when the compiler says that it is there, all the rest when it has ended. What rustc makes for
//! Linux does not hold the path of the directory it was told, but what it says and dep-info do; there the
//! wrapper, and [`Aside`], write the one that cargo named.
//!
//! A compiler whose daemon dies goes on in its directory, which the next daemon leaves alone for as long
//! as its wrapper holds a lock on it, and the wrapper copies what was made.

mod eligible;
mod incremental;
mod macros;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lru::LruCache;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use parking_lot::Mutex;
use store::StoreDir;
use wrapper::artifacts::{self, PATIENCE};
use wrapper::aside::{self, Told};
use wrapper::environment;
use wrapper::lease;
use wrapper::protocol::{self, Decision, Outcome, ProtocolError, Report, Run, Verdict};
use wrapper::trace::{Access, UNWATCHED, Unseen};

use super::Service;
use super::prepare::Prepared;
use super::pulse::Pulse;
use super::units::UnderWay;
use crate::fs::adopt::Adopted;
use crate::fs::{Errno, FsResult, errno};

/// How often to try whether a wrapper that is gone has let go of its directory, and how long to wait between.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// Crates compiled twice that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Where compilers may write.
pub(super) struct Directories {
    /// Its real path, for whoever asks where it is goes by all of it.
    path: PathBuf,
    /// Those that should be gone, but that a wrapper had then, or that could not be removed.
    left: Mutex<Vec<PathBuf>>,
    /// Those in use that have their names of what they stand for.
    named: Mutex<HashSet<PathBuf>>,
    sessions: incremental::Names,
    macros: macros::Macros,
    /// Crates that were compiled twice because of what their proc macros may have asked.
    twice: Mutex<LruCache<UnderWay, ()>>,
    /// Whether the last compiler could not be watched.
    is_unwatched: AtomicBool,
}

impl Directories {
    /// An error where it is not ours alone, where private files cannot be linked from there, or where leases do
    /// not tell who writes.
    pub fn open(dir: &StoreDir) -> io::Result<Self> {
        let path = dir.aside();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        // All in it is ours, and will be removed.
        let meta = fs::symlink_metadata(&path)?;
        if !meta.is_dir() || meta.uid() != geteuid().as_raw() || meta.mode() & 0o077 != 0 {
            return Err(io::Error::other(format!(
                "{} is not a directory of our own",
                path.display()
            )));
        }
        let path = fs::canonicalize(path)?;
        let probe = tempfile::Builder::new().prefix(".").tempfile_in(&path)?;
        let linked = dir
            .scratch()
            .join(probe.path().file_name().unwrap_or_default());
        fs::hard_link(probe.path(), &linked)?;
        fs::remove_file(linked)?;
        let _unharmed = lease::Unharmed::start();
        let read = File::open(probe.path())?;
        let is_told = lease::is_written(&read);
        // Closes it.
        let _probe = probe.into_temp_path();
        if !is_told || !lease::wait_unwritten(&read, Instant::now() + PATIENCE) {
            return Err(io::Error::other("leases do not tell who writes there"));
        }
        Ok(Self {
            path,
            left: Mutex::default(),
            named: Mutex::default(),
            sessions: incremental::Names::default(),
            macros: macros::Macros::default(),
            twice: Mutex::new(LruCache::new(REMEMBERED)),
            is_unwatched: AtomicBool::new(false),
        })
    }

    /// Takes away what compilers left that an earlier daemon gave a directory to, once no wrapper has it any
    /// more. Nobody must have been given one since.
    pub fn clear(&self) {
        let entries = fs::read_dir(&self.path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tell what compilers left");
            Vec::new()
        });
        let paths = entries.iter().map(fs::DirEntry::path);
        self.left.lock().extend(paths);
        self.clear_left();
    }

    fn clear_left(&self) {
        let mut left = std::mem::take(&mut *self.left.lock());
        let is_used = |path: &PathBuf| self.named.lock().contains(path);
        left.retain(|path| is_used(path) || clear(path).is_err());
        self.left.lock().extend(left);
    }

    /// A directory for a compiler; `None` for one that must write where it is told.
    pub fn directory<'a>(&'a self, service: &Service, prepared: &'a Prepared) -> Option<Aside<'a>> {
        if !eligible::may_write_aside(&self.path, prepared) || self.may_ask(service, prepared) {
            return None;
        }
        self.clear_left();
        let incremental = prepared.invocation.incremental.as_deref();
        let place = match incremental {
            Some(named) => Some(incremental::Place::of(prepared, named)?),
            None => None,
        };
        let made = match &place {
            Some(place) => self.make(&place.name()),
            None => tempfile::Builder::new()
                .prefix("")
                .tempdir_in(&self.path)
                .map(|made| Some(made.keep())),
        };
        let made = made.inspect_err(|error| tracing::warn!(%error, "no directory for a compiler"));
        let mut aside = Aside {
            directories: self,
            prepared,
            path: made.ok()??,
            state: None,
            placed: HashSet::new(),
            has_leaked: false,
            // Until a wrapper hears of it.
            is_over: true,
        };
        if let Some(place) = place {
            aside.state = Some(aside.put_state(place)?);
        }
        aside.is_over = false;
        Some(aside)
    }

    /// Whether a proc macro may ask how the compiler was called.
    fn may_ask(&self, service: &Service, prepared: &Prepared) -> bool {
        let is_unwatched = || {
            self.is_unwatched.load(Ordering::Relaxed)
                || environment::value(&prepared.environment, UNWATCHED.as_bytes()).is_some()
        };
        prepared.opaque
            && (is_unwatched()
                || self.twice.lock().contains(&prepared.under_way)
                || !self.macros.are_blind(service, prepared))
    }

    /// Takes note of whether a compiler could be watched.
    pub fn note_watched(&self, outcome: &Outcome) {
        let is_unwatched = outcome.observed.is_none();
        self.is_unwatched.store(is_unwatched, Ordering::Relaxed);
    }

    /// Makes the directory of a name; `None` while somebody has it.
    fn make(&self, name: &str) -> io::Result<Option<PathBuf>> {
        let path = self.path.join(name);
        if !self.named.lock().insert(path.clone()) {
            return Ok(None);
        }
        let make = || {
            clear(&path)?;
            self.left.lock().retain(|left| *left != path);
            DirBuilder::new().mode(0o700).create(&path)
        };
        let made = make().inspect_err(|_| {
            self.named.lock().remove(&path);
        });
        match made {
            Ok(()) => Ok(Some(path)),
            // Of a daemon that died.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lets go of a directory that a wrapper may have.
    fn leave(&self, path: &Path) {
        for _ in 0..TRIES {
            match clear(path) {
                Ok(()) => return,
                // Of a process that ends, the connection may end before its locks do.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "cannot remove what a compiler left");
                    break;
                }
            }
        }
        self.left.lock().push(path.to_owned());
    }
}

/// Takes a directory away. `WouldBlock` while a wrapper has it.
fn clear(path: &Path) -> io::Result<()> {
    let cleared = || {
        let meta = path.symlink_metadata()?;
        if !meta.is_dir() {
            return fs::remove_file(path);
        }
        let directory = File::open(path)?;
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
        // Another may have its name by now.
        let locked = lock.metadata()?;
        if (locked.dev(), locked.ino()) != (meta.dev(), meta.ino()) || locked.nlink() == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        fs::remove_dir_all(path)
    };
    match cleared() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        cleared => cleared,
    }
}

/// A directory for one compiler; gone with this, unless its wrapper goes on without us.
pub(super) struct Aside<'a> {
    directories: &'a Directories,
    prepared: &'a Prepared,
    path: PathBuf,
    /// What the compiler goes on from, if it does.
    state: Option<incremental::State<'a>>,
    /// What has its name in the view.
    placed: HashSet<OsString>,
    /// Whether a proc macro may have learnt of it.
    has_leaked: bool,
    /// Whether the wrapper has heard what becomes of it all.
    is_over: bool,
}

impl<'a> Aside<'a> {
    fn put_state(&self, place: incremental::Place) -> Option<incremental::State<'a>> {
        let Prepared {
            view, invocation, ..
        } = self.prepared;
        let to = self.told().incremental_aside();
        let names = &self.directories.sessions;
        let put = incremental::State::put(names, view, place, &invocation.crate_name, &to);
        put.inspect_err(|error| tracing::warn!(%error, "no incremental state for a compiler"))
            .ok()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn told(&self) -> Told<'_> {
        Told {
            out_dir: &self.prepared.invocation.out_dir,
            incremental: self.prepared.invocation.incremental.as_deref(),
            aside: &self.path,
        }
    }

    /// Has the compiler told to write here. It is not told to remap: the wrapper alone puts back what it says.
    pub fn tell(&self, run: &mut Run) {
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let told = self.told();
        run.aside = Some(protocol::Aside {
            path: bytes(told.aside),
            out_dir: bytes(told.out_dir),
            incremental: told.incremental.map(bytes),
        });
        run.remaps.extend(told.remaps());
        run.scope.own.push(bytes(told.aside));
        run.scope.arguments = self.prepared.opaque;
    }

    /// Why the compiler must run again where cargo told it to write: a proc macro may have made something of how it
    /// was called. This crate, and those behind the same proc macros, are written there from now on.
    pub fn why_redo(&self, service: &Service, outcome: &Outcome) -> Option<&'static str> {
        if !self.has_leaked {
            return None;
        }
        let crates = &self.directories.twice;
        crates.lock().put(self.prepared.under_way.clone(), ());
        // Of one that could not be watched nothing is known.
        if outcome.observed.is_none() {
            return Some("not-watched");
        }
        self.directories.macros.suspect(service, self.prepared);
        Some(Unseen::Arguments.name())
    }

    /// Gives a file its name in the view that the compiler says it has made.
    fn place(&mut self, name: &str) -> FsResult<()> {
        // It comes from another process.
        if name.contains('/') || !self.prepared.invocation.is_output(name) {
            return Err(Errno::EINVAL);
        }
        self.adopt(&[OsString::from(name)])
    }

    /// Gives all else that is there its names in the view, after which nothing may be missing of what the
    /// compiler says it has made.
    fn place_all(&mut self, outcome: &Outcome) -> FsResult<()> {
        let made = || aside::made(&self.path);
        let names = made().or_else(|error| self.prepared.view.storage.again(error, made));
        let names = names.map_err(|error| errno(&error))?;
        let others = names.into_iter().filter(|name| !self.placed.contains(name));
        self.adopt(&others.collect::<Vec<_>>())?;
        let is_placed = |path: &str| {
            let name = Path::new(path).file_name();
            name.is_some_and(|name| self.placed.contains(name))
        };
        let mut announced = artifacts::announced(&outcome.stderr);
        let missing = announced.any(|output| !is_placed(&output.artifact));
        if outcome.success && missing {
            return Err(Errno::ENOENT);
        }
        self.take_state();
        Ok(())
    }

    /// Without it the next compile takes longer, and no more.
    fn take_state(&self) {
        let from = self.told().incremental_aside();
        let taken = self
            .state
            .as_ref()
            .map(|state| state.take(&from, self.prepared.caller));
        if let Some(Err(error)) = taken {
            let crate_name = &self.prepared.invocation.crate_name;
            tracing::warn!(crate_name, %error, "incremental state is left behind");
        }
    }

    fn adopt(&mut self, names: &[OsString]) -> FsResult<()> {
        if names.is_empty() {
            return Ok(());
        }
        let told = self.told();
        let edit = |text: &[u8]| told.edit(text);
        let files = names.iter().map(|name| Adopted {
            name: name.as_bytes().to_vec(),
            path: self.path.join(name),
            edit: Told::is_edited(name).then_some(&edit as _),
        });
        let files = files.collect::<Vec<_>>();
        let Prepared {
            view,
            out_dir,
            caller,
            ..
        } = self.prepared;
        view.adopt(*out_dir, &files, Instant::now() + PATIENCE, *caller)?;
        self.placed.extend(names.iter().cloned());
        Ok(())
    }

    /// Takes out of what a compiler was seen to do how it looked where this is: it would have looked where
    /// cargo's directory is, which is noted of nobody. None of it is a link, for it is a real path.
    fn forget_way(&self, outcome: &mut Outcome) {
        let Some(observed) = &mut outcome.observed else {
            return;
        };
        let here = self.path.as_os_str().as_bytes();
        observed.paths.retain(|path, uses| {
            let is_above = here
                .strip_prefix(path.as_slice())
                .is_some_and(|rest| path.ends_with(b"/") || rest.starts_with(b"/"));
            !is_above || uses.absent || !uses.accesses.is_only(Access::Link)
        });
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if !self.is_over || fs::remove_dir_all(&self.path).is_err() {
            self.directories.leave(&self.path);
        }
        self.directories.named.lock().remove(&self.path);
    }
}

/// Waits until a compile has ended, whose files meanwhile get their names: all of them, or none where it says
/// why.
pub(super) fn until_ended(
    stream: &UnixStream,
    mut aside: Option<&mut Aside<'_>>,
) -> Result<(Outcome, FsResult<()>), ProtocolError> {
    loop {
        match protocol::receive(stream)? {
            Report::<String, _>::Made(name) => {
                let aside = aside.as_mut().ok_or_else(|| {
                    ProtocolError::Malformed("a file of a compiler without a directory".into())
                })?;
                let placed = while_heard(stream, || aside.place(&name))?;
                if let Err(error) = &placed {
                    tracing::warn!(name, %error, "not placed");
                }
                protocol::send(stream, &Decision::Placed(placed.is_ok()))?;
            }
            Report::Ended {
                mut outcome,
                aside: wrote_aside,
                asked,
            } => {
                let mut placed = Ok(());
                if let Some(aside) = aside
                    && wrote_aside
                {
                    aside.has_leaked = asked;
                    aside.forget_way(&mut outcome);
                    if !asked {
                        placed = while_heard(stream, || aside.place_all(&outcome))?;
                    }
                }
                return Ok((outcome, placed));
            }
        }
    }
}

/// Does what takes its time, unless the wrapper has given us up already, and places its files itself.
fn while_heard<R>(stream: &UnixStream, work: impl FnOnce() -> R) -> Result<R, ProtocolError> {
    protocol::send(stream, &Decision::Wait)?;
    Ok(Pulse::during(stream, work)?)
}

/// Tells the wrapper what becomes of a compile.
pub(super) fn conclude(
    stream: &UnixStream,
    aside: Option<Aside<'_>>,
    verdict: Verdict,
) -> Result<(), ProtocolError> {
    protocol::send(stream, &Decision::Over(verdict))?;
    if let Some(mut aside) = aside {
        aside.is_over = true;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_left_is_cleared_once_nobody_has_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path().join("store"));
        fs::create_dir_all(store.scratch()).expect("mkdir");
        let place = Directories::open(&store).expect("opens");
        let at = |name: &str| store.aside().join(name);
        for name in ["held", "left"] {
            fs::create_dir(at(name)).expect("mkdir");
            fs::write(at(name).join("libx.rmeta"), "").expect("writes");
        }
        fs::write(at("stray"), "").expect("writes");
        let hold = |name: &str| {
            let held = File::open(at(name)).expect("opens");
            Flock::lock(held, FlockArg::LockShared).expect("locks")
        };
        let held = hold("held");
        place.clear();
        assert!(at("held").join("libx.rmeta").exists());
        assert!(!at("left").exists() && !at("stray").exists());
        place.clear_left();
        assert!(at("held").exists());
        drop(held);
        place.clear_left();
        assert!(!at("held").exists() && place.left.lock().is_empty());

        // A wrapper that ends while we look.
        fs::create_dir(at("ending")).expect("mkdir");
        let held = hold("ending");
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(3 * PAUSE);
                drop(held);
            });
            place.leave(&at("ending"));
        });
        assert!(!at("ending").exists() && place.left.lock().is_empty());
    }

    #[test]
    fn only_a_directory_of_our_own_is_used() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path().join("store"));
        fs::create_dir_all(store.scratch()).expect("mkdir");
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).expect("mkdir");
        fs::write(elsewhere.join("precious"), "").expect("writes");
        std::os::unix::fs::symlink(&elsewhere, store.aside()).expect("links");
        assert!(Directories::open(&store).is_err());
        fs::remove_file(store.aside()).expect("removes");
        fs::create_dir(store.aside()).expect("mkdir");
        let open_to_all = fs::Permissions::from_mode(0o777);
        fs::set_permissions(store.aside(), open_to_all).expect("chmod");
        assert!(Directories::open(&store).is_err());
        assert!(elsewhere.join("precious").exists());
    }
}
