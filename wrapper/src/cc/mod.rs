//! `kachefs-cc`: the thin client before a C or C++ compiler, as in `CC="kachefs-cc cc"`.
//!
//! Asks the daemon that serves the directory of the object (or `OUT_DIR`, which counts why a run is
//! not cached), and on any doubt becomes the compiler. `args`, `environment` and `key` say what a run
//! means; it holds no other policy. Under a build script's watch it sees to it that the watch learns
//! what the object was made of, although no compiler runs (docs/design.md, "C compilers").

pub mod args;
pub mod environment;
pub mod key;
pub mod reason;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use store::Look;

use crate::artifacts::PATIENCE;
use crate::client::{self, CANNOT_RUN, Call, DISABLE};
use crate::lease;
use crate::protocol::{self, CcRequest, Outcome, Request, Run, Token};
use crate::run;
use crate::trace::Part;

/// Set for what a watched build script starts.
pub(crate) const WATCHED: &str = "KACHEFS_WATCHED";

/// The longest name of a socket that can be connected to by itself (unix(7), `sun_path`).
const LONGEST_SOCKET: usize = 107;

/// Runs the program with this process's arguments and environment.
pub fn main() -> ExitCode {
    let argv: Vec<OsString> = env::args_os().skip(1).collect();
    if argv.is_empty() {
        client::say(
            "kachefs-cc: to be put before a compiler and its arguments: CC=\"kachefs-cc cc\"",
        );
        return ExitCode::from(CANNOT_RUN);
    }
    // The launcher disables what it watches, but for us.
    let watched = env::var_os(WATCHED).is_some();
    if env::var_os(DISABLE).is_some() && !watched {
        return become_compiler(&argv);
    }
    let Ok(cwd) = env::current_dir() else {
        return become_compiler(&argv);
    };
    let Some((token, directory)) = place(&argv, &cwd) else {
        return become_compiler(&argv);
    };
    let token = if watched { unnoted(&token) } else { token };
    // A longer name can be reached only in a way that the watch does note.
    if watched && token.socket.len() > LONGEST_SOCKET {
        return become_compiler(&argv);
    }
    let request = CcRequest {
        token: (token.view, token.directory),
        directory: directory.into_os_string().into_vec(),
        argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        environment: crate::environment::own(),
        cwd: cwd.into_os_string().into_vec(),
        umask: client::current_umask(),
        watched,
    };
    let call = Call {
        request: Request::Cc(request),
        become_it: &|| become_compiler(&argv),
        run: &|run, stream| compile(&argv, run, stream, watched),
    };
    call.make(&token)
}

/// The directory the object goes to, if it is in a view; else the build script's own.
fn place(argv: &[OsString], cwd: &Path) -> Option<(Token, PathBuf)> {
    let of_object = object(argv).map(|object| cwd.join(object));
    let of_object = of_object.as_deref().and_then(Path::parent);
    let of_object = of_object.map(|path| path.components().collect::<PathBuf>());
    let of_script = env::var_os("OUT_DIR").map(PathBuf::from);
    [of_object, of_script]
        .into_iter()
        .flatten()
        .find_map(|directory| Some((client::read_token(&directory)?, directory)))
}

/// What follows the last `-o`.
fn object(argv: &[OsString]) -> Option<&OsStr> {
    let at = argv
        .iter()
        .rposition(|arg| arg.as_bytes().starts_with(b"-o"))?;
    match &argv[at].as_bytes()[2..] {
        [] => argv.get(at + 1).map(OsString::as_os_str),
        attached => Some(OsStr::from_bytes(attached)),
    }
}

/// The same daemon, by a name of its socket that watches do not note: what it says to us is no input
/// of the script that started us. What it tells others (`kachefs stats`, say) is.
fn unnoted(token: &Token) -> Token {
    Token {
        socket: unnoted_socket(&token.socket),
        ..*token
    }
}

/// Another spelling of a socket's path.
pub fn unnoted_socket(socket: &[u8]) -> Vec<u8> {
    let at = socket.iter().rposition(|byte| *byte == b'/');
    let (directory, name) = socket.split_at(at.unwrap_or(0));
    [directory, b"/.", name].concat()
}

/// Replaces this process by the compiler.
fn become_compiler(argv: &[OsString]) -> ExitCode {
    let error = Command::new(&argv[0]).args(&argv[1..]).exec();
    client::say(&format!(
        "kachefs-cc: cannot run {}: {error}",
        argv[0].to_string_lossy()
    ));
    ExitCode::from(CANNOT_RUN)
}

/// Runs the compiler under watch, and reports how it went.
fn compile(argv: &[OsString], run: &Run, stream: &UnixStream, watched: bool) -> ExitCode {
    let command = || {
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]);
        command
    };
    // Under another watch, ours fails to start.
    let part = if watched { Part::begin().ok() } else { None };
    let ended = match run::streamed(command, run, None, |_| true) {
        Ok(ended) => ended,
        Err(run::Failed::Again | run::Failed::Unwatched) => return become_compiler(argv),
        Err(run::Failed::Lost(error)) => {
            client::say(&format!("kachefs-cc: lost the compiler: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let mut observed = ended.observed.or_else(|| part?.finish());
    if let Some(observed) = &mut observed {
        observed.paths.retain(|path, _| !run.scope.owns(path));
    }
    let outcome = Outcome {
        success: ended.status.success(),
        unsettled: unsettled(&run.scope.own),
        stdout: ended.stdout,
        stderr: ended.stderr,
        observed,
    };
    // The object stands whether or not the daemon hears of it. It answers once it holds on to it.
    let heard = protocol::send(stream, &outcome);
    let _ = heard.and_then(|()| protocol::decision(stream));
    run::exit_like(ended.status)
}

/// The first output that some process still writes to.
fn unsettled(outputs: &[Vec<u8>]) -> Option<String> {
    let deadline = Instant::now() + PATIENCE;
    let _unharmed = lease::Unharmed::start();
    let paths = outputs
        .iter()
        .map(|path| Path::new(OsStr::from_bytes(path)));
    let is_written =
        |path: &Path| File::open(path).is_ok_and(|file| !lease::wait_unwritten(&file, deadline));
    let mut written = paths.filter(|path| is_written(path));
    written.next().map(|path| path.display().to_string())
}

/// Does before a watch what the compiler did that a hit spared: looks where it looked, and touches what
/// it wrote, without changing it.
pub(crate) fn act(looked: &[(Look, Vec<u8>)], wrote: &[Vec<u8>]) {
    for (look, path) in looked {
        let path = Path::new(OsStr::from_bytes(path));
        // What is found does not matter here: the watch sees the question, and finds out itself.
        let _: io::Result<()> = match look {
            Look::Open | Look::Tree => open(path).map(drop),
            Look::Status => fs::metadata(path).map(drop),
            Look::Link => fs::symlink_metadata(path).map(drop),
        };
    }
    for path in wrote {
        let same = TimeSpec::UTIME_OMIT;
        let path = Path::new(OsStr::from_bytes(path));
        let _: nix::Result<()> =
            utimensat(AT_FDCWD, path, &same, &same, UtimensatFlags::FollowSymlink);
    }
}

/// Opens without waiting for whoever writes to a pipe.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_object() {
        let argv = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(
            object(&argv("cc -c a.c -o b/a.o")),
            Some(OsStr::new("b/a.o"))
        );
        assert_eq!(
            object(&argv("cc -c a.c -ob/a.o")),
            Some(OsStr::new("b/a.o"))
        );
        assert_eq!(object(&argv("cc -c a.c")), None);
        assert_eq!(object(&argv("cc -c a.c -o")), None);
    }

    #[test]
    fn another_name_of_the_same_socket() {
        assert_eq!(
            unnoted_socket(b"/s/run/daemon.sock"),
            b"/s/run/./daemon.sock"
        );
        let path = Path::new("/s/run/./daemon.sock");
        assert_eq!(path.parent(), Some(Path::new("/s/run")));
    }
}
