//! Questions to a compiler, answered from the daemon's memory.
//!
//! Before it builds in an empty target, cargo asks for the compiler's version and the target's
//! properties several times over, about ten milliseconds each. The daemon of this user's store, if
//! one runs, knows the answers of a compiler it can tell by content; any doubt, and the compiler is
//! asked. It holds no policy.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use crate::args::looks_like_query;
use crate::client::{self, Call};
use crate::environment;
use crate::managed;
use crate::protocol::{self, Outcome, ProbeRequest, Request};
use crate::run;

/// Whether a command line, compiler first, is a question.
pub(crate) fn is_probe(argv: &[OsString]) -> bool {
    let arguments: Vec<&[u8]> = argv.iter().skip(1).map(|arg| arg.as_bytes()).collect();
    looks_like_query(&arguments) && (arguments == [b"-vV"] || input_is_empty())
}

/// Whether standard input is `/dev/null`, as cargo leaves it.
fn input_is_empty() -> bool {
    let identity = |path: &str| {
        let stat = nix::sys::stat::stat(Path::new(path)).ok()?;
        Some((stat.st_dev, stat.st_ino, stat.st_rdev))
    };
    let input = format!("/proc/self/fd/{}", io::stdin().as_raw_fd());
    identity("/dev/null").is_some_and(|null| identity(&input) == Some(null))
}

/// What the daemon answers, or the compiler in its place; `None` when nobody was asked.
pub(crate) fn answer(argv: &[OsString]) -> Option<ExitCode> {
    let store = managed::own_store()?;
    let request = ProbeRequest {
        argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        environment: environment::own(),
        cwd: env::current_dir().ok()?.into_os_string().into_vec(),
    };
    let call = Call {
        request: Request::Probe(request),
        become_it: &|| client::become_compiler(argv),
        run: &|_, stream| ask_compiler(argv, stream),
    };
    // No daemon, one that dies, one of another version: the compile that follows says so.
    call.converse(&store.socket()).ok()
}

/// Asks the compiler and tells the daemon what it said.
fn ask_compiler(argv: &[OsString], stream: &UnixStream) -> ExitCode {
    let mut command = Command::new(&argv[0]);
    let Ok(said) = command.args(&argv[1..]).stdin(Stdio::null()).output() else {
        return client::become_compiler(argv);
    };
    // A reader that has gone away is cargo's affair, as it is for rustc.
    let _ = io::stdout()
        .write_all(&said.stdout)
        .and_then(|()| io::stdout().flush());
    let _ = io::stderr().write_all(&said.stderr);
    let outcome = Outcome {
        success: said.status.success(),
        stdout: said.stdout,
        stderr: said.stderr,
        unsettled: None,
        observed: None,
    };
    // It is only to be remembered.
    let _ = protocol::send(stream, &outcome);
    run::exit_like(said.status)
}
