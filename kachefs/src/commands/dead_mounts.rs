//! The part of `kachefs doctor` that looks at mounts: names those whose daemon is gone, and takes
//! them away when asked to.
//!
//! Only kachefs mounts of this user. A mount that answers, of whatever store, is never touched,
//! nor is one that only does not answer in time: its daemon may be stopped or busy.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use crate::mount::{self, MountLine};

/// How long a living daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What asking a mount gave.
enum State {
    Alive,
    /// Nobody serves it, nor ever will.
    Dead,
    /// Somebody holds it and does not answer.
    Silent,
}

/// Checks every mount; with `fix` the dead ones go. The result says what was found and done.
pub(super) fn check(fix: bool) -> Result<String, String> {
    let own = nix::unistd::geteuid().as_raw();
    let lines = mount::mounts().map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    let mut alive = 0;
    let (mut done, mut problems) = (Vec::new(), Vec::new());
    // The topmost first: only that can be unmounted where several are at one path.
    let ours: Vec<&MountLine> = lines
        .iter()
        .rev()
        .filter(|line| line.fs_type == mount::FS_TYPE && line.owner == Some(own))
        .collect();
    // All are asked at once: the silent ones cost their time together.
    let asked: Vec<_> = ours.iter().map(|line| ask(line)).collect();
    let deadline = Instant::now() + PATIENCE;
    for (line, answer) in ours.into_iter().zip(asked) {
        let path = line.path.display();
        match state(&answer, deadline) {
            State::Alive => alive += 1,
            State::Silent => problems.push(format!(
                "{path} does not answer, its daemon is stopped or stuck (`umount -l` or \
                 `fusermount3 -uz` ends the mount)"
            )),
            State::Dead if fix => match remove(line) {
                Ok(()) => done.push(format!("removed the dead mount {path}")),
                Err(error) => problems.push(format!("{path}: {error:#}")),
            },
            State::Dead => problems.push(format!(
                "{path}: its daemon is gone (`kachefs doctor --fix` removes the mount)"
            )),
        }
    }
    let working = match alive {
        1 => "1 mount, it answers".to_owned(),
        n => format!("{n} mounts, all answer"),
    };
    if problems.is_empty() {
        done.push(working);
        Ok(done.join("; "))
    } else {
        done.extend(problems);
        Err(done.join("; "))
    }
}

/// Asks in a thread of its own: nothing wakes whoever asks a mount that does not answer.
fn ask(line: &MountLine) -> Receiver<Result<(), Errno>> {
    let (say, said) = mpsc::channel();
    let path = line.path.clone();
    // A thread that cannot start is a mount that does not answer.
    let _ = std::thread::Builder::new().spawn(move || {
        // Nobody listens any more when the time is over.
        let _ = say.send(mount::answers(&path));
    });
    said
}

fn state(answer: &Receiver<Result<(), Errno>>, deadline: Instant) -> State {
    match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Err(Errno::ENOTCONN | Errno::ECONNABORTED)) => State::Dead,
        // Anything else is an answer, if only through what is mounted above it.
        Ok(_) => State::Alive,
        Err(_) => State::Silent,
    }
}

fn remove(line: &MountLine) -> Result<()> {
    // The path leads to the topmost mount: it must be the one that was found dead.
    let top = mount::mounted_at(&line.path)?;
    if top.is_none_or(|top| top.minor != line.minor) {
        bail!("another mount hides it");
    }
    // Whoever still waits for an answer gets an error now. A connection without any descriptor has
    // been cut already, and the file may be closed to this user: the unmount is what counts.
    let connection = Path::new("/sys/fs/fuse/connections").join(line.minor.to_string());
    let _ = fs::write(connection.join("abort"), "1");
    mount::unmount(&line.path, true).context("cannot unmount it")
}
