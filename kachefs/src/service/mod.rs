//! The action service: answers a wrapper, from request to bound outputs or recorded result.
//!
//! `prepare` turns a request into everything its key needs, `lookup` finds a result and binds it,
//! `aside` has compilers write where they need no daemon, `record` stores what they made, `lineage` makes
//! again what is lost of that. `files`, `toolchain` and `units` know digests and origins.

mod allocator;
mod aside;
pub mod builds;
pub mod cc;
mod clippy;
mod compile;
mod compilers;
mod externs;
pub mod files;
pub mod hit_cost;
mod lineage;
pub mod listings;
mod loaded;
pub mod lookup;
mod machine;
mod mode;
mod named;
mod observed;
mod out_dir;
mod package;
mod parts;
mod plan;
pub mod prepare;
mod present;
mod probes;
mod programs;
mod pulse;
pub mod record;
mod script;
mod share;
mod sidecars;
mod swapped;
pub mod toolchain;
mod unit_dirs;
pub mod units;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use store::builds::{KeptRequest, LoggedEnd};
use store::{ActionEntry, ActionKey, Counter, Digest, InvocationDigest};
use wrapper::environment::{self, Environment};
use wrapper::protocol::{self, Decision, ProtocolError};

use self::builds::{Asked, Builds};
use self::cc::dates::Dates;
use self::files::FileDigests;
use self::hit_cost::{HitCost, Percentiles, Stopwatch};
use self::lineage::Recomputer;
use self::loaded::Loaded;
use self::prepare::Refusal;
use self::probes::Probes;
use self::pulse::Pulse;
use self::script::launcher::Launchers;
use self::share::{Build, Source};
use self::toolchain::Toolchains;
use self::units::Units;
use crate::daemon::mounts::Mounts;
use crate::flight::{self, Flights};
use crate::lazy::secrets::SecretsOf;
use crate::storage::Storage;

/// How often a waiting wrapper hears that we are alive.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long we may take to find out what an action is. A wrapper that hears nothing for longer (see
/// `wrapper::client`) compiles without us: something we looked at does not answer.
const PREPARE: Duration = Duration::from_mins(3);

/// How long one process waits for another's compile of the same action before it compiles too.
const PATIENCE: Duration = Duration::from_mins(10);

/// The right to compile one action.
type Flight = flight::Flight<ActionKey>;

/// Answers compilers.
pub struct Service {
    storage: Arc<Storage>,
    mounts: Arc<Mounts>,
    files: Arc<FileDigests>,
    /// Where compilers may write.
    aside: Option<aside::Directories>,
    toolchains: Toolchains,
    loaded: Loaded,
    units: Units,
    flights: Arc<Flights<ActionKey>>,
    recording: Recording,
    hit_cost: HitCost,
    /// What builds asked for.
    pub builds: Arc<Builds>,
    launchers: Launchers,
    probes: Probes,
    dates: Dates,
    secrets: SecretsOf,
    /// Makes again what is lost.
    pub lineage: Arc<Recomputer>,
}

/// Numbers of the results being recorded, so that a daemon about to end can wait for them.
#[derive(Default)]
struct Recording {
    active: Mutex<BTreeSet<u64>>,
    begun: AtomicU64,
    ended: Condvar,
}

impl Service {
    /// A service for the views in `mounts`.
    pub fn new(storage: Arc<Storage>, mounts: Arc<Mounts>) -> Arc<Self> {
        let files = Arc::new(FileDigests::new(Arc::clone(&storage)));
        let aside = aside::Directories::open(&storage.dir);
        let aside =
            aside.inspect_err(|error| tracing::warn!(%error, "compilers write to the view"));
        let service = Arc::new_cyclic(|service| Self {
            aside: aside.ok(),
            toolchains: Toolchains::new(Arc::clone(&files)),
            loaded: Loaded::default(),
            units: Units::new(Arc::clone(&storage)),
            flights: Arc::default(),
            recording: Recording::default(),
            probes: Probes::default(),
            hit_cost: HitCost::default(),
            builds: Arc::new(Builds::new(Arc::clone(&storage), shown_in(&mounts))),
            launchers: Launchers::new(Arc::clone(&storage)),
            dates: Dates::default(),
            secrets: SecretsOf::default(),
            lineage: Arc::new(Recomputer::new(service.clone())),
            storage,
            mounts,
            files,
        });
        service.lineage.install(&service.storage.lazy);
        service
    }

    /// All views are mounted: takes away what an earlier daemon's compilers left, and makes what is asked for.
    pub fn open(&self) {
        if let Some(directories) = &self.aside {
            directories.clear();
        }
        self.lineage.open(&self.storage.dir);
    }

    /// Reads the compiler and the linker that whoever has this environment and working directory most
    /// likely builds with: a toolchain has hundreds of megabytes, for which the first build would
    /// wait. Compilers that are not there are nobody's loss.
    pub fn acquaint(&self, environment: &Environment, cwd: &Path) {
        let began = Instant::now();
        let caller = toolchain::Caller {
            environment,
            cwd,
            in_view: &|path| self.mounts.locate(path).is_some(),
        };
        let compiler = environment::value(environment, b"RUSTC").unwrap_or(b"rustc");
        let compiler = Path::new(OsStr::from_bytes(compiler));
        let compiler = self.toolchains.compiler(compiler, None, None, &caller);
        let linker = self.toolchains.linker(None, None, &caller);
        for error in [compiler.err(), linker.err()].into_iter().flatten() {
            tracing::debug!(%error, "getting acquainted");
        }
        tracing::debug!(took = ?began.elapsed(), "got acquainted");
    }

    /// What is keyed beforehand, found out while the wrapper hears that we are alive. A refusal is
    /// answered here.
    fn prepared<P>(
        &self,
        stream: &UnixStream,
        asked: Option<&Asked>,
        prepare: impl FnOnce() -> Result<P, Refusal>,
    ) -> Result<Option<P>, ProtocolError> {
        match Pulse::during(stream, prepare)? {
            Ok(prepared) => Ok(Some(prepared)),
            Err(refusal) => {
                self.refused(&refusal, asked);
                protocol::send(stream, &Decision::Plain)?;
                Ok(None)
            }
        }
    }

    /// Answers a request that cannot be judged here: the compiler runs as it was called.
    pub fn refuse(
        &self,
        stream: &UnixStream,
        asked: Option<&Asked>,
        reason: &'static str,
    ) -> Result<(), ProtocolError> {
        self.refused(&Refusal::Named(reason), asked);
        protocol::send(stream, &Decision::Plain)
    }

    /// A hit, or leave to run. Waits while another process runs the same.
    fn decide(
        &self,
        stream: &UnixStream,
        action: &impl Action,
        watch: &mut Stopwatch,
    ) -> Result<Decided, ProtocolError> {
        let deadline = Instant::now() + PATIENCE;
        let mut learned = false;
        let mut came = true;
        loop {
            if let Some(replay) = self.find_and_bind(stream, action, *watch, &mut came)? {
                return Ok(Decided::Hit(replay));
            }
            if !std::mem::replace(&mut learned, true) && self.learn(stream, action)? {
                continue;
            }
            let Some(key) = action.flight_key() else {
                return Ok(Decided::Run(None));
            };
            match self.flights.take_off(key) {
                // Recorded between the look and the take-off?
                Ok(flight) => {
                    let found = self.find_and_bind(stream, action, *watch, &mut came)?;
                    return Ok(found.map_or(Decided::Run(Some(flight)), Decided::Hit));
                }
                Err(_) if Instant::now() > deadline => return Ok(Decided::Run(None)),
                Err(boarding) => watch.without(|| {
                    while !boarding.wait(HEARTBEAT) && Instant::now() < deadline {
                        protocol::send(stream, &Decision::Wait)?;
                    }
                    Ok::<_, ProtocolError>(())
                })?,
            }
        }
    }

    /// Binds a result, if there is one. What a remote may have lost is fetched first, unless something has not
    /// come before: `came` says so.
    fn find_and_bind(
        &self,
        stream: &UnixStream,
        action: &impl Action,
        watch: Stopwatch,
        came: &mut bool,
    ) -> Result<Option<Replay>, ProtocolError> {
        let Some(found) = action.find() else {
            return Ok(None);
        };
        let doubted = self.storage.doubted(action.blobs(&found));
        if !doubted.is_empty() {
            *came = *came && Pulse::during(stream, || self.storage.bring_doubted(&doubted))?;
            if !*came {
                return Ok(None);
            }
        }
        if watch.elapsed() > HEARTBEAT {
            // Fails when the wrapper gave up on us: then nothing may be bound over what it makes now.
            protocol::send(stream, &Decision::Wait)?;
        }
        Ok(action.bind(found))
    }

    /// Answers with a hit, then notes it.
    fn answer(
        &self,
        stream: &UnixStream,
        replay: Replay,
        mut asked: Asked,
        request: impl FnOnce(&Asked) -> Option<KeptRequest>,
    ) -> Result<(), ProtocolError> {
        let Replay {
            stdout,
            stderr,
            key,
            spared_ms,
            ..
        } = replay;
        let _recording = self.recording.begin();
        let sent = protocol::send(stream, &Decision::Hit { stdout, stderr });
        asked.answered();
        self.hit_cost.add(asked.watch.cost());
        let request = request(&asked);
        self.builds
            .note(&asked, LoggedEnd::Hit { key, spared_ms }, request);
        sent
    }

    fn refused(&self, refusal: &Refusal, asked: Option<&Asked>) {
        let Some(reason) = refusal.reason() else {
            return;
        };
        tracing::info!(?refusal, "not cached");
        self.count(&[], Some(reason));
        let end = LoggedEnd::Uncacheable {
            reason: reason.to_owned(),
            detail: refusal.detail(),
        };
        if let Some(asked) = asked {
            self.builds.note(asked, end, None);
        }
    }

    fn count(&self, add: &[(Counter, u64)], uncacheable: Option<&str>) {
        let mut batch = self.storage.index.batch();
        batch.count(add, uncacheable);
        if let Err(error) = batch.commit() {
            tracing::error!(%error, "cannot count");
        }
    }

    /// Waits until everything is recorded whose recording has begun.
    pub fn drain(&self) {
        let mut active = self.recording.active.lock();
        let newest = active.last().copied();
        while active
            .first()
            .copied()
            .is_some_and(|oldest| Some(oldest) <= newest)
        {
            self.recording.ended.wait(&mut active);
        }
    }

    /// What hits have cost since the daemon started.
    pub fn hit_cost(&self) -> Percentiles {
        self.hit_cost.percentiles()
    }

    /// Results being recorded now.
    pub fn pending(&self) -> usize {
        self.recording.active.lock().len()
    }

    /// What the action cache holds under `key`; a damaged or unknown entry counts as none.
    fn entry(&self, key: &store::ActionKey) -> Option<ActionEntry> {
        self.storage.index.action(key).unwrap_or_else(|error| {
            tracing::warn!(?key, %error, "action");
            None
        })
    }
}

fn shown_in(mounts: &Arc<Mounts>) -> builds::Shown {
    let mounts = Arc::clone(mounts);
    Box::new(move |view| {
        let view = mounts.view(view);
        view.map(|view| view.origins()).unwrap_or_default()
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// An action about to run, if nobody has run it before.
trait Action {
    /// A result that serves it.
    type Found;

    /// Where its input records are found.
    fn invocation(&self) -> InvocationDigest;

    /// The build it belongs to, if others may have the same.
    fn build(&self) -> Option<Build>;

    /// What processes about to run the same agree on; `None` when that cannot be told.
    fn flight_key(&self) -> Option<ActionKey>;

    /// Looks for a result.
    fn find(&self) -> Option<Self::Found>;

    /// The blobs it names, with their sizes in bytes.
    fn blobs(&self, found: &Self::Found) -> Vec<(Digest, u64)>;

    /// Binds its outputs, and returns what is to be replayed.
    fn bind(&self, found: Self::Found) -> Option<Replay>;
}

enum Decided {
    Hit(Replay),
    Run(Option<Flight>),
}

/// What a hit shows.
struct Replay {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// The result's key.
    key: ActionKey,
    /// How it was found.
    source: Source,
    /// What it spares.
    spared_ms: u64,
}

impl Recording {
    fn begin(&self) -> OnDrop<impl Fn()> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        self.active.lock().insert(number);
        OnDrop(move || {
            self.active.lock().remove(&number);
            self.ended.notify_all();
        })
    }
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
