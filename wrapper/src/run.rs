//! Running a program in our place: its output passed on as it comes, its accesses watched.
//!
//! What the wrapper does with a compiler and the launcher with a build script. Holds no policy.

use std::io::{self, PipeReader, Read, Write};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::thread;

use std::os::unix::process::ExitStatusExt;

use crate::protocol::Run;
use crate::roots::Roots;
use crate::trace::{Asked, Observed, Program, Scope, Unseen, Watch};

/// How a program ended.
pub(crate) struct Ended {
    /// Its status.
    pub(crate) status: ExitStatus,
    /// What it wrote to standard output.
    pub(crate) stdout: Vec<u8>,
    /// What it wrote to standard error, with real paths.
    pub(crate) stderr: Vec<u8>,
    /// What it was seen to do; `None` where it could not be watched.
    pub(crate) observed: Option<Observed>,
}

/// Why a program did not come to its end under our eyes.
pub(crate) enum Failed {
    /// It never ran, or its watcher died and all its calls failed: to be run again.
    Again,
    /// It never ran, for it must be watched and cannot be.
    Unwatched,
    /// It ran, but its end was not seen.
    Lost(io::Error),
}

/// Runs a program to its end, as the daemon wants it run. Its output goes to ours as it comes, with the
/// real ones in place of remapped paths. `hear` gets each line of its standard error first, and says whether
/// it is to go on. Where arguments are not the caller's, `asked` is set when something may have asked for them, and
/// nothing runs that cannot be watched.
pub(crate) fn streamed(
    command: impl Fn() -> Command,
    run: &Run,
    asked: Option<&Arc<Asked>>,
    hear: impl FnMut(&[u8]) -> bool,
) -> Result<Ended, Failed> {
    let mut edit = edits(run, hear);
    let (pipes, piped) = Pipes::of(command()).map_err(|_| Failed::Again)?;
    let program = Program {
        command: piped,
        libraries: run.libraries.clone(),
        allocator: run.allocator.clone(),
        asked: asked.cloned(),
    };
    let scope = Scope {
        arguments: asked.is_some(),
        ..run.scope.clone()
    };
    if let Ok(watch) = Watch::start(program, scope) {
        let (stdout, stderr) = pipes.pass_on(&mut edit).map_err(Failed::Lost)?;
        let (status, observed) = watch.finish().map_err(|_| Failed::Again)?;
        return Ok(Ended {
            status,
            stdout,
            stderr,
            observed: Some(observed).filter(|observed| !is_blind(observed)),
        });
    }
    if asked.is_some() {
        return Err(Failed::Unwatched);
    }
    let started = Unwatched::start(command()).map_err(|_| Failed::Again)?;
    let (status, stdout, stderr) = started.pass_on(edit).map_err(Failed::Lost)?;
    Ok(Ended {
        status,
        stdout,
        stderr,
        observed: None,
    })
}

/// The same, but nobody watches.
pub(crate) fn unwatched(
    command: Command,
    run: &Run,
    hear: impl FnMut(&[u8]) -> bool,
) -> io::Result<ExitStatus> {
    let (status, ..) = Unwatched::start(command)?.pass_on(edits(run, hear))?;
    Ok(status)
}

fn edits(run: &Run, mut hear: impl FnMut(&[u8]) -> bool) -> impl FnMut(&[u8]) -> (Vec<u8>, bool) {
    move |text| {
        let text = Roots::unremap(text, &run.remaps);
        let goes_on = hear(&text);
        (text, goes_on)
    }
}

/// A program that nobody watches.
struct Unwatched {
    child: Child,
    pipes: Pipes,
}

impl Unwatched {
    fn start(command: Command) -> io::Result<Self> {
        let (pipes, mut piped) = Pipes::of(command)?;
        let child = piped.spawn()?;
        Ok(Self { child, pipes })
    }

    fn pass_on(
        mut self,
        edit: impl FnMut(&[u8]) -> (Vec<u8>, bool),
    ) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
        let (stdout, stderr) = self.pipes.pass_on(edit)?;
        Ok((self.child.wait()?, stdout, stderr))
    }
}

/// Whether not even the program's start could be seen: where memory of other processes must not be
/// read (`kernel.yama.ptrace_scope`).
fn is_blind(observed: &Observed) -> bool {
    observed.paths.is_empty() && observed.unseen.contains(&Unseen::Memory)
}

/// Our ends of the pipes a program writes to.
struct Pipes {
    stdout: PipeReader,
    stderr: PipeReader,
}

impl Pipes {
    /// Makes them, and has a program write to the other ends.
    fn of(mut command: Command) -> io::Result<(Self, Command)> {
        let (stdout, theirs) = io::pipe()?;
        command.stdout(theirs);
        let (stderr, theirs) = io::pipe()?;
        command.stderr(theirs);
        Ok((Self { stdout, stderr }, command))
    }

    /// Passes on what comes, to the end, and returns it; standard error as [`tee`] edits it.
    fn pass_on(self, edit: impl FnMut(&[u8]) -> (Vec<u8>, bool)) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let Self { stdout, stderr } = self;
        thread::scope(|scope| {
            let out = scope.spawn(|| tee(stdout, io::stdout(), |text| (text.to_vec(), true)));
            let err = tee(stderr, io::stderr(), edit);
            let out = out
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("stdout reader died")));
            Ok((out?, err?))
        })
    }
}

/// Copies `from` to `to` line by line as lines arrive (cargo starts dependents on rustc's
/// artifact notifications), and returns it all. `edit` makes of each line what goes on, and says whether it does.
fn tee(
    mut from: impl Read,
    mut to: impl Write,
    mut edit: impl FnMut(&[u8]) -> (Vec<u8>, bool),
) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut line = Vec::new();
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let before = line.len();
        line.extend_from_slice(&buffer[..n]);
        // At the end everything goes out, with or without a newline.
        let whole = if n == 0 {
            line.len()
        } else {
            memchr::memrchr(b'\n', &buffer[..n]).map_or(0, |at| before + at + 1)
        };
        if whole > 0 {
            let rest = line.split_off(whole);
            let mut text = Vec::new();
            for line in line.split_inclusive(|byte| *byte == b'\n') {
                let (line, goes_on) = edit(line);
                all.extend_from_slice(&line);
                if goes_on {
                    text.extend(line);
                }
            }
            // A reader that has gone away must not stop the compiler.
            let _ = to.write_all(&text).and_then(|()| to.flush());
            line = rest;
        }
        if n == 0 {
            return Ok(all);
        }
    }
}

/// Ends this process as another ended: same status, or same signal.
pub(crate) fn exit_like(status: ExitStatus) -> ExitCode {
    if let Some(code) = status.code() {
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    let signal = status.signal().unwrap_or(libc::SIGKILL);
    if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
        // When the signal does not end this process, the shell's code for it does.
        let _ = nix::sys::signal::raise(signal);
    }
    ExitCode::from(128_u8.saturating_add(u8::try_from(signal).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tee_keeps_lines_whole_and_paths_real() {
        let remaps = vec![("/home/ann/ws".to_owned(), "/proc/self/cwd".to_owned())];
        let mut shown = Vec::new();
        let all = tee(
            &b"at /proc/self/cwd/x\nlast /proc/self/cwd"[..],
            &mut shown,
            |text| (Roots::unremap(text, &remaps), true),
        )
        .expect("copies");
        assert_eq!(shown, b"at /home/ann/ws/x\nlast /home/ann/ws");
        assert_eq!(all, shown);
    }

    #[test]
    fn only_what_is_to_go_on_does() {
        let mut shown = Vec::new();
        let said = &b"one\ntwo\nthree"[..];
        let all = tee(said, &mut shown, |text| (text.to_vec(), text != b"two\n")).expect("copies");
        assert_eq!(shown, b"one\nthree");
        assert_eq!(all, said);
    }
}
