//! A part of a watched run that somebody in it wants to know by itself.
//!
//! Under one watch there is no other (seccomp(2), EBUSY). So a program in a watched run tells the
//! listener, by asking for paths that nobody else asks for, when its part begins and ends: the part is
//! itself and what it starts meanwhile. At the end the listener writes what the part did into a file of
//! the program's. `cc` is the program. Where nobody listens, the file stays empty.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

use super::{Access, Observed, Unseen, Uses};

/// Nothing is called so.
const BEGIN: &str = "/proc/self/kachefs-part/begin";
const END: &str = "/proc/self/kachefs-part/end/";

/// How far up the ancestors of a process are followed.
const MOST_ANCESTORS: u32 = 64;

/// One's own part. To be begun and finished by the only thread of a process, before it starts others.
pub(crate) struct Part(File);

impl Part {
    /// What happens from now on is part of it.
    pub(crate) fn begin() -> io::Result<Self> {
        let file = memfd_create("kachefs-part", MFdFlags::MFD_CLOEXEC)?;
        // That nothing is there is what is expected.
        let _: io::Result<_> = fs::metadata(BEGIN);
        Ok(Self(file.into()))
    }

    /// What it did; `None` where no listener was told.
    pub(crate) fn finish(mut self) -> Option<Observed> {
        let _: io::Result<_> = fs::metadata(format!("{END}{}", self.0.as_raw_fd()));
        let mut said = Vec::new();
        self.0.seek(SeekFrom::Start(0)).ok()?;
        self.0.read_to_end(&mut said).ok()?;
        postcard::from_bytes(&said).ok()
    }
}

/// The parts of a run, as its listener knows them.
#[derive(Default)]
pub(super) struct Parts {
    active: HashMap<Pid, Noted>,
    /// Threads seen while a part was active: when each began, and whose part it is in.
    seen: HashMap<Pid, (u64, Option<Pid>)>,
    /// Processes that speak through the shim, and whose part each is in.
    attached: HashMap<u32, Option<Pid>>,
    /// The part of the call being noted.
    inside: Option<Pid>,
}

struct Noted {
    /// When the program began whose part it is: another may get its number.
    start: u64,
    paths: HashMap<Vec<u8>, Uses>,
    unseen: BTreeSet<Unseen>,
}

impl Parts {
    /// A call of this thread is noted next.
    pub(super) fn enter(&mut self, thread: Pid) {
        self.inside = None;
        if self.active.is_empty() {
            return;
        }
        match self.part_of(thread) {
            Ok(part) => self.inside = part.filter(|part| self.active.contains_key(part)),
            // One whose ancestors are gone may be anybody's.
            Err(_) => self.unseen_by_all(Unseen::ProcessLeft),
        }
    }

    /// Notes that something is not seen of any part.
    pub(super) fn unseen_by_all(&mut self, unseen: Unseen) {
        for noted in self.active.values_mut() {
            noted.unseen.insert(unseen);
        }
    }

    /// A process is about to speak through the shim.
    pub(super) fn attach(&mut self, process: Pid) {
        self.enter(process);
        self.set_attached(process, self.inside);
    }

    fn set_attached(&mut self, process: Pid, part: Option<Pid>) {
        self.attached.insert(process.as_raw().cast_unsigned(), part);
    }

    /// What this process said through the shim is noted next.
    pub(super) fn enter_attached(&mut self, process: u32) {
        let part = self.attached.get(&process).copied().flatten();
        self.inside = part.filter(|part| self.active.contains_key(part));
    }

    /// Whether the call being noted is part of any.
    pub(super) fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// Notes an access.
    pub(super) fn add(&mut self, path: &[u8], access: Access, exists: bool) {
        let Some(noted) = self.inside.and_then(|part| self.active.get_mut(&part)) else {
            return;
        };
        let uses = noted.paths.entry(path.to_vec()).or_insert_with(|| Uses {
            absent: !exists,
            ..Uses::default()
        });
        uses.accesses.insert(access);
    }

    /// Notes that something is not seen.
    pub(super) fn unseen(&mut self, unseen: Unseen) {
        if let Some(noted) = self.inside.and_then(|part| self.active.get_mut(&part)) {
            noted.unseen.insert(unseen);
        }
    }

    /// Whether a path is a word to the listener, which is then heeded.
    pub(super) fn is_word(&mut self, thread: Pid, path: &[u8]) -> bool {
        if path == BEGIN.as_bytes() {
            self.seen.remove(&thread);
            if let Ok(Stat { start, .. }) = Stat::of(thread) {
                let noted = Noted {
                    start,
                    paths: HashMap::new(),
                    unseen: BTreeSet::new(),
                };
                self.active.insert(thread, noted);
                self.set_attached(thread, Some(thread));
            }
            return true;
        }
        let Some(fd) = path.strip_prefix(END.as_bytes()) else {
            return false;
        };
        if let (Some(noted), Ok(fd)) = (self.active.remove(&thread), std::str::from_utf8(fd)) {
            // Perhaps it is in another's.
            self.attach(thread);
            let observed = self.finished(thread, noted);
            // Nothing was said then, and the program takes it so.
            let _: io::Result<()> = tell(thread, fd, &observed);
        }
        true
    }

    fn finished(&mut self, part: Pid, mut noted: Noted) -> Observed {
        let in_part = |(_, of): &(u64, Option<Pid>)| *of == Some(part);
        let left = self.seen.iter().any(|(thread, seen)| {
            in_part(seen) && *thread != part && Stat::of(*thread).is_ok_and(|is| is.start == seen.0)
        });
        if left {
            noted.unseen.insert(Unseen::ProcessLeft);
        }
        self.seen.retain(|_, seen| !in_part(seen));
        Observed {
            paths: noted.paths.into_iter().collect(),
            libraries: BTreeSet::new(),
            unseen: noted.unseen,
        }
    }

    /// Whose part a thread is in: that of its nearest ancestor who has one.
    fn part_of(&mut self, thread: Pid) -> io::Result<Option<Pid>> {
        let stat = Stat::of(thread)?;
        if self.has_part(thread, &stat) {
            return Ok(Some(thread));
        }
        if let Some((start, part)) = self.seen.get(&thread)
            && *start == stat.start
        {
            return Ok(*part);
        }
        let mut at = stat.parent;
        for _ in 0..MOST_ANCESTORS {
            if at == Pid::this() {
                self.seen.insert(thread, (stat.start, None));
                return Ok(None);
            }
            if at.as_raw() <= 1 {
                break;
            }
            let above = Stat::of(at)?;
            if self.has_part(at, &above) {
                self.seen.insert(thread, (stat.start, Some(at)));
                return Ok(Some(at));
            }
            at = above.parent;
        }
        Err(io::Error::other("its ancestors are gone"))
    }

    /// Whether a program has begun a part. One that died in its part has none any more.
    fn has_part(&mut self, program: Pid, stat: &Stat) -> bool {
        let Some(noted) = self.active.get(&program) else {
            return false;
        };
        let same = noted.start == stat.start;
        if !same {
            self.active.remove(&program);
        }
        same
    }
}

/// Writes what a part did into a file its program has open.
fn tell(program: Pid, fd: &str, observed: &Observed) -> io::Result<()> {
    let said = postcard::to_stdvec(observed).map_err(io::Error::other)?;
    let path = format!(
        "/proc/{program}/fd/{}",
        fd.parse::<u32>().map_err(io::Error::other)?
    );
    if !fs::metadata(&path)?.is_file() {
        return Err(io::Error::other("no file"));
    }
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(Path::new(&path))?;
    file.write_all(&said)
}

/// What the kernel says of a thread (proc(5), `/proc/pid/stat`).
struct Stat {
    /// Its process's parent.
    parent: Pid,
    /// When it began.
    start: u64,
}

impl Stat {
    fn of(thread: Pid) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{thread}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::other("an odd stat"))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name may hold anything.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Self {
            parent: Pid::from_raw(fields.get(1)?.parse().ok()?),
            start: fields.get(19)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says() {
        let text = "7 (a) b) S 3 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 100 5\n";
        let stat = Stat::parse(text).expect("a stat");
        assert_eq!((stat.parent.as_raw(), stat.start), (3, 4711));
        let own = Stat::of(Pid::this()).expect("our own");
        assert_eq!(own.parent, Pid::parent());
    }

    #[test]
    fn without_a_listener_nothing_is_said() {
        let part = Part::begin().expect("begins");
        assert_eq!(part.finish(), None);
    }
}
