//! Compiles, from the request to the end of what the compiler made.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use store::builds::LoggedEnd;
use store::{ActionKey, Counter, Digest, Ino, InvocationDigest, Timestamp};
use wrapper::protocol::{self, CompileRequest, Decision, Outcome, ProtocolError, Run, Verdict};

use super::allocator;
use super::aside;
use super::builds::Asked;
use super::lookup::{self, Found};
use super::parts::{self, Known};
use super::prepare::{Place, Prepared, Refusal, prepare};
use super::pulse::Pulse;
use super::record::{self, NotStored, Ran, Recorded};
use super::share::Build;
use super::{Action, Decided, Flight, OnDrop, Replay, Service, millis, toolchain};
use crate::clock;
use crate::fs::passthrough::Writer;
use crate::fs::{Caller, FsResult};

impl Service {
    /// Serves one compile from request to end.
    pub fn compile(
        &self,
        stream: &UnixStream,
        request: CompileRequest,
        caller: Caller,
    ) -> Result<(), ProtocolError> {
        let mut asked = Asked::compile(&request);
        let prepare = || prepare(self, &request, caller);
        let Some(prepared) = self.prepared(stream, Some(&asked), prepare)? else {
            return Ok(());
        };
        let action = Compile {
            service: self,
            prepared: &prepared,
            build: self.build_of(&prepared),
        };
        match self.decide(stream, &action, &mut asked.watch)? {
            Decided::Hit(replay) => {
                let key = replay.key;
                self.note_part(action.build, prepared.digest, &replay.source, key);
                self.answer(stream, replay, asked, |asked| asked.kept(request, key))?;
                self.foresee(action.build, &key);
                Ok(())
            }
            Decided::Run(flight) => self.run(stream, &action, flight, asked),
        }
    }

    /// Has the compiler run, and stores what it makes.
    fn run(
        &self,
        stream: &UnixStream,
        action: &Compile<'_>,
        flight: Option<Flight>,
        mut asked: Asked,
    ) -> Result<(), ProtocolError> {
        let prepared = action.prepared;
        self.has_missed(action.build, &prepared.view);
        self.bring_externs(stream, prepared)?;
        let mut run = Run {
            libraries: Pulse::during(stream, || self.loaded_with(prepared))?,
            ..run_of(prepared)
        };
        let directory = || self.aside.as_ref()?.directory(self, prepared);
        let mut aside = Pulse::during(stream, directory)?;
        if let Some(aside) = &aside {
            aside.tell(&mut run);
        }
        let started: Timestamp = clock::now();
        let clock = Instant::now();
        self.units
            .begin(prepared.under_way.clone(), prepared.origin.clone());
        let _over = OnDrop(|| self.units.end(&prepared.under_way));
        let directories = self.written_by(prepared);
        let compiling = prepared.view.writing(Writer::Compiler, directories);
        // Compilers take as long as they take; the connection ends with the wrapper's process.
        stream.set_read_timeout(None)?;
        asked.answered();
        protocol::send(stream, &Decision::Run(run))?;
        let (outcome, placed) = aside::until_ended(stream, aside.as_mut())?;
        let _recording = self.recording.begin();
        if let Some(directories) = &self.aside {
            directories.note_watched(&outcome);
        }
        let leaked = aside
            .as_ref()
            .and_then(|aside| aside.why_redo(self, &outcome));
        if let Some(why) = leaked.or_else(|| why_redo(prepared, &outcome, placed)) {
            self.refused(&Refusal::Named(why), Some(&asked));
            return aside::conclude(stream, aside, Verdict::Redo);
        }
        let elapsed = clock.elapsed();
        let ran_ms = millis(elapsed);
        if !outcome.success {
            self.count(&[(Counter::Failed, 1)], None);
            let sent = aside::conclude(stream, aside, Verdict::Stands);
            self.builds.note(&asked, LoggedEnd::Failed { ran_ms }, None);
            return sent;
        }
        let stood_in = aside.as_ref().map(|aside| aside.path().to_owned());
        let held = record::hold(prepared, &outcome, started);
        if held.is_ok()
            && let Err(error) = self.launchers.stand_in(prepared)
        {
            tracing::warn!(crate_name = prepared.invocation.crate_name, %error, "launcher");
        }
        aside::conclude(stream, aside, Verdict::Stands)?;
        // The compiler and all it started are gone, and cargo does not wait for the rest.
        drop(compiling);
        let ran = Ran {
            started,
            elapsed,
            stood_in,
        };
        let stored = held.and_then(|held| record::record(self, prepared, &outcome, &held, &ran));
        drop(flight);
        self.note_miss(action, &asked, ran_ms, stored);
        Ok(())
    }

    fn note_miss(
        &self,
        action: &Compile<'_>,
        asked: &Asked,
        ran_ms: u64,
        stored: Result<Recorded, NotStored>,
    ) {
        let prepared = action.prepared;
        let known = match &stored {
            Ok(stored) => {
                let (invocation, source) = (prepared.digest, &stored.source);
                self.note_part(action.build, invocation, source, stored.stored_under);
                Some(Known {
                    key: source.key,
                    read: &stored.sources,
                    bound: stored.bound,
                })
            }
            Err(reason) => {
                tracing::info!(crate_name = prepared.invocation.crate_name, %reason, "not stored");
                self.count(&[(Counter::Misses, 1)], None);
                None
            }
        };
        let end = LoggedEnd::Miss {
            ran_ms,
            parts: parts::of_compile(prepared, &asked.version, known.as_ref()),
            not_stored: stored.err().map(|reason| reason.to_string()),
        };
        self.builds.note(asked, end, None);
    }

    /// The libraries that the compiler is loaded with, where that is known.
    fn loaded_with(&self, prepared: &Prepared) -> Vec<Vec<u8>> {
        let caller = toolchain::Caller {
            environment: &prepared.environment,
            cwd: &prepared.cwd,
            in_view: &|path| self.mounts.locate(path).is_some(),
        };
        let Some((program, digest)) = prepared.compiler() else {
            return Vec::new();
        };
        let path = self.toolchains.told_by_content(program, &caller);
        path.map_or_else(Vec::new, |path| {
            self.loaded.libraries(&path, digest, &caller)
        })
    }

    /// The directories a compiler writes to.
    fn written_by(&self, prepared: &Prepared) -> Vec<Ino> {
        let incremental = prepared.invocation.incremental.as_deref();
        let incremental = incremental.and_then(|path| {
            let Place::View(view, path) = prepared.locate(self, path) else {
                return None;
            };
            let node = view.resolve(&path).ok()?;
            (view.id == prepared.view.id).then_some(node.ino)
        });
        incremental.into_iter().chain([prepared.out_dir]).collect()
    }
}

/// Why the compiler must run again; `placed` is whether what it made has its names.
fn why_redo(prepared: &Prepared, outcome: &Outcome, placed: FsResult<()>) -> Option<&'static str> {
    if let Err(error) = placed
        && outcome.success
    {
        tracing::warn!(crate_name = prepared.invocation.crate_name, %error, "outputs");
        return Some("outputs-not-placed");
    }
    let verdict = record::verdict(prepared, outcome);
    (verdict == Verdict::Redo).then_some("reads-terminal-variable")
}

pub(super) fn run_of(prepared: &Prepared) -> Run {
    let remaps = prepared.remaps();
    Run {
        arguments: remaps
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={from}={to}").into_bytes())
            .collect(),
        remove_environment: prepared.scrubbed.clone(),
        remaps: remaps
            .iter()
            .map(|(f, t)| ((*f).to_owned(), (*t).to_owned()))
            .collect(),
        allocator: allocator::told(),
        ..Run::as_called(prepared.scope.clone())
    }
}

/// A compile.
struct Compile<'a> {
    service: &'a Service,
    prepared: &'a Prepared,
    build: Option<Build>,
}

impl Action for Compile<'_> {
    type Found = Found;

    fn invocation(&self) -> InvocationDigest {
        self.prepared.digest
    }

    fn build(&self) -> Option<Build> {
        self.build
    }

    fn flight_key(&self) -> Option<ActionKey> {
        lookup::flight_key(self.service, self.prepared)
    }

    fn find(&self) -> Option<Found> {
        lookup::find(self.service, self.prepared)
    }

    fn blobs(&self, found: &Found) -> Vec<(Digest, u64)> {
        found.result.blobs().collect()
    }

    fn bind(&self, found: Found) -> Option<Replay> {
        let result = &found.result;
        if let Err(error) = lookup::bind(self.service, self.prepared, &found) {
            tracing::error!(crate_name = result.crate_name, %error, "cannot bind a hit");
            return None;
        }
        let roots = &self.prepared.roots;
        Some(Replay {
            stdout: roots.render(&result.stdout),
            stderr: roots.render(&result.stderr),
            key: found.key,
            spared_ms: result.compile_ms,
            source: found.source,
        })
    }
}
