//! The action service: answers a wrapper, from request to bound outputs or recorded result.
//!
//! `prepare` turns a request into everything its key needs, `lookup` finds a result and binds it,
//! `record` stores what a compiler made. `files`, `toolchain` and `units` know digests and
//! origins, `flight` keeps two processes from compiling the same.

pub mod files;
pub mod flight;
pub mod lookup;
pub mod prepare;
pub mod record;
pub mod toolchain;
pub mod units;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use store::{ActionEntry, Counter, Timestamp};
use wrapper::protocol::{self, CompileRequest, Decision, Outcome, ProtocolError, Run};

use self::files::FileDigests;
use self::flight::{Flight, Flights};
use self::lookup::Found;
use self::prepare::{Prepared, Refusal, prepare};
use self::toolchain::Toolchains;
use self::units::Units;
use crate::clock;
use crate::daemon::mounts::Mounts;
use crate::fs::Caller;
use crate::storage::Storage;

/// How often a waiting wrapper hears that we are alive.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long one process waits for another's compile of the same action before it compiles too.
const PATIENCE: Duration = Duration::from_mins(10);

/// Answers compilers.
pub struct Service {
    storage: Arc<Storage>,
    mounts: Arc<Mounts>,
    files: Arc<FileDigests>,
    toolchains: Toolchains,
    units: Units,
    flights: Arc<Flights>,
    recording: Recording,
}

/// Counts results being recorded, so that a daemon about to end can wait for them.
#[derive(Default)]
struct Recording {
    active: Mutex<usize>,
    idle: Condvar,
}

impl Service {
    /// A service for the views in `mounts`.
    pub fn new(storage: Arc<Storage>, mounts: Arc<Mounts>) -> Self {
        let files = Arc::new(FileDigests::new(Arc::clone(&storage)));
        Self {
            toolchains: Toolchains::new(Arc::clone(&files)),
            units: Units::new(Arc::clone(&storage)),
            flights: Arc::default(),
            recording: Recording::default(),
            storage,
            mounts,
            files,
        }
    }

    /// Serves one compile from request to end.
    pub fn compile(
        &self,
        stream: &UnixStream,
        request: &CompileRequest,
        caller: Caller,
    ) -> Result<(), ProtocolError> {
        let prepared = match prepare(self, request, caller) {
            Ok(prepared) => prepared,
            Err(refusal) => {
                self.refused(&refusal);
                return protocol::send(stream, &Decision::Plain);
            }
        };
        match self.decide(stream, &prepared)? {
            Decided::Hit { stdout, stderr } => {
                protocol::send(stream, &Decision::Hit { stdout, stderr })
            }
            Decided::Run(flight) => self.run(stream, &prepared, flight),
        }
    }

    /// A hit, or leave to compile. Waits while another process compiles the same.
    fn decide(&self, stream: &UnixStream, prepared: &Prepared) -> Result<Decided, ProtocolError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Taking off before looking means that nobody can record in between.
            let flight = match lookup::flight_key(self, prepared) {
                Some(key) => match self.flights.take_off(key) {
                    Ok(flight) => Some(flight),
                    Err(boarding) if Instant::now() < deadline => {
                        if !boarding.wait(HEARTBEAT) {
                            protocol::send(stream, &Decision::Wait)?;
                        }
                        continue;
                    }
                    Err(_) => None,
                },
                None => None,
            };
            return Ok(match self.find_and_bind(prepared) {
                Some((stdout, stderr)) => Decided::Hit { stdout, stderr },
                None => Decided::Run(flight),
            });
        }
    }

    fn find_and_bind(&self, prepared: &Prepared) -> Option<(Vec<u8>, Vec<u8>)> {
        let found = lookup::find(self, prepared)?;
        let Found { result, .. } = &found;
        let (stdout, stderr) = (
            prepared.roots.render(&result.stdout),
            prepared.roots.render(&result.stderr),
        );
        match lookup::bind(prepared, &found) {
            Ok(()) => Some((stdout, stderr)),
            Err(error) => {
                tracing::error!(crate_name = result.crate_name, %error, "cannot bind a hit");
                None
            }
        }
    }

    fn run(
        &self,
        stream: &UnixStream,
        prepared: &Prepared,
        flight: Option<Flight>,
    ) -> Result<(), ProtocolError> {
        let remaps = prepared.roots.remaps();
        let run = Run {
            arguments: remaps
                .iter()
                .map(|(from, to)| format!("--remap-path-prefix={from}={to}").into_bytes())
                .collect(),
            remove_environment: prepared.scrubbed.clone(),
            remaps: remaps
                .iter()
                .map(|(f, t)| ((*f).to_owned(), (*t).to_owned()))
                .collect(),
        };
        let started: Timestamp = clock::now();
        let clock = Instant::now();
        self.units
            .begin(prepared.under_way.clone(), prepared.origin.clone());
        let _over = OnDrop(|| self.units.end(&prepared.under_way));
        // Compilers take as long as they take; the connection ends with the wrapper's process.
        stream.set_read_timeout(None)?;
        protocol::send(stream, &Decision::Run(run))?;
        let outcome: Outcome = protocol::receive(stream)?;
        let _recording = self.recording.begin();
        if !outcome.success {
            self.count(&[(Counter::Failed, 1)], None);
            return protocol::send(stream, &());
        }
        let elapsed = clock.elapsed();
        let held = record::hold(prepared, &outcome);
        protocol::send(stream, &())?;
        let stored =
            held.and_then(|held| record::record(self, prepared, &outcome, &held, started, elapsed));
        if let Err(reason) = stored {
            tracing::info!(crate_name = prepared.invocation.crate_name, %reason, "not stored");
            self.count(&[(Counter::Misses, 1)], None);
        }
        drop(flight);
        Ok(())
    }

    fn refused(&self, refusal: &Refusal) {
        let Some(reason) = refusal.reason() else {
            return;
        };
        tracing::info!(?refusal, "not cached");
        self.count(&[], Some(reason));
    }

    fn count(&self, add: &[(Counter, u64)], uncacheable: Option<&str>) {
        let mut batch = self.storage.index.batch();
        batch.count(add, uncacheable);
        if let Err(error) = batch.commit() {
            tracing::error!(%error, "cannot count");
        }
    }

    /// Waits until nothing is being recorded.
    pub fn drain(&self) {
        let mut active = self.recording.active.lock();
        while *active > 0 {
            self.recording.idle.wait(&mut active);
        }
    }

    /// Results being recorded now.
    pub fn pending(&self) -> usize {
        *self.recording.active.lock()
    }

    /// What the action cache holds under `key`; a damaged or unknown entry counts as none.
    fn entry(&self, key: &store::ActionKey) -> Option<ActionEntry> {
        self.storage.index.action(key).unwrap_or_else(|error| {
            tracing::warn!(?key, %error, "action");
            None
        })
    }
}

enum Decided {
    Hit { stdout: Vec<u8>, stderr: Vec<u8> },
    Run(Option<Flight>),
}

impl Recording {
    fn begin(&self) -> OnDrop<impl Fn()> {
        *self.active.lock() += 1;
        OnDrop(|| {
            let mut active = self.active.lock();
            *active -= 1;
            if *active == 0 {
                self.idle.notify_all();
            }
        })
    }
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
