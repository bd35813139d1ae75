//! The process that starts a program under the filter and answers its calls.
//!
//! It outlives the wrapper: a filter whose listener is gone fails every call it hands over, and a
//! wrapper may be killed, or end, while what its program started runs on. It is the program's parent,
//! because some systems let only ancestors read a process's memory (`kernel.yama.ptrace_scope`).

use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;

use nix::unistd::{ForkResult, Pid};
use serde::{Deserialize, Serialize};

use super::listener::{End, Listener};
use super::notes::Notes;
use super::shim::Shim;
use super::{Observed, Program, Scope, Unseen, filter};
use crate::protocol::{self, ProtocolError};

/// The program was started, or why not.
#[derive(Serialize, Deserialize)]
pub(super) struct Started(Result<(), Failure>);

/// An error of the system, sent from process to process.
#[derive(Serialize, Deserialize)]
struct Failure {
    number: Option<i32>,
    text: String,
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        Self {
            number: error.raw_os_error(),
            text: error.to_string(),
        }
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        let other = || io::Error::other(failure.text);
        failure
            .number
            .map_or_else(other, io::Error::from_raw_os_error)
    }
}

/// How the program ended.
#[derive(Serialize, Deserialize)]
pub(super) struct Ended {
    /// As wait(2) tells it.
    status: i32,
    /// What it was seen to do.
    observed: Observed,
}

/// The wrapper's end.
pub(super) struct Watcher {
    pid: Pid,
    stream: UnixStream,
}

impl Watcher {
    /// Starts a program under watch, with this shim.
    pub(super) fn start(
        program: Program,
        scope: Scope,
        shim: fn() -> Option<Shim>,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: the wrapper and the launcher have one thread when they get here. Where there are
        // more (tests), the child needs no lock but the allocator's, which forks soundly (glibc).
        let watcher = match unsafe { nix::unistd::fork() }? {
            ForkResult::Child => be_watcher(program, scope, shim, &theirs),
            ForkResult::Parent { child } => Self {
                pid: child,
                stream: ours,
            },
        };
        drop((program, theirs));
        let started: Result<Started, _> = protocol::receive(&watcher.stream);
        let result = started
            .map_err(lost)
            .and_then(|Started(result)| result.map_err(io::Error::from));
        if let Err(error) = result {
            watcher.reap();
            return Err(error);
        }
        Ok(watcher)
    }

    /// Waits for the program's end.
    pub(super) fn finish(self) -> io::Result<(ExitStatus, Observed)> {
        let Ended { status, observed } = protocol::receive(&self.stream).map_err(lost)?;
        // Otherwise it stays with those that are left.
        if !observed.unseen.contains(&Unseen::ProcessLeft) {
            self.reap();
        }
        Ok((ExitStatus::from_raw(status), observed))
    }

    fn reap(&self) {
        // It has said all it knows: how it ends tells nothing.
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

fn lost(error: ProtocolError) -> io::Error {
    match error {
        ProtocolError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// What the other process does, to its end.
fn be_watcher(
    program: Program,
    scope: Scope,
    shim: fn() -> Option<Shim>,
    stream: &UnixStream,
) -> ! {
    // Nobody is left to be told.
    let _ = watch(program, scope, shim(), stream);
    // SAFETY: ends this process without running what its parent registered.
    unsafe { libc::_exit(0) }
}

/// Runs the program, tells how it went, and stays with those that outlive it.
fn watch(
    mut program: Program,
    scope: Scope,
    mut shim: Option<Shim>,
    stream: &UnixStream,
) -> Result<(), ProtocolError> {
    let (mut told, tell) = io::pipe()?;
    if let Some(shim) = &mut shim {
        shim.put_before(&mut program);
    }
    let Program { command, asked, .. } = program;
    let keep = shim.as_ref().map(Shim::descriptors).into_iter().flatten();
    let mut keep: Vec<RawFd> = keep.chain([stream.as_raw_fd()]).collect();
    thread::scope(|threads| {
        // The filter is a thread's own and passes on to what that thread starts: this one alone.
        let program = threads.spawn(move || {
            let _ended = TellEnd;
            let listener = install(tell)?;
            let child = start(command, stream);
            keep.push(listener);
            leave(keep);
            child?.wait()
        });
        let mut said = || {
            let mut said = [0; 4];
            told.read_exact(&mut said)
                .map(|()| i32::from_ne_bytes(said))
        };
        let (end, listener) = (End::told_by(Pid::from_raw(said()?)), said()?);
        drop(told);
        let listener = match Listener::from_raw(listener) {
            Ok(listener) => listener,
            Err(error) => {
                protocol::send(stream, &Started(Err(Failure::from(&error))))?;
                return Err(io::Error::other("no listener").into());
            }
        };
        let (mut observed, listener) = listener.watch(end, Notes::within(scope, shim, asked));
        let died = |_| io::Error::other("the thread that starts programs died");
        let status = program.join().map_err(died)??;
        if !listener.is_over() {
            observed.unseen.insert(Unseen::ProcessLeft);
        }
        let status = status.into_raw();
        let ended = Ended { status, observed };
        // Those that are left are answered meanwhile: the wrapper may read this only when they have
        // closed its pipes. It may also be gone.
        threads.spawn(move || protocol::send(stream, &ended));
        listener.serve_until_over();
        Ok(())
    })
}

/// Tells the end of what this thread does, also when it does not get far.
struct TellEnd;

impl Drop for TellEnd {
    fn drop(&mut self) {
        End::tell();
    }
}

/// Installs the filter and tells this thread's number and the listener's descriptor, or the negative
/// number of an error. From then on each call of this thread may wait for the listener.
fn install(mut tell: PipeWriter) -> io::Result<RawFd> {
    let installed = filter::install();
    let said = installed
        .as_ref()
        .map_or_else(|error| -(*error as i32), RawFd::clone);
    for said in [nix::unistd::gettid().as_raw(), said] {
        tell.write_all(&said.to_ne_bytes())?;
    }
    Ok(installed?)
}

/// Starts the program and says so.
fn start(mut command: Command, stream: &UnixStream) -> io::Result<Child> {
    let child = command.spawn();
    // With it go our ends of the pipes it writes to.
    drop(command);
    let started = Started(child.as_ref().map(drop).map_err(Failure::from));
    // The program runs on when the wrapper died.
    let _ = protocol::send(stream, &started);
    child
}

/// Leaves the wrapper's session, so that what ends it does not end this process, and closes all but
/// these descriptors: whoever reads from one of the others must not wait for us.
fn leave(mut keep: Vec<RawFd>) {
    // Fails in a session's leader alone, which a new process is not.
    let _ = nix::unistd::setsid();
    keep.sort_unstable();
    let mut first = 0;
    for end in keep.into_iter().chain([RawFd::MAX]) {
        if first < end {
            // SAFETY: nothing in this process uses them any more. Before Linux 5.9 they stay open.
            unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
        }
        first = end.saturating_add(1);
    }
}
