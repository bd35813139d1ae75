//! Compilers that the daemon starts itself, to make again what is lost: some at a time, each in a process
//! group of its own, so that it can be ended with all it started. They inherit nothing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};
use store::{StoreDir, ViewId};
use tempfile::TempDir;
use wrapper::protocol::PlannedCompile;

use super::builds::started;
use crate::compile_again;

/// Compilers at a time.
const COMPILERS: usize = 2;

/// How often a compiler is looked after.
const TICK: Duration = Duration::from_millis(10);

/// How long a daemon that ends, or unmounts, waits for its compilers to be gone.
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

/// Where a compiler writes, in its scratch directory, where what it says goes, and which process it is.
const OUT: &str = "out";
const SAID: &str = "said";
const PROCESS: &str = "process";

fn scratch(dir: &StoreDir) -> io::Result<TempDir> {
    let directory = dir.recompute();
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&directory)?;
    tempfile::Builder::new().prefix("").tempdir_in(directory)
}

/// The compilers that run, and what waits to run one.
#[derive(Default)]
pub(super) struct Compilers {
    state: Mutex<Running>,
    changed: Condvar,
}

#[derive(Default)]
struct Running {
    asked: Vec<Asked>,
    closed: bool,
}

/// Somebody who runs a compiler, or waits to.
struct Asked {
    view: ViewId,
    runs: bool,
    /// The compiler's process group, when it is there.
    group: Option<u32>,
    halted: Arc<AtomicBool>,
}

impl Running {
    fn position(&self, halted: &Arc<AtomicBool>) -> Option<usize> {
        let mut asked = self.asked.iter();
        asked.position(|asked| Arc::ptr_eq(&asked.halted, halted))
    }

    fn is_full(&self) -> bool {
        self.asked.iter().filter(|asked| asked.runs).count() >= COMPILERS
    }
}

/// The right to run a compiler, for as long as it is held.
struct Turn<'a> {
    compilers: &'a Compilers,
    halted: Arc<AtomicBool>,
}

impl Turn<'_> {
    fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    fn runs_as(&self, group: u32) {
        let mut state = self.compilers.state.lock();
        if let Some(at) = state.position(&self.halted) {
            state.asked[at].group = Some(group);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.compilers.state.lock();
        if let Some(at) = state.position(&self.halted) {
            state.asked.swap_remove(at);
        }
        self.compilers.changed.notify_all();
    }
}

impl Compilers {
    /// Waits for the turn to run one for a view.
    fn enter(&self, view: ViewId, deadline: Instant) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        let turn = Turn {
            compilers: self,
            halted: Arc::new(AtomicBool::new(state.closed)),
        };
        state.asked.push(Asked {
            view,
            runs: false,
            group: None,
            halted: Arc::clone(&turn.halted),
        });
        let mut in_time = true;
        while in_time && state.is_full() && !turn.is_halted() {
            in_time = !self.changed.wait_until(&mut state, deadline).timed_out();
        }
        let runs = !state.is_full() && !turn.is_halted();
        if let Some(at) = state.position(&turn.halted) {
            state.asked[at].runs = runs;
        }
        // Whoever has none says so, which takes the lock.
        drop(state);
        runs.then_some(turn)
    }

    /// Starts no more of them, and ends those that run.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.halt(|_| true);
    }

    /// The process groups of those that run for a view.
    pub fn groups(&self, view: ViewId) -> Vec<u32> {
        let state = self.state.lock();
        let of_view = state.asked.iter().filter(|asked| asked.view == view);
        of_view.filter_map(|asked| asked.group).collect()
    }

    /// Ends those that run for a view, and waits for that.
    pub fn leave(&self, view: ViewId) {
        self.halt(|asked| asked == view);
    }

    fn halt(&self, is_meant: impl Fn(ViewId) -> bool) {
        let deadline = Instant::now() + ENDING;
        let mut state = self.state.lock();
        for asked in state.asked.iter().filter(|asked| is_meant(asked.view)) {
            asked.halted.store(true, Ordering::Relaxed);
        }
        self.changed.notify_all();
        while state.asked.iter().any(|asked| is_meant(asked.view)) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Runs a compiler, when it is its turn, to its end or to the deadline.
    pub fn run(
        &self,
        view: ViewId,
        compile: &PlannedCompile,
        dir: &StoreDir,
        deadline: Instant,
    ) -> Result<Made, CompilerError> {
        let turn = self.enter(view, deadline).ok_or(CompilerError::Late)?;
        let scratch = scratch(dir)?;
        turn.run_in(scratch.path(), compile, deadline)?;
        Ok(Made(scratch))
    }
}

impl Turn<'_> {
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
        self.runs_as(compiler.id());
        if let Err(error) = note(scratch, compiler.id()) {
            end(&mut compiler);
            return Err(error.into());
        }
        loop {
            match compiler.try_wait() {
                Ok(None) if Instant::now() < deadline && !self.is_halted() => {
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

/// Notes which process it is, so that a daemon that is killed leaves none behind.
fn note(scratch: &Path, pid: u32) -> io::Result<()> {
    let started = started(pid).unwrap_or_default();
    fs::write(scratch.join(PROCESS), format!("{pid} {started}"))
}

/// Ends what the compilers of a daemon that is gone left running, and takes away what they made.
pub(super) fn end_left_behind(dir: &StoreDir) -> io::Result<()> {
    let directory = dir.recompute();
    let scratches = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        scratches => scratches?,
    };
    for scratch in scratches {
        // One that was killed between starting it and noting that leaves one.
        let Ok(noted) = fs::read_to_string(scratch?.path().join(PROCESS)) else {
            continue;
        };
        let numbers = noted
            .split_once(' ')
            .map(|(pid, at)| (pid.parse(), at.parse()));
        // Another may have its number by now.
        if let Some((Ok(pid), Ok(at))) = numbers
            && started(pid) == Some(at)
        {
            end_group(pid);
        }
    }
    fs::remove_dir_all(directory)
}

fn end_group(leader: u32) {
    if let Ok(group) = i32::try_from(leader) {
        // Gone is what it should be.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// Ends a compiler that was not waited for yet, and what it started.
fn end(compiler: &mut Child) {
    end_group(compiler.id());
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

    const VIEW: ViewId = ViewId(1);

    #[test]
    fn a_turn_is_waited_for_until_it_is_too_late() {
        let compilers = Compilers::default();
        let enter = || compilers.enter(VIEW, Instant::now() + Duration::from_millis(20));
        let turns: Vec<_> = (0..COMPILERS).map(|_| enter()).collect();
        assert!(turns.iter().all(Option::is_some));
        assert!(enter().is_none());
        drop(turns);
        let turn = enter();
        assert!(turn.is_some());
        drop(turn);
        compilers.close();
        assert!(enter().is_none());
        assert!(compilers.state.lock().asked.is_empty());
    }

    #[test]
    fn who_leaves_a_view_ends_what_runs_and_waits_for_it() {
        let compilers = Compilers::default();
        let later = Instant::now() + Duration::from_mins(1);
        let other = compilers.enter(ViewId(2), later).expect("a turn");
        let turn = compilers.enter(VIEW, later).expect("a turn");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| compilers.enter(VIEW, later).is_none());
            while compilers.state.lock().asked.len() < 3 {
                std::thread::sleep(TICK);
            }
            scope.spawn(move || {
                while !turn.is_halted() {
                    std::thread::sleep(TICK);
                }
            });
            compilers.leave(VIEW);
            assert!(waiting.join().expect("it ends"));
        });
        assert_eq!(compilers.state.lock().asked.len(), 1);
        assert!(!other.is_halted());
        drop(other);
        // Later ones are other ones.
        assert!(compilers.enter(VIEW, later).is_some());
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
            let compilers = Compilers::default();
            let turn = compilers.enter(VIEW, deadline).expect("a turn");
            turn.run_in(scratch.path(), &compile(script), deadline)
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
