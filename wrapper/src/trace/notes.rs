//! What is noted of calls: those handed over, and those their callers tell of through the shim.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Pid;

use super::calls::{self, Directory, Does, Meaning, Named};
use super::part::Parts;
use super::ring::Found;
use super::shim::Shim;
use super::words;
use super::{Access, Asked, Observed, Scope, Unseen, Uses, memory};

/// What lies there is the kernel's or the machine's, not an input.
const NO_FILES: [&[u8]; 3] = [b"/proc/", b"/sys/", b"/dev/"];
/// But this is a directory like any other.
const SHARED_MEMORY: &[u8] = b"/dev/shm/";
/// Another name of the caller's working directory.
const WORKING_DIRECTORY: &[u8] = b"/proc/self/cwd/";

/// What was noted so far.
pub(super) struct Notes {
    scope: Scope,
    shim: Option<Shim>,
    asked: Option<Arc<Asked>>,
    paths: HashMap<Vec<u8>, Uses>,
    libraries: HashSet<Vec<u8>>,
    unseen: BTreeSet<Unseen>,
    parts: Parts,
    working: Option<Working>,
    /// Whether the call being noted asks for the shim's memory.
    asks: bool,
}

/// Where the last caller works: one that makes a call makes many, and finding this out costs as much
/// as all the rest. Forgotten when another calls, and when anything may move.
struct Working {
    thread: Pid,
    directory: PathBuf,
}

impl Notes {
    /// Nothing yet. The shim is what the program was started with.
    pub(super) fn within(scope: Scope, shim: Option<Shim>, asked: Option<Arc<Asked>>) -> Self {
        Self {
            scope,
            shim,
            asked,
            paths: HashMap::new(),
            libraries: HashSet::new(),
            unseen: BTreeSet::new(),
            parts: Parts::default(),
            working: None,
            asks: false,
        }
    }

    /// Everything; and the shim, which what the program left behind may still load.
    pub(super) fn observed(mut self) -> (Observed, Option<Shim>) {
        self.read_shim();
        // Nobody reads any more.
        if let Some(shim) = &self.shim {
            shim.close();
        }
        let observed = Observed {
            paths: self.paths.into_iter().collect(),
            libraries: self.libraries.into_iter().collect(),
            unseen: self.unseen,
        };
        (observed, self.shim)
    }

    /// Notes a call while its caller waits. Returns whether it asks for the shim's memory.
    pub(super) fn note(
        &mut self,
        call: &libc::seccomp_notif,
        is_waiting: impl Fn() -> bool,
    ) -> Option<&Shim> {
        self.asks = false;
        let noted = self.try_note(call);
        if calls::moves(call.data.nr.into()) {
            self.working = None;
        }
        // A caller that died has not done what it was about to.
        if noted.is_err() && is_waiting() {
            self.unseen(Unseen::Memory);
        }
        self.shim.as_ref().filter(|_| self.asks)
    }

    /// Notes what programs said through the shim up to now.
    fn read_shim(&mut self) {
        let Some(mut shim) = self.shim.take() else {
            return;
        };
        let is_whole = shim.read(|said, path| {
            let does = match said.does {
                0 => Does::Open,
                1 => Does::Status,
                2 => Does::Link,
                _ => return self.unseen_by_all(Unseen::Memory),
            };
            self.parts.enter_attached(said.process);
            self.named(does, path.to_vec(), Some(said.found));
        });
        if !is_whole {
            self.unseen_by_all(Unseen::Memory);
        }
        self.shim = Some(shim);
    }

    fn unseen(&mut self, unseen: Unseen) {
        self.insert_unseen(unseen);
        self.parts.unseen(unseen);
    }

    fn insert_unseen(&mut self, unseen: Unseen) {
        self.unseen.insert(unseen);
        if self.scope.arguments
            && unseen.may_tell_arguments()
            && let Some(asked) = &self.asked
        {
            asked.set();
        }
    }

    /// Notes that something is not seen, whosever it may be.
    fn unseen_by_all(&mut self, unseen: Unseen) {
        self.insert_unseen(unseen);
        self.parts.unseen_by_all(unseen);
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
        if path.is_empty() || (path.starts_with(words::WORD) && self.heed(pid, &path)) {
            return Ok(());
        }
        self.access(pid, named.does, named.directory, &path)
    }

    /// Heeds what is said to us; false if it is nothing.
    fn heed(&mut self, pid: Pid, path: &[u8]) -> bool {
        // Whose what was said until now is changes.
        self.read_shim();
        if path == words::SEARCH.to_bytes() {
            self.shim.as_ref().inspect(|shim| shim.tell_vain());
            return true;
        }
        let Some(process) = path.strip_prefix(words::ATTACH) else {
            return self.parts.is_word(pid, path);
        };
        // In another namespace it has another number, and could be taken for another's (`pid_namespaces(7)`).
        self.asks = process == format!("{pid:x}", pid = pid.as_raw()).as_bytes();
        if self.asks {
            self.parts.attach(pid);
        }
        true
    }

    fn access(
        &mut self,
        pid: Pid,
        does: Does,
        directory: Directory,
        path: &[u8],
    ) -> io::Result<()> {
        let path = self.resolve(pid, directory, path)?;
        let is_filling = self.shim.as_ref().is_some_and(Shim::is_filling);
        if !does.reads() || is_filling {
            // What was there before it changes comes first. And whose call this is is asked again.
            self.read_shim();
            self.parts.enter(pid);
        }
        if !does.reads() {
            self.working = None;
        }
        self.named(does, path, None);
        Ok(())
    }

    /// Notes that something was done with a whole path, if it is that of a file. Where it is not known
    /// whether anything was `found` there, this is asked now.
    fn named(&mut self, does: Does, path: Vec<u8>, found: Option<Found>) {
        if self.scope.arguments && tells_arguments(&path) {
            self.unseen(Unseen::Arguments);
        }
        if leads_through_process(&path) {
            self.unseen(Unseen::Calls);
        } else if !is_no_file(&path) {
            self.add(does, path, found);
        }
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

    fn add(&mut self, does: Does, path: Vec<u8>, found: Option<Found>) {
        let reads = does.reads();
        let known = self.scope.owns(&path) || (reads && self.scope.knows(&path));
        let inside = self.parts.is_inside();
        if known && !inside {
            if does == Does::Open && is_library(&path) && was_there(&path, found) {
                self.libraries.insert(path);
            }
            return;
        }
        // What a use finds counts when it is the first, or may change it.
        let counts = !reads || inside || !self.paths.contains_key(&path);
        let exists = counts && was_there(&path, found);
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

/// Whether a file is one that crates are loaded from, going by its name.
fn is_library(path: &[u8]) -> bool {
    const ENDS: [&[u8]; 3] = [b".rlib", b".rmeta", b".so"];
    ENDS.iter().any(|end| path.ends_with(end))
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

/// Whether a path may be where the kernel tells how a process was called (proc(5)), wherever that is mounted. Not how
/// the kernel itself was, and not a directory of that name.
fn tells_arguments(path: &[u8]) -> bool {
    let is_directory = || Path::new(OsStr::from_bytes(path)).is_dir();
    path.ends_with(b"/cmdline") && path != b"/proc/cmdline" && !is_directory()
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

/// Whether something is at a path, where so much is known. Who asks now comes before all that those who
/// are watched change.
fn was_there(path: &[u8], found: Option<Found>) -> bool {
    match found {
        None => exists_now(path),
        Some(Found::Something) => true,
        Some(Found::Nothing) => false,
        // A file that is there by now has come from elsewhere.
        Some(Found::NoWay) => is_link_now(path),
    }
}

fn is_link_now(path: &[u8]) -> bool {
    let meta = Path::new(OsStr::from_bytes(path)).symlink_metadata();
    meta.is_ok_and(|meta| meta.is_symlink())
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
    fn arguments_are_where_the_kernel_tells_them() {
        for path in [
            "/proc/self/cmdline",
            "//proc/7/task/8/cmdline",
            "/usr/../proc/self/cmdline",
            "/elsewhere/self/cmdline",
        ] {
            assert!(tells_arguments(path.as_bytes()), "{path}");
        }
        for path in ["/proc/cmdline", "/proc/self/cmdlines", "/proc/self/environ"] {
            assert!(!tells_arguments(path.as_bytes()), "{path}");
        }
        let dir = tempfile::tempdir().expect("tempdir");
        let project = dir.path().join("cmdline");
        fs::create_dir(&project).expect("mkdir");
        assert!(!tells_arguments(project.as_os_str().as_bytes()));
    }

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
