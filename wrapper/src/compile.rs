//! A compile that the daemon wants run: told where to write, listened to, and reported.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use crate::artifacts;
use crate::aside::Held;
use crate::client::{CANNOT_RUN, become_compiler, say};
use crate::drivers;
use crate::protocol::{self, Decision, Outcome, Report, Run, Verdict};
use crate::run::{self, Ended};
use crate::trace::Asked;
use crate::verdict::verdict;

/// Runs the compiler, streaming what it says, and reports how it went.
pub(crate) fn compile(argv: &[OsString], run: &Run, stream: &UnixStream) -> ExitCode {
    let (programs, arguments) = argv.split_at(drivers::programs(argv));
    let command = |arguments: &[OsString]| {
        let mut command = Command::new(&programs[0]);
        command
            .args(&programs[1..])
            .args(run.arguments.iter().map(|arg| OsStr::from_bytes(arg)))
            .args(arguments);
        for name in &run.remove_environment {
            command.env_remove(OsStr::from_bytes(name));
        }
        command
    };
    let mut compile = Compile::new(run, stream);
    let told = compile.write_aside(arguments);
    let told = told.as_deref().unwrap_or(arguments);
    let asked = compile.asked.clone();
    let hear = |line: &[u8]| compile.hear(line);
    let mut ran = run::streamed(|| command(told), run, asked.as_ref(), hear);
    if matches!(ran, Err(run::Failed::Unwatched)) {
        compile.write_where_told();
        ran = run::streamed(|| command(arguments), run, None, |line| compile.hear(line));
    }
    match ran {
        Ok(ended) => {
            let status = ended.status;
            if compile.end(ended) == Verdict::Stands {
                return run::exit_like(status);
            }
        }
        Err(run::Failed::Again | run::Failed::Unwatched) => {}
        Err(run::Failed::Lost(error)) => {
            say(&format!("kachefs-rustc: lost the compiler: {error}"));
            // It may still write to its directory, and has the lock for as long as nobody gives it up.
            std::mem::forget(compile);
            return ExitCode::FAILURE;
        }
    }
    let has_announced = compile.has_announced;
    // Gives up its directory: what has run there has ended.
    drop(compile);
    if !has_announced {
        return become_compiler(argv);
    }
    // Who has read the metadata must find the same again, of which paths and variables are a part; and cargo
    // fails when it hears of it a second time.
    // Gone already is as good.
    let _ = stream.shutdown(Shutdown::Both);
    match run::unwatched(command(arguments), run, |line| !is_of_metadata(line)) {
        Ok(status) => run::exit_like(status),
        Err(error) => {
            say(&format!(
                "kachefs-rustc: cannot run the compiler again: {error}"
            ));
            ExitCode::from(CANNOT_RUN)
        }
    }
}

/// Whether a line says that there is metadata.
fn is_of_metadata(line: &[u8]) -> bool {
    artifacts::announced(line).any(|output| output.emit == "metadata")
}

/// What has become of a compile so far.
struct Compile<'a> {
    run: &'a Run,
    stream: &'a UnixStream,
    /// Where it writes, if not where cargo said.
    held: Option<Held>,
    /// Whether something may have asked for its arguments, where those are not cargo's and proc macros may still
    /// run.
    asked: Option<Arc<Asked>>,
    /// The path of its dep-info, once that is there.
    dep_info: Option<String>,
    /// Whether cargo has heard that there is metadata.
    has_announced: bool,
}

impl<'a> Compile<'a> {
    fn new(run: &'a Run, stream: &'a UnixStream) -> Self {
        Self {
            run,
            stream,
            held: None,
            asked: None,
            dep_info: None,
            has_announced: false,
        }
    }

    /// The arguments with which the compiler writes where the daemon wants it, if it is to.
    fn write_aside(&mut self, arguments: &[OsString]) -> Option<Vec<OsString>> {
        let (held, told) = Held::of(self.run, arguments)?;
        if self.run.scope.arguments {
            self.asked = Some(Arc::new(Asked::new().ok()?));
        }
        self.held = Some(held);
        Some(told)
    }

    /// It writes where cargo said after all.
    fn write_where_told(&mut self) {
        self.held = None;
        self.asked = None;
    }

    /// Takes note of a line that the compiler says. Whether it is to go on.
    fn hear(&mut self, line: &[u8]) -> bool {
        // It will run again, and say all again.
        if self.may_have_asked() {
            return false;
        }
        let Some(output) = artifacts::announced(line).next() else {
            return true;
        };
        match output.emit.as_ref() {
            "dep-info" => {
                self.dep_info = Some(output.artifact.into_owned());
                true
            }
            "metadata" => {
                // Nobody is to read that of a compile which will not stand. Dep-info is there: rustc writes it
                // before it analyses anything.
                let stands = self.looked_for_nothing_removed();
                let held = self.held.as_mut();
                let is_ready = stands && held.is_none_or(|held| held.hear(&output, self.stream));
                if is_ready {
                    self.has_announced = true;
                    // Macros have run, and who asks from now on tells the compiler nothing.
                    self.asked = None;
                }
                is_ready
            }
            _ => true,
        }
    }

    /// The compiler has ended. Whether that stands.
    fn end(&mut self, ended: Ended) -> Verdict {
        let success = ended.status.success();
        // No wonder that it failed.
        if !success && self.held.as_ref().is_some_and(Held::is_gone) {
            return Verdict::Redo;
        }
        let unsettled = || artifacts::unsettled(&ended.stderr);
        let outcome = Outcome {
            success,
            unsettled: self.held.is_none().then(unsettled).flatten(),
            stdout: ended.stdout,
            stderr: ended.stderr,
            observed: ended.observed,
        };
        match self.report(&outcome) {
            // Also when it failed: perhaps for want of that.
            Verdict::Stands if !self.looked_for_nothing_removed() => Verdict::Redo,
            verdict => verdict,
        }
    }

    /// Whether a macro may have found that it was called otherwise than cargo said.
    fn may_have_asked(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.is_set())
    }

    /// Whether, by its dep-info, the compiler looked for no variable that was taken away from it.
    fn looked_for_nothing_removed(&self) -> bool {
        self.own_verdict(true, &[]) == Verdict::Stands
    }

    /// Tells the daemon. It answers once it holds on to the output files, so that nothing cargo does next takes
    /// them away first.
    fn report(&mut self, outcome: &Outcome) -> Verdict {
        let held = self.held.take();
        let report = Report::<&str, _>::Ended {
            outcome,
            aside: held.is_some(),
            asked: self.may_have_asked(),
        };
        let heard = protocol::send(self.stream, &report);
        if let Ok(Decision::Over(verdict)) = heard.and_then(|()| protocol::decision(self.stream)) {
            return verdict;
        }
        if self.may_have_asked() {
            // One that is only silent must not place anything later. Gone already is as good.
            let _ = self.stream.shutdown(Shutdown::Both);
            return Verdict::Redo;
        }
        // Else the compile stands whether or not the daemon hears of it.
        let placed = held.map_or(Ok(()), |held| held.place_all(self.stream, &outcome.stderr));
        if outcome.success && placed.is_err() {
            return Verdict::Redo;
        }
        self.own_verdict(outcome.success, &outcome.stderr)
    }

    /// What the daemon would say.
    fn own_verdict(&self, success: bool, stderr: &[u8]) -> Verdict {
        let dep_info = || {
            let path = Path::new(self.dep_info.as_ref()?);
            let aside = self.held.as_ref().and_then(|held| held.made(path));
            fs::read(aside.as_deref().unwrap_or(path)).ok()
        };
        verdict(success, stderr, &self.run.remove_environment, dep_info)
    }
}
