//! Signs of life for waiters that wait.
//!
//! One thread gives them to all: most waiters are answered within a millisecond, of which a thread of
//! its own for each would take a good part.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use parking_lot::{Condvar, Mutex};
use wrapper::protocol::{self, Decision, ProtocolError};

use super::{HEARTBEAT, PREPARE};

/// How often to look who has waited too long.
const LOOK: Duration = Duration::from_millis(250);

/// When that has found nobody waiting so many times, it stops until somebody comes.
const LOOKS_IN_VAIN: u32 = 8;

/// A wrapper that hears every second that we are alive, until this goes. Nothing is sent to it then: the
/// lock is held while something is.
pub(super) struct Pulse(u64);

impl Pulse {
    /// Does what may take its time.
    pub(super) fn during<R>(stream: &UnixStream, work: impl FnOnce() -> R) -> io::Result<R> {
        let _pulse = Self::start(stream)?;
        Ok(work())
    }

    fn start(stream: &UnixStream) -> io::Result<Self> {
        let stream = stream.try_clone()?;
        let mut waiting = HEART.waiting.lock();
        match waiting.thread {
            Thread::None => {
                let thread = thread::Builder::new().name("pulse".into());
                thread.spawn(|| HEART.beat())?;
                waiting.thread = Thread::Looks;
            }
            Thread::Sleeps => drop(HEART.came.notify_one()),
            Thread::Looks => {}
        }
        waiting.last += 1;
        let number = waiting.last;
        let now = Instant::now();
        waiting.waiters.push(Waiter {
            number,
            stream,
            heard: now,
            until: now + PREPARE,
        });
        Ok(Self(number))
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        let mut waiting = HEART.waiting.lock();
        waiting.waiters.retain(|waiter| waiter.number != self.0);
    }
}

static HEART: Heart = Heart {
    waiting: Mutex::new(Waiting {
        waiters: Vec::new(),
        last: 0,
        thread: Thread::None,
    }),
    came: Condvar::new(),
};

/// Who waits, and the thread that looks after them.
struct Heart {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

struct Waiting {
    waiters: Vec<Waiter>,
    /// The number given last.
    last: u64,
    thread: Thread,
}

/// What the thread does.
enum Thread {
    None,
    Sleeps,
    Looks,
}

struct Waiter {
    number: u64,
    stream: UnixStream,
    /// When it last heard of us.
    heard: Instant,
    /// When it has waited so long that it should give us up.
    until: Instant,
}

impl Heart {
    fn beat(&self) {
        let mut in_vain = 0;
        let mut waiting = self.waiting.lock();
        loop {
            waiting.beat(Instant::now());
            in_vain = if waiting.waiters.is_empty() {
                in_vain + 1
            } else {
                0
            };
            if in_vain < LOOKS_IN_VAIN {
                self.came.wait_for(&mut waiting, LOOK);
            } else {
                waiting.thread = Thread::Sleeps;
                self.came.wait(&mut waiting);
                waiting.thread = Thread::Looks;
                in_vain = 0;
            }
        }
    }
}

impl Waiting {
    fn beat(&mut self, now: Instant) {
        for waiter in &mut self.waiters {
            if now < waiter.heard + HEARTBEAT || now >= waiter.until {
                continue;
            }
            waiter.heard = now;
            if let Err(error) = waiter.tell() {
                // It has gone, or gives us up: noticed by who sends the decision.
                tracing::debug!(%error, "nobody hears that we are alive");
                waiter.until = now;
            }
        }
    }
}

impl Waiter {
    fn tell(&self) -> Result<(), ProtocolError> {
        let mut sign = Vec::new();
        protocol::send(&mut sign, &Decision::Wait)?;
        // Who has not read the last ones must not keep all others waiting, and has enough to read.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.stream.as_raw_fd(), &sign, flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Ok(sent) if sent == sign.len() => Ok(()),
            // Linux sends so few bytes whole or not at all; what came after a part would make no sense.
            Ok(_) => Ok(self.stream.shutdown(Shutdown::Both)?),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// What has come, and how much of it is signs of life.
    fn heard(mut wrapper: &UnixStream) -> usize {
        wrapper.set_nonblocking(true).expect("a socket");
        let mut signs = 0;
        let mut sign = Vec::new();
        protocol::send(&mut sign, &Decision::Wait).expect("encodes");
        let mut came = vec![0; sign.len()];
        while let Ok(n) = wrapper.read(&mut came) {
            assert_eq!(came[..n], sign, "something else");
            signs += 1;
        }
        signs
    }

    #[test]
    fn who_waits_hears_of_it_until_it_is_over() {
        let (daemon, wrapper) = UnixStream::pair().expect("a pair");
        let (full, _unread) = UnixStream::pair().expect("a pair");
        full.set_nonblocking(true).expect("a socket");
        while (&full).write(&[0; 4096]).is_ok() {}
        let (left, gone) = UnixStream::pair().expect("a pair");
        drop(gone);
        let quick = Pulse::during(&daemon, || ());
        quick.expect("starts");
        let waited = Pulse::during(&full, || {
            Pulse::during(&left, || {
                Pulse::during(&daemon, || thread::sleep(HEARTBEAT * 5 / 2))
            })
        });
        waited.expect("starts").expect("starts").expect("starts");
        let signs = heard(&wrapper);
        assert!((1..=2).contains(&signs), "{signs}");
        thread::sleep(HEARTBEAT * 3 / 2);
        assert_eq!(heard(&wrapper), 0);
        // Whoever comes wakes the thread.
        let sleeps = || matches!(HEART.waiting.lock().thread, Thread::Sleeps);
        let deadline = Instant::now() + HEARTBEAT * 60;
        while !sleeps() {
            assert!(Instant::now() < deadline, "it looks for ever");
            thread::sleep(LOOK);
        }
        let waited = Pulse::during(&daemon, || thread::sleep(HEARTBEAT * 5 / 2));
        waited.expect("starts");
        assert_ne!(heard(&wrapper), 0);
    }

    #[test]
    fn who_has_waited_too_long_hears_nothing_more() {
        let (daemon, wrapper) = UnixStream::pair().expect("a pair");
        let now = Instant::now();
        let mut waiting = Waiting {
            waiters: vec![Waiter {
                number: 1,
                stream: daemon,
                heard: now,
                until: now + PREPARE,
            }],
            last: 1,
            thread: Thread::None,
        };
        for (after, signs) in [
            (HEARTBEAT / 2, 0),
            (HEARTBEAT, 1),
            (HEARTBEAT + LOOK, 0),
            (HEARTBEAT * 2, 1),
            (PREPARE, 0),
        ] {
            waiting.beat(now + after);
            assert_eq!(heard(&wrapper), signs, "{after:?}");
        }
    }
}
