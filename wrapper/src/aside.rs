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
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};

use crate::args::written::{self, Named, Written};
use crate::artifacts::{self, Artifact};
use crate::protocol::{self, Aside, Decision, Outcome, Report, Run};
use crate::roots::{Roots, is_plain_path};

/// Where incremental state goes, within the directory that a compiler is told.
pub const INCREMENTAL: &str = "incremental";

/// What cargo named, and what the compiler is told.
#[derive(Clone, Copy)]
pub struct Told<'a> {
    /// The directory cargo named for outputs.
    pub out_dir: &'a Path,
    /// The one it named for incremental state.
    pub incremental: Option<&'a Path>,
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
    /// The paths cargo named, each with the one that stands in its place: what diagnostics show again.
    pub fn remaps(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let incremental = self
            .incremental
            .map(|path| (path, self.incremental_aside()));
        let remaps = incremental.map(|(named, told)| (text(named), text(&told)));
        let out_dir = (text(self.out_dir), text(self.aside));
        remaps.into_iter().chain([out_dir]).collect()
    }

    /// Where incremental state goes.
    pub fn incremental_aside(&self) -> PathBuf {
        self.aside.join(INCREMENTAL)
    }

    /// Whether a file of this name names the outputs by their paths, as dep-info does.
    pub fn is_edited(name: &OsStr) -> bool {
        Path::new(name).extension() == Some(OsStr::new("d"))
    }

    /// What such a file should hold.
    pub fn edit(&self, text: &[u8]) -> Vec<u8> {
        Roots::unremap(text, &self.remaps())
    }
}

/// A directory that is ours for as long as this lives, whatever becomes of the daemon.
pub(crate) struct Held {
    out_dir: PathBuf,
    incremental: Option<PathBuf>,
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
        let held = Self::take(run.aside.as_ref()?).ok()?;
        let arguments = held.arguments(arguments)?;
        Some((held, arguments))
    }

    fn take(named: &Aside) -> io::Result<Self> {
        let path = |bytes: &Vec<u8>| PathBuf::from(OsStr::from_bytes(bytes));
        let aside = path(&named.path);
        let lock =
            Flock::lock(File::open(&aside)?, FlockArg::LockSharedNonblock).map_err(|(_, e)| e)?;
        // It may have been cleared before it was locked.
        if lock.metadata()?.nlink() == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        // The compiler and whatever it runs have it as well, for they may write there when the wrapper is killed. Where
        // it ends in peace it unlocks it for all of them (flock(2)).
        fcntl(&*lock, FcntlArg::F_SETFD(FdFlag::empty()))?;
        // In a container it may be there, and not for us.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(aside.join(".held"))?;
        Ok(Self {
            out_dir: path(&named.out_dir),
            incremental: named.incremental.as_ref().map(path),
            aside,
            placed: HashSet::new(),
            is_alone: false,
            _lock: lock,
        })
    }

    fn told(&self) -> Told<'_> {
        Told {
            out_dir: &self.out_dir,
            incremental: self.incremental.as_deref(),
            aside: &self.aside,
        }
    }

    /// The arguments with this directory in them; `None` unless they name, once each, what it stands for.
    fn arguments(&self, arguments: &[OsString]) -> Option<Vec<OsString>> {
        let told = self.told();
        let incremental_aside = told.incremental_aside();
        let named = written::named_in(arguments.iter().map(OsString::as_os_str));
        if named.len() != 1 + usize::from(self.incremental.is_some()) {
            return None;
        }
        let mut replaced = arguments.to_vec();
        for (wanted, meant, path) in [
            (Written::Outputs, Some(told.out_dir), told.aside),
            (Written::Incremental, told.incremental, &incremental_aside),
        ] {
            let Some(meant) = meant else { continue };
            let is_it = |named: &&Named| named.written == wanted && named.path == meant.as_os_str();
            let (at, argument) = named.iter().find(is_it)?.with(path);
            replaced[at] = argument;
        }
        Some(replaced)
    }

    /// Where a file is until it has the path that the compiler says it has.
    pub(crate) fn made(&self, said: &Path) -> Option<PathBuf> {
        let is_ours = said.parent() == Some(&self.out_dir);
        let name = said.file_name().filter(|_| is_ours)?;
        Some(self.aside.join(name))
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
            let runnable = fs::metadata(&from)?.mode() & 0o111;
            let mut to = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o666 | runnable)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn named(aside: &Path, out_dir: &Path, incremental: Option<&Path>) -> Aside {
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        Aside {
            path: bytes(aside),
            out_dir: bytes(out_dir),
            incremental: incremental.map(bytes),
        }
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
            let held = Held::take(&named(&aside, &deps, None));
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
        for others in [
            &["--out-dir", "deps"][..],
            &["x.rs"],
            &["--out-dir", &deps, "-Cincremental=/t/i"],
            &["--out-dir", &deps, "--out-dir", &deps],
        ] {
            assert_eq!(alone.held.arguments(&words(others)), None, "{others:?}");
        }
    }

    #[test]
    fn incremental_state_goes_into_a_directory_within() {
        let Alone { dir, held, .. } = Alone::new();
        drop(held);
        let [aside, deps] = ["aside", "deps"].map(|name| dir.path().join(name));
        fs::remove_file(aside.join(".held")).expect("removes");
        let held = Held::take(&named(&aside, &deps, Some(Path::new("/t/i")))).expect("takes");
        let deps = deps.to_string_lossy();
        let arguments = |incremental| words(&["--out-dir", &deps, "-C", incremental]);
        let told = held.arguments(&arguments("incremental=/t/i"));
        let aside = aside.to_string_lossy();
        let within = format!("incremental={aside}/incremental");
        let expected = words(&["--out-dir", &aside, "-C", &within]);
        assert_eq!(told, Some(expected));
        assert_eq!(held.arguments(&arguments("incremental=/t/j")), None);
        assert_eq!(held.arguments(&arguments("opt-level=1")), None);
        let said = format!("in {aside}/incremental/x-1, {aside}/libx.rlib");
        let shown = Roots::unremap(said.as_bytes(), &held.told().remaps());
        assert_eq!(shown, format!("in /t/i/x-1, {deps}/libx.rlib").into_bytes());
    }

    #[test]
    fn what_is_gone_or_held_already_is_not_taken() {
        let alone = Alone::new();
        let take = || {
            let aside = alone.path("aside");
            Held::take(&named(&aside, Path::new("/t/deps"), None))
        };
        assert!(take().is_err(), "nothing can be made there");
        fs::remove_dir_all(alone.path("aside")).expect("removes");
        assert!(take().is_err() && alone.held.is_gone());
    }
}
