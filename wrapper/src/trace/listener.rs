//! The listening end of the filter: notes each call and lets it go on.
//!
//! Whoever made the call waits meanwhile, so it is answered as soon as it is understood. The
//! arguments may change behind our back (another thread of the caller): this is a record of what
//! honest programs do, not a sandbox.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use super::calls::{self, Directory, Does, Meaning, Named};
use super::part::Parts;
use super::{Access, Observed, Scope, Unseen, Uses, memory};

/// How long processes may take to end after the program that started them.
const GRACE: Duration = Duration::from_millis(200);

/// What poll(2) counts in.
const TICK: Duration = Duration::from_millis(1);

/// Lets the kernel wake the listener on the caller's processor (`seccomp_unotify(2)`, Linux 6.6).
const SYNC_WAKE_UP: u64 = 1;

/// What lies there is the kernel's or the machine's, not an input.
const NO_FILES: [&[u8]; 3] = [b"/proc/", b"/sys/", b"/dev/"];
/// But this is a directory like any other.
const SHARED_MEMORY: &[u8] = b"/dev/shm/";
/// Another name of the caller's working directory.
const WORKING_DIRECTORY: &[u8] = b"/proc/self/cwd/";

/// Receives calls.
pub(super) struct Listener {
    fd: OwnedFd,
    over: bool,
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
        Ok(Self { fd, over: false })
    }

    /// Whether nobody is under the filter any more.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Notes calls until `end` is made known and nobody is left who could make one, or those left take
    /// too long.
    pub(super) fn watch(mut self, end: End, scope: Scope) -> (Observed, Self) {
        let mut notes = Notes::within(scope);
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
        (notes.observed(), self)
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
        if let Some(notes) = notes {
            notes.note(&call, || self.is_waiting(call.id));
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

/// What was noted so far.
struct Notes {
    scope: Scope,
    paths: HashMap<Vec<u8>, Uses>,
    unseen: BTreeSet<Unseen>,
    parts: Parts,
    working: Option<Working>,
}

/// Where the last caller works: one that makes a call makes many, and finding this out costs as much
/// as all the rest. Forgotten when another calls, and when anything may move.
struct Working {
    thread: Pid,
    directory: PathBuf,
}

impl Notes {
    fn within(scope: Scope) -> Self {
        Self {
            scope,
            paths: HashMap::new(),
            unseen: BTreeSet::new(),
            parts: Parts::default(),
            working: None,
        }
    }

    fn observed(self) -> Observed {
        Observed {
            paths: self.paths.into_iter().collect(),
            unseen: self.unseen,
        }
    }

    /// Notes a call while its caller waits.
    fn note(&mut self, call: &libc::seccomp_notif, is_waiting: impl Fn() -> bool) {
        let noted = self.try_note(call);
        if calls::moves(call.data.nr.into()) {
            self.working = None;
        }
        // A caller that died has not done what it was about to.
        if noted.is_err() && is_waiting() {
            self.unseen(Unseen::Memory);
        }
    }

    fn unseen(&mut self, unseen: Unseen) {
        self.unseen.insert(unseen);
        self.parts.unseen(unseen);
    }

    fn try_note(&mut self, call: &libc::seccomp_notif) -> io::Result<()> {
        let pid = Pid::from_raw(i32::try_from(call.pid).map_err(io::Error::other)?);
        self.parts.enter(pid);
        if self
            .working
            .as_ref()
            .is_some_and(|working| working.thread != pid)
        {
            self.working = None;
        }
        let data = &call.data;
        if !super::filter::is_native(data.arch, data.nr) {
            self.unseen(Unseen::Calls);
            return Ok(());
        }
        match calls::meaning(data.nr.into(), &data.args) {
            Meaning::Paths(first, second) => {
                self.path(pid, first)?;
                second.map_or(Ok(()), |second| self.path(pid, second))
            }
            Meaning::OpenHow(directory, address, how) => {
                let flags = memory::bytes(pid, how, 8)?;
                let flags = <[u8; 8]>::try_from(flags).map_err(|_| io::Error::other("short"))?;
                let does = calls::opened(u64::from_le_bytes(flags));
                let named = Named {
                    does,
                    directory,
                    address,
                };
                self.path(pid, named)
            }
            Meaning::Socket {
                listens,
                address,
                length,
            } => self.socket(pid, listens, address, length),
            Meaning::Message(at) => {
                // The address and its length come first (sendmsg(2)).
                let head = memory::bytes(pid, at, 12)?;
                let (Some(address), Some(length)) = (head.first_chunk(), head.last_chunk()) else {
                    return Ok(());
                };
                let address = u64::from_le_bytes(*address);
                let length = u32::from_le_bytes(*length).into();
                if address == 0 {
                    return Ok(());
                }
                self.socket(pid, false, address, length)
            }
            Meaning::Moves => Ok(()),
            Meaning::Unseen(unseen) => {
                self.unseen(unseen);
                Ok(())
            }
        }
    }

    fn path(&mut self, pid: Pid, named: Named) -> io::Result<()> {
        let Some(path) = memory::path(pid, named.address)? else {
            return Ok(());
        };
        // An empty one names what is open already.
        if path.is_empty() || self.parts.is_word(pid, &path) {
            return Ok(());
        }
        self.access(pid, named.does, named.directory, &path)
    }

    fn access(
        &mut self,
        pid: Pid,
        does: Does,
        directory: Directory,
        path: &[u8],
    ) -> io::Result<()> {
        let path = self.resolve(pid, directory, path)?;
        if !does.reads() {
            self.working = None;
        }
        if leads_through_process(&path) {
            self.unseen(Unseen::Calls);
        } else if !is_no_file(&path) {
            self.add(does, path);
        }
        Ok(())
    }

    /// The whole path a process means.
    fn resolve(&mut self, pid: Pid, directory: Directory, path: &[u8]) -> io::Result<Vec<u8>> {
        let (directory, rest) = match path.strip_prefix(WORKING_DIRECTORY) {
            Some(rest) => (Directory::Working, rest),
            None if path.starts_with(b"/") => return Ok(path.to_vec()),
            None => (directory, path),
        };
        let rest = OsStr::from_bytes(rest);
        let path = match (directory, &self.working) {
            (Directory::Working, Some(working)) => working.directory.join(rest),
            (Directory::Working, None) => {
                let directory = fs::read_link(format!("/proc/{pid}/cwd"))?;
                let path = directory.join(rest);
                let thread = pid;
                self.working = Some(Working { thread, directory });
                path
            }
            (Directory::Open(fd), _) => fs::read_link(format!("/proc/{pid}/fd/{fd}"))?.join(rest),
        };
        Ok(path.into_os_string().into_encoded_bytes())
    }

    fn add(&mut self, does: Does, path: Vec<u8>) {
        let reads = does.reads();
        let known = self.scope.owns(&path) || (reads && self.scope.knows(&path));
        let inside = self.parts.is_inside();
        if known && !inside {
            return;
        }
        // What a use finds counts when it is the first, or may change it.
        let exists = !reads || inside || !self.paths.contains_key(&path);
        let exists = exists && exists_now(&path);
        let access = comes_to(does, exists);
        self.parts.add(&path, access, exists);
        if known {
            return;
        }
        // What it finds absent after it has made or removed something there is its own doing.
        let uses = self.paths.entry(path).or_insert_with(|| Uses {
            absent: !exists,
            ..Uses::default()
        });
        uses.accesses.insert(access);
    }

    /// Another process in this machine is spoken to by a path (unix(7)); where there is nobody, this
    /// is a question whether there is.
    fn socket(&mut self, pid: Pid, listens: bool, address: u64, length: u64) -> io::Result<()> {
        const FAMILY: usize = size_of::<libc::sa_family_t>();
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let name = memory::bytes(pid, address, length.min(size_of::<libc::sockaddr_un>()))?;
        let Some((family, path)) = name.split_at_checked(FAMILY) else {
            return Ok(());
        };
        let family = family.try_into().map(libc::sa_family_t::from_ne_bytes);
        if !family.is_ok_and(|family| i32::from(family) == libc::AF_UNIX) {
            // Sockets of other families were noted when they were made, but for the kernel's own.
            return Ok(());
        }
        let end = path.iter().position(|byte| *byte == 0);
        let path = &path[..end.unwrap_or(path.len())];
        if path.is_empty() {
            // Listening at a name the kernel chooses disturbs nobody.
            if !listens {
                self.unseen(Unseen::Network);
            }
            return Ok(());
        }
        if !listens && self.scope.unnoted.iter().any(|name| name == path) {
            return Ok(());
        }
        if listens {
            return self.access(pid, Does::Make, Directory::Working, path);
        }
        self.access(pid, Does::Status, Directory::Working, path)?;
        let path = self.resolve(pid, Directory::Working, path)?;
        if exists_now(&path) {
            self.unseen(Unseen::Network);
        }
        Ok(())
    }
}

/// Whether a path is the kernel's or the machine's.
fn is_no_file(path: &[u8]) -> bool {
    NO_FILES.iter().any(|prefix| path.starts_with(prefix)) && !path.starts_with(SHARED_MEMORY)
}

/// Whether a path that looks like the kernel's leads to a file by way of a process (proc(5)), or back
/// out.
fn leads_through_process(path: &[u8]) -> bool {
    let has = |part: &[u8]| path.windows(part.len()).any(|window| window == part);
    let by_way = |part: &str| has(format!("/{part}/").as_bytes());
    is_no_file(path)
        && (by_way("..")
            || (path.starts_with(b"/proc/") && ["cwd", "root"].into_iter().any(by_way))
            || is_below_descriptor(path))
}

/// `/proc/self/fd/3/name`, but not `/proc/self/fd/3`.
fn is_below_descriptor(path: &[u8]) -> bool {
    let mut parts = path.split(|byte| *byte == b'/');
    parts.any(|part| part == b"fd") && parts.filter(|part| !part.is_empty()).count() > 1
}

/// What it comes to, given what is there before it happens: making a directory that is there changes
/// nothing, nor does removing what is not.
fn comes_to(does: Does, exists: bool) -> Access {
    match (does, exists) {
        (Does::Open, _) => Access::Open,
        (Does::Status, _) | (Does::Make, true) => Access::Status,
        (Does::Link, _) | (Does::Change | Does::Remove, false) => Access::Link,
        (Does::Make | Does::Put, false) => Access::Make,
        (Does::Put | Does::Change, true) => Access::Change,
        (Does::Remove, true) => Access::Remove,
    }
}

fn exists_now(path: &[u8]) -> bool {
    Path::new(OsStr::from_bytes(path))
        .symlink_metadata()
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_through_processes_are_no_dead_ends() {
        let through = |path: &str| leads_through_process(path.as_bytes());
        for path in [
            "/proc/self/fd/3/name",
            "/proc/7/cwd/name",
            "/proc/self/root/etc/x",
            "/dev/fd/3/name",
            "/dev/../etc/x",
        ] {
            assert!(through(path), "{path}");
        }
        for path in [
            "/proc/self/fd/3",
            "/proc/cpuinfo",
            "/dev/null",
            "/etc/fd/a/b",
            "/proc/self/fd",
        ] {
            assert!(!through(path), "{path}");
        }
    }
}
