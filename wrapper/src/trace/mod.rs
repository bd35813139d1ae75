//! Watching what a program, and all it starts, asks of the file system.
//!
//! A seccomp filter hands the calls that open, look at or change names to the watcher, a process of
//! ours, which notes them and lets the kernel go on (`seccomp_unotify(2)`). A filter follows forks and threads by
//! itself, and a debugger may still attach. Where the kernel or a container forbids it,
//! [`Watch::start`] says so and the program runs unwatched. `run` calls it; what an access means for a
//! key is the daemon's business.

mod asked;
mod calls;
mod filter;
mod listener;
mod loader;
mod memory;
mod notes;
mod part;
// The shim is the one that writes.
#[cfg_attr(not(test), expect(dead_code))]
mod ring;
mod scope;
mod search;
mod shim;
mod watcher;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::asked::Asked;
pub(crate) use self::part::Part;
pub use self::scope::Scope;
pub use self::words::ALLOCATOR_IS_TOLD;

use self::shim::Shim;
use self::watcher::Watcher;

/// One thing a program did with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Access {
    /// Opened it for reading, or ran it: a file's content, a directory's names.
    Open,
    /// Asked what it is, following links.
    Status,
    /// Asked what it is without following a last link, or where that leads.
    Link,
    /// Made it where nothing was.
    Make,
    /// Changed or replaced what was there.
    Change,
    /// Took it away.
    Remove,
}

/// Why the accesses of a run do not tell everything it depended on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Unseen {
    /// It talked to another process or machine.
    Network,
    /// It left a process behind.
    ProcessLeft,
    /// It changed what paths mean: a mount, a root, a namespace.
    Mounts,
    /// It made calls that cannot be watched: of another architecture, or through `io_uring`.
    Calls,
    /// The memory of one of its processes could not be read.
    Memory,
    /// It asked the kernel for a process's arguments, where they are not its caller's ([`Scope::arguments`]).
    Arguments,
}

impl Unseen {
    /// The stable name, for counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::ProcessLeft => "process-left-behind",
            Self::Mounts => "changes-mounts",
            Self::Calls => "unwatchable-calls",
            Self::Memory => "unreadable-process",
            Self::Arguments => "reads-arguments",
        }
    }

    /// Whether somebody may have learnt how the program was called, for all that was seen.
    pub fn may_tell_arguments(self) -> bool {
        match self {
            Self::Arguments | Self::Calls | Self::Memory | Self::Mounts => true,
            Self::Network | Self::ProcessLeft => false,
        }
    }
}

/// Several kinds of access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accesses(u8);

impl Accesses {
    /// Adds one.
    pub fn insert(&mut self, access: Access) {
        self.0 |= 1 << access as u8;
    }

    /// Whether it is the only one.
    pub fn is_only(self, access: Access) -> bool {
        self.0 == 1 << access as u8
    }

    /// Whether it is among them.
    pub fn contains(self, access: Access) -> bool {
        self.0 & (1 << access as u8) != 0
    }
}

/// What a run did with one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uses {
    /// Everything it did.
    pub accesses: Accesses,
    /// Whether nothing was there when it first did something.
    pub absent: bool,
}

/// What a run was seen to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// The paths it used: absolute, and as it spelled them.
    pub paths: BTreeMap<Vec<u8>, Uses>,
    /// Crates and libraries it opened where nothing else is noted, as it spelled them: in what is known, or its own
    /// ([`Scope`]). Not told of parts ([`Part`]), which load none.
    pub libraries: BTreeSet<Vec<u8>>,
    /// What was not seen.
    pub unseen: BTreeSet<Unseen>,
}

/// When set, nothing is watched: as where the kernel or a container forbids it.
pub const UNWATCHED: &str = "KACHEFS_UNWATCHED";

/// Whether programs can be watched here; an error says why not.
pub fn is_possible() -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--version").stdout(Stdio::null());
    let (_, observed) = Watch::start(command, Scope::default())?.finish()?;
    let unseen = observed.unseen.first();
    unseen.map_or(Ok(()), |unseen| Err(io::Error::other(unseen.name())))
}

/// A program to be watched.
pub struct Program {
    /// How it is started.
    pub command: Command,
    /// The libraries its loader is known to find for it, in this order. Given those by their paths it need not
    /// look for them, and each look is handed over. Should it by now find others, it runs with those it would
    /// find.
    pub libraries: Vec<Vec<u8>>,
    /// What its allocator is told, if that is jemalloc (jemalloc(3), "TUNING"), where the user has told it nothing
    /// and neither it nor what it starts gets to know ([`ALLOCATOR_IS_TOLD`]). Empty for nothing.
    pub allocator: Vec<u8>,
    /// Who is to know at once that something may have asked for its arguments, where that is noted.
    pub asked: Option<Arc<Asked>>,
}

impl From<Command> for Program {
    fn from(command: Command) -> Self {
        Self {
            command,
            libraries: Vec::new(),
            allocator: Vec::new(),
            asked: None,
        }
    }
}

/// A program being watched.
pub struct Watch(Watcher);

impl Watch {
    /// Starts a program under watch, noting what `scope` leaves. An error says that watching is
    /// impossible here, or that the program cannot be started; nothing runs then.
    ///
    /// Another process starts it: pipes it is to use must be made before, and its standard output and
    /// error must not be [`Stdio::piped`].
    pub fn start(program: impl Into<Program>, scope: Scope) -> io::Result<Self> {
        if env::var_os(UNWATCHED).is_some() {
            return Err(io::Error::other(format!("{UNWATCHED} is set")));
        }
        Watcher::start(program.into(), scope, Shim::new).map(Self)
    }

    /// Waits for the program's end. Processes it leaves behind are served on: a filter without a
    /// listener would fail their calls.
    pub fn finish(self) -> io::Result<(ExitStatus, Observed)> {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;
    use std::thread;

    fn observe(script: &str, cwd: &Path) -> (ExitStatus, Observed, String) {
        observe_within(Scope::default(), script, cwd)
    }

    fn observe_within(scope: Scope, script: &str, cwd: &Path) -> (ExitStatus, Observed, String) {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script).current_dir(cwd);
        let (mut stdout, theirs) = io::pipe().expect("pipe");
        command.stdout(theirs);
        let watch = Watch::start(command, scope).expect("starts");
        let mut said = String::new();
        stdout.read_to_string(&mut said).expect("reads");
        let (status, observed) = watch.finish().expect("ends");
        (status, observed, said)
    }

    fn uses(observed: &Observed, path: &Path) -> Uses {
        let uses = observed.paths.get(path.as_os_str().as_bytes());
        uses.copied().unwrap_or_default()
    }

    #[test]
    fn sees_what_children_read_make_and_miss() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        fs::write(at("read"), "text").expect("writes");
        fs::write(at("old"), "text").expect("writes");
        fs::create_dir(at("listed")).expect("mkdir");
        let script = "cat read; ls listed; test -e missing; mkdir -p listed made; \
                      echo x > made/new; rm old; rm -f missing; (sleep 0; cat made/new)";
        let (status, observed, said) = observe(script, dir.path());
        assert!(status.success());
        assert_eq!(said, "textx\n");
        assert_eq!(observed.unseen, BTreeSet::new());
        for (access, name) in [
            (Access::Open, "read"),
            (Access::Open, "listed"),
            (Access::Status, "missing"),
            (Access::Make, "made"),
            (Access::Make, "made/new"),
            (Access::Open, "made/new"),
            (Access::Remove, "old"),
        ] {
            let accesses = uses(&observed, &at(name)).accesses;
            assert!(accesses.contains(access), "{access:?} {name}: {observed:?}");
        }
        assert!(uses(&observed, &at("missing")).absent);
        assert!(uses(&observed, &at("made")).absent);
        assert!(!uses(&observed, &at("read")).absent);
        let changed = |uses: &Uses| uses.accesses.contains(Access::Change);
        assert!(!observed.paths.values().any(changed), "{observed:?}");
    }

    #[test]
    fn sees_which_crates_are_opened_where_nothing_else_is_noted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join("deps").join(name);
        fs::create_dir(dir.path().join("deps")).expect("mkdir");
        for name in ["liba.rlib", "liba.rmeta", "libb.so", "libc.rmeta", "a.d"] {
            fs::write(at(name), "text").expect("writes");
        }
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let deps = bytes(&dir.path().join("deps"));
        let scope = Scope {
            known: vec![deps.clone()],
            own: vec![deps],
            ..Scope::default()
        };
        let script = "cd deps; cat liba.rlib libb.so a.d; test -e libc.rmeta; echo x > liba.rmeta; \
                      cat libd.rlib || true";
        let (status, observed, _) = observe_within(scope, script, dir.path());
        assert!(status.success());
        let opened = ["liba.rlib", "libb.so"].map(|name| bytes(&at(name)));
        assert_eq!(observed.libraries, BTreeSet::from(opened));
        let noted = observed
            .paths
            .keys()
            .find(|path| path.ends_with(b"liba.rlib"));
        assert_eq!(noted, None);
    }

    #[test]
    fn sees_whom_datagrams_are_sent_to() {
        let dir = tempfile::tempdir().expect("tempdir");
        let socket = UnixDatagram::bind(dir.path().join("socket")).expect("binds");
        let send = |call: &str, name: &str| {
            let program = format!(
                "import socket\ns = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
                 try: s.{call}\nexcept FileNotFoundError: pass"
            );
            let program = program.replace("NAME", name);
            let (status, observed, _) = observe(&format!("python3 -c '{program}'"), dir.path());
            assert!(status.success(), "{call}");
            (observed.unseen, observed.paths)
        };
        for call in [
            "sendto(b\"x\", \"NAME\")",
            "sendmsg([b\"x\"], [], 0, \"NAME\")",
        ] {
            let (unseen, _) = send(call, "socket");
            assert_eq!(unseen, BTreeSet::from([Unseen::Network]), "{call}");
            assert_eq!(socket.recv(&mut [0; 8]).expect("receives"), 1);
            // Where nobody listens, it is a question whether somebody does.
            let (unseen, paths) = send(call, "missing");
            assert_eq!(unseen, BTreeSet::new(), "{call}");
            let missing = dir
                .path()
                .join("missing")
                .into_os_string()
                .into_encoded_bytes();
            assert!(paths[&missing].absent, "{call}");
        }
    }

    #[test]
    fn sees_the_link_a_program_goes_through() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("one")).expect("mkdir");
        fs::write(dir.path().join("one/f"), "text").expect("writes");
        std::os::unix::fs::symlink("one", dir.path().join("current")).expect("links");
        let (status, observed, said) = observe("cd current && cat f", dir.path());
        assert!(status.success());
        assert_eq!(said, "text");
        let link = uses(&observed, &dir.path().join("current"));
        assert!(link.accesses.contains(Access::Link), "{observed:?}");
    }

    #[test]
    fn sees_where_a_program_has_gone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let read = ["a/one", "b/two", "a/three", "c/four"];
        for file in read {
            let file = dir.path().join(file);
            fs::create_dir_all(file.parent().expect("has one")).expect("mkdir");
            fs::write(file, "").expect("writes");
        }
        // By path, by descriptor, and while the directory it is in gets another name.
        let program = "import os\nopen('a/one')\nfd = os.open('a', 0)\nos.chdir('b')\n\
                       open('two')\nos.fchdir(fd)\nopen('three')\nos.chdir('../c')\n\
                       os.rename('../c', '../d')\nopen('four')";
        let (status, observed, _) = observe(&format!("python3 -c \"{program}\""), dir.path());
        assert!(status.success());
        for file in ["a/one", "b/two", "a/three", "d/four"] {
            let opened = uses(&observed, &dir.path().join(file)).accesses;
            assert!(opened.contains(Access::Open), "{file}: {observed:?}");
        }
    }

    #[test]
    fn those_left_behind_go_on() {
        let dir = tempfile::tempdir().expect("tempdir");
        let script = "(sleep 1; echo late > late) >/dev/null 2>&1 &";
        let (status, observed, _) = observe(script, dir.path());
        assert!(status.success());
        assert!(observed.unseen.contains(&Unseen::ProcessLeft));
        let late = dir.path().join("late");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while fs::read(&late).ok().as_deref() != Some(b"late\n") {
            assert!(std::time::Instant::now() < deadline, "its calls fail");
            thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    #[test]
    fn those_left_behind_are_answered_while_the_end_is_told() {
        let dir = tempfile::tempdir().expect("tempdir");
        // More than a socket takes at once; and it holds the pipe that is read to its end before.
        let script = "i=0; while [ $i -lt 9000 ]; do [ -e missing-$i ]; i=$((i+1)); done; \
                      (sleep 1; [ -e missing ]; echo late) &";
        let (status, observed, said) = observe(script, dir.path());
        assert!(status.success());
        assert_eq!(said, "late\n");
        assert!(observed.unseen.contains(&Unseen::ProcessLeft));
    }

    #[test]
    fn programs_that_cannot_be_started_say_so() {
        let error = Watch::start(Command::new("/nowhere/program"), Scope::default()).err();
        let error = error.expect("nothing to start");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
