//! Objects of C compilers: found and bound, or compiled under watch and recorded.
//!
//! `kachefs-cc` asks here. As with build scripts, what a compile read is known from watching it: its
//! headers, where it looked for them in vain, and the programs the driver runs. `prepare` turns a
//! request into what is keyed beforehand, `record` stores a compile, `dates` tells which texts make an
//! object depend on the clock, `alike` which names lead to one file.

mod alike;
pub mod dates;
mod prepare;
mod record;

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use store::{
    ActionEntry, ActionKey, ActionResult, Batch, Counter, Digest, InvocationDigest, Look,
    Observation, OutputContent, Timestamp,
};
use wrapper::cc::key::cc_key;
use wrapper::protocol::{self, CcRequest, Decision, Outcome, ProtocolError, Run, Verdict};

use self::prepare::Prepared;
use super::hit_cost::Stopwatch;
use super::lookup;
use super::share::{Build, Source};
use super::{Action, Decided, Flight, Replay, Service};
use crate::clock;
use crate::fs::outputs::Bound;
use crate::fs::{Body, Caller, Errno, FsResult};

impl Service {
    /// Serves one run of a C compiler from request to end.
    pub fn cc(
        &self,
        stream: &UnixStream,
        request: &CcRequest,
        caller: Caller,
    ) -> Result<(), ProtocolError> {
        // In no log of builds: who runs it, a build script, is.
        let mut watch = Stopwatch::start();
        let prepare = || prepare::prepare(self, request, caller);
        let Some(prepared) = self.prepared(stream, None, prepare)? else {
            return Ok(());
        };
        let action = CcAction {
            service: self,
            prepared: &prepared,
            looked: RefCell::default(),
        };
        match self.decide(stream, &action, &mut watch)? {
            Decided::Hit(Replay { stdout, stderr, .. }) => {
                let hit = if request.watched {
                    Decision::WatchedHit {
                        looked: action.looked.into_inner(),
                        wrote: prepared.written(),
                        stdout,
                        stderr,
                    }
                } else {
                    Decision::Hit { stdout, stderr }
                };
                let sent = protocol::send(stream, &hit);
                self.hit_cost.add(watch.cost());
                sent
            }
            Decided::Run(flight) => self.run_cc(stream, &prepared, flight),
        }
    }

    fn run_cc(
        &self,
        stream: &UnixStream,
        prepared: &Prepared,
        flight: Option<Flight>,
    ) -> Result<(), ProtocolError> {
        let run = Run::as_called(prepared.scope.clone());
        let started: Timestamp = clock::now();
        let clock = Instant::now();
        // Compilers take as long as they take; the connection ends with the client's process.
        stream.set_read_timeout(None)?;
        protocol::send(stream, &Decision::Run(run))?;
        let outcome: Outcome = protocol::receive(stream)?;
        let elapsed = clock.elapsed();
        let _recording = self.recording.begin();
        if !outcome.success {
            self.count(&[(Counter::Failed, 1)], None);
            return protocol::send(stream, &Decision::Over(Verdict::Stands));
        }
        let held = record::hold(prepared, &outcome);
        protocol::send(stream, &Decision::Over(Verdict::Stands))?;
        let stored =
            held.and_then(|held| record::record(self, prepared, &outcome, &held, started, elapsed));
        if let Err(reason) = stored {
            tracing::info!(source = prepared.compile.source, %reason, "object not stored");
            self.count(&[(Counter::CcMisses, 1)], reason.name());
        }
        drop(flight);
        Ok(())
    }
}

/// What an earlier compile looked at, as this checkout names it.
fn looked(prepared: &Prepared, observed: &[Observation]) -> Vec<(Look, Vec<u8>)> {
    let here = |observation: &Observation| {
        let path = prepared.roots.render(&observation.path);
        (observation.look, path)
    };
    observed.iter().map(here).collect()
}

/// One compile, as [`Service::decide`] sees it.
struct CcAction<'a> {
    service: &'a Service,
    prepared: &'a Prepared,
    /// Where the compile that a hit spares would have looked.
    looked: RefCell<Vec<(Look, Vec<u8>)>>,
}

/// A result that serves it.
struct FoundObject {
    key: ActionKey,
    result: ActionResult,
    source: Source,
}

impl Action for CcAction<'_> {
    type Found = FoundObject;

    fn invocation(&self) -> InvocationDigest {
        self.prepared.digest
    }

    fn build(&self) -> Option<Build> {
        // Where the run of the script hits, nobody asks for what it compiles.
        None
    }

    fn flight_key(&self) -> Option<ActionKey> {
        Some(ActionKey(self.prepared.digest.0))
    }

    fn find(&self) -> Option<FoundObject> {
        find(self.service, self.prepared)
    }

    fn blobs(&self, found: &FoundObject) -> Vec<(Digest, u64)> {
        found.result.blobs().collect()
    }

    fn bind(&self, found: FoundObject) -> Option<Replay> {
        let (roots, result) = (&self.prepared.roots, &found.result);
        let observed = found.source.record.observed.as_deref();
        let looked = looked(self.prepared, observed.unwrap_or_default());
        self.looked.replace(looked);
        if let Err(error) = bind(self.prepared, &found) {
            tracing::error!(source = result.crate_name, %error, "cannot bind an object");
            return None;
        }
        Some(Replay {
            stdout: roots.render(&result.stdout),
            stderr: roots.render(&result.stderr),
            key: found.key,
            spared_ms: result.compile_ms,
            source: found.source,
        })
    }
}

/// The key of a compile that read this, as it is now.
fn key_now(service: &Service, prepared: &Prepared, observed: &[Observation]) -> Option<ActionKey> {
    let site = prepared.site(service);
    let seen = lookup::look_again(site, observed)?;
    let alike = alike::of(site, &seen)?;
    Some(cc_key(&prepared.digest, &seen, &alike))
}

/// The first result whose recorded inputs are what they were.
fn find(service: &Service, prepared: &Prepared) -> Option<FoundObject> {
    lookup::records(service, &prepared.digest)
        .into_iter()
        .find_map(|record| {
            let key = key_now(service, prepared, record.observed.as_deref()?)?;
            let source = Source { record, key };
            let (key, entry) = lookup::entry_here(service, &key, &prepared.roots)?;
            let ActionEntry::Result(result) = entry else {
                return None;
            };
            let fits = result.outputs.len() == prepared.names.len();
            (fits && lookup::is_whole(service, &result)).then_some(FoundObject {
                key,
                result,
                source,
            })
        })
}

/// Puts the object, and the list of what it includes, where the compile was to put them. Counts the
/// hit in the same commit.
fn bind(prepared: &Prepared, found: &FoundObject) -> FsResult<()> {
    let outputs = prepared
        .names
        .iter()
        .zip(&found.result.outputs)
        .map(|(name, output)| {
            let OutputContent::Blob { digest, size } = output.content else {
                return Err(Errno::EIO);
            };
            let perm = u16::try_from(0o666 & !prepared.umask).map_err(|_| Errno::EINVAL)?;
            Ok(Bound {
                name: name.clone(),
                perm,
                body: Body::Blob { digest, size },
            })
        })
        .collect::<FsResult<Vec<_>>>()?;
    let counted = [
        (Counter::CcHits, 1),
        (Counter::BytesReferenced, found.result.referenced_bytes()),
        (Counter::SavedMs, found.result.compile_ms),
    ];
    let count = |batch: &mut Batch<'_>| batch.count(&counted, None);
    let (view, directory) = (&prepared.view, prepared.directory);
    view.bind(directory, outputs, Some(found.key), prepared.caller, count)
}
