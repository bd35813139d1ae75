//! Compilers that the daemon starts itself, to make again what is lost: some at a time, each in a process
//! group of its own, so that it can be ended with all it started. They inherit nothing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};
use store::StoreDir;
use tempfile::TempDir;
use wrapper::protocol::PlannedCompile;

use super::OnDrop;
use crate::compile_again;

/// Compilers at a time.
const COMPILERS: usize = 2;

/// How often a compiler is looked after.
const TICK: Duration = Duration::from_millis(10);

/// How long a daemon that ends waits for its compilers to be gone.
const ENDING: Duration = Duration::from_secs(1);

/// What became of a compiler, if not what it should make.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompilerError {
    /// It was ended, or never begun.
    #[error("it takes too long")]
    Late,
    /// It failed.
    #[error("the compiler fails: {0}")]
    Failed(String),
    /// It cannot be started, or not be given a place.
    #[error("cannot run the compiler: {0}")]
    Io(#[from] io::Error),
}

/// What a compiler has made; gone with this.
pub(super) struct Made(TempDir);

impl Made {
    /// Where a file of that name is, if it was made.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(OUT).join(name)
    }
}

/// Where a compiler writes, in its scratch directory, and where what it says goes.
const OUT: &str = "out";
const SAID: &str = "said";

fn scratch(dir: &StoreDir) -> io::Result<TempDir> {
    let directory = dir.recompute();
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&directory)?;
    tempfile::Builder::new().prefix("").tempdir_in(directory)
}

/// The compilers that run.
#[derive(Default)]
pub(super) struct Compilers {
    state: Mutex<Running>,
    changed: Condvar,
}

#[derive(Default)]
struct Running {
    count: usize,
    closed: bool,
}

impl Compilers {
    /// The right to run one, for as long as it is held.
    fn enter(&self, deadline: Instant) -> Option<OnDrop<impl Fn()>> {
        let mut state = self.state.lock();
        while state.count >= COMPILERS && !state.closed {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return None;
            }
        }
        if state.closed {
            return None;
        }
        state.count += 1;
        Some(OnDrop(|| {
            self.state.lock().count -= 1;
            self.changed.notify_all();
        }))
    }

    /// Starts no more of them, and ends those that run.
    pub fn close(&self) {
        let deadline = Instant::now() + ENDING;
        let mut state = self.state.lock();
        state.closed = true;
        self.changed.notify_all();
        while state.count > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Runs a compiler, when it is its turn, to its end or to the deadline.
    pub fn run(
        &self,
        compile: &PlannedCompile,
        dir: &StoreDir,
        deadline: Instant,
    ) -> Result<Made, CompilerError> {
        let _turn = self.enter(deadline).ok_or(CompilerError::Late)?;
        let scratch = scratch(dir)?;
        self.run_in(scratch.path(), compile, deadline)?;
        Ok(Made(scratch))
    }

    fn run_in(
        &self,
        scratch: &Path,
        compile: &PlannedCompile,
        deadline: Instant,
    ) -> Result<(), CompilerError> {
        fs::create_dir(scratch.join(OUT))?;
        let said = scratch.join(SAID);
        let mut compiler = compile_again::command(compile, &scratch.join(OUT))
            .stdout(Stdio::null())
            .stderr(File::create(&said)?)
            // With all it starts it can be ended.
            .process_group(0)
            .spawn()?;
        loop {
            match compiler.try_wait() {
                Ok(None) if Instant::now() < deadline && !self.state.lock().closed => {
                    std::thread::sleep(TICK);
                }
                Ok(None) => {
                    end(&mut compiler);
                    return Err(CompilerError::Late);
                }
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    let said = first_line(&said).unwrap_or_default();
                    return Err(CompilerError::Failed(format!("{status}: {said}")));
                }
                Err(error) => {
                    end(&mut compiler);
                    return Err(error.into());
                }
            }
        }
    }
}

/// Ends a compiler that was not waited for yet, and what it started.
fn end(compiler: &mut Child) {
    if let Ok(group) = i32::try_from(compiler.id()) {
        // Gone is what it should be.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    if let Err(error) = compiler.wait() {
        tracing::warn!(%error, "cannot wait for a compiler");
    }
}

/// What a compiler says first.
fn first_line(path: &Path) -> io::Result<String> {
    const MOST: u64 = 1024;
    let mut text = Vec::new();
    File::open(path)?.take(MOST).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_waited_for_until_it_is_too_late() {
        let compilers = Compilers::default();
        let soon = || Instant::now() + Duration::from_millis(20);
        let turns: Vec<_> = (0..COMPILERS).map(|_| compilers.enter(soon())).collect();
        assert!(turns.iter().all(Option::is_some));
        assert!(compilers.enter(soon()).is_none());
        drop(turns);
        let turn = compilers.enter(soon());
        assert!(turn.is_some());
        drop(turn);
        compilers.close();
        assert!(compilers.enter(soon()).is_none());
    }

    #[test]
    fn a_compiler_is_ended_with_what_it_started() {
        let scratch = tempfile::tempdir().expect("tempdir");
        let compile = |script: &str| PlannedCompile {
            unit: wrapper::protocol::PlannedUnit {
                package: String::new(),
                version: String::new(),
                crate_name: String::new(),
                kind: String::new(),
            },
            program: b"/bin/sh".to_vec(),
            arguments: vec![b"-c".to_vec(), script.as_bytes().to_vec()],
            environment: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec())],
            cwd: scratch.path().as_os_str().as_encoded_bytes().to_vec(),
            files: Vec::new(),
        };
        let run = |script: &str, millis| {
            let _ = fs::remove_dir(scratch.path().join(OUT));
            let deadline = Instant::now() + Duration::from_millis(millis);
            Compilers::default().run_in(scratch.path(), &compile(script), deadline)
        };
        assert!(run("true", 20_000).is_ok());
        let failed = run("echo why it fails >&2; exit 1", 20_000);
        let said = failed.expect_err("it fails").to_string();
        assert!(said.contains("why it fails"), "{said}");
        let script = "sleep 1000 & echo $! > child; wait";
        assert!(matches!(run(script, 1500), Err(CompilerError::Late)));
        let child = fs::read_to_string(scratch.path().join("child")).expect("it ran");
        let stat = format!("/proc/{}/stat", child.trim());
        let is_gone = || fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_gone() {
            assert!(Instant::now() < deadline, "it lives");
            std::thread::sleep(TICK);
        }
    }
}
