//! Brings managed targets back: mounts what should be mounted before cargo looks at it.
//!
//! After `cargo clean`, a reboot or the death of the daemon, the target is a plain directory or
//! none at all. Cargo then asks the compiler for its version before it touches the target, and
//! through the wrapper that question comes here first. Decides which targets the build may mean;
//! the `kachefs` program beside the wrapper mounts them. Where nothing is managed this costs two
//! or three system calls, and whatever fails, the compiler runs.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use store::managed::mountpoint;
use store::{Managed, ManagedTarget, StoreDir};

use crate::drivers;

/// How long a mount may take before the build goes on without it.
const PATIENCE: Duration = Duration::from_mins(1);

/// Variables that move the target (the cargo book, "Environment Variables").
const TARGET_VARIABLES: [&str; 2] = ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"];

/// The variable that takes what is built out of the target (the cargo book, "build.build-dir").
const BUILD_VARIABLE: &str = "CARGO_BUILD_BUILD_DIR";

/// What stands in its value for the workspace, which lies at or above the sources.
const WORKSPACE: &[u8] = b"{workspace-root}";

/// A target that could not be mounted.
pub(crate) struct Unmounted {
    /// Where marks about warnings are kept.
    pub run: PathBuf,
    /// One line.
    pub warning: String,
}

/// Whether this is cargo's first question to a compiler it does not know yet.
pub(crate) fn is_first_question(argv: &[OsString]) -> bool {
    argv.len() == drivers::programs(argv) + 1 && argv.last().is_some_and(|word| word == "-vV")
}

/// Mounts the managed targets this build may use and that are not mounted; `serves` tells whether
/// a directory is in a view.
pub(crate) fn bring_back(serves: impl Fn(&Path) -> bool) -> Result<(), Unmounted> {
    let Some(dir) = own_store() else {
        return Ok(());
    };
    let managed = dir.managed();
    // Without a working directory the compiler has worse problems.
    let Ok(cwd) = env::current_dir() else {
        return Ok(());
    };
    let cargo = callers_arguments();
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
    let named =
        option(&cargo, "--target-dir").or_else(|| TARGET_VARIABLES.into_iter().find_map(variable));
    let manifest = option(&cargo, "--manifest-path");
    let manifest = manifest.and_then(|path| cwd.join(path).parent()?.canonicalize().ok());
    let sources = manifest.as_deref().unwrap_or(&cwd);
    let built = variable(BUILD_VARIABLE).map(|built| built_in(&managed, sources, &cwd, &built));
    let targets = targets(&managed, &cwd, named, sources);
    for target in targets.into_iter().chain(built.into_iter().flatten()) {
        if serves(&target) {
            continue;
        }
        mount(&dir, &target).map_err(|error| Unmounted {
            run: dir.run(),
            warning: format!(
                "kachefs: cannot mount {} again: {error}; building in the plain directory",
                target.display()
            ),
        })?;
    }
    Ok(())
}

/// This user's store, where there is one.
pub(crate) fn own_store() -> Option<StoreDir> {
    let root = StoreDir::from_environment(|name| env::var_os(name))?;
    let dir = std::path::absolute(root).map(StoreDir::new).ok()?;
    let euid = nix::unistd::geteuid().as_raw();
    dir.managed().belongs_to(euid).then_some(dir)
}

/// The managed targets that may be meant: the one that is named, or any above the sources.
fn targets(managed: &Managed, cwd: &Path, named: Option<OsString>, sources: &Path) -> Vec<PathBuf> {
    let in_place = |target: &ManagedTarget| target.is_in_place();
    if let Some(named) = named {
        return managed_at(managed, &cwd.join(named)).into_iter().collect();
    }
    sources
        .ancestors()
        .flat_map(|directory| {
            let linked = linked_target(managed, directory);
            let here = managed.in_directory(directory).unwrap_or_default();
            here.into_iter().chain(linked)
        })
        .filter(in_place)
        .map(|target| target.path())
        .collect()
}

/// The managed directory that a value of [`BUILD_VARIABLE`] may mean: the first at or above the
/// sources, if it names the workspace's.
fn built_in(managed: &Managed, sources: &Path, cwd: &Path, value: &OsStr) -> Option<PathBuf> {
    let Some(below) = value.as_bytes().strip_prefix(WORKSPACE) else {
        return managed_at(managed, &cwd.join(value));
    };
    let start = below.iter().take_while(|byte| **byte == b'/').count();
    let below = Path::new(OsStr::from_bytes(&below[start..]));
    sources
        .ancestors()
        .find_map(|workspace| managed_at(managed, &workspace.join(below)))
}

fn managed_at(managed: &Managed, path: &Path) -> Option<PathBuf> {
    let found = managed.find(&mountpoint(path).ok()?).ok()??;
    found.is_in_place().then(|| found.path())
}

/// The managed target behind a symbolic link named `target`.
fn linked_target(managed: &Managed, directory: &Path) -> Option<ManagedTarget> {
    let target = directory.join("target");
    std::fs::read_link(&target).ok()?;
    managed.find(&mountpoint(&target).ok()?).ok()?
}

/// The arguments of the cargo that called, nothing if something else did.
fn callers_arguments() -> Vec<Vec<u8>> {
    let parent = std::os::unix::process::parent_id();
    let line = std::fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0).map(<[u8]>::to_vec);
    let program = words.next().unwrap_or_default();
    if Path::new(OsStr::from_bytes(&program)).file_name() == Some(OsStr::new("cargo")) {
        words.collect()
    } else {
        Vec::new()
    }
}

/// The value of an option of cargo, given as `--name value` or `--name=value`.
fn option(arguments: &[Vec<u8>], name: &str) -> Option<OsString> {
    let mut words = arguments.iter().take_while(|word| *word != b"--");
    let value = words.find_map(|word| match word.strip_prefix(name.as_bytes())? {
        [] => Some(None),
        [b'=', value @ ..] => Some(Some(value.to_vec())),
        _ => None,
    })?;
    let value = value.or_else(|| words.next().cloned())?;
    Some(OsString::from_vec(value)).filter(|value| !value.is_empty())
}

/// Has the `kachefs` program mount a target, and start the daemon if none runs.
fn mount(dir: &StoreDir, target: &Path) -> io::Result<()> {
    let program = env::current_exe()?.with_file_name("kachefs");
    let mut command = Command::new(&program);
    command
        .arg("--store")
        .arg(dir.root())
        .args(["mount", "--managed"])
        .arg(target)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // A daemon that is started now outlives this build: it must not hold the pipes of whoever
    // waits for the build to end, nor cargo's jobserver.
    // SAFETY: close_range is a bare system call, safe between fork and exec (signal-safety(7)).
    unsafe {
        command.pre_exec(|| {
            let first = 3;
            let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
            // Refused by a kernel before 5.11: then descriptors are inherited as ever.
            libc::close_range(first, libc::c_uint::MAX, flags);
            Ok(())
        });
    }
    let mut child = command
        .spawn()
        .map_err(|error| io::Error::other(format!("{}: {error}", program.display())))?;
    if wait(&mut child)? {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(4096).read_to_string(&mut said)?;
    }
    let last = said.lines().last().unwrap_or("it failed without a word");
    Err(io::Error::other(
        last.trim_start_matches("kachefs: ").to_owned(),
    ))
}

/// Whether the child succeeds in time.
fn wait(child: &mut Child) -> io::Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<Vec<u8>> {
        line.split_whitespace()
            .map(|word| word.as_bytes().to_vec())
            .collect()
    }

    #[test]
    fn options_of_cargo() {
        let option = |line, name| option(&words(line), name);
        let target = |line| option(line, "--target-dir");
        assert_eq!(target("build --target-dir out -v"), Some("out".into()));
        assert_eq!(target("build --target-dir=out"), Some("out".into()));
        assert_eq!(target("build --target-directory out"), None);
        assert_eq!(target("run -- --target-dir out"), None);
        assert_eq!(target("build --target-dir"), None);
        assert_eq!(
            option("check --manifest-path a/Cargo.toml", "--manifest-path"),
            Some("a/Cargo.toml".into())
        );
    }

    #[test]
    fn only_the_first_question_counts() {
        let argv = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(is_first_question(&argv("rustc -vV")));
        assert!(is_first_question(&argv("clippy-driver /bin/rustc -vV")));
        assert!(!is_first_question(&argv("rustc -vV --print cfg")));
        assert!(!is_first_question(&argv("rustc --version")));
        assert!(!is_first_question(&argv("rustc")));
    }

    #[test]
    fn targets_above_the_sources_or_the_named_one() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().canonicalize().expect("canonical");
        let store = StoreDir::new(root.join("store"));
        let managed = store.managed();
        for path in ["ws/crates/app/src", "other", "disk"] {
            std::fs::create_dir_all(root.join(path)).expect("mkdir");
        }
        let ws = root.join("ws");
        let (target, away) = (ws.join("target"), root.join("disk/away"));
        managed.add(&target).expect("adds");
        managed.add(&away).expect("adds");
        let found = |cwd: &str, named: Option<&str>, manifest: Option<&str>| {
            let cwd = root.join(cwd);
            let manifest = manifest.and_then(|path| cwd.join(path).parent()?.canonicalize().ok());
            let sources = manifest.as_deref().unwrap_or(&cwd);
            targets(&managed, &cwd, named.map(Into::into), sources)
        };
        let only = |path: &Path| vec![path.to_owned()];
        assert_eq!(found("ws/crates/app/src", None, None), only(&target));
        assert_eq!(found("ws", None, None), only(&target));
        assert!(found("other", None, None).is_empty());
        assert_eq!(
            found("other", None, Some("../ws/Cargo.toml")),
            only(&target)
        );
        assert_eq!(found("ws", Some("../disk/away"), None), only(&away));
        assert!(found("ws", Some("../disk/none"), None).is_empty());
        let built = |cwd: &str, value: &str| {
            let cwd = root.join(cwd);
            built_in(&managed, &cwd, &cwd, OsStr::new(value))
        };
        assert_eq!(built("ws", "../disk/away"), Some(away.clone()));
        assert_eq!(built("ws", "../disk/none"), None);
        let value = "{workspace-root}/../disk/away";
        assert_eq!(built("ws/crates/app", value), Some(away.clone()));
        std::os::unix::fs::symlink(&away, root.join("other/target")).expect("symlink");
        assert_eq!(found("other", None, None), only(&away));
    }
}
