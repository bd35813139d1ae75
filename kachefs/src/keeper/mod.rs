//! The keeper: holds the descriptors of all mounts, so that none ends with a daemon, and starts the
//! daemon, again when it dies.
//!
//! Deliberately small: one thread, no index, no blob, and neither a descriptor, nor a working
//! directory, nor a mapping on a mount, so that it can never wait for the daemon it is to start.
//! Started by `kachefs mount`; ends with a daemon that ends in order.

mod policy;
pub mod program;
pub mod wire;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use store::{StoreDir, ViewId};

use self::policy::{Life, Policy, Verdict};
use self::wire::{Report, Session, Start};

/// A daemon that has not taken everything over by then never will.
const START: Duration = Duration::from_mins(1);

/// Keeps the mounts of a store until its daemon ends in order, or cannot be kept alive.
pub fn run(dir: &StoreDir) -> Result<ExitCode> {
    program::leave_mounts()?;
    program::name_process();
    let _alone = dir.lock_keeper()?;
    let mut keeper = Keeper {
        dir,
        signals: Signals::take().context("cannot take signals")?,
        held: BTreeMap::new(),
        restarts: 0,
        acknowledged: memfd_create("kachefs-acknowledged", MFdFlags::MFD_CLOEXEC)
            .inspect_err(|error| say(&format!("no file in memory: {error}")))
            .ok(),
    };
    let mut policy = Policy::default();
    loop {
        let life = keeper.one_daemon();
        if keeper.signals.ending() {
            return Ok(ExitCode::SUCCESS);
        }
        match policy.judge(&life, keeper.held.is_empty()) {
            Verdict::End(code) => return Ok(ExitCode::from(code)),
            Verdict::GiveUp => {
                // Whoever waits for an answer gets ENOTCONN when the descriptors close with us.
                say(&format!("the daemon {life}, too often: giving up"));
                return Ok(ExitCode::FAILURE);
            }
            Verdict::Restart(pause) => {
                say(&format!("the daemon {life}; starting it again"));
                std::thread::sleep(pause);
                keeper.restarts += 1;
            }
        }
    }
}

struct Keeper<'a> {
    dir: &'a StoreDir,
    signals: Signals,
    held: BTreeMap<ViewId, (Session, OwnedFd)>,
    restarts: u32,
    /// How far the index has come, as the daemons leave it to each other.
    acknowledged: Option<OwnedFd>,
}

impl Keeper<'_> {
    /// Starts a daemon and sees it through to its end.
    fn one_daemon(&mut self) -> Life {
        let started = Instant::now();
        let (mut child, line) = match self.start() {
            Ok(started) => started,
            Err(error) => return Life::never(format!("cannot be started: {error:#}")),
        };
        let mut ready = None;
        let mut open = true;
        let status = loop {
            let patience = match ready {
                None => START.saturating_sub(started.elapsed()),
                Some(_) => Duration::MAX,
            };
            if patience.is_zero() {
                return hung(child);
            }
            if self.signals.ending() {
                // It unmounts everything, and ends.
                let _ = kill(pid_of(&child), Signal::SIGTERM);
            }
            open &= self.wait(open.then_some(&line), patience, &mut ready);
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break status,
                Err(error) => return Life::never(format!("is lost: {error}")),
            }
        };
        // What it said last is still to be read.
        while open {
            open = self.hear(&line, &mut ready);
        }
        Life::of(status, ready.map(|since: Instant| since.elapsed()))
    }

    fn start(&self) -> Result<(Child, OwnedFd)> {
        let (ours, theirs) = wire::pair()?;
        let child = program::command()
            .args(["daemon", "run", "--kept", "--store"])
            .arg(self.dir.root())
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .spawn()?;
        let start = Start {
            restarts: self.restarts,
            sessions: u32::try_from(self.held.len())?,
        };
        let acknowledged = self.acknowledged.as_ref().map(AsFd::as_fd);
        let told = wire::send(ours.as_fd(), &start, acknowledged).and_then(|()| {
            self.held.values().try_for_each(|(session, device)| {
                wire::send(ours.as_fd(), session, Some(device.as_fd()))
            })
        });
        if let Err(error) = told {
            // It is dead already, which is noticed below.
            say(&format!("cannot hand over: {error}"));
        }
        Ok((child, ours))
    }

    /// Waits for a signal or a message; `false` when the daemon's end of the line is closed.
    fn wait(
        &mut self,
        line: Option<&OwnedFd>,
        patience: Duration,
        ready: &mut Option<Instant>,
    ) -> bool {
        let mut sources = vec![PollFd::new(self.signals.wake.as_fd(), PollFlags::POLLIN)];
        sources.extend(line.map(|line| PollFd::new(line.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::NONE);
        // Interrupted or not: who calls looks at everything.
        let _ = poll(&mut sources, timeout);
        let spoken = sources
            .get(1)
            .and_then(PollFd::revents)
            .is_some_and(|events| !events.is_empty());
        self.signals.clear();
        match line {
            Some(line) if spoken => self.hear(line, ready),
            _ => true,
        }
    }

    /// Takes in one message; `false` at the end.
    fn hear(&mut self, line: &OwnedFd, ready: &mut Option<Instant>) -> bool {
        match wire::receive(line.as_fd()) {
            Ok(Some((Report::Ready, _))) => *ready = Some(Instant::now()),
            Ok(Some((Report::Hold(session), Some(device)))) => {
                self.held.insert(session.view, (session, device));
            }
            Ok(Some((Report::Hold(session), None))) => {
                say(&format!("no descriptor came with {:?}", session.view));
            }
            Ok(Some((Report::Release(view), _))) => drop(self.held.remove(&view)),
            Ok(None) => return false,
            Err(error) => {
                say(&format!("cannot read from the daemon: {error}"));
                return false;
            }
        }
        true
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Ends a daemon that does not come up.
fn hung(mut child: Child) -> Life {
    // Gone already is as good as killed.
    let _ = child.kill();
    let _ = child.wait();
    Life::hung()
}

/// Signals, as something to poll.
struct Signals {
    wake: UnixStream,
    ending: Arc<AtomicBool>,
}

impl Signals {
    fn take() -> io::Result<Self> {
        let (wake, wakes) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let ending = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register(signal, Arc::clone(&ending))?;
        }
        // SIGHUP is taken, not ignored: a closed terminal ends neither keeper nor daemon.
        for signal in [SIGCHLD, SIGTERM, SIGINT, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, wakes.try_clone()?)?;
        }
        Ok(Self { wake, ending })
    }

    fn ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    fn clear(&mut self) {
        let mut bytes = [0; 64];
        while matches!((&self.wake).read(&mut bytes), Ok(1..)) {}
    }
}

/// Into the daemon's log.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "keeper: {text}");
}
