//! What a daemon and its keeper do for each other, and how a daemon goes on with the mounts of one
//! that died.
//!
//! The kernel shook hands with the first daemon of a mount and does not do it again, so a successor
//! shakes hands with itself, puts the real device in place of that conversation, and asks the kernel
//! to send again whatever the dead one had not answered (`FUSE_NOTIFY_RESEND`, Linux 6.9). A kernel
//! that cannot do this leaves nothing to the keeper: its mounts end with the daemon, and the next
//! one mounts afresh.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use fuser::InitFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use store::{Ino, Kind, ViewId};
use wrapper::protocol::TOKEN_NAME;

use super::mounts::{Mounted, Mounts, run, session_config};
use crate::fs::View;
use crate::fuse::{Adapter, MAX_REQUEST};
use crate::keeper::wire::{self, Connection, Report, Session, Start};

/// The daemon's end of the line to its keeper.
pub struct Keeper {
    line: Option<OwnedFd>,
    pid: u32,
    /// Daemons this keeper had before.
    pub restarts: u32,
    lost: AtomicBool,
    acknowledged: Option<File>,
}

/// A mounted view that an earlier daemon served.
pub struct Inherited {
    session: Session,
    device: OwnedFd,
}

impl Keeper {
    /// Nobody: mounts end with this process.
    pub fn none() -> Self {
        Self {
            line: None,
            pid: 0,
            restarts: 0,
            lost: AtomicBool::new(false),
            acknowledged: None,
        }
    }

    /// The keeper that started this process, and what it hands over.
    pub fn from_stdin() -> Result<(Self, Vec<Inherited>)> {
        let line = io::stdin().as_fd().try_clone_to_owned()?;
        // No child of ours may have it as its standard input.
        let null = File::open("/dev/null").context("cannot open /dev/null")?;
        nix::unistd::dup2_stdin(null)?;
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let (start, acknowledged) = wire::receive::<Start>(line.as_fd())
            .and_then(|start| start.ok_or_else(gone))
            .context("no keeper on standard input")?;
        let mut inherited = Vec::new();
        for _ in 0..start.sessions {
            let next = wire::receive::<Session>(line.as_fd()).context("keeper")?;
            let Some((session, Some(device))) = next else {
                bail!("keeper: a mounted view without a descriptor");
            };
            inherited.push(Inherited { session, device });
        }
        let keeper = Self {
            line: Some(line),
            pid: std::os::unix::process::parent_id(),
            restarts: start.restarts,
            lost: AtomicBool::new(false),
            acknowledged: acknowledged.map(File::from),
        };
        Ok((keeper, inherited))
    }

    /// The keeper's process, while it lives.
    pub fn pid(&self) -> Option<u32> {
        let lives = self.line.is_some() && std::os::unix::process::parent_id() == self.pid;
        lives.then_some(self.pid)
    }

    /// Where each daemon of this keeper leaves how far the index has come.
    pub fn acknowledged(&mut self) -> Option<File> {
        self.acknowledged.take()
    }

    /// Tells it that everything is served again.
    pub fn ready(&self) {
        self.report(&Report::Ready, None);
    }

    /// Gives it a descriptor to hold, if a successor could do anything with it.
    pub fn hold(&self, session: &Session, device: BorrowedFd<'_>) {
        let offered = InitFlags::from_bits_retain(session.connection.capabilities);
        if offered.contains(InitFlags::FUSE_HAS_RESEND) {
            self.report(&Report::Hold(session.clone()), Some(device));
        }
    }

    /// Has it close the descriptor of a view that is unmounted.
    pub fn release(&self, view: ViewId) {
        self.report(&Report::Release(view), None);
    }

    fn report(&self, report: &Report, device: Option<BorrowedFd<'_>>) {
        let Some(line) = &self.line else { return };
        if let Err(error) = wire::send(line.as_fd(), report, device)
            && !self.lost.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "the keeper is gone: mounts end with this daemon");
        }
    }
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid() {
            Some(pid) => write!(f, "keeper {pid}, restarts {}", self.restarts),
            None => f.write_str("no keeper"),
        }
    }
}

impl Mounts {
    /// Goes on with the mounts of a daemon that died. When this returns every request it had is
    /// answered, and the kernel remembers nothing it would have been told is no longer true. Returns
    /// where they are, or were: one of those requests may have been the last of a `cargo clean`.
    pub fn take_over(&self, inherited: Vec<Inherited>) -> Vec<PathBuf> {
        let _changing = self.changing.lock();
        let (mut taken, mut paths) = (Vec::new(), Vec::new());
        for inherited in inherited {
            let path = inherited.path();
            let view = inherited.session.view;
            match self.go_on(&inherited) {
                Ok(Some(view)) => {
                    tracing::info!(path = %path.display(), "taken over");
                    taken.push((view, inherited.device));
                    paths.push(path);
                }
                Ok(None) => {
                    tracing::info!(path = %path.display(), "was unmounted");
                    self.keeper.release(view);
                }
                Err(error) => {
                    // Closed everywhere, its users get ENOTCONN instead of waiting for ever.
                    let error = format!("{error:#}");
                    tracing::error!(path = %path.display(), error, "cannot take over");
                    self.keeper.release(view);
                }
            }
        }
        for (view, device) in &taken {
            expire(view, device.as_fd());
        }
        paths
    }

    /// Serves an inherited mount; `None` when it is a mount no more.
    fn go_on(&self, inherited: &Inherited) -> Result<Option<Arc<View>>> {
        let Inherited { session, device } = inherited;
        if !self.storage.damage.spares(session.view) {
            bail!("its part of the index was damaged, so it is mounted afresh");
        }
        let views = self.storage.index.views()?;
        let known = views.into_iter().find(|(id, _)| *id == session.view);
        let (id, mut record) = known.context("the index does not know the view")?;
        if is_over(device.as_fd())? {
            record.mounted = false;
            let mut batch = self.storage.index.batch();
            batch.put_view(id, &record)?;
            batch.commit()?;
            return Ok(None);
        }
        let view = Arc::new(View::take_over(Arc::clone(&self.storage), id, record)?);
        let adapter = self.adapter(&view);
        let running = shake_hands(adapter, &session.connection)?;
        // The session reads from, and answers to, its descriptor's number. Nobody uses it yet.
        dup_over(device.as_fd(), running.as_fd())?;
        resend(device.as_fd()).context("the kernel does not send again")?;
        let path = inherited.path();
        let here = crate::mount::mounted_at(&path)?;
        let mounted = Mounted {
            session: run(&view, running)?,
            view: Arc::clone(&view),
            // Detached by then: only its last users are left.
            leaving: here.is_none_or(|line| line.minor != session.minor),
            path,
            device: nix::sys::stat::makedev(0, u64::from(session.minor)),
        };
        self.mounted.lock().insert(id, mounted);
        view.set_mounted(true)?;
        Ok(Some(view))
    }
}

impl Inherited {
    fn path(&self) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        Path::new(std::ffi::OsStr::from_bytes(&self.session.path)).to_owned()
    }
}

/// Whether the kernel has ended a connection.
fn is_over(device: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut polled = [PollFd::new(device, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

/// A session that believes it has just met the kernel.
fn shake_hands(adapter: Adapter, connection: &Connection) -> Result<fuser::Session<Adapter>> {
    let (kernel, session) = wire::pair()?;
    nix::unistd::write(&kernel, &init_request(connection))?;
    let config = session_config();
    let session = fuser::Session::from_fd(adapter, session, config.acl, config)
        .context("cannot set up the session")?;
    // The answer, which the real kernel had long ago.
    nix::unistd::read(&kernel, &mut [0; 256])?;
    Ok(session)
}

/// `FUSE_INIT` as the kernel sent it to the first daemon (`struct fuse_in_header` and
/// `fuse_init_in` in linux/fuse.h, 7.36 and later).
fn init_request(connection: &Connection) -> Vec<u8> {
    const LENGTH: u32 = 104;
    const FUSE_INIT: u32 = 26;
    let flags = connection.capabilities | InitFlags::FUSE_INIT_EXT.bits();
    let half = |shift: u32| u32::try_from(flags >> shift & u64::from(u32::MAX)).unwrap_or(0);
    let (low, high) = (half(0), half(32));
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    let mut put = |word: u32| bytes.extend_from_slice(&word.to_ne_bytes());
    put(LENGTH);
    put(FUSE_INIT);
    let (major, minor) = connection.abi;
    for word in [major, minor, MAX_REQUEST, low, high] {
        put(word);
    }
    // The number of the request, and ids of node, user, group and process, lie between.
    let mut head = 1_u64.to_ne_bytes().to_vec();
    head.resize(32, 0);
    bytes.splice(8..8, head);
    bytes.resize(LENGTH as usize, 0);
    bytes
}

/// Makes the number of `to` mean what `from` means.
fn dup_over(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: both are open, and dup3 touches no memory. `to` stays owned by who owns it; only what
    // it refers to changes.
    let result = unsafe { libc::dup3(from.as_raw_fd(), to.as_raw_fd(), libc::O_CLOEXEC) };
    nix::errno::Errno::result(result).map(drop)
}

/// `enum fuse_notify_code` in linux/fuse.h.
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
const NOTIFY_RESEND: i32 = 7;

/// Of an invalidated entry: ask again when it is used, but leave it where it is, for it may be a
/// working directory (`FUSE_EXPIRE_ONLY`).
const EXPIRE_ONLY: u32 = 1;

/// Sends the kernel a notification (`struct fuse_out_header` with the number 0).
fn notify(device: BorrowedFd<'_>, code: i32, body: &[&[u8]]) -> nix::Result<()> {
    let length = 16 + body.iter().map(|part| part.len()).sum::<usize>();
    let mut head = u32::try_from(length)
        .unwrap_or(u32::MAX)
        .to_ne_bytes()
        .to_vec();
    head.extend_from_slice(&code.to_ne_bytes());
    head.extend_from_slice(&0_u64.to_ne_bytes());
    let mut parts = vec![IoSlice::new(&head)];
    parts.extend(body.iter().map(|part| IoSlice::new(part)));
    nix::sys::uio::writev(device, &parts).map(drop)
}

/// Has the kernel send again what it has no answer to.
fn resend(device: BorrowedFd<'_>) -> nix::Result<()> {
    notify(device, NOTIFY_RESEND, &[])
}

fn expire_entry(device: BorrowedFd<'_>, parent: Ino, name: &[u8]) -> nix::Result<()> {
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX).to_ne_bytes();
    let flags = EXPIRE_ONLY.to_ne_bytes();
    let parent = parent.0.to_ne_bytes();
    notify(
        device,
        NOTIFY_INVAL_ENTRY,
        &[&parent, &length, &flags, name, b"\0"],
    )
}

/// Drops an inode's attributes and, when `data` says so, its pages: of a directory its listing.
fn invalidate_inode(device: BorrowedFd<'_>, ino: Ino, data: bool) -> nix::Result<()> {
    let from: i64 = if data { 0 } else { -1 };
    let (ino, from, length) = (ino.0.to_ne_bytes(), from.to_ne_bytes(), 0_i64.to_ne_bytes());
    notify(device, NOTIFY_INVAL_INODE, &[&ino, &from, &length])
}

/// Makes the kernel ask again about everything it remembers.
///
/// A bind stores its names first and then tells the kernel; a death in between leaves it with
/// entries and absences that would be wrong for a year. Nothing but binds changes names behind its
/// back, and a bind removes none, so every name it can be wrong about is one the view has.
///
/// Each directory's lock is taken for this, which whoever waits for an answer to a request about
/// its names holds: so when this ends, those sent again are answered. Called with the session
/// running and no lock held.
fn expire(view: &View, device: BorrowedFd<'_>) {
    // ENOENT: the kernel does not remember it. Anything else means that the mount is gone.
    for (ino, kind) in view.inodes() {
        let _ = invalidate_inode(device, ino, kind == Kind::Dir);
        if kind != Kind::Dir {
            continue;
        }
        let _ = expire_entry(device, ino, TOKEN_NAME.as_bytes());
        for row in view.list(ino, 0, usize::MAX).unwrap_or_default() {
            let _ = expire_entry(device, ino, &row.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_looks_like_the_kernels() {
        let connection = Connection {
            abi: (7, 45),
            capabilities: 0x1_0000_0009,
        };
        let bytes = init_request(&connection);
        let word = |at: usize| {
            let four = bytes[at..at + 4].try_into().expect("four bytes");
            u32::from_ne_bytes(four)
        };
        assert_eq!(bytes.len(), 104);
        // Length, opcode and number.
        assert_eq!((word(0), word(4), word(8), word(12)), (104, 26, 1, 0));
        assert!(bytes[16..40].iter().all(|byte| *byte == 0));
        assert_eq!((word(40), word(44), word(48)), (7, 45, MAX_REQUEST));
        assert_eq!((word(52), word(56)), (1 << 30 | 9, 1));
        assert!(bytes[60..].iter().all(|byte| *byte == 0));
    }
}
