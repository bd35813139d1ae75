//! Whether somebody has a file open for writing, asked of the kernel.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};

/// Between two looks at a file that is being written.
const PAUSE: Duration = Duration::from_millis(5);

/// Lets this process live when somebody opens a file in the moment a lease is tried on it: that
/// breaks the lease, and SIGIO says so.
#[must_use]
pub struct Unharmed(Option<SigHandler>);

impl Unharmed {
    /// Ignores SIGIO from now on.
    pub fn start() -> Self {
        // SAFETY: no handler is installed, the signal is ignored.
        Self(unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) }.ok())
    }
}

impl Drop for Unharmed {
    fn drop(&mut self) {
        if let Some(before) = self.0.take() {
            // SAFETY: puts back what was there; this program installs no handlers of its own.
            let _ = unsafe { signal(Signal::SIGIO, before) };
        }
    }
}

/// Waits until nobody has the file open for writing or mapped for it; false when they still have
/// at the deadline. Needs an [`Unharmed`].
pub fn wait_unwritten(file: &File, deadline: Instant) -> bool {
    while is_written(file) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

/// Whether some process has the file open for writing: the kernel then refuses a read lease
/// (fcntl(2), "Leases"). A file that cannot have leases counts as not written. Needs an
/// [`Unharmed`].
pub fn is_written(file: &File) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: the descriptor is open for the call; F_SETLEASE takes a number.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
        Errno::result(result)
    };
    match lease(libc::F_RDLCK) {
        Ok(_) => {
            // Closing the file ends it too.
            let _ = lease(libc::F_UNLCK);
            false
        }
        Err(error) => error == Errno::EAGAIN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_writers_and_mappings() {
        let _unharmed = Unharmed::start();
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        let writer = File::create(&path).expect("creates");
        let reader = File::open(&path).expect("opens");
        assert!(is_written(&reader));
        assert!(!wait_unwritten(&reader, Instant::now()));
        drop(writer);
        assert!(!is_written(&reader));
        assert!(wait_unwritten(&reader, Instant::now()));
    }
}
