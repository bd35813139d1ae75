//! Compilers that write to another directory than cargo told them, the wrapper's part.
//!
//! The daemon gives the directory and puts what was made into the view (`kachefs::service::aside`). The
//! wrapper tells the compiler, corrects what it says, and where the daemon is gone puts the files where they
//! belong itself.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};

use crate::artifacts::{self, Artifact};
use crate::protocol::{self, Decision, Outcome, Report, Run};
use crate::roots::{Roots, is_plain_path};

/// Both directories.
#[derive(Clone, Copy)]
pub struct Told<'a> {
    /// The one cargo named.
    pub out_dir: &'a Path,
    /// The one the compiler is told.
    pub aside: &'a Path,
}

/// Whether a path is written alike in arguments, JSON and dep-info.
pub fn is_plain(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    is_plain_path(bytes) && !bytes.contains(&b'=')
}

/// The names of all files that a compiler has made in a directory.
pub fn made(directory: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        // Those are not the compiler's.
        if !name.as_bytes().starts_with(b".") && entry.file_type()?.is_file() {
            names.push(name);
        }
    }
    Ok(names)
}

impl Told<'_> {
    /// The path cargo named, and the one that stands in its place: what diagnostics show again.
    pub fn remap(&self) -> (String, String) {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        (text(self.out_dir), text(self.aside))
    }

    /// Whether a file of this name names the outputs by their paths, as dep-info does.
    pub fn is_edited(name: &OsStr) -> bool {
        Path::new(name).extension() == Some(OsStr::new("d"))
    }

    /// What such a file should hold.
    pub fn edit(&self, text: &[u8]) -> Vec<u8> {
        Roots::unremap(text, &[self.remap()])
    }
}

/// A directory that is ours for as long as this lives, whatever becomes of the daemon.
pub(crate) struct Held {
    out_dir: PathBuf,
    aside: PathBuf,
    /// What others may read in its place by now. Nobody must touch it again.
    placed: HashSet<OsString>,
    /// Whether the daemon places nothing any more.
    is_alone: bool,
    _lock: Flock<File>,
}

impl Held {
    /// Takes hold of the directory that a run names, with the compiler's arguments for it. `None` where the
    /// compiler writes where it is told, also because nothing can be written there.
    pub(crate) fn of(run: &Run, arguments: &[OsString]) -> Option<(Self, Vec<OsString>)> {
        let (aside, out_dir) = run.aside.as_ref()?;
        let held = Self::take(aside, out_dir).ok()?;
        let arguments = held.arguments(arguments)?;
        Some((held, arguments))
    }

    fn take(aside: &[u8], out_dir: &[u8]) -> io::Result<Self> {
        let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        let (aside, out_dir) = (path(aside), path(out_dir));
        let lock =
            Flock::lock(File::open(&aside)?, FlockArg::LockSharedNonblock).map_err(|(_, e)| e)?;
        // It may have been cleared before it was locked.
        if lock.metadata()?.nlink() == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        // In a container it may be there, and not for us.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(aside.join(".held"))?;
        Ok(Self {
            out_dir,
            aside,
            placed: HashSet::new(),
            is_alone: false,
            _lock: lock,
        })
    }

    fn told(&self) -> Told<'_> {
        Told {
            out_dir: &self.out_dir,
            aside: &self.aside,
        }
    }

    /// The arguments with this directory in them; `None` when they name another than it stands for.
    fn arguments(&self, arguments: &[OsString]) -> Option<Vec<OsString>> {
        let mut arguments = arguments.to_vec();
        let (at, named) = out_dir(&arguments)?;
        if named != self.out_dir.as_os_str() {
            return None;
        }
        let whole = arguments[at].len() == named.len();
        let aside = self.aside.as_os_str().as_bytes();
        arguments[at] = if whole {
            self.aside.clone().into_os_string()
        } else {
            OsString::from_vec([OUT_DIR, b"=", aside].concat())
        };
        Some(arguments)
    }

    /// Whether somebody has taken it away.
    pub(crate) fn is_gone(&self) -> bool {
        !self.aside.exists()
    }

    /// Has an output put into its place before others hear that it is there, for they go on to read it. Whether
    /// they may hear.
    pub(crate) fn hear(&mut self, output: &Artifact<'_>, stream: &UnixStream) -> bool {
        let Some(name) = name_of(output) else {
            return true;
        };
        if !self.is_alone && is_placed(stream, name) {
            self.placed.insert(name.to_owned());
            return true;
        }
        self.part_with(stream);
        // If that fails, all of it will at the end, and the compiler runs again.
        self.place(name).is_ok()
    }

    /// From here on the daemon places nothing: what it placed late would replace what others read by now.
    fn part_with(&mut self, stream: &UnixStream) {
        self.is_alone = true;
        // Gone already is as good.
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Puts all other files into their places. An error, too, if anything is missing of what the compiler says
    /// it has made.
    pub(crate) fn place_all(mut self, stream: &UnixStream, said: &[u8]) -> io::Result<()> {
        self.part_with(stream);
        for name in made(&self.aside)? {
            if !self.placed.contains(&name) {
                self.place(&name)?;
            }
        }
        for output in artifacts::announced(said) {
            if !name_of(&output).is_some_and(|name| self.placed.contains(name)) {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
        // Else the next daemon does.
        let _ = fs::remove_dir_all(&self.aside);
        Ok(())
    }

    /// In place of what is there, not into it: others may have that open.
    fn place(&mut self, name: &OsStr) -> io::Result<()> {
        let from = self.aside.join(name);
        let unfinished = self.out_dir.join(unfinished_name());
        let copied = || {
            // With the mode that a compiler's files get.
            let mut to = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&unfinished)?;
            if Told::is_edited(name) {
                to.write_all(&self.told().edit(&fs::read(&from)?))?;
            } else {
                io::copy(&mut File::open(&from)?, &mut to)?;
            }
            fs::rename(&unfinished, self.out_dir.join(name))
        };
        copied().inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
        self.placed.insert(name.to_owned());
        Ok(())
    }
}

fn name_of<'a>(output: &'a Artifact<'_>) -> Option<&'a OsStr> {
    Path::new(output.artifact.as_ref()).file_name()
}

/// Nobody else's, also not of a process that was killed.
fn unfinished_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    format!(".kachefs-{}-{now:x}", std::process::id())
}

/// Has the daemon give a file its name in the view. Whether it did.
fn is_placed(stream: &UnixStream, name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let heard = protocol::send(stream, &Report::<_, &Outcome>::Made(name));
    let decision = heard.and_then(|()| protocol::decision(stream));
    matches!(decision, Ok(Decision::Placed(true)))
}

/// The option that names the directory to write to.
const OUT_DIR: &[u8] = b"--out-dir";

/// The directory that a compiler is told to write to, and which argument says so.
pub(crate) fn out_dir(arguments: &[OsString]) -> Option<(usize, &OsStr)> {
    let is_it = |argument: &OsString| argument.as_bytes().starts_with(OUT_DIR);
    let at = arguments.iter().position(is_it)?;
    match arguments[at].as_bytes().strip_prefix(OUT_DIR)? {
        [] => Some((at + 1, arguments.get(at + 1)?)),
        [b'=', path @ ..] => Some((at, OsStr::from_bytes(path))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn finds_the_out_dir() {
        let found = |arguments: &[&str]| {
            let arguments = words(arguments);
            let found = out_dir(&arguments);
            found.map(|(at, path)| (at, path.to_owned()))
        };
        assert_eq!(found(&["rustc", "--out-dir", "/t"]), Some((2, "/t".into())));
        let one = found(&["rustc", "--out-dir=/t", "x"]);
        assert_eq!(one, Some((1, "/t".into())));
        assert_eq!(found(&["rustc", "-vV"]), None);
        assert_eq!(found(&["rustc", "--out-dir"]), None);
    }

    /// A directory held for another, of which a daemon was to know that is gone.
    struct Alone {
        dir: tempfile::TempDir,
        held: Held,
        stream: UnixStream,
    }

    impl Alone {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("tempdir");
            for name in ["aside", "deps"] {
                fs::create_dir(dir.path().join(name)).expect("mkdir");
            }
            let [aside, deps] = ["aside", "deps"].map(|name| dir.path().join(name));
            let held = Held::take(aside.as_os_str().as_bytes(), deps.as_os_str().as_bytes());
            let (stream, _) = UnixStream::pair().expect("connects");
            Self {
                held: held.expect("takes"),
                dir,
                stream,
            }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn make(&self, name: &str, text: &str) {
            fs::write(self.path("aside").join(name), text).expect("writes");
        }

        /// What the compiler says of what it made, as others are to see it.
        fn said(&self, emit: &str, name: &str) -> Vec<u8> {
            let path = self.path("deps").join(name);
            let path = path.display();
            format!(
                "{{\"$message_type\":\"artifact\",\"artifact\":\"{path}\",\"emit\":\"{emit}\"}}\n"
            )
            .into()
        }

        fn hears(&mut self, said: &[u8]) -> bool {
            let output = artifacts::announced(said).next().expect("an output");
            self.held.hear(&output, &self.stream)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path("deps").join(name)).expect("reads")
        }
    }

    #[test]
    fn who_is_alone_places_everything_once() {
        let mut alone = Alone::new();
        alone.make("libx.rmeta", "metadata");
        let metadata = alone.said("metadata", "libx.rmeta");
        assert!(alone.hears(&metadata));
        assert_eq!(alone.read("libx.rmeta"), "metadata");

        fs::write(alone.path("deps/libx.rlib"), "of before").expect("writes");
        alone.make("libx.rmeta", "must not be touched again");
        alone.make("libx.rlib", "code");
        let aside = alone.path("aside");
        alone.make("x.d", &format!("{}/libx.rlib: lib.rs\n", aside.display()));
        let said = [
            metadata,
            alone.said("link", "libx.rlib"),
            alone.said("dep-info", "x.d"),
        ];
        let Alone { dir, held, stream } = alone;
        held.place_all(&stream, &said.concat()).expect("places");
        let read =
            |name: &str| fs::read_to_string(dir.path().join("deps").join(name)).expect("reads");
        assert_eq!(
            (&*read("libx.rmeta"), &*read("libx.rlib")),
            ("metadata", "code")
        );
        let deps = dir.path().join("deps");
        assert_eq!(
            read("x.d"),
            format!("{}/libx.rlib: lib.rs\n", deps.display())
        );
        assert_eq!(fs::read_dir(deps).expect("lists").count(), 3);
        assert!(!aside.exists());
    }

    #[test]
    fn who_is_told_that_nothing_was_placed_does_it_alone() {
        let mut alone = Alone::new();
        let (stream, daemon) = UnixStream::pair().expect("connects");
        let answers = thread::spawn(move || {
            let report = protocol::receive(&daemon).expect("receives");
            assert!(
                matches!(report, Report::<String, Outcome>::Made(name) if name == "libx.rmeta")
            );
            for answer in [Decision::Wait, Decision::Wait, Decision::Placed(false)] {
                protocol::send(&daemon, &answer).expect("sends");
            }
            let more: Result<Report, _> = protocol::receive(&daemon);
            assert!(more.is_err() && protocol::send(&daemon, &Decision::Wait).is_err());
        });
        alone.make("libx.rmeta", "metadata");
        let metadata = alone.said("metadata", "libx.rmeta");
        alone.stream = stream;
        assert!(alone.hears(&metadata));
        assert_eq!(alone.read("libx.rmeta"), "metadata");
        answers.join().expect("the daemon is no more asked");
    }

    #[test]
    fn what_nobody_could_place_is_not_announced() {
        let mut alone = Alone::new();
        let metadata = alone.said("metadata", "libx.rmeta");
        assert!(!alone.hears(&metadata));
    }

    #[test]
    fn what_is_missing_is_noticed_although_an_older_one_is_there() {
        let alone = Alone::new();
        fs::write(alone.path("deps/libx.rlib"), "of before").expect("writes");
        let said = alone.said("link", "libx.rlib");
        assert!(alone.held.place_all(&alone.stream, &said).is_err());
    }

    #[test]
    fn only_the_directory_it_stands_for_is_replaced() {
        let alone = Alone::new();
        let deps = alone.path("deps").to_string_lossy().into_owned();
        let aside = alone.path("aside").to_string_lossy().into_owned();
        let told = alone
            .held
            .arguments(&words(&["x.rs", "--out-dir", &deps, "--test"]));
        assert_eq!(told, Some(words(&["x.rs", "--out-dir", &aside, "--test"])));
        let told = alone
            .held
            .arguments(&words(&[&format!("--out-dir={deps}")]));
        assert_eq!(told, Some(words(&[&format!("--out-dir={aside}")])));
        assert_eq!(alone.held.arguments(&words(&["--out-dir", "deps"])), None);
        assert_eq!(alone.held.arguments(&words(&["x.rs"])), None);
    }

    #[test]
    fn what_is_gone_or_held_already_is_not_taken() {
        let alone = Alone::new();
        let take = || {
            let aside = alone.path("aside");
            Held::take(aside.as_os_str().as_bytes(), b"/t/deps")
        };
        assert!(take().is_err(), "nothing can be made there");
        fs::remove_dir_all(alone.path("aside")).expect("removes");
        assert!(take().is_err() && alone.held.is_gone());
    }
}
