//! Commands under a timeout, in a process group of their own, with their output captured.
//!
//! A command that does not end in time is reported with what every process of its sandbox was
//! waiting for, then killed; a test never hangs on a child. Used for every program a test runs.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::{Must, mounts, processes};

/// How long a command may take unless it says otherwise: far more than any takes when all is well.
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(3);
/// How long the output may stay open after the command itself has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(10);

/// A command to be run in a sandbox.
pub struct Cmd {
    inner: Command,
    timeout: Duration,
    root: PathBuf,
}

impl Cmd {
    /// A command with an empty environment. `root` is the sandbox to describe, and whose mounts to
    /// cut, when the command hangs.
    pub fn new(program: impl AsRef<OsStr>, root: &Path) -> Self {
        let mut inner = Command::new(program);
        inner.env_clear();
        Self {
            inner,
            timeout: DEFAULT_TIMEOUT,
            root: root.to_owned(),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.inner.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(name, value);
        self
    }

    /// Sets environment variables.
    #[must_use]
    pub fn envs<N: AsRef<OsStr>, V: AsRef<OsStr>>(
        mut self,
        vars: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        self.inner.envs(vars);
        self
    }

    /// Removes an environment variable.
    #[must_use]
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.inner.env_remove(name);
        self
    }

    /// Sets the directory to run in.
    #[must_use]
    pub fn in_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.inner.current_dir(dir);
        self
    }

    /// Sets the time after which the command has failed.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Starts the command.
    #[track_caller]
    pub fn spawn(mut self) -> Running {
        let shown = self.shown();
        self.inner
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.inner.process_group(0);
        let mut child = self.inner.spawn().must(format!("cannot start `{shown}`"));
        let stdout = Capture::start(child.stdout.take().must("stdout is piped"));
        let stderr = Capture::start(child.stderr.take().must("stderr is piped"));
        Running {
            child: Some(child),
            stdout,
            stderr,
            shown,
            deadline: Instant::now() + self.timeout,
            timeout: self.timeout,
            root: self.root,
        }
    }

    /// Runs the command to its end, whatever that is.
    #[track_caller]
    pub fn run(self) -> Outcome {
        self.spawn().finish()
    }

    /// Runs the command; the test fails unless it succeeds.
    #[track_caller]
    pub fn ok(self) -> Outcome {
        self.run().success()
    }

    /// Runs the command; the test fails unless it fails (by an exit status, not by a signal).
    #[track_caller]
    pub fn fails(self) -> Outcome {
        self.run().failure()
    }

    fn shown(&self) -> String {
        let words: Vec<_> = std::iter::once(self.inner.get_program())
            .chain(self.inner.get_args())
            .map(OsStr::to_string_lossy)
            .collect();
        match self.inner.get_current_dir() {
            Some(dir) => format!("{} (in {})", words.join(" "), dir.display()),
            None => words.join(" "),
        }
    }
}

/// A command that has been started. Dropped before its end, its process group is killed.
pub struct Running {
    child: Option<Child>,
    stdout: Capture,
    stderr: Capture,
    shown: String,
    deadline: Instant,
    timeout: Duration,
    root: PathBuf,
}

impl Running {
    /// Whether the command has not ended yet.
    #[track_caller]
    pub fn is_running(&mut self) -> bool {
        let child = self.child.as_mut().must("the command was already finished");
        child.try_wait().must("waiting for a command").is_none()
    }

    /// Sends a signal to the command (not to its children).
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).must(format!("sending {signal} to `{}`", self.shown));
    }

    /// Waits for the end of the command and of its output.
    #[track_caller]
    pub fn finish(mut self) -> Outcome {
        let status = self
            .wait_until(self.deadline)
            .unwrap_or_else(|| self.give_up());
        self.child = None;
        let closed = self.stdout.wait_closed(OUTPUT_GRACE) && self.stderr.wait_closed(OUTPUT_GRACE);
        let outcome = Outcome {
            shown: self.shown.clone(),
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        };
        assert!(
            closed,
            "the command ended, but a process it left behind holds its stdout or stderr open, so \
             a script that captures the output would hang\n{outcome}\n{}",
            processes::describe(&self.root)
        );
        outcome
    }

    fn pid(&self) -> Pid {
        let id = self
            .child
            .as_ref()
            .map(Child::id)
            .must("the command was already finished");
        Pid::from_raw(id.cast_signed())
    }

    fn wait_until(&mut self, deadline: Instant) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        let mut pause = Duration::from_millis(2);
        loop {
            if let Some(status) = child.try_wait().must("waiting for a command") {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(25));
        }
    }

    #[track_caller]
    fn give_up(&mut self) -> ! {
        let scene = processes::describe(&self.root);
        self.kill();
        panic!(
            "`{}` did not end within {} s\n--- stdout\n{}\n--- stderr\n{}\n--- processes\n{scene}",
            self.shown,
            self.timeout.as_secs(),
            self.stdout.text(),
            self.stderr.text(),
        );
    }

    fn kill(&mut self) {
        let group = self.pid();
        // Gone already is as good as killed, here and below.
        let _ = killpg(group, Signal::SIGKILL);
        if self
            .wait_until(Instant::now() + Duration::from_secs(5))
            .is_none()
        {
            // It sits in a request no daemon answers: only cutting the connection ends that.
            mounts::cut_below(&self.root);
            let _ = self.wait_until(Instant::now() + Duration::from_secs(5));
        }
        self.child = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// What a command that has ended said.
#[derive(Clone, Debug)]
pub struct Outcome {
    shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Outcome {
    /// Itself; the test fails unless the command succeeded.
    #[must_use]
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(self.status.success(), "expected success\n{self}");
        self
    }

    /// Itself; the test fails unless the command exited with an error status.
    #[must_use]
    #[track_caller]
    pub fn failure(self) -> Self {
        assert!(
            !self.status.success() && self.status.signal().is_none(),
            "expected an error exit status\n{self}"
        );
        self
    }

    /// The one line this command printed on stderr, as every failing kachefs command must: no
    /// backtrace, no usage page, nothing on stdout.
    #[track_caller]
    pub fn one_line_error(&self) -> &str {
        assert_eq!(
            self.stderr.trim_end().lines().count(),
            1,
            "one line on stderr\n{self}"
        );
        assert_eq!(self.stdout, "", "nothing on stdout\n{self}");
        self.stderr.trim_end()
    }

    /// stdout and stderr together, for messages that may go to either.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}`: {}\n--- stdout\n{}\n--- stderr\n{}",
            self.shown, self.status, self.stdout, self.stderr
        )
    }
}

/// The bytes of one pipe, gathered by a thread so that no child ever blocks on us.
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: Receiver<()>,
}

impl Capture {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let (done, closed) = mpsc::channel::<()>();
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                let mut all = shared.lock().unwrap_or_else(PoisonError::into_inner);
                all.extend_from_slice(&buffer[..count]);
            }
            drop(done);
        });
        Self { bytes, closed }
    }

    /// Whether the pipe was closed within `grace`.
    fn wait_closed(&self, grace: Duration) -> bool {
        self.closed.recv_timeout(grace) != Err(mpsc::RecvTimeoutError::Timeout)
    }

    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The value of a variable of the test's own environment.
pub(crate) fn own_env(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}
