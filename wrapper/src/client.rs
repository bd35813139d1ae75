//! The thin client: what runs as `RUSTC_WRAPPER`.
//!
//! Starts in about a millisecond, asks the daemon that serves the out-dir, and on any doubt
//! becomes the real compiler. It holds no policy: whether an action is cacheable, hits or must
//! run is the daemon's decision. Whatever goes wrong on the way, cargo gets a correct compile.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use store::StoreDir;

use crate::args::written;
use crate::cc;
use crate::compile::compile;
use crate::environment;
use crate::launcher;
use crate::managed;
use crate::probe;
use crate::protocol::{
    self, CompileRequest, Decision, ProtocolError, Request, Run, TOKEN_NAME, Token,
};

/// The daemon answers or sends `Wait` at least every second; silence for this long means that it
/// is stuck, and the compiler runs without it.
const SILENCE: Duration = Duration::from_secs(30);

/// How many daemons may die of, or during, one question before the compiler runs without them.
const SUCCESSORS: u32 = 10;

/// Between two looks whether the next daemon listens.
const PAUSE: Duration = Duration::from_millis(10);

/// When set, programs run as if kachefs was not there.
pub(crate) const DISABLE: &str = "KACHEFS_DISABLE";

/// Exit status when there is nothing to run, as shells use it.
pub(crate) const CANNOT_RUN: u8 = 127;

/// Runs the wrapper with this process's arguments and environment.
pub fn main() -> ExitCode {
    let mut argv = env::args_os();
    let own = argv.next().unwrap_or_default();
    let argv: Vec<OsString> = argv.collect();
    if launcher::stands_in(&own) {
        return launcher::main(&own, argv);
    }
    if argv.is_empty() {
        say("kachefs-rustc: called by cargo as RUSTC_WRAPPER, with a compiler and its arguments");
        return ExitCode::from(CANNOT_RUN);
    }
    if env::var_os(DISABLE).is_some() {
        return become_compiler(&argv);
    }
    if managed::is_first_question(&argv) {
        let brought = managed::bring_back(is_served);
        if let Err(failed) = brought {
            warn_once(&failed.run, &failed.warning);
        }
    }
    if probe::is_probe(&argv) {
        return probe::answer(&argv).unwrap_or_else(|| become_compiler(&argv));
    }
    let Some(token) = written::out_dir(&argv).and_then(read_token) else {
        return become_compiler(&argv);
    };
    let Ok(request) = request(&argv, &token) else {
        return become_compiler(&argv);
    };
    let call = Call {
        request: Request::Compile(request),
        become_it: &|| become_compiler(&argv),
        run: &|run, stream| compile(&argv, run, stream),
    };
    call.make(&token)
}

/// Asks the directory itself whether it belongs to a view, and to whose.
pub(crate) fn read_token(directory: &Path) -> Option<Token> {
    let target = std::fs::read_link(directory.join(TOKEN_NAME)).ok()?;
    Token::decode(target.as_os_str().as_bytes())
}

/// Whether a directory is in a view that somebody serves. The kernel may know the token by heart;
/// for the disk's numbers it always asks.
fn is_served(directory: &Path) -> bool {
    read_token(directory).is_some() && nix::sys::statvfs::statvfs(directory).is_ok()
}

/// What is asked of the daemon, and what its answers lead to.
pub(crate) struct Call<'a> {
    /// The question.
    pub(crate) request: Request,
    /// Becomes the program, called as cargo meant it.
    pub(crate) become_it: &'a dyn Fn() -> ExitCode,
    /// Runs it as the daemon wants and reports how it went.
    pub(crate) run: &'a dyn Fn(&Run, &UnixStream) -> ExitCode,
}

impl Call<'_> {
    /// Asks the daemon behind a token. Whatever goes wrong, the program runs.
    pub(crate) fn make(&self, token: &Token) -> ExitCode {
        match self.converse_with_any(token) {
            Ok(code) => code,
            Err(error) => {
                let socket = Path::new(OsStr::from_bytes(&token.socket));
                warn_once(
                    socket.parent().unwrap_or(socket),
                    &format!("kachefs: {error}; going on without the cache"),
                );
                (self.become_it)()
            }
        }
    }

    /// Asks the daemon, and its successor when it dies before it has decided.
    fn converse_with_any(&self, token: &Token) -> Result<ExitCode, ProtocolError> {
        let mut successors = SUCCESSORS;
        loop {
            match self.converse(Path::new(OsStr::from_bytes(&token.socket))) {
                Err(ProtocolError::Io(error)) if successors > 0 && is_gone(&error) => {
                    if !wait_for_successor(Path::new(OsStr::from_bytes(&token.socket))) {
                        return Err(error.into());
                    }
                    successors -= 1;
                }
                result => return result,
            }
        }
    }

    /// Asks the daemon behind a socket.
    pub(crate) fn converse(&self, socket: &Path) -> Result<ExitCode, ProtocolError> {
        let stream = connect(socket)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        protocol::send(&stream, &self.request)?;
        match protocol::decision(&stream)? {
            Decision::Plain => Ok((self.become_it)()),
            Decision::Hit { stdout, stderr } => Ok(replay(&stdout, &stderr)),
            Decision::WatchedHit {
                looked,
                wrote,
                stdout,
                stderr,
            } => {
                cc::act(&looked, &wrote);
                Ok(replay(&stdout, &stderr))
            }
            Decision::Run(run) => Ok((self.run)(&run, &stream)),
            Decision::Wait | Decision::Placed(_) | Decision::Over(_) => Err(
                ProtocolError::Malformed("a decision on what was not reported".into()),
            ),
        }
    }
}

/// Whether the daemon has died, not merely fallen silent.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    let kinds = [
        BrokenPipe,
        ConnectionRefused,
        ConnectionReset,
        NotFound,
        UnexpectedEof,
    ];
    kinds.contains(&error.kind())
}

/// Waits until another daemon listens; `false` when none is to come.
fn wait_for_successor(socket: &Path) -> bool {
    let Some(dir) = StoreDir::of_socket(socket) else {
        return false;
    };
    let deadline = Instant::now() + SILENCE;
    while dir.has_keeper() && Instant::now() < deadline {
        thread::sleep(PAUSE);
        if connect(socket).is_ok() {
            return true;
        }
    }
    false
}

/// Connects through the socket's directory: `sun_path` holds 108 bytes (unix(7)), store paths can
/// be longer.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    match UnixStream::connect(socket) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let directory = std::fs::File::open(socket.parent().unwrap_or(socket))?;
            let name = socket.file_name().unwrap_or_default();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
            UnixStream::connect(Path::new(&format!("/proc/self/fd/{fd}")).join(name))
        }
        result => result,
    }
}

fn request(argv: &[OsString], token: &Token) -> io::Result<CompileRequest> {
    Ok(CompileRequest {
        token: (token.view, token.directory),
        argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        environment: environment::own(),
        cwd: env::current_dir()?.into_os_string().into_vec(),
        umask: current_umask(),
        parent: std::os::unix::process::parent_id(),
    })
}

/// The mask new files are made with.
pub(crate) fn current_umask() -> u32 {
    let mode = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    nix::sys::stat::umask(mode);
    mode.bits()
}

fn replay(stdout: &[u8], stderr: &[u8]) -> ExitCode {
    // A reader that has gone away is cargo's affair, as it is for rustc.
    let _ = io::stdout()
        .write_all(stdout)
        .and_then(|()| io::stdout().flush());
    let _ = io::stderr().write_all(stderr);
    ExitCode::SUCCESS
}

/// Replaces this process by the compiler, called as cargo meant it.
pub(crate) fn become_compiler(argv: &[OsString]) -> ExitCode {
    let error = Command::new(&argv[0]).args(&argv[1..]).exec();
    say(&format!(
        "kachefs-rustc: cannot run {}: {error}",
        argv[0].to_string_lossy()
    ));
    ExitCode::from(CANNOT_RUN)
}

/// Tells the person once per build, which a mark in the run directory shows. Straight to cargo's own standard error: what a compiler
/// prints, cargo records and repeats on every later build.
fn warn_once(run: &Path, text: &str) {
    let parent = std::os::unix::process::parent_id();
    let name = format!("kachefs-warned-{}-{parent}", nix::unistd::geteuid());
    // Another user's daemon, or none at all: then its directory is closed or gone.
    for mark in [run.join(&name), env::temp_dir().join(&name)] {
        match OpenOptions::new().write(true).create_new(true).open(mark) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return,
            Ok(_) => break,
            Err(_) => {}
        }
    }
    let cargo = OpenOptions::new()
        .append(true)
        .open(format!("/proc/{parent}/fd/2"));
    match cargo {
        Ok(mut stderr) => drop(writeln!(stderr, "{text}")),
        Err(_) => say(text),
    }
}

pub(crate) fn say(text: &str) {
    // Nobody is left to be told when standard error is closed.
    let _ = writeln!(io::stderr(), "{text}");
}
