//! The listening end of the filter: notes each call and lets it go on.
//!
//! Whoever made the call waits meanwhile, so it is answered as soon as it is understood. The
//! arguments may change behind our back (another thread of the caller): this is a record of what
//! honest programs do, not a sandbox.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
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

    /// Notes calls until nobody is left who could make one, or `ended` closes and those left after it
    /// take too long.
    pub(super) fn watch(mut self, ended: &PipeReader, scope: Scope) -> (Observed, Self) {
        let mut notes = Notes::within(scope);
        let mut deadline: Option<Instant> = None;
        // One that never ceases to make calls does not hold up the build.
        while deadline.is_none_or(|deadline| Instant::now() < deadline) {
            let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                // Rounded up: nothing is asked in a hurry in the last millisecond.
                PollTimeout::try_from(left + TICK).unwrap_or(PollTimeout::ZERO)
            });
            let mut waiting = [
                PollFd::new(self.fd.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            let sources = if deadline.is_some() { 1 } else { 2 };
            match poll(&mut waiting[..sources], timeout) {
                Ok(0) => break,
                Ok(_) => {}
                // Whoever waits for an answer must get it, later then.
                Err(_) => {
                    thread::sleep(TICK);
                    continue;
                }
            }
            let happened = |at: usize| waiting[at].revents().unwrap_or(PollFlags::empty());
            let (calls, end) = (happened(0), happened(1));
            if calls.contains(PollFlags::POLLIN) {
                self.serve(Some(&mut notes));
            } else if calls.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
                self.over = true;
                break;
            }
            if deadline.is_none() && !end.is_empty() {
                deadline = Some(Instant::now() + GRACE);
            }
        }
        (notes.observed(), self)
    }

    /// Receives one call, notes it and lets it go on.
    fn serve(&self, notes: Option<&mut Notes>) {
        // SAFETY: all zeroes is a value of this plain struct, and what the kernel asks for.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let received = ioctl(
            &self.fd,
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            (&raw mut call).cast(),
        );
        // The caller may have died before it could be asked.
        if received.is_err() {
            return;
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
                Ok(_) if happened.contains(PollFlags::POLLIN) => self.serve(None),
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

/// What was noted so far.
struct Notes {
    scope: Scope,
    paths: HashMap<Vec<u8>, Uses>,
    unseen: BTreeSet<Unseen>,
    parts: Parts,
}

impl Notes {
    fn within(scope: Scope) -> Self {
        Self {
            scope,
            paths: HashMap::new(),
            unseen: BTreeSet::new(),
            parts: Parts::default(),
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
        let path = resolve(pid, directory, path)?;
        if leads_through_process(&path) {
            self.unseen(Unseen::Calls);
        } else if !is_no_file(&path) {
            self.add(does, path);
        }
        Ok(())
    }

    fn add(&mut self, does: Does, path: Vec<u8>) {
        let reads = matches!(does, Does::Open | Does::Status | Does::Link);
        let known = self.scope.owns(&path) || (reads && self.scope.knows(&path));
        if known && !self.parts.is_inside() {
            return;
        }
        let exists = exists(&path);
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
        if exists(&resolve(pid, Directory::Working, path)?) {
            self.unseen(Unseen::Network);
        }
        Ok(())
    }
}

/// The whole path a process means.
fn resolve(pid: Pid, directory: Directory, path: &[u8]) -> io::Result<Vec<u8>> {
    let (directory, rest) = match path.strip_prefix(WORKING_DIRECTORY) {
        Some(rest) => (Directory::Working, rest),
        None if path.starts_with(b"/") => return Ok(path.to_vec()),
        None => (directory, path),
    };
    let start = match directory {
        Directory::Working => format!("/proc/{pid}/cwd"),
        Directory::Open(fd) => format!("/proc/{pid}/fd/{fd}"),
    };
    let start = std::fs::read_link(start)?;
    let path = start.join(OsStr::from_bytes(rest));
    Ok(path.into_os_string().into_encoded_bytes())
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

fn exists(path: &[u8]) -> bool {
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
