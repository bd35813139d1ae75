//! The published suites for POSIX file systems, on a view: pjdfstest whole, fsx with many seeds, both
//! as root and as an ordinary user.
//!
//! The tools are `$KACHEFS_CACHE_DIR/tools/bin`; CI and `scripts/test --long` install them there,
//! anybody else runs without, and is told. fsx makes 62,000 operations for each user, and more than
//! a million with `KACHEFS_TEST_LONG=1`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::unprivileged::can_mount_unprivileged;
use harness::{Must, Sandbox, toolchain};

/// Which cases do not run, and why.
const SKIPPED: &str = include_str!("skipped.txt");
/// Cases pjdfstest 0.2.2 has on Linux: fewer would mean that it stopped early.
const CASES: usize = 398;

/// Weights of fsx's operations, and how large the file and one operation may be.
///
/// `min = 1`: otherwise fsx at times allocates 0 bytes, which is EINVAL everywhere.
const MIXES: [(&str, &str, &str); 4] = [
    (
        "everything",
        "flen = 65536\nnomsyncafterwrite = true\n[opsize]\nmin = 1\nmax = 16384",
        "close_open = 1.0\ninvalidate = 0.2\nmapread = 10.0\nmapwrite = 10.0\nread = 10.0\n\
         write = 10.0\ntruncate = 10.0\nfsync = 0.05\nfdatasync = 0.05\nposix_fallocate = 5.0\n\
         punch_hole = 5.0\nsendfile = 5.0\nposix_fadvise = 1.0\ncopy_file_range = 5.0",
    ),
    (
        "without mappings",
        "flen = 65536\n[opsize]\nmin = 1\nmax = 16384",
        "close_open = 1.0\nmapread = 0.0\nmapwrite = 0.0\nread = 10.0\nwrite = 10.0\n\
         truncate = 10.0\nposix_fallocate = 5.0\npunch_hole = 5.0\nsendfile = 5.0\n\
         posix_fadvise = 1.0\ncopy_file_range = 5.0",
    ),
    (
        "without allocation and ranges",
        "flen = 65536\nnomsyncafterwrite = true\n[opsize]\nmin = 1\nmax = 16384",
        "close_open = 1.0\nmapread = 10.0\nmapwrite = 10.0\nread = 10.0\nwrite = 10.0\n\
         truncate = 10.0",
    ),
    (
        "large",
        "flen = 3000000\nnomsyncafterwrite = true\n[opsize]\nmin = 1\nmax = 200000",
        "close_open = 1.0\nmapread = 5.0\nmapwrite = 10.0\nread = 10.0\nwrite = 10.0\n\
         truncate = 2.0\nposix_fallocate = 2.0\npunch_hole = 5.0\ncopy_file_range = 5.0",
    ),
];
/// Operations of one run of fsx; a file of that mix takes so many times longer.
const OPERATIONS: [u32; 4] = [20_000, 20_000, 20_000, 2000];
/// Runs of each mix, each with another seed, in a long run.
const LONG_RUNS: u32 = 18;

fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some_and(|value| value == "1")
}

/// Runs a function of `scripts/lib.sh` as the user who runs the tests.
fn script(words: &[&str]) -> String {
    let output = Command::new("bash")
        .arg(toolchain::workspace().join("scripts/lib.sh"))
        .args(words)
        .output()
        .must("bash");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The directory of the tools; `None`, and why, where they are not installed and need not be.
fn tools() -> Option<PathBuf> {
    if long() || std::env::var_os("CI").is_some_and(|value| !value.is_empty()) {
        return Some(PathBuf::from(script(&["install_suites"])));
    }
    let dir = Path::new(&script(&["where_is", "cache"])).join("tools/bin");
    if dir.join("pjdfstest").is_file() && dir.join("fsx").is_file() {
        return Some(dir);
    }
    eprintln!(
        "skipped: pjdfstest and fsx are not in {} (scripts/test --long installs them)",
        dir.display()
    );
    None
}

/// A mounted view for one of the two users, and the tools where that user can reach them.
struct Place {
    sandbox: Sandbox,
    user: &'static str,
    view: PathBuf,
}

/// Another name of a directory, short enough for sockets below it: their addresses hold 108 bytes.
struct ShortName(PathBuf);

impl ShortName {
    fn of(directory: &Path) -> Self {
        let name = format!("/tmp/kfs-{}", std::process::id());
        std::os::unix::fs::symlink(directory, &name).must(&name);
        Self(name.into())
    }
}

impl Drop for ShortName {
    fn drop(&mut self) {
        // Left behind, it would only name what is gone.
        let _ = fs::remove_file(&self.0);
    }
}

impl Place {
    fn root() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: this part takes root");
            return None;
        }
        let tools = tools()?;
        Some(Self::new(Sandbox::with_limit(limit()), "root", &tools))
    }

    fn user() -> Option<Self> {
        if let Err(reason) = can_mount_unprivileged() {
            eprintln!("skipped: {reason}");
            return None;
        }
        let tools = tools()?;
        Some(Self::new(
            Sandbox::unprivileged_with_limit(limit()),
            "user",
            &tools,
        ))
    }

    fn new(sandbox: Sandbox, user: &'static str, tools: &Path) -> Self {
        // The suite becomes other users, who must be able to get here.
        let open = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).must(path.display());
        };
        open(sandbox.root(), 0o711);
        for name in ["pjdfstest", "fsx"] {
            fs::copy(tools.join(name), sandbox.path(name)).must(name);
            open(&sandbox.path(name), 0o755);
        }
        sandbox.make_dir("other disk");
        open(&sandbox.path("other disk"), 0o777);
        let view = sandbox.make_dir("project").join("target");
        sandbox.mount(&view);
        Self {
            sandbox,
            user,
            view,
        }
    }

    /// Results by case.
    fn pjdfstest(&self) -> BTreeMap<String, String> {
        let group = fs::read_to_string("/etc/group").must("/etc/group");
        let nobody = if group.contains("\nnogroup:") {
            "nogroup"
        } else {
            "nobody"
        };
        // `naptime` is longer than a tick of the clock that stamps files.
        let config = format!(
            "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nutime_now = {{}}\n\
             utimensat = {{}}\n[settings]\nnaptime = 0.02\nallow_remount = false\n\
             [dummy_auth]\nentries = [[\"nobody\", \"{nobody}\"], [\"daemon\", \"daemon\"]]\n"
        );
        let path = self.sandbox.path("pjdfstest.toml");
        fs::write(&path, config).must("the configuration");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).must("chmod");
        let short = ShortName::of(&self.view);
        let outcome = self
            .sandbox
            .command(self.sandbox.path("pjdfstest"))
            .arg("-c")
            .arg(path)
            .arg("-s")
            .arg(self.sandbox.path("other disk"))
            .arg("-p")
            .arg(&short.0)
            .timeout(Duration::from_mins(5))
            .run();
        let results: BTreeMap<_, _> = outcome
            .stdout
            .lines()
            .filter_map(|line| {
                let (case, result) = line.split_once(char::is_whitespace)?;
                let result = result.trim();
                let known = ["ok", "skipped", "FAILED"].contains(&result);
                (known && case.contains("::")).then(|| (case.to_owned(), result.to_owned()))
            })
            .collect();
        assert!(results.len() >= CASES, "{} cases\n{outcome}", results.len());
        let failed = results.values().any(|result| result == "FAILED");
        assert_eq!(failed, !outcome.status.success(), "{outcome}");
        if failed {
            eprintln!("{outcome}");
        }
        results
    }

    /// The cases that must not run here.
    fn skipped(&self) -> BTreeSet<String> {
        SKIPPED
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (who, case) = (words.next()?, words.next().must(line));
                assert!(["any", "root", "user"].contains(&who), "{line}");
                assert!(words.next().is_some(), "no reason: {line}");
                (who == "any" || who == self.user).then(|| case.to_owned())
            })
            .collect()
    }

    fn assert_pjdfstest(&self) {
        let results = self.pjdfstest();
        let not_ok: BTreeSet<String> = results
            .iter()
            .filter(|(_, result)| *result != "ok")
            .map(|(case, _)| case.clone())
            .collect();
        let listed = self.skipped();
        let unlisted: Vec<_> = not_ok
            .difference(&listed)
            .map(|case| format!("{case}: {}", results[case]))
            .collect();
        let passing: Vec<_> = listed.difference(&not_ok).collect();
        assert!(unlisted.is_empty(), "neither ok nor listed: {unlisted:#?}");
        assert!(
            passing.is_empty(),
            "listed in skipped.txt, but ok: {passing:#?}"
        );
        println!(
            "{} of {} cases ok",
            results.len() - not_ok.len(),
            results.len()
        );
    }

    fn assert_fsx(&self) {
        let mut total = 0;
        for ((name, sizes, weights), operations) in MIXES.into_iter().zip(OPERATIONS) {
            let config = self.sandbox.path("fsx.toml");
            fs::write(&config, format!("{sizes}\n[weights]\n{weights}\n")).must("fsx.toml");
            fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).must("chmod");
            for seed in 1..=if long() { LONG_RUNS } else { 1 } {
                let file = self.view.join("fsx");
                let outcome = self
                    .sandbox
                    .command(self.sandbox.path("fsx"))
                    .arg("-q")
                    .arg("-f")
                    .arg(&config)
                    .args(["-S", &seed.to_string(), "-N", &operations.to_string()])
                    .arg("-P")
                    .arg(self.sandbox.path("tmp"))
                    .arg(file)
                    .timeout(Duration::from_mins(10))
                    .run();
                let said = outcome.said();
                let end: Vec<_> = said.lines().rev().take(40).collect();
                assert!(
                    outcome.status.success(),
                    "fsx, {name}, seed {seed}:\n{sizes}\n[weights]\n{weights}\n... {end:#?}"
                );
                total += operations;
            }
        }
        println!("{total} operations");
    }
}

fn limit() -> Duration {
    Duration::from_mins(if long() { 90 } else { 7 })
}

#[test]
fn pjdfstest_as_root() {
    let Some(place) = Place::root() else { return };
    // The suite sets user IDs and opens devices; a view's mount has no effect for both, unless its
    // administrator says otherwise.
    let remount = Command::new("mount")
        .args(["-o", "remount,bind,suid,dev"])
        .arg(&place.view)
        .status();
    assert!(remount.must("mount").success());
    place.assert_pjdfstest();
}

#[test]
fn pjdfstest_as_a_user() {
    let Some(place) = Place::user() else { return };
    place.assert_pjdfstest();
}

#[test]
fn fsx_as_root() {
    let Some(place) = Place::root() else { return };
    place.assert_fsx();
}

#[test]
fn fsx_as_a_user() {
    let Some(place) = Place::user() else { return };
    place.assert_fsx();
}
