//! Makes again what is lost: the compile that made it is run once more, as it was asked for when it hit,
//! and what it makes is taken for what is missing if it is the same, byte for byte.
//!
//! Asked by who reads a file whose bytes are nowhere (`crate::lazy::Lineage`), and before a compiler runs
//! for the crates it loads. The compiler is started by a thread of its own, holds nothing of the daemon's
//! and is ended when whoever waits has waited long enough. It reads from the views it once read from, so
//! the crates it loads are made again first, if they are lost, too. Where one thing could not be made again
//! nothing else is tried for a while of what is lost of that view by then: the next build makes all of it,
//! faster than we could.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::unistd::{getegid, geteuid};
use parking_lot::{Condvar, Mutex};
use store::builds::KeptRequest;
use store::digest::hash_reader;
use store::{ActionKey, CasError, Counter, IndexError, StoreDir, ViewId};
use wrapper::protocol::PlannedFile;

use super::compilers::{CompilerError, Compilers, Made, end_left_behind};
use super::present::Wanted;
use super::{Flight, Service};
use crate::flight::Flights;
use crate::fs::Caller;
use crate::lazy::{FaultError, Lazy, Lineage, Lost};
use crate::storage::Storage;

/// How long anybody waits for something to be made again, with all that has to be made for it.
const LIMIT: Duration = Duration::from_mins(2);

/// Instead of [`LIMIT`], in milliseconds: for tests.
const TEST_LIMIT: &str = "KACHEFS_TEST_RECOMPUTE_MS";

/// How long nothing is tried that was in vain, or was lost when something was.
const HOPELESS: Duration = Duration::from_mins(1);

/// How many lost crates may be behind each other.
const DEEPEST: u32 = 64;

/// Why something is not made again.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no request for it is known")]
    Unknown,
    #[error("a library that was compiled incrementally is never the same")]
    Incremental,
    #[error("{0}")]
    Skipped(String),
    #[error("something it loads is lost, too")]
    Externs,
    #[error("it takes too long")]
    Late,
    #[error("too many crates that it needs are lost")]
    Deep,
    #[error(transparent)]
    Compiler(#[from] CompilerError),
    #[error("the compiler makes something else now")]
    Different,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] CasError),
    #[error(transparent)]
    Fault(#[from] FaultError),
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// Runs compiles again.
pub struct Recomputer {
    service: Weak<Service>,
    limit: Duration,
    /// Whether all views are there that compilers may read from.
    open: Mutex<bool>,
    opens: Condvar,
    flights: Arc<Flights<ActionKey>>,
    compilers: Compilers,
    /// What was in vain, or was lost when something was, and when.
    hopeless: Mutex<HashMap<(ViewId, ActionKey), Instant>>,
}

/// What the store's views ask.
struct Installed(Arc<Recomputer>);

/// How much may be done for whoever waits.
#[derive(Clone, Copy)]
struct Bounds {
    deadline: Instant,
    /// How many others wait for this one, each for the next.
    depth: u32,
}

impl Lineage for Installed {
    fn is_hopeful(&self, view: ViewId, action: &ActionKey) -> bool {
        self.0.is_hopeful(view, action)
    }

    fn known(&self, view: ViewId) -> HashSet<ActionKey> {
        let mut known = HashSet::new();
        let Some(service) = self.0.service.upgrade() else {
            return known;
        };
        service.builds.write();
        let read = service.storage.index.each_request(view, |kept| {
            if is_reproducible(&kept) && self.0.is_hopeful(view, &kept.key) {
                known.insert(kept.key);
            }
        });
        if let Err(error) = read {
            tracing::warn!(%error, "requests of a view");
        }
        known
    }

    fn recompute(&self, lost: Lost) -> bool {
        self.0.make(lost, self.0.bounds())
    }

    fn groups(&self, view: ViewId) -> Vec<u32> {
        self.0.compilers.groups(view)
    }

    fn leave(&self, view: ViewId) {
        self.0.compilers.leave(view);
    }
}

impl Recomputer {
    /// Nothing is started yet.
    pub fn new(service: Weak<Service>) -> Self {
        let test = std::env::var(TEST_LIMIT).ok();
        let test = test.and_then(|text| text.parse().ok());
        Self {
            service,
            limit: test.map_or(LIMIT, Duration::from_millis),
            open: Mutex::default(),
            opens: Condvar::new(),
            flights: Arc::default(),
            compilers: Compilers::default(),
            hopeless: Mutex::default(),
        }
    }

    /// From now on the store's views ask for what they miss.
    pub(super) fn install(self: &Arc<Self>, lazy: &Lazy) {
        if lazy
            .lineage
            .set(Box::new(Installed(Arc::clone(self))))
            .is_err()
        {
            tracing::error!("a store has two services");
        }
    }

    /// All views are mounted: what was asked for until now is made, too. What an earlier daemon was about
    /// to make goes.
    pub fn open(&self, dir: &StoreDir) {
        if let Err(error) = end_left_behind(dir) {
            tracing::warn!(%error, "cannot remove what was being made again");
        }
        *self.open.lock() = true;
        self.opens.notify_all();
    }

    fn wait_until_open(&self, deadline: Instant) -> bool {
        let mut open = self.open.lock();
        while !*open {
            if self.opens.wait_until(&mut open, deadline).timed_out() {
                return *open;
            }
        }
        true
    }

    /// Starts no more compilers, and ends those that run.
    pub fn close(&self) {
        self.compilers.close();
    }

    /// Makes again what is lost of the crates a compile loads; `false` when not all of them are here then.
    pub(super) fn bring(self: &Arc<Self>, service: &Service, wanted: &[Wanted]) -> bool {
        let bounds = self.bounds();
        let came = self.bring_within(service, wanted, bounds);
        let is_lost = |wanted: &&Wanted| !service.storage.has(&wanted.blob.0, wanted.blob.1);
        if !came && let Some(lost) = wanted.iter().find(is_lost) {
            // The compiler fails: what is still lost is for the next build.
            let view = lost.view.id;
            self.give_up(
                service,
                view,
                lost.action,
                bounds.deadline,
                &Failure::Externs,
            );
        }
        came
    }

    fn bring_within(
        self: &Arc<Self>,
        service: &Service,
        wanted: &[Wanted],
        bounds: Bounds,
    ) -> bool {
        wanted.iter().all(|wanted| {
            let (digest, size) = wanted.blob;
            if service.storage.fault(&digest, size).is_ok() {
                return true;
            }
            let is_lost = !service.storage.has(&digest, size);
            let action = wanted.action.filter(|_| is_lost);
            let lost = |action| Lost {
                view: wanted.view.id,
                action,
                digest,
                size,
            };
            action.is_some_and(|action| self.make(lost(action), bounds))
        })
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            deadline: Instant::now() + self.limit,
            depth: 0,
        }
    }

    fn is_hopeful(&self, view: ViewId, action: &ActionKey) -> bool {
        let hopeless = self.hopeless.lock();
        let since = hopeless.get(&(view, *action));
        since.is_none_or(|since| since.elapsed() > HOPELESS)
    }

    /// One makes it, however many wait. Who made something else of the same action has not made this.
    fn make(self: &Arc<Self>, lost: Lost, bounds: Bounds) -> bool {
        loop {
            let Some(service) = self.service.upgrade() else {
                return false;
            };
            if service.storage.cas.has(&lost.digest, lost.size) {
                return true;
            }
            if !self.is_hopeful(lost.view, &lost.action) {
                return false;
            }
            let left = bounds.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.fail(&service, &lost, bounds, &Failure::Late);
                return false;
            }
            drop(service);
            match self.flights.take_off(lost.action) {
                Ok(flight) => self.start(flight, lost, bounds),
                Err(boarding) => {
                    boarding.wait(left);
                }
            }
        }
    }

    fn start(self: &Arc<Self>, flight: Flight, lost: Lost, bounds: Bounds) {
        let Some(service) = self.service.upgrade() else {
            return;
        };
        let (this, theirs) = (Arc::clone(self), Arc::clone(&service));
        let work = move || {
            if let Err(failure) = this.attempt(&theirs, &lost, bounds) {
                this.fail(&theirs, &lost, bounds, &failure);
            }
            // Whoever waits finds the blob, or that there is no hope.
            drop(flight);
        };
        let thread = std::thread::Builder::new().name("recompute".into());
        if let Err(error) = thread.spawn(work) {
            self.fail(&service, &lost, bounds, &error.into());
        }
    }

    fn fail(&self, service: &Service, lost: &Lost, bounds: Bounds, why: &Failure) {
        self.give_up(service, lost.view, Some(lost.action), bounds.deadline, why);
    }

    /// Nothing is tried for a while of what is lost of this view by now, and it loses its names. Whoever waits
    /// does so until the deadline.
    fn give_up(
        &self,
        service: &Service,
        view: ViewId,
        action: Option<ActionKey>,
        deadline: Instant,
        why: &Failure,
    ) {
        tracing::warn!(view = view.0, %why, "what is lost is not made again");
        // All of it, not what was read until now.
        service.storage.wait_for_look(Some(deadline));
        let mounted = service.mounts.view(view);
        let lost = mounted.as_ref().map(|view| view.lost_origins());
        let lost = lost.into_iter().flatten().chain(action);
        let now = Instant::now();
        {
            let mut hopeless = self.hopeless.lock();
            hopeless.retain(|_, since| since.elapsed() <= HOPELESS);
            hopeless.extend(lost.map(|action| ((view, action), now)));
        }
        if let Some(view) = mounted {
            view.doubt_lost();
        }
    }

    fn attempt(
        self: &Arc<Self>,
        service: &Service,
        lost: &Lost,
        bounds: Bounds,
    ) -> Result<(), Failure> {
        let storage = &service.storage;
        if storage.cas.has(&lost.digest, lost.size) {
            return Ok(());
        }
        if !self.wait_until_open(bounds.deadline) {
            return Err(Failure::Late);
        }
        let began = Instant::now();
        let kept = request(service, lost)?;
        let caller = Caller {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        };
        let planned = service.plan_lost(&kept, caller);
        let (prepared, compile) = planned.map_err(|skipped| Failure::Skipped(skipped.why))?;
        if !compile.files.iter().any(|file| file.digest == lost.digest) {
            return Err(Failure::Unknown);
        }
        let depth = bounds.depth + 1;
        // All of it: what it was seen to load last may have been with another source.
        let wanted = service.externs_elsewhere(&prepared, None);
        if !wanted.is_empty() {
            if depth > DEEPEST {
                return Err(Failure::Deep);
            }
            // What a remote has comes together.
            let blobs: Vec<_> = wanted.iter().map(|wanted| wanted.blob).collect();
            if storage.fault_all(&blobs).is_err()
                && !self.bring_within(service, &wanted, Bounds { depth, ..bounds })
            {
                return Err(Failure::Externs);
            }
        }
        let compilers = &self.compilers;
        let made = compilers.run(lost.view, &compile, &storage.dir, bounds.deadline)?;
        let mut taken = 0;
        for file in &compile.files {
            if !storage.cas.has(&file.digest, file.size) {
                taken += u64::from(take(storage, file, &made)?);
            }
        }
        let unit = &compile.unit.crate_name;
        tracing::info!(crate_name = unit, taken, took = ?began.elapsed(), "made again what was lost");
        if taken > 0 {
            service.count(&[(Counter::Recomputed, 1)], None);
        }
        if !storage.cas.has(&lost.digest, lost.size) {
            return Err(Failure::Different);
        }
        Ok(())
    }
}

/// The last request that got the result something lost was of.
fn request(service: &Service, lost: &Lost) -> Result<KeptRequest, Failure> {
    service.builds.write();
    let mut found = None;
    service.storage.index.each_request(lost.view, |kept| {
        if kept.key == lost.action {
            found = Some(kept);
        }
    })?;
    let kept = found.ok_or(Failure::Unknown)?;
    if is_reproducible(&kept) {
        Ok(kept)
    } else {
        Err(Failure::Incremental)
    }
}

/// Whether the same comes of a compile each time, as far as its arguments tell: rustc makes up new names
/// for what is in a library each time it compiles incrementally.
fn is_reproducible(kept: &KeptRequest) -> bool {
    const INCREMENTAL: &[u8] = b"incremental=";
    let is_library = kept
        .unit
        .kind
        .split(',')
        .any(|kind| ["lib", "rlib", "staticlib"].contains(&kind));
    let is_incremental = |argument: &Vec<u8>| {
        let mut parts = argument.windows(INCREMENTAL.len());
        parts.any(|part| part == INCREMENTAL)
    };
    !(is_library && kept.argv.iter().any(is_incremental))
}

/// Takes a file into the store if it is what was lost. Copied: whatever the compiler started may still
/// have it open.
fn take(storage: &Storage, file: &PlannedFile, made: &Made) -> Result<bool, Failure> {
    let made = match File::open(made.path(&file.name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        made => made?,
    };
    let (id, mut copy) = storage.new_scratch()?;
    let mut written = Ok(());
    let hashed = hash_reader(made, |chunk| {
        if written.is_ok() {
            written = copy.write_all(chunk);
        }
    });
    let taken = match (hashed, written) {
        (Ok((digest, size)), Ok(())) if (digest, size) == (file.digest, file.size) => {
            let path = storage.dir.scratch_file(id);
            let taken = storage.take_file(&path, &copy, digest, size);
            taken.map(|()| true).map_err(Failure::from)
        }
        (Ok(_), Ok(())) => Ok(false),
        (Err(error), _) | (_, Err(error)) => Err(error.into()),
    };
    storage.remove_scratch(id);
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::Digest;
    use store::builds::Unit;

    #[test]
    fn incremental_libraries_are_never_the_same() {
        let is = |kind: &str, words: &str| {
            is_reproducible(&KeptRequest {
                unit: Unit {
                    package: String::new(),
                    crate_name: String::new(),
                    kind: kind.to_owned(),
                },
                version: String::new(),
                key: ActionKey(Digest::of(b"k")),
                out_dir: (1, 1),
                argv: words
                    .split(' ')
                    .map(|word| word.as_bytes().to_vec())
                    .collect(),
                environment: Vec::new(),
                cwd: Vec::new(),
                umask: 0,
            })
        };
        assert!(is("lib", "rustc -C opt-level=3"));
        assert!(is("bin", "rustc -C incremental=/t"));
        assert!(is("proc-macro", "rustc -Cincremental=/t"));
        for kind in ["lib", "rlib", "cdylib,lib", "staticlib"] {
            assert!(!is(kind, "rustc -C incremental=/t"), "{kind}");
            assert!(!is(kind, "rustc --codegen=incremental=/t"), "{kind}");
        }
    }
}
