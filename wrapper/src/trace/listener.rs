//! The listening end of the filter: notes each call and lets it go on.
//!
//! Whoever made the call waits meanwhile, so it is answered as soon as it is understood. The
//! arguments may change behind our back (another thread of the caller): this is a record of what
//! honest programs do, not a sandbox.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use super::Observed;
use super::notes::Notes;
use super::shim::Shim;

/// How long processes may take to end after the program that started them.
const GRACE: Duration = Duration::from_millis(200);

/// What poll(2) counts in.
const TICK: Duration = Duration::from_millis(1);

/// Lets the kernel wake the listener on the caller's processor (`seccomp_unotify(2)`, Linux 6.6).
const SYNC_WAKE_UP: u64 = 1;

/// Receives calls.
pub(super) struct Listener {
    fd: OwnedFd,
    over: bool,
    /// Kept for those that are left.
    shim: Option<Shim>,
}

impl Listener {
    /// What the installing thread said: a descriptor, or a negative error number.
    pub(super) fn from_raw(said: RawFd) -> io::Result<Self> {
        if said < 0 {
            return Err(Errno::from_raw(-said).into());
        }
        // SAFETY: the kernel has just made this descriptor for the filter; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(said) };
        // Older kernels do without.
        let _ = ioctl(
            &fd,
            libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS,
            SYNC_WAKE_UP as *mut u8,
        );
        Ok(Self {
            fd,
            over: false,
            shim: None,
        })
    }

    /// Whether nobody is under the filter any more.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Notes calls until `end` is made known and nobody is left who could make one, or those left take
    /// too long.
    pub(super) fn watch(mut self, end: End, mut notes: Notes) -> (Observed, Self) {
        // The kernel waits better than poll(2) would, and wakes the caller's processor. The one who
        // makes the end known is under the filter until then, so that there is always one to wait for.
        while self
            .serve(Some(&mut notes))
            .is_none_or(|call| !end.is(&call))
        {}
        let deadline = Instant::now() + GRACE;
        // One that never ceases to make calls does not hold up the build.
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: nothing is asked in a hurry in the last millisecond.
            let timeout = PollTimeout::try_from(left + TICK).unwrap_or(PollTimeout::ZERO);
            let mut waiting = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waiting, timeout) {
                Ok(0) => break,
                Ok(_) => {}
                // Whoever waits for an answer must get it, later then.
                Err(_) => {
                    thread::sleep(TICK);
                    continue;
                }
            }
            let happened = waiting[0].revents().unwrap_or(PollFlags::empty());
            if happened.contains(PollFlags::POLLIN) {
                self.serve(Some(&mut notes));
            } else if happened.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
                self.over = true;
                break;
            }
        }
        let (observed, shim) = notes.observed();
        self.shim = shim;
        (observed, self)
    }

    /// Receives one call, notes it and lets it go on; `None` where there was none after all.
    fn serve(&self, notes: Option<&mut Notes>) -> Option<libc::seccomp_notif> {
        // SAFETY: all zeroes is a value of this plain struct, and what the kernel asks for.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let received = ioctl(
            &self.fd,
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            (&raw mut call).cast(),
        );
        match received {
            Ok(_) => {}
            // The caller died before it could be asked.
            Err(Errno::ENOENT | Errno::EINTR) => return None,
            Err(_) => {
                thread::sleep(TICK);
                return None;
            }
        }
        let shim = notes.and_then(|notes| notes.note(&call, || self.is_waiting(call.id)));
        if shim.is_some_and(|shim| shim.hand_over(&self.fd, call.id)) {
            return Some(call);
        }
        // The flag is a small number.
        #[expect(clippy::cast_possible_truncation)]
        let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        let mut answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: 0,
            flags,
        };
        // It may have died meanwhile.
        let _ = ioctl(
            &self.fd,
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            (&raw mut answer).cast(),
        );
        Some(call)
    }

    /// Whether the caller still waits for an answer: what its number names is then still itself.
    fn is_waiting(&self, mut id: u64) -> bool {
        let asked = ioctl(
            &self.fd,
            libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
            (&raw mut id).cast(),
        );
        asked.is_ok()
    }

    /// Answers those that outlive the program, until the last of them has ended.
    pub(super) fn serve_until_over(&self) {
        loop {
            let mut waiting = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            let polled = poll(&mut waiting, PollTimeout::NONE);
            let happened = waiting[0].revents().unwrap_or(PollFlags::empty());
            match polled {
                Ok(_) if happened.contains(PollFlags::POLLIN) => {
                    self.serve(None);
                }
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
    }
}

fn ioctl(fd: &OwnedFd, request: libc::Ioctl, argument: *mut u8) -> Result<i32, Errno> {
    // SAFETY: each caller passes what its request takes: a struct of its own, or a number.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })
}

/// How the thread that starts the program, which is under the filter itself, makes known that it ended.
///
/// By a call like those it waits for, so that the listener has one thing to wait for and not two: that
/// would cost a call more for each one noted.
#[derive(Clone, Copy)]
pub(super) struct End {
    thread: Pid,
}

impl End {
    /// Nothing is called so.
    const PATH: &CStr = c"/proc/self/kachefs-ended";

    /// To be told by this thread.
    pub(super) fn told_by(thread: Pid) -> Self {
        Self { thread }
    }

    /// Makes it known, on the thread that is to tell it. Returns when the listener has heard.
    pub(super) fn tell() {
        let path = Self::PATH.as_ptr();
        // SAFETY: the text ends in a NUL and outlives the call. That nothing is there is expected.
        unsafe { libc::syscall(libc::SYS_faccessat, libc::AT_FDCWD, path, libc::F_OK) };
    }

    fn is(self, call: &libc::seccomp_notif) -> bool {
        // A thread of this process: the address means the same there.
        i32::try_from(call.pid).is_ok_and(|pid| pid == self.thread.as_raw())
            && libc::c_long::from(call.data.nr) == libc::SYS_faccessat
            && call.data.args[1] == Self::PATH.as_ptr() as u64
    }
}
