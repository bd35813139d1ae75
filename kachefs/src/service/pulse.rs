//! Signs of life for a wrapper that waits.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use wrapper::protocol::{self, Decision};

use super::{HEARTBEAT, PREPARE};

/// Tells a waiting wrapper every second that we are alive, while this thread is busy.
pub(super) struct Pulse(Arc<(Mutex<bool>, Condvar)>);

impl Pulse {
    /// Does what may take its time.
    pub(super) fn during<R>(stream: &UnixStream, work: impl FnOnce() -> R) -> io::Result<R> {
        let pulse = Self::start(stream)?;
        let result = work();
        pulse.stop();
        Ok(result)
    }

    fn start(stream: &UnixStream) -> io::Result<Self> {
        let stream = stream.try_clone()?;
        let stopped = Arc::new((Mutex::new(false), Condvar::new()));
        let watched = Arc::clone(&stopped);
        let beat = move || {
            let (stopped, signal) = &*watched;
            let deadline = Instant::now() + PREPARE;
            let mut stopped = stopped.lock();
            while !*stopped && Instant::now() < deadline {
                // A wrapper that has gone, or gives us up, is noticed by who sends the decision.
                if signal.wait_for(&mut stopped, HEARTBEAT).timed_out()
                    && !*stopped
                    && protocol::send(&stream, &Decision::Wait).is_err()
                {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("pulse".into());
        thread.spawn(beat)?;
        Ok(Self(stopped))
    }

    /// Stops; nothing is sent after this returns, because the lock is held while something is. The
    /// thread ends when it next runs: nobody waits for it, for on a busy machine that takes a while.
    fn stop(self) {
        *self.0.0.lock() = true;
        self.0.1.notify_all();
    }
}
