//! Runs of build scripts: found and replayed, or watched and recorded.
//!
//! A launcher (`wrapper::launcher`) lies under the script's name and asks here. What a run read is
//! known only from watching it, so where that is impossible nothing is stored. `prepare` turns a
//! request into what is keyed beforehand, `record` stores a run, `launcher` puts launchers in place.

pub mod launcher;
pub(super) mod prepare;
mod record;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use store::builds::LoggedEnd;
use store::{
    ActionEntry, ActionKey, Counter, Digest, InvocationDigest, Observation, ScriptResult,
    Timestamp, TreeContent,
};
use wrapper::key;
use wrapper::protocol::{self, Decision, Outcome, ProtocolError, Run, ScriptRequest, Verdict};

pub(in crate::service) use self::prepare::Prepared;
use super::builds::Asked;
use super::lookup;
use super::parts::{self, Known};
use super::prepare::Refusal;
use super::share::{Build, Source};
use super::{Action, Decided, Flight, Replay, Service, millis};
use crate::clock;
use crate::fs::passthrough::Writer;
use crate::fs::trees::{Grown, GrownBody};
use crate::fs::{Body, Caller, FsResult};

impl Service {
    /// Serves one run of a build script from request to end.
    pub fn script(
        &self,
        stream: &UnixStream,
        request: &ScriptRequest,
        caller: Caller,
    ) -> Result<(), ProtocolError> {
        let mut asked = Asked::script(request);
        let prepare = || prepare::prepare(self, request, caller);
        let Some(prepared) = self.prepared(stream, Some(&asked), prepare)? else {
            return Ok(());
        };
        let action = ScriptAction {
            service: self,
            prepared: &prepared,
            build: self.build_of_process(prepared.parent),
        };
        match self.decide(stream, &action, &mut asked.watch)? {
            Decided::Hit(replay) => {
                self.note_part(action.build, prepared.digest, &replay.source, replay.key);
                let key = replay.key;
                self.answer(stream, replay, asked, |_| None)?;
                self.foresee(action.build, &key);
                Ok(())
            }
            // What an earlier run left may get into what this one makes.
            Decided::Run(_) if !prepared.starts_empty() => {
                self.refused(&Refusal::Named("out-dir-in-use"), Some(&asked));
                protocol::send(stream, &Decision::Plain)
            }
            Decided::Run(flight) => self.run_script(stream, &action, flight, asked),
        }
    }

    fn run_script(
        &self,
        stream: &UnixStream,
        action: &ScriptAction<'_>,
        flight: Option<Flight>,
        mut asked: Asked,
    ) -> Result<(), ProtocolError> {
        let prepared = action.prepared;
        let run = Run::as_called(prepared.scope.clone());
        let started: Timestamp = clock::now();
        let clock = Instant::now();
        let running = prepared
            .view
            .writing(Writer::Script, vec![prepared.out_dir]);
        // Scripts take as long as they take; the connection ends with the launcher's process.
        stream.set_read_timeout(None)?;
        asked.answered();
        protocol::send(stream, &Decision::Run(run))?;
        let outcome: Outcome = protocol::receive(stream)?;
        drop(running);
        let elapsed = clock.elapsed();
        let _recording = self.recording.begin();
        let held = if outcome.success {
            Some(record::hold(prepared))
        } else {
            None
        };
        let sent = protocol::send(stream, &Decision::Over(Verdict::Stands));
        let ran_ms = millis(elapsed);
        let Some(held) = held else {
            self.count(&[(Counter::Failed, 1)], None);
            self.builds.note(&asked, LoggedEnd::Failed { ran_ms }, None);
            return sent;
        };
        sent?;
        let stored =
            held.and_then(|held| record::record(self, prepared, &outcome, &held, started, elapsed));
        if let Err(reason) = &stored {
            tracing::info!(package = prepared.package, %reason, "build script not stored");
            self.count(&[(Counter::ScriptMisses, 1)], reason.name());
        }
        drop(flight);
        if let Ok(stored) = &stored {
            let (invocation, source) = (prepared.digest, &stored.source);
            self.note_part(action.build, invocation, source, stored.stored_under);
        }
        let known = stored.as_ref().ok().map(|stored| Known {
            key: stored.source.key,
            read: stored.seen.as_slice(),
            bound: stored.bound,
        });
        let end = LoggedEnd::Miss {
            ran_ms,
            parts: parts::of_script(prepared, &asked.version, known.as_ref()),
            not_stored: stored.err().map(|reason| reason.to_string()),
        };
        self.builds.note(&asked, end, None);
        Ok(())
    }
}

/// One run, as [`Service::decide`] sees it.
struct ScriptAction<'a> {
    service: &'a Service,
    prepared: &'a Prepared,
    build: Option<Build>,
}

impl Action for ScriptAction<'_> {
    type Found = FoundRun;

    fn invocation(&self) -> InvocationDigest {
        self.prepared.digest
    }

    fn build(&self) -> Option<Build> {
        self.build
    }

    fn flight_key(&self) -> Option<ActionKey> {
        Some(ActionKey(self.prepared.digest.0))
    }

    fn find(&self) -> Option<Self::Found> {
        find(self.service, self.prepared)
    }

    fn blobs(&self, found: &FoundRun) -> Vec<(Digest, u64)> {
        found.result.blobs().collect()
    }

    fn bind(&self, found: FoundRun) -> Option<Replay> {
        let FoundRun {
            key,
            result,
            source,
        } = found;
        let roots = &self.prepared.roots;
        let replay = Replay {
            stdout: roots.render(&result.stdout),
            stderr: roots.render(&result.stderr),
            key,
            source,
            spared_ms: result.run_ms,
        };
        match bind(self.prepared, key, &result) {
            Ok(()) => Some(replay),
            Err(error) => {
                tracing::error!(package = result.package, %error, "cannot bind a build script's run");
                None
            }
        }
    }
}

/// A result that serves a run.
struct FoundRun {
    key: ActionKey,
    result: ScriptResult,
    source: Source,
}

/// The key of a run with these inputs.
fn script_key(
    service: &Service,
    prepared: &Prepared,
    observed: &[Observation],
) -> Option<ActionKey> {
    let seen = lookup::look_again(prepared.site(service), observed)?;
    Some(key::script_key(&prepared.digest, &seen))
}

/// The first result whose recorded inputs are what they were.
fn find(service: &Service, prepared: &Prepared) -> Option<FoundRun> {
    lookup::records(service, &prepared.digest)
        .into_iter()
        .find_map(|record| {
            let key = script_key(service, prepared, record.observed.as_deref()?)?;
            let source = Source { record, key };
            let (key, entry) = lookup::entry_here(service, &key, &prepared.roots)?;
            let ActionEntry::Script(result) = entry else {
                return None;
            };
            let is_whole = service.storage.may_be_bound(result.blobs());
            is_whole.then_some(FoundRun {
                key,
                result,
                source,
            })
        })
}

/// Makes `OUT_DIR` what the run left, and counts the hit in the same commit.
fn bind(prepared: &Prepared, key: ActionKey, result: &ScriptResult) -> FsResult<()> {
    let origin = Arc::new(key);
    let tree = result
        .tree
        .iter()
        .map(|entry| {
            let body = match &entry.content {
                TreeContent::Directory => GrownBody::Directory,
                TreeContent::Blob { digest, size } => GrownBody::Leaf(Body::Blob {
                    digest: *digest,
                    size: *size,
                }),
                TreeContent::Link(target) => {
                    GrownBody::Leaf(Body::Link(prepared.roots.render(target)))
                }
            };
            Grown {
                path: entry.path.clone(),
                perm: entry.mode,
                mtime: None,
                origin: Some(Arc::clone(&origin)),
                body,
            }
        })
        .collect();
    let counted = [
        (Counter::ScriptHits, 1),
        (Counter::BytesReferenced, result.referenced_bytes()),
        (Counter::SavedMs, result.run_ms),
    ];
    prepared.view.empty_directory(prepared.out_dir)?;
    let count = |batch: &mut store::Batch<'_>| batch.count(&counted, None);
    prepared
        .view
        .grow(prepared.out_dir, tree, prepared.caller, count)
}
