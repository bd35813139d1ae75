//! Where the programs under test and the Rust toolchain are.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::Must;
use crate::command::own_env;

/// The workspace this crate belongs to: as the test runner tells, because several clones may share
/// what was built for one of them.
pub fn workspace() -> &'static Path {
    static WORKSPACE: OnceLock<PathBuf> = OnceLock::new();
    WORKSPACE.get_or_init(|| {
        let tests = own_env("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let workspace = tests.parent();
        workspace
            .must("the tests crate lies in the workspace")
            .to_owned()
    })
}

/// The directory of `kachefs` and `kachefs-rustc`: `$KACHEFS_BIN_DIR`, else where cargo put this
/// test, `target/<profile>`.
#[track_caller]
pub fn bin_dir() -> PathBuf {
    let dir = own_env("KACHEFS_BIN_DIR").map_or_else(
        || {
            let test = std::env::current_exe().must("the path of the test");
            // target/<profile>/deps/<test>-<hash>
            test.ancestors()
                .nth(2)
                .must("the test lies in target/<profile>/deps")
                .to_owned()
        },
        PathBuf::from,
    );
    for name in ["kachefs", "kachefs-rustc", "kachefs-cc"] {
        assert!(
            dir.join(name).is_file(),
            "{} is missing. Run `cargo build` first (with the same profile), or set \
             KACHEFS_BIN_DIR to the directory of the binaries to test.",
            dir.join(name).display()
        );
    }
    dir.canonicalize().must("KACHEFS_BIN_DIR")
}

/// The user's own `$CARGO_HOME`.
pub fn real_cargo_home() -> PathBuf {
    own_env("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

/// The user's own `$RUSTUP_HOME`, if rustup is used at all.
pub fn real_rustup_home() -> Option<PathBuf> {
    let dir = own_env("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from);
    dir.is_dir().then_some(dir)
}

fn home() -> PathBuf {
    own_env("HOME").map(PathBuf::from).must("HOME is not set")
}

/// The directory of the toolchain cargo uses here.
#[track_caller]
pub fn sysroot() -> &'static Path {
    static SYSROOT: OnceLock<PathBuf> = OnceLock::new();
    SYSROOT.get_or_init(|| PathBuf::from(output_of("rustc", &["--print", "sysroot"])))
}

/// The name rustup knows the toolchain by, so that no directory below a sandbox picks another.
pub fn rustup_toolchain() -> Option<OsString> {
    own_env("RUSTUP_TOOLCHAIN").or_else(|| sysroot().file_name().map(ToOwned::to_owned))
}

/// The host triple.
#[track_caller]
pub fn host() -> String {
    output_of("rustc", &["--print", "host-tuple"])
}

/// The directories to find cargo, rustc and the system's programs in.
#[track_caller]
pub fn search_path() -> Vec<PathBuf> {
    let own = own_env("PATH").must("PATH is not set");
    let mut path: Vec<_> = std::env::split_paths(&own)
        .filter(|dir| dir.join("cargo").is_file() && dir.join("rustc").is_file())
        .take(1)
        .collect();
    assert!(
        !path.is_empty(),
        "no directory in PATH holds cargo and rustc"
    );
    path.extend(["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    path
}

#[track_caller]
fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(workspace())
        .output();
    let output = output.must(format!("cannot run {program}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout)
        .must("text from rustc")
        .trim()
        .to_owned()
}

/// A second copy of the toolchain at `dest`, made of hard links where the disk allows it: it costs
/// nothing, is reachable by every user who can reach `dest`, and files in it can be replaced
/// (never written to) without touching the original.
#[track_caller]
pub fn copy_to(dest: &Path) {
    for part in ["bin", "lib"] {
        link_tree(&sysroot().join(part), &dest.join(part));
    }
}

fn link_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).must("a directory for the toolchain's copy");
    for entry in fs::read_dir(from).must("reading the toolchain").flatten() {
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().must("the type of a toolchain file");
        if kind.is_dir() {
            link_tree(&source, &copy);
        } else if kind.is_symlink() {
            let target = fs::read_link(&source).must("reading a link of the toolchain");
            std::os::unix::fs::symlink(target, copy).must("copying a link of the toolchain");
        } else if fs::hard_link(&source, &copy).is_err() {
            fs::copy(&source, &copy).must("copying a toolchain file");
        }
    }
}
