//! One test's own world: a home, a cargo home, a store, a daemon, and the guarantee that nothing of
//! it outlives the test.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::command::own_env;
use crate::unprivileged::User;
use crate::{Cmd, Counters, Must, Outcome, fetch, mounts, processes, toolchain};

/// How long a test may hold a sandbox before its mounts are cut and its processes are ended.
const DEFAULT_LIMIT: Duration = Duration::from_mins(7);
/// How long the daemon may go on hashing after a build before the counters are expected to rest.
const SETTLE_PATIENCE: Duration = Duration::from_mins(1);

/// A temporary directory that holds everything one test touches.
///
/// Dropping it unmounts, stops the daemon and removes the directory; if that took force, or left
/// anything, the test fails. With `KACHEFS_TEST_KEEP=1` the directory stays.
pub struct Sandbox {
    dir: Option<TempDir>,
    root: PathBuf,
    env: Vec<(OsString, OsString)>,
    bin_dir: PathBuf,
    user: Option<User>,
    watchdog: Option<(Sender<()>, JoinHandle<bool>)>,
}

impl Sandbox {
    /// A sandbox whose commands run as the user who runs the tests.
    #[track_caller]
    pub fn new() -> Self {
        Self::with_limit(DEFAULT_LIMIT)
    }

    /// A sandbox for a test that takes longer than others.
    #[track_caller]
    pub fn with_limit(limit: Duration) -> Self {
        Self::build(limit, None)
    }

    /// A sandbox whose commands run as an ordinary user, whoever runs the tests. The files in it
    /// belong to that user; its mounts cannot be read by the test itself, only by its commands.
    #[track_caller]
    pub fn unprivileged() -> Self {
        Self::unprivileged_with_limit(DEFAULT_LIMIT)
    }

    /// A sandbox of an ordinary user for a test that takes longer than others.
    #[track_caller]
    pub fn unprivileged_with_limit(limit: Duration) -> Self {
        Self::build(limit, User::other())
    }

    #[track_caller]
    fn build(limit: Duration, user: Option<User>) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kachefs-")
            .tempdir()
            .must("a temporary directory");
        let root = dir.path().canonicalize().must("the temporary directory");
        let watchdog = Some(watch(root.clone(), limit));
        let mut sandbox = Self {
            dir: Some(dir),
            env: Vec::new(),
            bin_dir: toolchain::bin_dir(),
            user,
            watchdog,
            root,
        };
        for name in ["home", "cargo", "tmp"] {
            sandbox.make_dir(name);
        }
        let mut path = toolchain::search_path();
        if let Some(user) = user {
            // The user may be unable to reach our toolchain and our binaries: bring them along.
            user.own(&sandbox.root);
            toolchain::copy_to(&sandbox.path("toolchain"));
            path[0] = sandbox.path("toolchain/bin");
            let bin = sandbox.make_dir("bin");
            for name in ["kachefs", "kachefs-rustc", "kachefs-cc"] {
                fs::copy(sandbox.bin_dir.join(name), bin.join(name)).must(name);
            }
            sandbox.bin_dir = bin;
        }
        path.insert(0, sandbox.bin_dir.clone());
        sandbox.env = sandbox.environment(&path);
        sandbox
    }

    /// Everything a command sees, named one by one: nothing of the caller's environment leaks into
    /// a build.
    fn environment(&self, path: &[PathBuf]) -> Vec<(OsString, OsString)> {
        let mut env: Vec<(OsString, OsString)> = vec![
            (
                "PATH".into(),
                std::env::join_paths(path).must("a search path"),
            ),
            ("HOME".into(), self.path("home").into()),
            ("TMPDIR".into(), self.path("tmp").into()),
            ("CARGO_HOME".into(), self.cargo_home().into()),
            ("KACHEFS_STORE".into(), self.store().into()),
            ("CARGO_NET_OFFLINE".into(), "true".into()),
            ("CARGO_TERM_COLOR".into(), "never".into()),
            ("LANG".into(), "C.UTF-8".into()),
        ];
        // Tells whoever counts leftovers which test run a process belongs to.
        env.extend(own_env("KACHEFS_TEST_RUN").map(|run| ("KACHEFS_TEST_RUN".into(), run)));
        if self.user.is_none()
            && let Some(rustup) = toolchain::real_rustup_home()
        {
            env.push(("RUSTUP_HOME".into(), rustup.into()));
            env.extend(toolchain::rustup_toolchain().map(|name| ("RUSTUP_TOOLCHAIN".into(), name)));
        }
        env
    }

    /// The directory that holds everything, without symbolic links in its path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the sandbox.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes a directory in the sandbox, for its user.
    #[track_caller]
    pub fn make_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).must(path.display());
        if let Some(user) = self.user {
            user.own(&path);
        }
        path
    }

    /// Hands a tree the test wrote to the sandbox's user.
    #[track_caller]
    pub fn hand_over(&self, path: &Path) {
        let Some(user) = self.user else { return };
        user.own(path);
        for name in crate::tree::walk(path) {
            user.own(&name);
        }
    }

    /// The store directory.
    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// `$CARGO_HOME`.
    pub fn cargo_home(&self) -> PathBuf {
        self.path("cargo")
    }

    /// The directory of the binaries under test.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// The path of the rustc wrapper.
    pub fn wrapper(&self) -> PathBuf {
        self.bin_dir.join("kachefs-rustc")
    }

    /// Any command, with the sandbox's environment and user.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Cmd {
        let cmd = match self.user {
            Some(user) => {
                let [first, rest @ ..] = user.prefix();
                Cmd::new(first, &self.root).args(rest).arg(program)
            }
            None => return self.privileged(program),
        };
        cmd.envs(self.env.iter().map(|(name, value)| (name, value)))
            .in_dir(&self.root)
    }

    /// A command run by the user who runs the tests, with the sandbox's environment.
    pub fn privileged(&self, program: impl AsRef<OsStr>) -> Cmd {
        Cmd::new(program, &self.root)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .in_dir(&self.root)
    }

    /// What to put before a command in a shell so that the sandbox's user runs it.
    pub fn user_prefix(&self) -> String {
        self.user
            .map_or_else(String::new, |user| user.prefix().join(" "))
    }

    /// A kachefs command, given as words.
    pub fn kachefs(&self, words: &str) -> Cmd {
        self.command(self.bin_dir.join("kachefs"))
            .args(words.split_whitespace())
    }

    /// A cargo command, given as words, in a project. The wrapper is whatever `kachefs mount` has
    /// configured.
    pub fn cargo(&self, dir: impl AsRef<Path>, words: &str) -> Cmd {
        self.command("cargo")
            .args(words.split_whitespace())
            .in_dir(dir)
    }

    /// A cargo command that uses no wrapper, whatever is configured.
    pub fn plain_cargo(&self, dir: impl AsRef<Path>, words: &str) -> Cmd {
        self.cargo(dir, words).env("RUSTC_WRAPPER", "")
    }

    /// What a program prints on stdout; the test fails if it does not succeed.
    #[track_caller]
    pub fn output_of(&self, program: impl AsRef<Path>) -> String {
        self.command(program.as_ref()).ok().stdout
    }

    /// Mounts a target directory.
    #[track_caller]
    pub fn mount(&self, target: impl AsRef<Path>) -> Outcome {
        let target = target.as_ref();
        let outcome = self.kachefs("mount").arg(target).ok();
        assert!(
            self.is_mounted(target),
            "{} is not mounted\n{outcome}",
            target.display()
        );
        outcome
    }

    /// Unmounts a target directory.
    #[track_caller]
    pub fn unmount(&self, target: impl AsRef<Path>) -> Outcome {
        let target = target.as_ref();
        let outcome = self.kachefs("unmount").arg(target).ok();
        assert!(
            !self.is_mounted(target),
            "{} is still mounted\n{outcome}",
            target.display()
        );
        outcome
    }

    /// Whether the kernel knows a FUSE mount exactly there.
    pub fn is_mounted(&self, target: &Path) -> bool {
        mounts::at(target).is_some_and(|mount| mount.is_fuse())
    }

    /// Removes everything below a mountpoint, but not the mountpoint.
    #[track_caller]
    pub fn empty_view(&self, target: impl AsRef<Path>) {
        let target = target.as_ref();
        // Emptying a plain directory would make the next build prove nothing.
        assert!(
            self.is_mounted(target),
            "{} is not mounted",
            target.display()
        );
        // What is recorded behind cargo's back is looked for in the view: the numbers wait for it.
        // Without a daemon nothing is.
        let _ = self.kachefs("stats --json").run();
        let _ = self
            .command("find")
            .arg(target)
            .args(["-mindepth", "1", "-delete"])
            .ok();
    }

    /// `kachefs stats --json`.
    #[track_caller]
    pub fn stats(&self) -> Value {
        let outcome = self.kachefs("stats --json").ok();
        let stats: Value = serde_json::from_str(&outcome.stdout).must(format!("JSON\n{outcome}"));
        assert_eq!(stats["schema"], 1, "the schema of stats --json: {stats:#}");
        stats
    }

    /// The counters, once the daemon has finished what builds left it to do.
    ///
    /// A daemon that counts its unfinished work in `actions.pending` is waited for exactly; from
    /// any other, the counters must be seen to rest.
    #[track_caller]
    pub fn counters(&self) -> Counters {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        let mut last = None;
        let mut resting = 0;
        loop {
            let stats = self.stats();
            let counters = Counters::from_json(&stats);
            resting = if last.as_ref() == Some(&counters) {
                resting + 1
            } else {
                0
            };
            match stats.pointer("/actions/pending").and_then(Value::as_u64) {
                Some(0) => return counters,
                None if resting >= 3 => return counters,
                _ => {}
            }
            assert!(
                Instant::now() < deadline,
                "the daemon never comes to rest: {stats:#}"
            );
            last = Some(counters);
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What the counters gained while `work` ran, and what `work` returned.
    #[track_caller]
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> (Counters, T) {
        let before = self.counters();
        let value = work();
        (self.counters() - &before, value)
    }

    /// The daemon's process.
    #[track_caller]
    pub fn daemon_pid(&self) -> Pid {
        let stats = self.stats();
        let pid = stats
            .pointer("/daemon/pid")
            .and_then(Value::as_i64)
            .and_then(|pid| pid.try_into().ok());
        Pid::from_raw(pid.must(format!("no /daemon/pid in {stats:#}")))
    }

    /// Stops the daemon until it gets SIGCONT; returns when none of its threads answers any more,
    /// which a signal alone does not promise.
    #[track_caller]
    pub fn stop_daemon(&self) -> Pid {
        let pid = self.signal_daemon(Signal::SIGSTOP);
        assert!(
            processes::wait_for(Duration::from_secs(20), || processes::is_stopped(pid)),
            "the daemon goes on after SIGSTOP"
        );
        pid
    }

    /// Sends the daemon a signal; the test fails if it is not a process of this sandbox.
    #[track_caller]
    pub fn signal_daemon(&self, signal: Signal) -> Pid {
        let pid = self.daemon_pid();
        assert!(
            processes::naming(&self.root).contains(&pid),
            "process {pid} is not our daemon"
        );
        kill(pid, signal).must(format!("sending {signal} to the daemon"));
        pid
    }

    /// `kill -9` of the daemon; returns when it is gone.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.signal_daemon(Signal::SIGKILL);
        let gone = || !processes::naming(&self.root).contains(&pid);
        assert!(
            processes::wait_for(Duration::from_secs(20), gone),
            "the daemon survives SIGKILL"
        );
    }

    /// The daemon's process as `kachefs daemon status` names it: sooner than [`Self::daemon_pid`],
    /// which waits for unfinished work. Waits for the next daemon when one has just died.
    #[track_caller]
    pub fn current_daemon(&self) -> Pid {
        let status = self.kachefs("daemon status").ok();
        let mut words = status.stdout.split(", ");
        let pid = words.find_map(|word| word.strip_prefix("pid "));
        let pid = pid.and_then(|pid| pid.parse().ok());
        Pid::from_raw(pid.must(format!("no pid\n{status}")))
    }

    /// The process that starts the next daemon, and how many it has started since the first.
    #[track_caller]
    pub fn keeper(&self) -> (Pid, u64) {
        let stats = self.stats();
        let number = |pointer: &str| stats.pointer(pointer).and_then(Value::as_u64);
        let pid = number("/daemon/keeper_pid").and_then(|pid| pid.try_into().ok());
        let restarts = number("/daemon/restarts");
        (
            Pid::from_raw(pid.must(format!("no keeper in {stats:#}"))),
            restarts.must(format!("no restarts in {stats:#}")),
        )
    }

    /// `kill -9` of keeper and daemon; returns when both are gone.
    #[track_caller]
    pub fn kill_keeper_and_daemon(&self) {
        let (keeper, _) = self.keeper();
        let daemon = self.daemon_pid();
        for pid in [keeper, daemon] {
            assert!(
                processes::naming(&self.root).contains(&pid),
                "process {pid} is not ours"
            );
            kill(pid, Signal::SIGKILL).must(format!("killing {pid}"));
        }
        let gone = || {
            let left = processes::naming(&self.root);
            ![keeper, daemon].iter().any(|pid| left.contains(pid))
        };
        assert!(
            processes::wait_for(Duration::from_secs(20), gone),
            "they survive SIGKILL"
        );
    }

    /// The source of a published crate at `name` in the sandbox, ready to be built offline.
    #[track_caller]
    pub fn fetch_crate(&self, krate: &str, version: &str, name: &str) -> crate::Project {
        let dest = self.path(name);
        fetch::fetch_crate(krate, version, &dest).must(format!("{krate} {version}"));
        // Downloads and index are shared with the user. The unpacked sources are not: two cargo
        // homes have two locks, and the compiler must see sources below its own cargo home.
        let (real, own) = (
            toolchain::real_cargo_home().join("registry"),
            self.make_dir("cargo/registry"),
        );
        for part in ["index", "cache"] {
            if !own.join(part).exists() {
                symlink(real.join(part), own.join(part)).must("sharing the cargo registry");
            }
        }
        self.hand_over(&dest);
        crate::Project::at(dest)
    }

    /// Unmounts everything and stops the daemon as a user would, then by force; returns what it
    /// took force to end.
    fn clean_up(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let alive = || !processes::naming(&self.root).is_empty();
        let mounted = || !mounts::below(&self.root).is_empty();
        if alive() || mounted() {
            // Either may fail where a test has killed the daemon; only what is left counts.
            for words in ["unmount --all", "daemon stop"] {
                let _ = self.quietly(words);
            }
        }
        processes::wait_gone(&self.root, Duration::from_secs(10));
        if alive() {
            complaints.push(format!(
                "processes left behind:\n{}",
                processes::describe(&self.root)
            ));
            processes::end(&self.root);
        }
        if mounted() {
            complaints.push(format!(
                "mounts left behind: {:?}",
                mounts::below(&self.root)
            ));
            mounts::cut_below(&self.root);
            processes::end(&self.root);
        }
        if alive() || mounted() {
            complaints.push("even force did not remove them".to_owned());
        }
        complaints
    }

    /// Runs a kachefs command without ever panicking: for cleaning up.
    fn quietly(&self, words: &str) -> bool {
        let run = || {
            let mut command = self.kachefs(words).timeout(Duration::from_secs(30)).spawn();
            processes::wait_for(Duration::from_secs(30), || !command.is_running())
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or(false)
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let failing = thread::panicking();
        let mut complaints = self.clean_up();
        if let Some((stop, guard)) = self.watchdog.take() {
            drop(stop);
            if guard.join().unwrap_or(true) {
                complaints.push("the watchdog had to end the test".to_owned());
            }
        }
        if failing || !complaints.is_empty() {
            let log = fs::read_to_string(self.store().join("daemon.log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(60)..];
            eprintln!("--- the end of daemon.log\n{}\n---", tail.join("\n"));
        }
        if let Some(dir) = self.dir.take() {
            if std::env::var_os("KACHEFS_TEST_KEEP").is_some() {
                eprintln!("kept: {}", dir.keep().display());
            } else if mounts::below(&self.root).is_empty() {
                make_removable(&self.root);
                if let Err(error) = dir.close() {
                    complaints.push(format!("cannot remove {}: {error}", self.root.display()));
                }
            } else {
                // Removing would reach into the mount.
                eprintln!("kept, for it is still mounted: {}", dir.keep().display());
            }
        }
        if !complaints.is_empty() {
            let text = format!("the sandbox was not left clean:\n{}", complaints.join("\n"));
            assert!(failing, "{text}");
            eprintln!("{text}");
        }
    }
}

/// Lets us delete what tests or the store made read-only.
fn make_removable(root: &Path) {
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() && !path.is_symlink() {
                // What cannot be changed is reported by the removal that follows.
                let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o755));
                pending.push(path);
            }
        }
    }
}

/// Starts the guard of one sandbox: when the time is over, whoever waits for its file system or
/// its processes gets an error. The thread returns whether it had to step in.
fn watch(root: PathBuf, limit: Duration) -> (Sender<()>, JoinHandle<bool>) {
    let (stop, stopped) = mpsc::channel();
    let guard = thread::spawn(move || {
        if stopped.recv_timeout(limit) != Err(mpsc::RecvTimeoutError::Timeout) {
            return false;
        }
        eprintln!(
            "watchdog: {} s are over\n{}",
            limit.as_secs(),
            processes::describe(&root)
        );
        mounts::cut_below(&root);
        processes::end(&root);
        true
    });
    (stop, guard)
}
