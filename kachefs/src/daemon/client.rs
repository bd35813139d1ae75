//! How commands reach the daemon, and how `mount` starts one: through a keeper.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use store::StoreDir;
use wrapper::protocol::{self, Answer, Control, ProtocolError, Request};

/// A daemon that has not opened its store by then says why in its log.
const START: Duration = Duration::from_mins(1);

/// Between two looks whether it has.
const PAUSE: Duration = Duration::from_millis(5);

/// Connects to the daemon of a store.
pub fn connect(dir: &StoreDir) -> io::Result<UnixStream> {
    wrapper::client::connect(&dir.socket())
}

/// Sends a command; `None` when no daemon runs. Waits for the next daemon when one has died, and
/// asks again when it died of the question, unless asking twice is not as good as once.
pub fn ask(dir: &StoreDir, control: Control) -> Result<Option<Answer>> {
    let repeatable = matches!(
        control,
        Control::Ping
            | Control::Mount { .. }
            | Control::Remount { .. }
            | Control::Stats { .. }
            | Control::Push
            | Control::Trees
            | Control::Explain { .. }
            | Control::LastBuild { .. }
            | Control::PlanVerify { .. }
    );
    let request = Request::Control(control);
    let deadline = Instant::now() + START;
    loop {
        let failure = match connect(dir) {
            Ok(stream) => match converse(&stream, &request) {
                Err(ProtocolError::Io(error)) if repeatable => ProtocolError::Io(error).into(),
                result => return Ok(Some(result?)),
            },
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                if !dir.has_keeper() {
                    return Ok(None);
                }
                anyhow!("the daemon does not answer; see {}", dir.log().display())
            }
            Err(error) => return Err(error).context("cannot reach the daemon"),
        };
        if !dir.has_keeper() || Instant::now() > deadline {
            return Err(failure);
        }
        std::thread::sleep(PAUSE);
    }
}

fn converse(stream: &UnixStream, request: &Request) -> Result<Answer, ProtocolError> {
    protocol::send(stream, request)?;
    protocol::receive(stream)
}

/// Whether a daemon answers. One that is ending takes connections until it is gone, and answers
/// none of them.
fn is_running(dir: &StoreDir) -> Result<bool> {
    match ask(dir, Control::Ping) {
        Ok(answer) => Ok(answer.is_some()),
        Err(error) if is_cut_off(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_cut_off(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ProtocolError::Io(error)) if matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::UnexpectedEof
        )
    )
}

/// Starts a daemon for the store if none answers.
pub fn ensure_running(dir: &StoreDir) -> Result<()> {
    if is_running(dir)? {
        return Ok(());
    }
    dir.create()?;
    let mut child = spawn(dir)?;
    let mut again = true;
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        if is_running(dir)? {
            return Ok(());
        }
        // Two commands may start a daemon at once: one of them gets the store, and the other waits
        // for it to answer.
        if let Some(status) = child.try_wait()?
            && !dir.has_keeper()
        {
            if !again {
                bail!(
                    "the daemon ended at once ({status}): {}",
                    last_line(&dir.log())
                );
            }
            // It may have met one that was still ending.
            again = false;
            child = spawn(dir)?;
        }
        std::thread::sleep(PAUSE);
    }
    bail!("the daemon does not answer; see {}", dir.log().display())
}

/// A log that is longer becomes the old one when the next daemon begins.
const LONG_LOG: u64 = 4 << 20;

fn spawn(dir: &StoreDir) -> Result<Child> {
    if std::fs::metadata(dir.log()).is_ok_and(|meta| meta.len() > LONG_LOG) {
        // Where it cannot be renamed it grows on.
        let _ = std::fs::rename(dir.log(), dir.log().with_extension("log.old"));
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(dir.log())
        .with_context(|| format!("cannot write {}", dir.log().display()))?;
    let program = std::env::current_exe().context("cannot find the kachefs program")?;
    // Its own process group, so that Ctrl-C in the shell that mounted does not reach it; away
    // from any directory, so that it keeps no file system busy.
    Command::new(program)
        .args(["daemon", "keep", "--store"])
        .arg(dir.root())
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the daemon")
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("its log is empty").to_owned()
}
